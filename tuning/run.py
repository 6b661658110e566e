"""`tune`: a Ray Tune sweep whose trials are Ray Train runs over one store; the only file here that builds Ray
objects.

Tune starts a small driver function a trial, which builds the trainer. A sweep is a folder, on a disk or
s3://: sweep.json, a run folder for each trial, and the best model exported. Finished trials are not run
again, nor those that diverged, and an interrupted one goes on from its last checkpoint.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from typing import Any

from pyarrow import fs

from pipeline import session, waiting
from pipeline.errors import NotFiniteError, OtherSettingsError, SettingsError, TrialsFailedError
from pipeline.store import Store, locations, lock
from training import preparation, run_folder, tracking
from training import run as training_run
from training.config import ExportConfig, TrainConfig
from training.run_folder import read_json, write_json
from training.settings import flat
from tuning import space
from tuning.cells import cell_of
from tuning.config import TuneConfig

Trial = dict[str, Any]


def tune(config: TuneConfig) -> dict[str, Any]:
    """Runs the grid, or what is left of it, and exports the best model; returns the content of sweep.json.

    The same sweep may be given other values of its axes: trials that are finished stay, whatever the grid is
    now.

    Raises:
        SettingsError: settings that do not fit the store, or not the trials that are there, or another
            process is at this sweep.
    """
    sweep = config.sweep or f"runs/sweep-{time.strftime('%Y%m%d-%H%M%S')}"
    sweep = locations.resolve(sweep)[1] if locations.is_local(sweep) else sweep.rstrip("/")
    locations.check_writable("sweep", sweep)
    # Every fault of the grid before the first trial starts.
    plain = space.trials(config, sweep)
    _check_earlier_grids(plain, sweep)
    trials = [_prepared(trial, sweep) for trial in plain]
    with lock.held(sweep, "sweep"):
        parent = _parent_run(config, sweep)
        trials = [trial.but(parent_run=parent) for trial in trials]
        rows = [_row(trial) for trial in trials]
        ended = {row["name"] for row in rows if row["result"] or row["failure"]}
        todo = [trial for trial in trials if space.trial_name(trial) not in ended]
        print(f"tune: {len(trials)} trials, {len(ended)} done before", file=sys.stderr)
        for row in rows:
            if row["failure"]:
                again = f"delete {sweep}/{row['name']} to have it trained again"
                print(f"tune: {row['name']} diverged before, as it would again; {again}", file=sys.stderr)
        content = _content(sweep, parent, trials)
        write_json(sweep, "sweep.json", content)
        if todo:
            _run_trials(config, sweep, todo)
            content = _content(sweep, parent, trials)
            write_json(sweep, "sweep.json", content)  # whatever becomes of the export
        if config.export:
            content |= _export_best(config, sweep, content)
        write_json(sweep, "sweep.json", content)
    return content


def require_results(content: dict[str, Any]) -> None:
    """Raises TrialsFailedError unless every trial has a result."""
    without = [trial for trial in content["trials"] if trial["result"] is None]
    diverged = [trial["name"] for trial in without if trial["failure"]]
    failed = [trial["name"] for trial in without if not trial["failure"]]
    if not without:
        return
    lines = [f"{len(without)} of {len(content['trials'])} trials failed; the others are kept."]
    if failed:
        where = f"{content['sweep']}/tune holds their errors, and the same command runs them again."
        lines.append(f"Failed: {', '.join(failed)}. {where}")
    if diverged:
        lines.append(
            f"Diverged: {', '.join(diverged)}. They are not run again; leave them out of the grid, or change "
            "the recipe."
        )
    raise TrialsFailedError("\n".join(lines))


def run_trial(trial: dict[str, str], configs: dict[str, dict[str, Any]], address: str = "") -> None:
    """One trial: builds the trainer in Tune's process and hands its metrics up, epoch by epoch. `address`: of
    the cluster, empty where Ray is the sweep's own."""
    if address:
        os.environ["RAY_ADDRESS"] = address  # which a worker's process does not have by itself
    from ray.tune.integration.ray_train import TuneReportCallback

    class Epochs(TuneReportCallback):
        """Results are the ends of epochs: between them a run reports checkpoints, without metrics."""

        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            if metrics[0]:
                super().after_report(run_context, metrics, checkpoint)

    try:
        training_run.train(TrainConfig.of(**configs[trial["trial"]]), callbacks=[Epochs()], progress=False)  # type: ignore[no-untyped-call]
    except NotFiniteError:
        return  # as the run's failure.json says; to Tune this is an end, as after an error it would try again


def _prepared(trial: TrainConfig, sweep: str) -> TrainConfig:
    recorded = read_json(trial.run, "config.json") or {}
    if recorded and trial.method.is_baseline and cell_of(recorded).is_baseline:  # axes decide nothing
        trial = trial.but(**{name: recorded[name] for name in trial.method.axes if name in recorded})
    try:
        return preparation.prepare(trial)[0]
    except OtherSettingsError as error:
        raise _other_settings(trial, sweep, error) from None


