"""A sweep's folder: sweep.json, and what it says together with the folders of the trials, at any time.

sweep.json holds what was asked for and, of each trial, what stands nowhere else: which configuration it is of
and what it cost. How far it came is read from its own folder.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from typing import Any

from pipeline.errors import MissingError
from pipeline.store import locations, lock
from training import run_folder
from training.config import TrainConfig
from training.run_folder import read_json, write_json
from training.settings import flat

Content = dict[str, Any]
Trial = dict[str, Any]

VERSION = 2
RUNNING = "running"
_OWN = ("name", "stage", "configuration", "arm", "backbone", "seed", "values", "seconds", "gpu_seconds")


def read(folder: str) -> Content:
    """The content of a sweep's sweep.json, completed from its trials' folders: right while it runs, too.

    Each trial has `status` (waiting, running, stopped at a rung, complete, diverged, failed), `epochs` and
    `history` so far, `result` of whole trainings, `failure`, and `config` as it is on record.

    Raises:
        MissingError: `folder` is no folder of a sweep.
    """
    content = read_json(folder, "sweep.json")
    if content is None:
        missing = locations.is_local(folder) and not os.path.isdir(folder)
        what = "there is no such folder" if missing else "holds no sweep.json, so it is no sweep"
        message = f"sweep={folder}: {what}; `gpt4image tune --sweep {folder}` makes one."
        raise MissingError(message)
    content |= {"sweep": folder.rstrip("/")}  # it may have been moved
    if content["version"] < VERSION:
        content = _of_version_1(content)
    at_work = content["state"] == RUNNING and lock.is_held(folder)
    if content["state"] == RUNNING and not at_work:
        content["state"] = "interrupted"
    content["trials"] = [
        complete(content["sweep"], trial, at_work, content["shared"]) for trial in content["trials"]
    ]
    return content


def complete(sweep: str, trial: Trial, at_work: bool, shared: Mapping[str, Any]) -> Trial:
    """A trial with what its own folder says; `shared`: what it has of settings beside its own, until it has
    begun."""
    run = locations.join(sweep, trial["name"])
    settings = read_json(run, "config.json") or shared | trial["config"]
    result, diverged = read_json(run, "result.json"), read_json(run, "failure.json")
    lines = (run_folder.read_text(run, "metrics.jsonl") or "").splitlines()
    history = result["history"] if result else [json.loads(line) for line in lines]
    failure, status = trial.get("failure", ""), "stopped" if history else "waiting"
    test = read_json(run, "test.json")
    if result is not None:
        # A final training whose measuring failed says so; other failures were made good since.
        failure = failure if trial["stage"] == "final" and test is None else ""
        status = "failed" if failure else "complete"
    elif diverged is not None:
        status, failure = "diverged", diverged["message"]
    elif trial.get("running") and at_work:
        status = RUNNING
    elif failure:
        status = "failed"
    own = {name: trial[name] for name in _OWN}
    return {
        **own,
        "config": settings,
        "status": status,
        "epochs": len(history),
        "history": history,
        "result": result,
        "failure": failure,
        "test": test,
    }


def spool(sweep: str) -> str:
    """Where metrics wait for MLflow: in the sweep's folder, if that is on a disk."""
    return os.path.join(sweep, "tracking") if locations.is_local(sweep) else ""


