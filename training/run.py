"""`train`: a Ray Train V2 run over the store, from settings to checkpoints; the one file here that builds Ray
objects.

A run is a folder, on a disk or s3://: settings (config.json), MLflow id, Ray Train's checkpoints,
metrics.jsonl, progress.json, and result.json at the end. The same command on the same folder goes on from the
last checkpoint, inside an epoch too, or after the epoch that --until-epoch ended it at.
`python -m training train --store STORE --preset scenes`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from pyarrow import fs

from pipeline import session, waiting
from pipeline.errors import MissingError, NotFiniteError, RunStoppedError, SettingsError, was_terminated
from pipeline.inspect import metrics as prometheus
from pipeline.store import Store, locations, lock
from training import preparation, run_folder, tracking
from training.config import TrainConfig
from training.objectives.registry import metric_named
from training.run_folder import read_json, write_json, write_text
from training.settings import flat
from training.tracking.commit import TAG, commit
from training.tracking.progress import Follower, waits

if TYPE_CHECKING:
    from training.data import decoder
    from training.data.loader import Decoding
    from training.engine import checkpoint, loop

Result = dict[str, Any]


def train(config: TrainConfig, *, callbacks: Sequence[Any] = (), progress: bool = True) -> Result:
    """Trains, or resumes, or finds the run finished.

    Returns the content of result.json and `complete`: whether the run is at its end. After a piece that
    `until_epoch` ended it is False, there is no result.json, and what is returned is of the epochs so far.

    Args:
        config: the run's settings; everything is checked before any worker starts.
        callbacks: Ray Train user callbacks, such as Tune's.
        progress: print a line an epoch, and how far the present one is.

    Raises:
        ValueError: settings that do not fit the store, the cluster or the run that is to be resumed.
        NotFiniteError: the loss was no number; the text names the pictures.
    """
    config, variants = preparation.prepare(config)
    finished = read_json(config.run, "result.json")
    if finished is not None:
        print(f"train: {config.run} is complete; nothing to do", file=sys.stderr)
        return finished | {"complete": True}
    with lock.held(config.run, "run"):  # two drivers would write each other's checkpoints
        recorded, finished = read_json(config.run, "config.json"), read_json(config.run, "result.json")
        if recorded is not None:  # perhaps another driver's, which has ended just now
            config = run_folder.resumed(config, recorded)
        elif progress:
            for note in preparation.length(config):
                print(f"train: {note}", file=sys.stderr)
        if finished is not None:
            return finished | {"complete": True}
        if recorded is not None and (piece := _piece_done(config)) is not None:
            return piece
        return _trained(config, variants, callbacks, progress)


def _trained(
    config: TrainConfig, variants: dict[str, str], callbacks: Sequence[Any], progress: bool
) -> Result:
    config = _tracked_as_begun(config)
    session.start_ray()
    config, cpus, gpus = placed(config)
    gang = waiting.Wanted(
        name="workers",
        count=config.place.workers,
        cpus=cpus,
        gpus=gpus,
        least=config.place.min_workers,
        gang=True,
        helpers=decoders(config),
    )
    with waits(config.run, aloud=progress) as say:
        waiting.wait(f"train: {config.run}", gang, config.place.wait_minutes, say)
    filesystem, path = locations.resolve(config.run)
    filesystem.create_dir(path, recursive=True)
    before = read_json(config.run, "config.json")
    contents = Store(config.store).contents
    record = run_folder.written(config, contents, before, commit=commit(), variants=variants)
    write_json(config.run, "config.json", record)
    for name in ("failure.json", "stopped.json", "progress.json"):
        if read_json(config.run, name) is not None:
            filesystem.delete_file(f"{path}/{name}")
    if config.data.shots:
        _keep_draw(config)
    run_id = _tracking_run(config, variants)

    # A report waits until the one before has been fetched; Ray's two seconds are longer than an epoch of a
    # small set.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    from ray.train import CheckpointConfig, FailureConfig, RunConfig
    from ray.train.torch import TorchTrainer

    _drop_useless_record(config.run)
    metric = metric_named(config.objective)
    # The best of what is exported, and the latest: Ray keeps both.
    kept = CheckpointConfig(
        num_to_keep=2,
        checkpoint_score_attribute=run_folder.headline_name(config),
        checkpoint_score_order="max" if metric.higher_is_better else "min",
    )
    if config.place.min_workers:
        # What Ray takes for free may lie on a node of whose death it has not heard yet: it looks again after
        # this, and not after a minute of waiting for that node.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"config": flat(config), "run_id": run_id, "threads": cpus},
        torch_config=_torch_config(),
        scaling_config=_scaling(config, cpus, gpus),
        run_config=RunConfig(
            name=path.rpartition("/")[2],
            storage_path=path.rpartition("/")[0],
            storage_filesystem=filesystem,
            callbacks=list(callbacks),
            failure_config=FailureConfig(max_failures=config.place.max_failures),
            checkpoint_config=kept,
        ),
    )
    if progress:
        where = f"{cpus} CPU threads each"
        if gpus:
            where = "a GPU each" if gpus == 1 else f"{gpus:g} of a GPU each"
        count = config.place.workers
        print(
            f"train: {config.run}: starting {count} worker{'s' * (count > 1)}, {where}",
            file=sys.stderr,
            flush=True,
        )
    try:
        epochs, watch = config.optim.epochs, prometheus.on()
        with Follower(config.run, epochs, show=progress, watch=watch, metric=metric):
            trainer.fit()
    except SystemExit:
        if was_terminated():
            raise
        raise KeyboardInterrupt from None  # how Ray Train ends the program after Ctrl-C
    except Exception:  # with --max-failures 0 Ray raises what the worker's note says better
        if read_json(config.run, "stopped.json") is None:
            raise
    if (stopped := read_json(config.run, "stopped.json")) is not None:
        raise RunStoppedError(stopped["message"])
    if (failure := read_json(config.run, "failure.json")) is not None:
        raise NotFiniteError(failure["message"])
    history = _history(config.run)
    result = _result(config, run_id, history)
    complete = len(history) >= config.optim.epochs
    if complete:
        _log_artifacts(config, run_id)
        write_json(config.run, "result.json", result)
    return result | {"complete": complete}


def _keep_draw(config: TrainConfig) -> None:
    """Names the few pictures that a run sees.

    Raises:
        SettingsError: it saw others before.
    """
    from training.data.few_shot import drawn

    now, before = drawn(config, Store(config.store)), read_json(config.run, "few_shot.json")
    if before is not None and before["digest"] != now["digest"]:
        message = (
            f"shots={config.data.shots}: other pictures are drawn now than few_shot.json of {config.run} "
            "names; some have become usable or unusable since. Pass another --run."
        )
        raise SettingsError(message)
    write_json(config.run, "few_shot.json", now)


def _piece_done(config: TrainConfig) -> Result | None:
    """What `train` returns of a run that has all epochs of the piece asked for, on record and in a
    checkpoint; None: there is something to train."""
    if config.last_epoch == config.optim.epochs or not (history := _history(config.run)):
        return None
    told = run_folder.epochs_told(config.run)  # a kill may have come between a checkpoint and this
    if min(len(history), told) < config.last_epoch:
        return None
    run_id = str((read_json(config.run, "mlflow.json") or {"run_id": ""})["run_id"])
    return _result(config, run_id, history) | {"complete": False}


def _scaling(config: TrainConfig, cpus: int, gpus: float) -> Any:
    """What Ray Train is to ask for, of what `placed` found."""
    from ray.train import ScalingConfig

    # Settings of Ray Train V2, which the declared type, V1's, does not know.
    size: dict[str, Any] = {"num_workers": config.place.workers}
    if config.place.min_workers:
        size = {
            "num_workers": (config.place.min_workers, config.place.workers),
            "elastic_resize_monitor_interval_s": config.place.resize_seconds,
        }
    return ScalingConfig(**size, use_gpu=gpus > 0, resources_per_worker={"CPU": cpus, "GPU": gpus})


def _torch_config() -> Any:
    """Ray's own, with a word on the network to each worker before it makes the process group."""
    from ray.train.torch import TorchConfig

    base: Any = TorchConfig().backend_cls

    class Backend(base):  # type: ignore[misc]
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(_be_reached)
            super().on_start(worker_group, backend_config)

    class Config(TorchConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return Backend

    return Config()


def _be_reached() -> None:
    import ray.util

    from training.engine import distributed

    distributed.be_reached_at(ray.util.get_node_ip_address())


def train_worker(arguments: dict[str, Any]) -> None:
    """One worker of the group: joins the process group that Ray Train made and runs the loop."""
    import ray.train
    import torch
    from ray.train.torch import get_device

    from training.engine import loop

    config = TrainConfig.of(**arguments["config"])
    # Ray says it in OMP_NUM_THREADS, which torch read long ago where the process had it loaded.
    torch.set_num_threads(arguments["threads"])
    if read_json(config.run, "stopped.json") is not None:
        return  # started again after what the next start would meet, too
    rank = ray.train.get_context().get_world_rank()
    device = get_device()
    assert isinstance(device, torch.device)
    reporter = _Reporter(config, arguments["run_id"], rank)
    decode = actor_decoding if config.place.loader == "actors" else None
    try:
        with _latest(config.run) as folder:
            if folder is not None:
                reporter.resume(folder)
            loop.fit(config, device, rank, folder, reporter, decode=decode, progress=reporter.progress)
    except NotFiniteError as error:
        # Every worker is here, and a restart would meet the same batch again: end without Ray's retries.
        if rank == 0:
            write_json(config.run, "failure.json", {"message": str(error)})
        reporter.finish("FAILED")
    except RunStoppedError as error:
        # Of this worker alone: the others wait for it, so Ray must start the group again, which then finds
        # the note and ends.
        write_json(config.run, "stopped.json", {"message": str(error)})
        reporter.finish("FAILED")
        raise
    else:
        # Ended before its end, like one that was interrupted; the next piece sets it running again.
        reporter.finish("FINISHED" if config.last_epoch == config.optim.epochs else "KILLED")


@contextmanager
def _latest(run: str) -> Iterator[str | None]:
    """A folder on this machine with the checkpoint to go on from, None at the beginning."""
    import ray.train

    from training.engine import checkpoint

    recorded = ray.train.get_checkpoint()  # none, too, where the record was useless: see below
    with ExitStack() as stack:
        folder = None
        with suppress(MissingError):
            folder = stack.enter_context(
                checkpoint.opened(run) if recorded is None else recorded.as_directory()
            )
        yield folder


def _drop_useless_record(run: str) -> None:
    """Ray keeps a record of a run's checkpoints. One that a kill or a full disk cut short, or that names a
    checkpoint which is gone, would end every later start; the checkpoints themselves say as much."""
    name = "checkpoint_manager_snapshot.json"
    filesystem, path = locations.resolve(run)
    try:
        record = read_json(run, name) or {"checkpoint_results": []}
        named = [f"{path}/{result['checkpoint_dir_name']}" for result in record["checkpoint_results"]]
        useless = any(info.type == fs.FileType.NotFound for info in filesystem.get_file_info(named))
    except (ValueError, KeyError, TypeError):
        useless = True
    if useless:
        filesystem.delete_file(f"{path}/{name}")


class _Reporter:
    """Carries what a worker's loop reports to Ray Train, the run's folder and MLflow; writing happens beside
    training."""

    def __init__(self, config: TrainConfig, run_id: str, rank: int) -> None:
        self._config, self._rank = config, rank
        self._tracker = tracking.Tracker(
            config.track.tracking_uri, run_id if rank == 0 else "", spool=_spool(config)
        )
        self._lines: list[str] = []
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="report")
        self._shown = 0.0

    def resume(self, folder: str) -> None:
        """Takes over the metrics of the epochs before."""
        from training.engine import checkpoint

        for metrics in checkpoint.read_state(folder)["history"]:
            self._lines.append(json.dumps(metrics) + "\n")
            if self._rank == 0:  # a kill may have come between an epoch's checkpoint and its metrics
                self._tracker.metrics(metrics, step=int(metrics["epoch"]), once=True)
        self._write_lines()

    def __call__(self, metrics: loop.Metrics | None, take: Callable[[], checkpoint.Snapshot]) -> None:
        """See `loop.Report`; returns as soon as rank 0 holds a copy."""
        import ray.train
        from ray.train import CheckpointUploadMode

        if self._rank != 0:
            ray.train.report(metrics or {})
            return
        snapshot = take()
        storage = ray.train.get_context().get_storage()

        def upload(_: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
            path = f"{storage.experiment_fs_path}/{name}"
            snapshot.upload(storage.storage_filesystem, path)
            return ray.train.Checkpoint(path, storage.storage_filesystem)

        placeholder = ray.train.Checkpoint.from_directory(tempfile.mkdtemp(prefix="checkpoint-"))
        ray.train.report(
            metrics or {},
            checkpoint=placeholder,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload,
        )
        if metrics is not None:
            self._tracker.metrics(metrics, step=int(metrics["epoch"]), once=True)
            self._lines.append(json.dumps(metrics) + "\n")
            self._write_lines()

    def progress(self, now: loop.Metrics) -> None:
        """Tells the run's folder how far it is, every two seconds at most (ten where it is remote)."""
        pause = 2 if locations.is_local(self._config.run) else 10
        if self._rank == 0 and time.monotonic() - self._shown > pause:
            self._shown = time.monotonic()
            self._writer.submit(write_json, self._config.run, "progress.json", now)

    def _write_lines(self) -> None:
        if self._rank == 0:
            self._writer.submit(write_text, self._config.run, "metrics.jsonl", "".join(self._lines))

    def finish(self, status: str) -> None:
        """Waits for what is still being written, for a server of MLflow not longer than 20 s."""
        self._writer.shutdown(wait=True)
        self._tracker.finish(status, wait_s=20)


class _DecodingActor:
    """A decoder in a process of its own, on any node."""

    def __init__(self, spec: decoder.DecoderSpec) -> None:
        import torch

        torch.set_num_threads(1)
        self._decoder = spec.build()
        self._alone = threading.Lock()  # views draw from global generators, which are seeded for each

    def decode(self, samples: decoder.Array, train: bool) -> decoder.Part:
        with self._alone:
            return self._decoder(samples, train)

    def prefetch(self, shards: list[int]) -> None:
        self._decoder.prefetch(shards)


class _ActorDecoding:
    """See `loader.Decoding`. A decoder whose node is lost is started elsewhere and does its part again, with
    the same result."""

    def __init__(self, spec: decoder.DecoderSpec, count: int) -> None:
        import ray

        self.decoders = count
        # Two threads, so that shards are read while others are decoded; SPREAD reaches nodes without GPUs,
        # too.
        actor = ray.remote(_DecodingActor).options(
            num_cpus=1, max_restarts=-1, max_task_retries=-1, max_concurrency=2, scheduling_strategy="SPREAD"
        )
        self._actors: list[Any] = [actor.remote(spec) for _ in range(count)]

    def start(self, number: int, samples: decoder.Array, train: bool) -> Callable[[], decoder.Part]:
        import ray

        waiting = self._actors[number].decode.remote(samples, train)
        return lambda: ray.get(waiting)

    def prefetch(self, number: int, shards: list[int]) -> None:
        self._actors[number].prefetch.remote(shards)


def actor_decoding(spec: decoder.DecoderSpec, count: int) -> Decoding:
    """So many decoders as actors, anywhere in the cluster; what `loop.fit` takes as `decode`."""
    return _ActorDecoding(spec, count)


def decoders(config: TrainConfig) -> int:
    """Actors that decode for each worker, a CPU each; 0 where threads do."""
    chosen = config.place.loader == "actors" or (
        config.place.loader == "auto" and config.data.needs_processes
    )
    return config.place.loader_workers if chosen else 0


def placed(config: TrainConfig) -> tuple[TrainConfig, int, float]:
    """(settings with the numbers filled in, CPUs of a worker, its share of a GPU or 0), checked against the
    cluster that this process has joined.

    Raises:
        SettingsError: the cluster has no such workers, and does not grow; or it grows, and nothing says how.
    """
    on_gpus, grows, total = session.computes_on_gpus(config.place.device), session.grows(), session.cpus()
    gpus = session.gpus() if on_gpus else 0
    share = config.place.gpu_share
    asked = config.place.workers or int(share < 1)
    if grows and not (asked or gpus):
        message = (
            "workers=0: the cluster grows, and nothing says how many workers it should get room for; pass "
            "--workers."
        )
        raise SettingsError(message)
    if grows and not on_gpus and not config.place.threads:
        message = (
            "threads=0: the cluster grows, and nothing says how many cores a worker has; pass --threads."
        )
        raise SettingsError(message)
    workers = asked or gpus or 2
    if on_gpus and workers > gpus and not (config.place.min_workers or grows):
        message = f"workers={workers}: the cluster has {gpus} GPUs; pass --workers {gpus} or fewer."
        raise SettingsError(message)
    if config.compute.sync_batch_norm and not on_gpus:
        message = (
            "sync_batch_norm: torch computes it on GPUs only, and the cluster has none; leave the flag out."
        )
        raise SettingsError(message)
    # Ray gives a worker as many OpenMP threads as CPUs; decoding threads come on top.
    largest = session.largest_node()
    cpus = 2 if on_gpus else config.place.threads or max(1, session.cores() // workers)
    if cpus > largest and not grows:
        message = (
            f"threads={cpus}: no node of the cluster has so many CPUs (the largest has {largest}); pass a "
            "smaller --threads."
        )
        raise SettingsError(message)
    wanted = workers * (cpus + decoders(config))
    if decoders(config) and wanted > total and not grows:
        message = (
            f"loader=actors: {workers} workers with {config.place.loader_workers} decoders each need "
            f"{wanted} CPUs, the cluster has {total}; pass a smaller --loader-workers."
        )
        raise SettingsError(message)
    loader = "actors" if decoders(config) else "threads"
    return config.but(workers=workers, loader=loader), cpus, share if on_gpus else 0.0


def _tracked_as_begun(config: TrainConfig) -> TrainConfig:
    """A run goes on where its metrics went so far: no other MLflow knows it.

    Raises:
        ValueError: another address, and the one on record had a password, which is not.
    """
    recorded = read_json(config.run, "mlflow.json")
    if recorded is None or not recorded["run_id"] or config.track.tracking_uri == tracking.OFF:
        return config
    before, now = str(recorded["tracking_uri"]), tracking.masked(config.track.tracking_uri)
    if before == now:
        return config
    if "***" in before:
        message = (
            f"tracking_uri={now}: the run is in {before}, and no other MLflow knows it; pass that address, "
            f"or --tracking-uri {tracking.OFF}."
        )
        raise SettingsError(message)
    print(f"train: metrics go on to {before}, where the run is, and not to {now}", file=sys.stderr)
    return config.but(tracking_uri=before)


def _tracking_run(config: TrainConfig, variants: dict[str, str]) -> str:
    recorded = read_json(config.run, "mlflow.json")
    if recorded is not None and (recorded["run_id"] or config.track.tracking_uri == tracking.OFF):
        return str(recorded["run_id"])
    params, tags = config.deciding(), variants | ({TAG: commit()} if commit() else {})
    name = config.run.rpartition("/")[2]
    run_id = tracking.start_run(
        config.track.tracking_uri,
        config.track.experiment,
        name,
        params,
        tags,
        config.track.parent_run,
        spool=_spool(config),
    )
    write_json(
        config.run,
        "mlflow.json",
        {"run_id": run_id, "tracking_uri": tracking.masked(config.track.tracking_uri)},
    )
    return run_id


def _spool(config: TrainConfig) -> str:
    """Where metrics wait for MLflow: in the run's folder, if that is on a disk."""
    return os.path.join(config.run, "tracking") if locations.is_local(config.run) else ""


def _log_artifacts(config: TrainConfig, run_id: str) -> None:
    """The exported model, and on demand the last checkpoint and a version in the registry."""
    if not run_id or (config.track.log_artifacts == "none" and not config.track.register_as):
        return
    from training.config import ExportConfig
    from training.engine import checkpoint
    from training.export.export import export

    tracker = tracking.Tracker(config.track.tracking_uri, run_id, spool=_spool(config), system_metrics_s=0)
    with tempfile.TemporaryDirectory(prefix="model-") as folder:
        export(ExportConfig(run=config.run, to=os.path.join(folder, "model")))
        if config.track.register_as:
            tracker.register(config.track.register_as, os.path.join(folder, "model"))
        else:
            tracker.artifacts(os.path.join(folder, "model"), "model")
        if config.track.log_artifacts == "all":
            with checkpoint.opened(config.run) as latest:
                tracker.artifacts(latest, "checkpoint")
        tracker.finish(wait_s=20)


def _history(run: str) -> list[dict[str, float]]:
    """The metrics of the epochs that the last checkpoint knows of; none, where there is no checkpoint."""
    from training.engine import checkpoint

    try:
        state = checkpoint.read_state(checkpoint.find(run))
    except MissingError:
        return []
    history: list[dict[str, float]] = state["history"]
    return history


def _result(config: TrainConfig, run_id: str, history: list[dict[str, float]]) -> Result:
    metric = metric_named(config.objective)
    best = max(history, key=lambda epoch: run_folder.merit(epoch, metric))
    return {
        "run": config.run,
        "run_id": tracking.actual_run_id(run_id, _spool(config)),
        "epochs": len(history),
        "last": history[-1],
        "best_epoch": best["epoch"],
        "best_top1": run_folder.headline(best, metric.name),
        "history": history,
        "commit": commit(),
    }
