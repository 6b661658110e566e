"""`evaluate` in one Ray task, on a GPU of the cluster where the run computes on GPUs: for a driver whose own
machine has none, such as the head of a cluster."""

from __future__ import annotations

from dataclasses import replace

from pipeline import session, waiting
from pipeline.errors import SettingsError, UserError
from pipeline.store import Store, locations
from training import run_folder
from training.config import EvaluateConfig, TrainConfig
from training.evaluation import findings
from training.evaluation.evaluate import Judgement, evaluate

_CPUS_BESIDE_GPU = 2  # as a worker of a training has


def evaluate_remote(settings: EvaluateConfig, *, gpu_share: float = 1.0, threads: int = 0) -> Judgement:
    """As `evaluate`, elsewhere: the files of --to are written here, and of the outputs the features, the
    projections and the text targets stay there. `outputs.correct` tells of each picture, in the split's
    order, whether it was recognised.

    Any number of threads may call it at a time: Ray gives each its share.

    Args:
        settings: what to measure; the run and its store lie where every node sees them.
        gpu_share: of a GPU, where the run's settings compute on GPUs.
        threads: CPUs, where they do not; 0: the cores of the node that has most of them.

    Raises:
        ValueError: see `evaluate`; or no node of the cluster has such a share or so many CPUs.
        FileNotFoundError: see `evaluate`.
        RunStoppedError: there was no room for so long as the run's --wait-minutes.
    """
    session.start_ray()
    import ray
    from ray.exceptions import RayTaskError

    config = run_folder.read(settings.run)
    if settings.to:
        locations.check_writable("to", settings.to)
    wanted = asked(config, gpu_share, threads)
    waiting.wait(f"evaluate: {settings.run}", wanted, config.place.wait_minutes)
    there = replace(settings, run=run_folder.address(settings.run), to="")
    # DEFAULT: not within the room of a trial of Tune, of which this may be a part.
    task = ray.remote(_evaluated).options(
        num_cpus=wanted.cpus, num_gpus=wanted.gpus, scheduling_strategy="DEFAULT"
    )
    try:
        judgement: Judgement = ray.get(task.remote(there, int(wanted.cpus)))
    except RayTaskError as error:
        if isinstance(error.cause, UserError):  # which its message explains, as here
            raise error.cause from None
        raise
    judgement = replace(judgement, summary=judgement.summary | {"run": settings.run})
    if settings.to:
        findings.write(judgement, Store(config.store), settings.to)
    return judgement


def asked(config: TrainConfig, gpu_share: float, threads: int) -> waiting.Wanted:
    """What is asked of the cluster to measure a run.

    Raises:
        SettingsError: see `evaluate_remote`.
    """
    if session.computes_on_gpus(config.place.device):
        if not 0 < gpu_share <= 1:
            message = f"gpu_share={gpu_share}: must be above 0 and at most 1."
            raise SettingsError(message)
        return waiting.Wanted(name="evaluations", count=1, cpus=_CPUS_BESIDE_GPU, gpus=gpu_share)
    cpus, largest = threads or session.cores(), session.largest_node()
    if cpus > largest and not session.grows():
        message = (
            f"threads={cpus}: no node of the cluster has so many CPUs (the largest has {largest}); ask for "
            "fewer."
        )
        raise SettingsError(message)
    return waiting.Wanted(name="evaluations", count=1, cpus=cpus)


def _evaluated(settings: EvaluateConfig, threads: int) -> Judgement:
    import torch

    torch.set_num_threads(threads)
    judgement = evaluate(settings)
    if judgement.outputs is None:
        return judgement
    small = replace(judgement.outputs, features=None, projected=None, targets=None)
    return replace(judgement, outputs=small)