def _other_settings(trial: TrainConfig, sweep: str, error: OtherSettingsError) -> OtherSettingsError:
    message = (
        f"sweep={sweep}: its trial {space.trial_name(trial)} was begun with other settings; pass another "
        f"--sweep. In the same one only the grid may have other values.\n{str(error).partition(chr(10))[2]}"
    )
    return OtherSettingsError(message)


def _check_earlier_grids(plain: list[TrainConfig], sweep: str) -> None:
    """Trials of an earlier grid stand beside those of this one and are compared with them: they must share
    its settings."""
    here = {space.trial_name(trial) for trial in plain}
    before = read_json(sweep, "sweep.json") or {"trials": []}
    for name in (row["name"] for row in before["trials"] if row["name"] not in here):
        run = locations.join(sweep, name)
        if (recorded := read_json(run, "config.json")) is None:
            continue
        method = plain[0].method
        names = ("backbone", "seed", "architecture", "pretrained", *method.axes, *method.left_open)
        own = {name: recorded[name] for name in names if name in recorded}
        trial = plain[0].but(run=run, store=run_folder.address(plain[0].store), **own)
        try:
            run_folder.resumed(trial, recorded)
            run_folder.check_store(run, recorded, Store(trial.store))
        except OtherSettingsError as error:
            raise _other_settings(trial, sweep, error) from None


