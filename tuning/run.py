"""`tune`: a Ray Tune sweep whose trials are Ray Train runs over one store; the only file here that builds Ray objects.

Tune starts a small driver function a trial, which builds the trainer. A sweep is a folder: sweep.json, one run folder a trial,
and the best model exported. Finished trials are not run again, and an interrupted one goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, replace
from typing import Any

from pipeline import session
from training import run as training_run
from training import tracking
from training.config import ExportConfig, TrainConfig
from tuning import space
from tuning.config import TuneConfig

Trial = dict[str, Any]


class TrialsFailedError(RuntimeError):
    """Some trials ended in an error; the others are kept. The same command runs the failed ones again."""


def tune(config: TuneConfig) -> dict[str, Any]:
    """Runs the grid, or what is left of it; returns the content of sweep.json."""
    sweep = os.path.abspath(os.path.expanduser(config.sweep or f"runs/sweep-{time.strftime('%Y%m%d-%H%M%S')}"))
    trials = space.trials(config, sweep)
    for trial in trials:
        training_run.check(trial)  # every fault of the grid before the first trial starts
    os.makedirs(sweep, exist_ok=True)
    parent = _parent_run(config, sweep)
    trials = [replace(trial, parent_run=parent) for trial in trials]
    todo = [trial for trial in trials if not os.path.isfile(os.path.join(trial.run, "result.json"))]
    print(f"tune: {len(trials)} trials, {len(trials) - len(todo)} done before", file=sys.stderr)
    if todo:
        _run_trials(config, sweep, todo)
    content = _collect(config, sweep, parent, trials)
    _write(sweep, content)
    failed = [trial["name"] for trial in content["trials"] if trial["result"] is None]
    if failed:
        message = f"{len(failed)} of {len(trials)} trials failed: {', '.join(failed)}; see {sweep}/tune for their errors."
        raise TrialsFailedError(message)
    if config.export and not content["exported"]:
        content["exported"] = _export_best(config, sweep, parent, content)
        _write(sweep, content)
    return content


def run_trial(trial: Trial) -> None:
    """One trial: builds the trainer in Tune's process and hands its metrics up, epoch by epoch."""
    from ray.tune.integration.ray_train import TuneReportCallback

    training_run.train(TrainConfig(**trial["config"]), callbacks=[TuneReportCallback()], progress=False)


def _run_trials(config: TuneConfig, sweep: str, todo: list[TrainConfig]) -> None:
    session.start_ray()
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # with verbose=0 the old reporter is silent, the new one is not
    from ray import tune as ray_tune

    concurrent, threads = _concurrent(config)
    todo = [replace(trial, threads=trial.threads or threads) for trial in todo]
    # The trial's own process only waits for its workers, whose CPUs and GPUs Ray Train asks for itself.
    trainable = ray_tune.with_resources(run_trial, {"CPU": 0.1})
    tuner = ray_tune.Tuner(
        trainable,
        param_space={"config": ray_tune.grid_search([asdict(trial) for trial in todo])},
        tune_config=ray_tune.TuneConfig(
            metric="top1", mode="max", max_concurrent_trials=concurrent, reuse_actors=False,
            trial_name_creator=_trial_name, trial_dirname_creator=_trial_name,
        ),
        run_config=ray_tune.RunConfig(
            name="tune", storage_path=sweep, verbose=0, callbacks=[_progress(len(todo))],
            failure_config=ray_tune.FailureConfig(max_failures=1),
        ),
    )  # fmt: skip
    tuner.fit()


def _trial_name(trial: Any) -> str:
    return space.trial_name(TrainConfig(**trial.config["config"]))


def _concurrent(config: TuneConfig) -> tuple[int, int]:
    """(trials at a time, threads of a worker without a GPU): a gang of workers must fit whole, or trials wait for each other."""
    gpus = session.gpus()
    workers = config.train.workers or gpus or 2
    concurrent = config.concurrent or max(1, gpus // workers)
    return concurrent, max(1, session.cores() // (workers * concurrent))


def _progress(count: int) -> Any:
    """A Tune callback that prints a line a finished trial, with the time left."""
    from ray.tune import Callback

    start = time.monotonic()

    class Progress(Callback):
        done = 0

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._line(trial, f"top-1 {trial.last_result.get('top1', float('nan')):.2f}")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._line(trial, "failed")

        def _line(self, trial: Any, what: str) -> None:
            self.done += 1
            left = (time.monotonic() - start) / self.done * (count - self.done)
            print(f"trial {self.done:>3}/{count}  {_trial_name(trial):40} {what}  {left:.0f} s left", file=sys.stderr, flush=True)

    return Progress()


def _parent_run(config: TuneConfig, sweep: str) -> str:
    path = os.path.join(sweep, "mlflow.json")
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as stream:
            return str(json.load(stream)["run_id"])
    grid = {name: getattr(config, name) for name in ("alignment_weights", "projection_dims", "backbones", "seeds")}
    train = config.train
    parent = tracking.start_run(
        train.tracking_uri,
        train.experiment,
        os.path.basename(sweep),
        {**grid, "store": train.store, "preset": train.preset},
        {},
        spool=os.path.join(sweep, "tracking"),
    )
    with open(path, "w", encoding="utf-8") as stream:
        json.dump({"run_id": parent, "tracking_uri": tracking.masked(train.tracking_uri)}, stream)
    return parent


def _collect(config: TuneConfig, sweep: str, parent: str, trials: list[TrainConfig]) -> dict[str, Any]:
    rows = []
    for trial in trials:
        path = os.path.join(trial.run, "result.json")
        result = None
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as stream:
                result = json.load(stream)
        rows.append({"name": space.trial_name(trial), "config": asdict(trial), "result": result})
    exported = os.path.join(sweep, "best") if os.path.isfile(os.path.join(sweep, "best", "config.json")) else ""
    return {
        "sweep": sweep, "store": config.train.store, "tracking_uri": tracking.masked(config.train.tracking_uri),
        "parent_run": parent, "exported": exported, "trials": rows,
    }  # fmt: skip


def best_trial(content: dict[str, Any]) -> Trial:
    """The trial with the best top-1 in its last epoch."""
    done: list[Trial] = [trial for trial in content["trials"] if trial["result"] is not None]
    return max(done, key=lambda trial: float(trial["result"]["last"]["top1"]))


def _export_best(config: TuneConfig, sweep: str, parent: str, content: dict[str, Any]) -> str:
    from training.export import export

    best = best_trial(content)
    folder = os.path.join(sweep, "best")
    export(ExportConfig(run=best["result"]["run"], to=folder))
    tracker = tracking.Tracker(config.train.tracking_uri, parent, spool=os.path.join(sweep, "tracking"))
    tracker.metrics({"best_top1": best["result"]["last"]["top1"]}, step=0)
    tracker.artifacts(folder, "best")
    tracker.finish()
    return folder


def _write(sweep: str, content: dict[str, Any]) -> None:
    path = os.path.join(sweep, "sweep.json")
    with open(f"{path}.tmp", "w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2)
    os.replace(f"{path}.tmp", path)
