"""The per-worker loop, one page: load, step, evaluate, report. Knows torch.distributed, not Ray; `run.py` brings the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.store import Store
from training.config import TrainConfig
from training.data import order
from training.data.decoder import DecoderSpec
from training.data.loader import Decoding, Loader, ThreadDecoding, lookahead
from training.data.order import Rows, Sequence
from training.data.views import Norm, Views
from training.engine import checkpoint
from training.engine.build import decoder_spec, has_own_statistics, make_norm, make_precision, moving_average, to_device
from training.engine.distributed import agree_on_buffers
from training.engine.epoch_log import Watch
from training.engine.step import Stepper
from training.losses.alignment import world_size
from training.models import optimizers
from training.objectives.protocol import Precision, objective_of

Metrics = dict[str, float]
Report = Callable[[Metrics | None, Callable[[], checkpoint.Snapshot]], None]
"""Called by all workers after every epoch with its metrics, and between epochs with None, when a checkpoint is due; the function
takes a copy of everything that is to be kept, which may be written while training goes on (rank 0's is used)."""
Progress = Callable[[Metrics], None]

# Pictures that are evaluated at a time. A batch of training may be of thousands over all workers, whose activations one of them
# cannot hold; and one size, dealt out whole, gives the same figures whatever the batch and the number of workers.
EVALUATED = 128


def fit(
    config: TrainConfig, device: torch.device, rank: int, resume_from: str | None, report: Report, *,
    decode: Callable[[DecoderSpec, int], Decoding] | None = None, progress: Progress | None = None,
) -> list[Metrics]:  # fmt: skip
    """Trains on this worker; every worker of the group calls it. Returns the metrics of all epochs.

    Args:
        config: the run's settings.
        device: of this worker.
        rank: of this worker.
        resume_from: a checkpoint's folder, or None to begin.
        report: see `Report`.
        decode: makes decoders elsewhere, for a specification and a number of them; None: threads of this process.
        progress: told every few steps how far the run is.

    Raises:
        NotFiniteError: the loss is no number any more; on all workers, with the ids of the batch that it came from.
    """
    store, world = Store(config.store), world_size()
    objective = objective_of(config)
    facts = objective.check(config, store)
    begun = replace(config, pretrained=False) if resume_from else config  # a checkpoint has all weights
    task = objective.build(begun, facts, len(store.dataset.classes))
    if config.checkpoint_activations:
        task.backbone.set_grad_checkpointing()
    if config.sync_batch_norm and world > 1:
        from timm.layers import convert_sync_batchnorm

        task = convert_sync_batchnorm(task)
    task = to_device(task, device, channels_last=config.channels_last)
    optimizer = optimizers.optimizer(config, task)
    ema = moving_average(config, task)
    state = checkpoint.load(resume_from, task, optimizer, ema) if resume_from else checkpoint.State()
    norm = make_norm(task.backbone, device, channels_last=config.channels_last)
    by = order.deal(store.dataset.source, looks_across=config.mixes or has_own_statistics(task))
    sharing = 1 if by == "place" else world  # workers that share the shards of a window
    spec = decoder_spec(config, facts.columns, task.backbone, sharing * config.loader_workers if decode else sharing)
    decoding = decode(spec, config.loader_workers) if decode else ThreadDecoding(spec.build(), config.loader_workers)
    train_rows, eval_rows = Rows(store, config.train_split), Rows(store, config.eval_split)
    sequence = Sequence(
        train_rows, seed=config.seed, window=config.shuffle_shards, batch=config.batch_size, repeats=config.repeats, by=by
    )
    ahead = lookahead(sequence, len(train_rows) / max(1, len(train_rows.rows)), config.shuffle_shards)
    loader = Loader(decoding, lookahead=ahead, pin=device.type == "cuda")
    if config.compile:
        task.compile()
    model: nn.Module = task
    if world > 1:
        model = DistributedDataParallel(task, device_ids=[device.index] if device.type == "cuda" else None)
    precision = make_precision(config, device)
    stepper = Stepper(
        config=config, task=task, model=model, optimizer=optimizer, ema=ema,
        views=Views(config, norm, len(store.dataset.classes)), rank=rank, world=world, steps=sequence.steps(config.epochs),
        warmup_steps=round(config.warmup_epochs * len(train_rows) / config.batch_size), precision=precision,
    )  # fmt: skip
    watch = Watch(config, store, device, rank, state, stepper.steps)

    def take(now: checkpoint.State) -> Callable[[], checkpoint.Snapshot]:
        return lambda: checkpoint.Snapshot.take(task, optimizer, ema, now)

    while len(state.history) < config.epochs:
        epoch = len(state.history) + 1
        model.train()
        watch.begin()
        stop = sequence.steps(epoch)
        for step, host_batch in enumerate(loader.train(sequence, state.step, stop, rank, world), start=state.step):
            batch = host_batch.to(device)
            watch.add(step, batch, stepper(batch, step))
            due = watch.look(step, stop, progress)
            if due and step + 1 < stop:
                report(None, take(watch.state(step + 1)))
        means = watch.epoch_means(stop)
        agree_on_buffers(task, ema)
        evaluated = evaluate(task, loader, eval_rows, norm, device, precision, rank)
        if ema is not None:
            averaged = evaluate(ema.module, loader, eval_rows, norm, device, precision, rank)
            evaluated |= {f"ema_{name}": value for name, value in averaged.items() if name != "eval_images"}
        metrics = means | evaluated | {"epoch": epoch, "step": stop, "lr": stepper.learning_rate(stop - 1)}
        state = watch.end_epoch(stop, metrics)
        report(metrics, take(state))
    return state.history


@torch.inference_mode()
def evaluate(task: Any, loader: Loader, rows: Rows, norm: Norm, device: torch.device, precision: Precision, rank: int) -> Metrics:
    """What the task's evaluator finds over all rows of a split, each counted once whatever the number of workers."""
    task.eval()
    evaluator = task.evaluator(device)
    for host_batch in loader.evaluate(rows.in_order(), EVALUATED, rank, world_size()):
        batch = host_batch.to(device)
        evaluator.add(batch, norm(batch.images), precision)
    sums = evaluator.sums()
    if world_size() > 1:
        dist.all_reduce(sums)
    found: Metrics = evaluator.metrics(sums.tolist())
    return found