class Record:
    """What a sweep that is at work writes down: sweep.json, anew at each change."""

    def __init__(self, folder: str, asked: Content) -> None:
        self._folder, self.asked = folder, asked
        before = read_json(folder, "sweep.json") or {}
        if before.get("version", VERSION) < VERSION:
            before = _of_version_1(before)
        # A sweep that goes on keeps when it began and what it cost.
        self._seconds = float(before.get("seconds", 0.0))
        self._kept: Content = {
            name: before[name] for name in ("started", "exported", "exported_from") if name in before
        }
        self._began = time.monotonic()
        self._written = -math.inf
        self.trials: dict[str, Trial] = {trial["name"]: trial for trial in before.get("trials", [])}
        for trial in self.trials.values():
            if trial.pop("running", False):  # when the start before was killed
                self._book(trial, max(0.0, before["written"] - trial["since"]))

    @property
    def seconds(self) -> float:
        """Wall time of the sweep, all starts together."""
        return self._seconds + time.monotonic() - self._began

    def gpu_seconds(self) -> float:
        """Of all trials of the search so far, those that run among them."""
        found = 0.0
        for trial in self.trials.values():
            if trial["stage"] == "search":
                found += trial["gpu_seconds"]
                if trial.get("running"):
                    found += (time.time() - trial["since"]) * trial["gpus"]
        return found

    def add(self, name: str, config: TrainConfig, **told: Any) -> None:
        """A trial, with its cost so far; `told`: configuration, arm, backbone, seed, values, stage."""
        before = self.trials.get(name, {"seconds": 0.0, "gpu_seconds": 0.0})
        shared = self.asked["shared"]
        own = {key: value for key, value in flat(config).items() if key not in shared or shared[key] != value}
        own.pop("tracking_uri", None)
        self.trials[name] = {"failure": "", **before, "name": name, **told, "config": own}

    def began(self, name: str, gpus: float) -> None:
        """A piece of a trial runs, on so many GPUs."""
        self.trials[name] |= {"running": True, "since": time.time(), "gpus": gpus, "failure": ""}
        self.write(soon=True)

    def ended(self, name: str, failure: str = "") -> None:
        """A piece of a trial has ended, or could not begin."""
        trial = self.trials[name]
        if trial.pop("running", False):
            self._book(trial, max(0.0, time.time() - trial["since"]))
        trial |= {"failure": failure}
        self.write(soon=True)

    def _book(self, trial: Trial, seconds: float) -> None:
        trial["seconds"] = round(trial["seconds"] + seconds, 1)
        trial["gpu_seconds"] = round(trial["gpu_seconds"] + seconds * trial["gpus"], 1)

    def write(self, state: str = RUNNING, *, soon: bool = False, **told: Any) -> None:
        """Writes sweep.json; `told` stays: best, final, exported, exported_from. `soon`: where there are many
        trials not at once, since another piece begins or ends in a moment."""
        self._kept |= told
        now = time.monotonic()
        if soon and now - self._written < len(self.trials) / 50:
            return
        self._written = now
        self._kept.setdefault("started", time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        content = {
            "version": VERSION,
            "sweep": self._folder,
            "exported": "",
            "exported_from": {},
            "best": {},
            "final": [],
            **self.asked,
            **self._kept,
            "state": state,
            "seconds": round(self.seconds, 1),
            "written": time.time(),
            "trials": list(self.trials.values()),
        }
        write_json(self._folder, "sweep.json", content)


def _of_version_1(content: Mapping[str, Any]) -> Content:
    """What a sweep of an earlier release says, in today's words: a grid, without a final comparison."""
    from tuning.cells import cell_of

    trials: list[Trial] = []
    cells: dict[Any, int] = {}
    for trial in content["trials"]:
        config = trial["config"]
        cell = cell_of(config)
        values = dict(zip(cell.names, cell.values, strict=True)) if not cell.is_baseline else {}
        trials.append(
            {
                "name": trial["name"],
                "stage": "search",
                "configuration": cells.setdefault(cell, len(cells)),
                "arm": "baseline" if cell.is_baseline else "method",
                "backbone": config["backbone"],
                "seed": config["seed"],
                "values": values,
                "seconds": round(
                    sum(epoch.get("seconds", 0.0) for epoch in (trial["result"] or {}).get("history", [])), 1
                ),
                "gpu_seconds": 0.0,
                "config": config,
                "failure": trial.get("failure", ""),
            }
        )
    first = trials[0]["config"] if trials else {}
    names = dict.fromkeys(name for trial in trials for name in trial["values"])
    axes = {
        name: ",".join(dict.fromkeys(str(t["values"][name]) for t in trials if t["values"])) for name in names
    }
    kept = ("sweep", "store", "tracking_uri", "parent_run", "exported", "exported_from")
    return {
        **{name: content.get(name, "") for name in kept},
        "version": VERSION,
        "objective": first.get("objective", "align"),
        "preset": first.get("preset", ""),
        "search": "grid",
        "scheduler": "none",
        "rungs": [first.get("epochs", 0)],
        "axes": axes,
        "seeds": sorted({trial["seed"] for trial in trials}),
        "fresh_seeds": [],
        "eval_split": first.get("eval_split", "val"),
        "test_split": "",
        "budget": {"trials": 0, "hours": 0.0, "gpu_hours": 0.0, "max_failed_trials": 0},
        "state": "complete",
        "started": "",
        "seconds": 0.0,
        "commit": "",
        "variants": {},
        "best": {},
        "final": [],
        "shared": {},
        "trials": trials,
    }
