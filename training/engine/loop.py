"""The per-worker loop, one page: load, step, evaluate, report. Knows torch.distributed, not Ray; `run.py` brings the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.store import Store
from training.config import TrainConfig
from training.data import order, text_targets
from training.data.decoder import DecoderSpec
from training.data.loader import Decoding, Loader, ThreadDecoding, lookahead
from training.data.negatives import Negatives
from training.data.order import Rows, Sequence
from training.engine import checkpoint
from training.engine.build import build_task, decoder_spec, has_own_statistics, make_norm, moving_average, to_device, use_autocast
from training.engine.distributed import agree_on_buffers
from training.engine.epoch_log import Watch
from training.engine.step import Norm, Stepper
from training.evaluation import measures
from training.losses.alignment import world_size
from training.models import backbones, optimizers
from training.objectives.align import AlignTask

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
    found = None
    if config.alignment_weight > 0:
        found = text_targets.of_config(config, store)
    raw_dim = found.dim if found is not None and config.text_projection == "learned" else 0
    dim = (config.projection_dim or raw_dim) if raw_dim else (found.dim if found else 0)
    begun = replace(config, pretrained=False) if resume_from else config  # a checkpoint has all weights
    task = build_task(begun, len(store.dataset.classes), dim, raw_dim)
    if config.checkpoint_activations:
        cast(Any, task.backbone).set_grad_checkpointing()
    if config.sync_batch_norm and world > 1:
        from timm.layers import convert_sync_batchnorm

        task = cast(AlignTask, convert_sync_batchnorm(task))
    task = to_device(task, device, channels_last=config.channels_last)
    optimizer = optimizers.optimizer(config, task)
    ema = moving_average(config, task)
    state = checkpoint.load(resume_from, task, optimizer, ema) if resume_from else checkpoint.State()
    norm = make_norm(task.backbone, device, channels_last=config.channels_last)
    by = order.deal(store.dataset.source, looks_across=config.mixes or has_own_statistics(task))
    sharing = 1 if by == "place" else world  # workers that share the shards of a window
    spec = decoder_spec(config, found, task.backbone, sharing * config.loader_workers if decode else sharing)
    decoding = decode(spec, config.loader_workers) if decode else ThreadDecoding(spec.build(), config.loader_workers)
    train_rows, eval_rows = Rows(store, config.train_split), Rows(store, config.eval_split)
    sequence = Sequence(
        train_rows, seed=config.seed, window=config.shuffle_shards, batch=config.batch_size, repeats=config.repeats, by=by
    )
    ahead = lookahead(sequence, len(train_rows) / max(1, len(train_rows.rows)), config.shuffle_shards)
    loader = Loader(decoding, lookahead=ahead, pin=device.type == "cuda")
    negatives = None
    if found is not None and config.store_negatives:
        negatives = Negatives(store, found, config.train_split, config.store_negatives, config.seed)
    if config.compile:
        task.features_and_logits = torch.compile(backbones.features_and_logits)
    model: nn.Module = task
    if world > 1:
        model = DistributedDataParallel(task, device_ids=[device.index] if device.type == "cuda" else None)
    stepper = Stepper(
        config=config, task=task, model=model, optimizer=optimizer, ema=ema, norm=norm, negatives=negatives,
        classes=len(store.dataset.classes), rank=rank, world=world, steps=sequence.steps(config.epochs),
        warmup_steps=round(config.warmup_epochs * len(train_rows) / config.batch_size), autocast=use_autocast(config, device),
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
        evaluated = evaluate(task, loader, eval_rows, norm, device, stepper.autocast, rank)
        if ema is not None:
            averaged = evaluate(ema.module, loader, eval_rows, norm, device, stepper.autocast, rank)
            evaluated |= {f"ema_{name}": averaged[name] for name in ("top1", "top5")}
        metrics = means | evaluated | {"epoch": epoch, "step": stop, "lr": stepper.learning_rate(stop - 1)}
        state = watch.end_epoch(stop, metrics)
        report(metrics, take(state))
    return state.history


@torch.inference_mode()
def evaluate(task: AlignTask, loader: Loader, rows: Rows, norm: Norm, device: torch.device, amp: bool, rank: int) -> Metrics:
    """top-1 and top-5 in percent over all rows of a split, each row counted once whatever the number of workers.

    Of an aligned model also `retrieval_rank`: the mean rank, from 1, of a picture's own caption among the different captions of
    the `EVALUATED` pictures that it is evaluated with, by the cosine of projected feature and text.
    """
    task.eval()
    hits = torch.zeros(5, device=device, dtype=torch.float64)
    for host_batch in loader.evaluate(rows.in_order(), EVALUATED, rank, world_size()):
        batch = host_batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            features, logits = backbones.features_and_logits(task.backbone, norm(batch.images))
        best = logits.topk(min(5, logits.shape[1])).indices == batch.labels[:, None]
        hits[:3] += torch.stack([best[:, 0].sum(), best.sum(), torch.tensor(len(best), device=device)])
        if task.head is not None and batch.texts is not None and batch.groups is not None:
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                z_bd = task.head(features)
            texts = batch.texts if task.text_projection is None else task.text_projection(batch.texts)
            ranks = caption_ranks(z_bd, texts, batch.groups)
            hits[3:] += torch.stack([ranks.sum(), torch.tensor(len(ranks), device=device)])
    if world_size() > 1:
        dist.all_reduce(hits)
    top1, top5, count, ranks, ranked = hits.tolist()
    found = {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "eval_images": count}
    return found | ({"retrieval_rank": ranks / ranked} if ranked else {})


def caption_ranks(z_bd: Tensor, texts_bd: Tensor, groups_b: Tensor) -> Tensor:
    """Rank, from 1, of each picture's own caption among the different captions of the batch; pictures without one have none."""
    kept = groups_b >= 0
    different, place = torch.unique(groups_b[kept], return_inverse=True)
    one_of = torch.zeros(len(different), dtype=torch.long, device=place.device)
    one_of[place] = torch.arange(len(place), device=place.device)
    cosines = z_bd[kept].float() @ texts_bd[kept][one_of].float().T
    return measures.ranks_of(cosines, place)