def _run_trials(config: TuneConfig, sweep: str, todo: list[TrainConfig]) -> None:
    session.start_ray()
    # With verbose=0 the old reporter is silent, the new one is not.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    from ray import tune as ray_tune

    concurrent, threads = _concurrent(config)
    _wait(config.train, concurrent)
    print(f"tune: starting {len(todo)} trials, {concurrent} at a time", file=sys.stderr, flush=True)
    todo = [trial.but(threads=trial.place.threads or threads) for trial in todo]
    # The trial's own process only waits for its workers, whose CPUs and GPUs Ray Train asks for itself.
    # Settings reach it beside Tune's own parameters, which Tune writes into files: an MLflow address may hold
    # a password.
    configs = {space.trial_name(trial): flat(trial) for trial in todo}
    trainable = ray_tune.with_resources(
        ray_tune.with_parameters(run_trial, configs=configs, address=session.address()), {"CPU": 0.1}
    )
    told = {
        name: {"run": config["run"], "objective": config["objective"]} for name, config in configs.items()
    }
    filesystem, path = locations.resolve(sweep)
    tuner = ray_tune.Tuner(
        trainable,
        param_space={"trial": ray_tune.grid_search(list(configs))},
        # Without a metric: Tune would demand it of every trial, and one that diverges in its first epoch has
        # none.
        tune_config=ray_tune.TuneConfig(
            max_concurrent_trials=concurrent,
            reuse_actors=False,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=ray_tune.RunConfig(
            name="tune",
            storage_path=path,
            storage_filesystem=filesystem,
            verbose=0,
            callbacks=[_progress(told)],
            failure_config=ray_tune.FailureConfig(max_failures=1),
        ),
    )
    with run_folder.Listener([config["run"] for config in configs.values()]):
        tuner.fit()


def _trial_name(trial: Any) -> str:
    return str(trial.config["trial"])


def _wait(config: TrainConfig, concurrent: int) -> None:
    """Here, where it is read: what a trial says reaches nobody."""
    place = config.place
    on_gpus = session.computes_on_gpus(place.device)
    workers = place.workers or (session.gpus() if on_gpus else 0) or 2
    room = waiting.Wanted(
        name="workers",
        count=workers * concurrent,
        cpus=2 if on_gpus else place.threads or 1,
        gpus=float(on_gpus),
        least=place.min_workers or workers,
        gang=True,
        helpers=training_run.decoders(config),
    )
    waiting.wait("tune", room, place.wait_minutes)


def _concurrent(config: TuneConfig) -> tuple[int, int]:
    """(trials at a time, threads of a worker without a GPU): a gang of workers must fit whole, or trials wait
    for each other."""
    place = config.train.place
    on_gpus = session.computes_on_gpus(place.device)
    gpus = session.gpus() if on_gpus else 0
    if session.grows() and not (config.concurrent and place.workers and (on_gpus or place.threads)):
        message = (
            "concurrent, workers: the cluster grows, and nothing says how much it should get; pass "
            "--concurrent (trials at a time) and --workers (of each), on CPUs --threads, too."
        )
        raise SettingsError(message)
    workers = place.workers or gpus or 2
    concurrent = config.concurrent or max(1, gpus // workers)
    return concurrent, max(1, session.cores() // (workers * concurrent))


def _progress(told: dict[str, dict[str, str]]) -> Any:
    """A Tune callback that prints a line a finished trial, with the time left."""
    from ray.tune import Callback

    start, count = time.monotonic(), len(told)

    class Progress(Callback):
        done = 0

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            diverged = read_json(told[_trial_name(trial)]["run"], "failure.json") is not None
            metric = run_folder.judged_by(told[_trial_name(trial)])
            last = trial.last_result if metric.name in trial.last_result else {metric.name: float("nan")}
            self._line(
                trial,
                "diverged"
                if diverged
                else f"{metric.title} {metric.shown(run_folder.headline(last, metric.name))}",
            )

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._line(trial, "failed")

        def _line(self, trial: Any, what: str) -> None:
            self.done += 1
            left = (time.monotonic() - start) / self.done * (count - self.done)
            print(
                f"trial {self.done:>3}/{count}  {_trial_name(trial):40} {what}  {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    return Progress()


def _parent_run(config: TuneConfig, sweep: str) -> str:
    recorded = read_json(sweep, "mlflow.json")
    if recorded is not None:
        return str(recorded["run_id"])
    train, name = config.train, sweep.rpartition("/")[2]
    told = {**config.axes(), "store": train.store, "preset": train.preset}
    parent = tracking.start_run(
        train.track.tracking_uri, train.track.experiment, name, told, {}, spool=_spool(sweep)
    )
    write_json(
        sweep, "mlflow.json", {"run_id": parent, "tracking_uri": tracking.masked(train.track.tracking_uri)}
    )
    return parent


def _spool(sweep: str) -> str:
    """Where metrics wait for MLflow: in the sweep's folder, if that is on a disk."""
    return os.path.join(sweep, "tracking") if locations.is_local(sweep) else ""


def _row(trial: TrainConfig) -> Trial:
    """What a trial's own folder says of it: its settings are those it was begun with, whatever the command
    line says now."""
    result, failure = read_json(trial.run, "result.json"), read_json(trial.run, "failure.json")
    settings = read_json(trial.run, "config.json") or flat(trial) | {
        "tracking_uri": tracking.masked(trial.track.tracking_uri)
    }
    why = failure["message"] if failure is not None and result is None else ""
    return {"name": space.trial_name(trial), "config": settings, "result": result, "failure": why}


def _content(sweep: str, parent: str, trials: list[TrainConfig]) -> dict[str, Any]:
    """What is known now: of the grid's trials, of finished ones that an earlier grid had, and of the model
    exported last."""
    before = read_json(sweep, "sweep.json") or {"trials": [], "exported": ""}
    rows = [_row(trial) for trial in trials]
    names = {row["name"] for row in rows}
    # A sweep's folder may have been moved since: the trials are where it is now.
    for name in (trial["name"] for trial in before["trials"] if trial["name"] not in names):
        settings, result = (
            read_json(locations.join(sweep, name), file) for file in ("config.json", "result.json")
        )
        if settings is not None and result is not None:
            rows.append({"name": name, "config": settings, "result": result, "failure": ""})
    exported = (
        locations.join(sweep, "best")
        if before["exported"] and read_json(locations.join(sweep, "best"), "config.json") is not None
        else ""
    )
    return {
        "version": 1,
        "sweep": sweep,
        "store": trials[0].store,
        "tracking_uri": tracking.masked(trials[0].track.tracking_uri),
        "parent_run": parent,
        "exported": exported,
        "exported_from": before.get("exported_from", {}) if exported else {},
        "trials": rows,
    }


def _headline(trial: Trial) -> float:
    return run_folder.headline(trial["result"]["last"], run_folder.judged_by(trial["config"]).name)


def _merit(trial: Trial) -> float:
    return run_folder.merit(trial["result"]["last"], run_folder.judged_by(trial["config"]))


def best_trial(content: dict[str, Any]) -> Trial | None:
    """The trial that its last epoch judges best, of the weights that export takes; None where none has
    a result."""
    done: list[Trial] = [trial for trial in content["trials"] if trial["result"] is not None]
    return max(done, key=_merit, default=None)


def _export_best(config: TuneConfig, sweep: str, content: dict[str, Any]) -> dict[str, Any]:
    """Exports the best trial's model, unless it is the one that was exported; what sweep.json is to say of
    it."""
    best = best_trial(content)
    if best is None:
        return {}
    source = {"trial": best["name"], "run_id": best["result"]["run_id"], "top1": _headline(best)}
    if content["exported"] and content["exported_from"] == source:
        return {}
    from training.export.export import export

    to = locations.join(sweep, "best")
    with tempfile.TemporaryDirectory(prefix="best-") as temporary:
        folder = to if locations.is_local(sweep) else temporary
        export(ExportConfig(run=locations.join(sweep, best["name"]), to=folder, overwrite=True))
        if folder != to:
            filesystem, path = locations.resolve(to)
            filesystem.delete_dir_contents(path, missing_dir_ok=True)
            fs.copy_files(
                folder, path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=filesystem
            )
        tracker = tracking.Tracker(
            config.train.track.tracking_uri, content["parent_run"], spool=_spool(sweep)
        )
        tracker.metrics({"best_top1": source["top1"]}, step=0)
        tracker.artifacts(folder, "best")
        tracker.finish()
    return {"exported": to, "exported_from": source}
