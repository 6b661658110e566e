"""The per-worker loop, one page: load, step, evaluate, report. Knows torch.distributed, not Ray; `run.py`
brings the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from training.config import TrainConfig
from training.data.decoder import DecoderSpec
from training.data.loader import Batch, Decoding, Kept
from training.engine import checkpoint
from training.engine.build import Run
from training.engine.distributed import agree_on_buffers
from training.engine.epoch_log import Watch

Metrics = dict[str, float]
Report = Callable[[Metrics | None, Callable[[], checkpoint.Snapshot]], None]
"""Called by all workers after every epoch with its metrics, and between epochs with None, when a checkpoint
is due; the function takes a copy of everything that is to be kept, which may be written while training goes
on (rank 0's is used)."""
Progress = Callable[[Metrics], None]

# Pictures that are evaluated at a time. A batch of training may be of thousands over all workers, whose
# activations one of them cannot hold; and one size, dealt out whole, gives the same figures whatever the
# batch and the number of workers.
EVALUATED = 128


def fit(
    config: TrainConfig,
    device: torch.device,
    rank: int,
    resume_from: str | None,
    report: Report,
    *,
    decode: Callable[[DecoderSpec, int], Decoding] | None = None,
    progress: Progress | None = None,
) -> list[Metrics]:
    """Trains on this worker, until `config.last_epoch`; every worker of the group calls it. Returns the
    metrics of all epochs so far.

    Args:
        config: the run's settings.
        device: of this worker.
        rank: of this worker.
        resume_from: a checkpoint's folder, or None to begin.
        report: see `Report`.
        decode: makes decoders elsewhere, for a specification and a number of them; None: threads of this
            process.
        progress: told every few steps how far the run is.

    Raises:
        NotFiniteError: the loss is no number any more; on all workers, with the ids of the batch that it came
            from.
    """
    run = Run.of(config, device, rank, resume_from, decode)
    task, loader, sequence, stepper, state = run.task, run.loader, run.sequence, run.stepper, run.state
    watch = Watch(config, run.store, device, rank, state, stepper.steps)
    judged = Kept(lambda: loader.evaluate(run.eval_rows.in_order(), EVALUATED, rank, run.world))

    def take(now: checkpoint.State) -> Callable[[], checkpoint.Snapshot]:
        return lambda: checkpoint.Snapshot.take(task, run.optimizer, run.ema, now)

    while len(state.history) < config.last_epoch:
        epoch = len(state.history) + 1
        run.train()
        watch.begin()
        stop = sequence.steps(epoch)
        for step, host_batch in enumerate(
            loader.train(sequence, state.step, stop, rank, run.world), start=state.step
        ):
            batch = host_batch.to(device)
            watch.add(step, batch, stepper(batch, step))
            due = watch.look(step, stop, progress)
            if due and step + 1 < stop:
                report(None, take(watch.state(step + 1)))
        means = watch.epoch_means(stop)
        agree_on_buffers(task, run.ema)
        evaluated = evaluate(run, task, judged)
        if run.ema is not None:
            averaged = evaluate(run, run.ema.module, judged)
            evaluated |= {f"ema_{name}": value for name, value in averaged.items() if name != "eval_images"}
        metrics = means | evaluated | {"epoch": epoch, "step": stop, "lr": stepper.learning_rate(stop - 1)}
        state = watch.end_epoch(stop, metrics)
        report(metrics, take(state))
    return state.history


@torch.inference_mode()
def evaluate(run: Run, task: Any, judged: Iterable[Batch]) -> Metrics:
    """What the evaluator of a task, or of its moving average, finds over this worker's batches of the eval
    split; each row counts once."""
    task.eval()
    evaluator = task.evaluator(run.device)
    for host_batch in judged:
        batch = host_batch.to(run.device)
        evaluator.add(batch, run.stepper.views.norm(batch.images), run.stepper.precision)
    sums = evaluator.sums()
    if run.world > 1:
        dist.all_reduce(sums)
    metrics: Metrics = evaluator.metrics(sums.tolist())
    return metrics
