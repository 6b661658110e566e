"""`tune`: a Ray Tune sweep whose trials are Ray Train runs over one store; the only file here that builds Ray
objects, beside the searcher of pieces.py.

Tune asks `search.Search` for one piece of a training after the other and starts a small driver function for
it, which builds the trainer. A sweep is a folder, on a disk or s3://: sweep.json, a run folder for each
trial, best.json, and the best model exported. What is finished is not computed again, nor what diverged, and
an interrupted trial goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from typing import Any

from pipeline import session, waiting
from pipeline.errors import NotFiniteError, SettingsError, TrialsFailedError
from pipeline.store import locations, lock
from training import preparation, run_folder, tracking
from training import run as training_run
from training.config import EvaluateConfig, TrainConfig
from training.objectives.registry import metric_named
from training.run_folder import read_json, write_json
from training.tracking.commit import TAG, commit
from training.tracking.progress import Listener
from tuning import best, checks, record, space
from tuning.config import TuneConfig
from tuning.driver import Driver
from tuning.record import Content


def tune(config: TuneConfig) -> Content:
    """Runs the sweep, or what is left of it, and exports the best model; returns the content of sweep.json.

    The same sweep may be given other values of its axes: trials that are finished stay, whatever the grid is
    now.

    Raises:
        SettingsError: settings that do not fit the store, or not the trials that are there, or another
            process is at this sweep.
    """
    sweep = config.sweep or f"runs/sweep-{time.strftime('%Y%m%d-%H%M%S')}"
    sweep = locations.resolve(sweep)[1] if locations.is_local(sweep) else sweep.rstrip("/")
    locations.check_writable("sweep", sweep)
    _check_folder(sweep)
    if start := config.train.model.init_from:  # a trial's process may stand elsewhere
        config = replace(config, train=config.train.but(init_from=run_folder.address(start)))
    if config.gpu_hours or config.trials_per_gpu > 1:
        session.start_ray()
        _concurrent(config)
    # Every fault of the space before the first trial starts.
    variants = checks.checked(config, sweep)
    checks.check_earlier(config, sweep)
    checks.check_test_split(config, sweep)
    if read_json(sweep, "sweep.json") is None:
        for note in preparation.length(config.train):
            print(f"tune: {note}", file=sys.stderr)
    with lock.held(sweep, "sweep"):
        parent = _parent_run(config, sweep)
        driver = Driver(config, sweep, parent, variants)
        try:
            driver.work(_run_trials)
        finally:
            driver.record.write("interrupted")
        driver.record.write(driver.state, best=driver.best(), final=driver.pairs())
        content = record.read(sweep)
        if content["best"]:
            best.write_settings(content)
            if config.export:
                told = best.export_model(config, content)
                driver.record.write(driver.state, **told)
    return record.read(sweep)


def _check_folder(sweep: str) -> None:
    if read_json(sweep, "sweep.json") is None:
        for file, what in (("dataset.json", "a store"), ("config.json", "a run")):
            if read_json(sweep, file) is not None:
                message = f"sweep={sweep}: is {what}; pass a folder of the sweep's own."
                raise SettingsError(message)


def require_results(content: Content) -> None:
    """Raises TrialsFailedError where a trial crashed or diverged."""
    diverged = [trial["name"] for trial in content["trials"] if trial["status"] == "diverged"]
    failed = [trial["name"] for trial in content["trials"] if trial["status"] == "failed"]
    if not (failed or diverged):
        return
    count = len(failed) + len(diverged)
    lines = [f"{count} of {len(content['trials'])} trials failed; the others are kept."]
    if failed:
        where = f"{content['sweep']}/tune holds their errors, and the same command runs them again."
        lines.append(f"Failed: {', '.join(failed)}. {where}")
    if diverged:
        lines.append(
            f"Diverged: {', '.join(diverged)}. They are not run again; leave them out of the grid, or change "
            "the recipe."
        )
    raise TrialsFailedError("\n".join(lines))


def run_trial(trial: dict[str, Any], shared: dict[str, Any], address: str = "") -> None:
    """One piece of a trial: builds the trainer in Tune's process, and measures a final one on its test split,
    once. `address`: of the cluster, empty where Ray is the sweep's own."""
    if address:
        os.environ["RAY_ADDRESS"] = address  # which a worker's process does not have by itself
    from ray import tune as ray_tune

    config = TrainConfig.of(**shared | json.loads(trial["settings"]))
    try:
        result = training_run.train(config, progress=False)
    except NotFiniteError:  # to Tune an end, as after an error it would try again; see the run's failure.json
        ray_tune.report({"epochs": 0})
        return
    if trial["test_split"] and read_json(config.run, "test.json") is None:
        _measure(config, trial["test_split"])
    ray_tune.report({"epochs": result["epochs"]})


def _measure(config: TrainConfig, split: str) -> None:
    """Writes test.json beside a finished training: the figure, and of what classifies which pictures were
    recognised."""
    from training.evaluation.remote import evaluate_remote

    judged = evaluate_remote(
        EvaluateConfig(run=config.run, split=split, retrieval=False),
        gpu_share=config.place.gpu_share,
        threads=config.place.threads,
    )
    content = {"split": split, "images": judged.summary["images"]}
    if judged.outputs is None:
        metric = metric_named(config.objective).name
        content |= {metric: judged.summary[metric]}
    else:
        right = judged.outputs.correct
        marks = "".join("1" if each else "0" for each in right)
        content |= {"top1": 100.0 * float(right.mean()), "right": marks}
    write_json(config.run, "test.json", content)


def _run_trials(driver: Driver) -> None:
    config, sweep = driver.config, driver.sweep
    session.start_ray()
    # With verbose=0 the old reporter is silent, the new one is not.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # Ctrl-C ends the sweep as it ends any verb; Tune would call what was cut off complete.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    from ray import tune as ray_tune

    from tuning.pieces import searcher

    concurrent, threads, gpus = _concurrent(config)
    driver.place(threads, gpus)
    training_run.placed(_shared(config))
    _wait(_shared(config), concurrent)
    many = f"{concurrent} trials at a time" if concurrent > 1 else "one trial at a time (--concurrent)"
    print(f"tune: {many}", file=sys.stderr, flush=True)
    # The trial's own process only waits for its workers, whose CPUs and GPUs Ray Train asks for itself.
    trainable = ray_tune.with_resources(
        ray_tune.with_parameters(
            run_trial, shared={"tracking_uri": config.train.track.tracking_uri}, address=session.address()
        ),
        {"CPU": 0.1},
    )
    filesystem, path = locations.resolve(sweep)
    tuner = ray_tune.Tuner(
        trainable,
        # Without a metric: Tune would demand it of every trial, and one that diverges has none.
        tune_config=ray_tune.TuneConfig(
            search_alg=searcher(driver),
            num_samples=-1,
            max_concurrent_trials=concurrent,
            reuse_actors=True,  # which have imported what a trial needs
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=ray_tune.RunConfig(
            name="tune",
            storage_path=path,
            storage_filesystem=filesystem,
            verbose=0,
            failure_config=ray_tune.FailureConfig(max_failures=1),
        ),
    )
    with Listener(driver.under_way, metric=metric_named(config.train.objective)):
        tuner.fit()


def _trial_name(trial: Any) -> str:
    return f"{trial.config['name']}-{trial.trial_id}"


def _shared(config: TuneConfig) -> TrainConfig:
    """What all trials share, as far as the cluster is concerned."""
    if config.trials_per_gpu == 1:
        return config.train
    return config.train.but(workers=1, gpu_share=1 / config.trials_per_gpu)


def _wait(config: TrainConfig, concurrent: int) -> None:
    """Here, where it is read: what a trial says reaches nobody."""
    place = config.place
    on_gpus = session.computes_on_gpus(place.device)
    workers = place.workers or (session.gpus() if on_gpus else 0) or 2
    room = waiting.Wanted(
        name="workers",
        count=workers * concurrent,
        cpus=2 if on_gpus else place.threads or 1,
        gpus=on_gpus * place.gpu_share,
        least=place.min_workers or workers,
        gang=True,
        helpers=training_run.decoders(config),
    )
    waiting.wait("tune", room, place.wait_minutes)


def _concurrent(config: TuneConfig) -> tuple[int, int, float]:
    """(trials at a time, threads of a worker without a GPU, GPUs of a trial): a gang of workers must fit
    whole, or trials wait for each other."""
    place = config.train.place
    on_gpus = session.computes_on_gpus(place.device)
    gpus = session.gpus() if on_gpus else 0
    if session.grows() and not (config.concurrent and place.workers and (on_gpus or place.threads)):
        message = (
            "concurrent, workers: the cluster grows, and nothing says how much it should get; pass "
            "--concurrent (trials at a time) and --workers (of each), on CPUs --threads, too."
        )
        raise SettingsError(message)
    if config.gpu_hours and not on_gpus:
        message = f"gpu_hours={config.gpu_hours}: trials compute on CPUs here; pass --hours."
        raise SettingsError(message)
    if config.trials_per_gpu > 1 and not on_gpus:
        message = f"trials_per_gpu={config.trials_per_gpu}: trials compute on CPUs here; leave it out."
        raise SettingsError(message)
    workers = place.workers or (1 if config.trials_per_gpu > 1 else gpus) or 2
    concurrent = config.concurrent or max(1, gpus * config.trials_per_gpu // workers)
    threads = max(1, session.cores() // (workers * concurrent))
    return concurrent, threads, workers / config.trials_per_gpu if on_gpus else 0.0


def _parent_run(config: TuneConfig, sweep: str) -> str:
    recorded = read_json(sweep, "mlflow.json")
    if recorded is not None:
        return str(recorded["run_id"])
    train, name = config.train, sweep.rpartition("/")[2]
    told = {**config.axes(), "axis": config.axis, "store": train.store, "preset": train.preset}
    tags = {
        "store": run_folder.address(train.store),
        "space": json.dumps(space.axes_told(space.arms(config))),
        "search": config.search,
        "scheduler": config.scheduler,
        TAG: commit(),
    }
    parent = tracking.start_run(
        train.track.tracking_uri, train.track.experiment, name, told, tags, spool=record.spool(sweep)
    )
    write_json(
        sweep, "mlflow.json", {"run_id": parent, "tracking_uri": tracking.masked(train.track.tracking_uri)}
    )
    return parent
