"""A sweep at work: hands out pieces of trainings and writes down what came of them; knows no Ray."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from pipeline.errors import SettingsError
from pipeline.store import locations
from training import run_folder, tracking
from training.config import TrainConfig
from training.objectives.registry import metric_named
from training.run_folder import read_json
from training.settings import flat
from training.tracking.commit import commit
from tuning import checks, record, search, space
from tuning.config import TuneConfig
from tuning.record import Content
from tuning.search import Piece


class Driver:
    """A sweep at work: hands out pieces of trainings and writes down what came of them."""

    def __init__(self, config: TuneConfig, sweep: str, parent: str, variants: dict[str, str]) -> None:
        self.config, self.sweep, self._parent = config, sweep, parent
        self._search = search.Search(config, space.arms(config))
        self.record = record.Record(sweep, _asked(config, parent, self._search, variants))
        self._gpus = 0.0
        self._threads = 0
        self._ahead: tuple[Piece, TrainConfig] | None = None
        self._running: set[str] = set()
        self._failed = 0
        self._told_final = False
        self._done_epochs = 0
        self._start = time.monotonic()
        self._restore()
        self.state = "complete"

    def work(self, run: Callable[[Driver], None]) -> None:
        """All that is left to do, by `run`, which says where trials compute (`place`) and trains what `begin`
        gives; it is not called where nothing is left."""
        self.record.write()
        known = record.read(self.sweep)["trials"]
        ended = sum(t["stage"] == "search" and t["status"] in ("complete", "diverged") for t in known)
        print(f"tune: {self._search.told()}, {ended} done before", file=sys.stderr)
        for trial in known:
            if trial["status"] == "diverged":
                again = f"delete {self.sweep}/{trial['name']} to have it trained again"
                print(f"tune: {trial['name']} diverged before, as it would again; {again}", file=sys.stderr)
        self._send_rest(known)
        self._ahead = self._look()
        if self._ahead is not None:
            run(self)

    def _send_rest(self, known: list[record.Trial]) -> None:
        """What trials logged that nobody will open again, as they ended at a rung, and a kill kept from
        MLflow."""
        uri = self.config.train.track.tracking_uri
        if uri == tracking.OFF or not locations.is_local(self.sweep):
            return
        for trial in known:
            spool = os.path.join(self.sweep, trial["name"], "tracking")
            try:
                if (
                    trial["epochs"]
                    and not tracking.is_sent(spool)
                    and not tracking.send(spool, uri, wait_s=20)
                ):
                    return  # nor would it take the others now
            except SettingsError:  # the address has a password, which is not on record
                return

    def begin(self) -> dict[str, Any] | None:
        """The next piece for `run_trial`; None where there is none now, or (see `is_done`) ever."""
        found, self._ahead = self._ahead or self._look(), None
        if found is None:
            return None
        (piece, trial), config = found, self.config
        name = space.trial_name(trial)
        self._tell_stage(piece)
        self.record.began(name, self._gpus)
        self._running.add(name)
        until = config.rungs[piece.rung] if piece.rung + 1 < len(config.rungs) else 0
        own = {**flat(trial), "parent_run": self._parent, "until_epoch": until}
        if config.trials_per_gpu > 1:
            own |= {"workers": 1, "gpu_share": 1 / config.trials_per_gpu}
        own["threads"] = trial.place.threads or self._threads
        del own["tracking_uri"]  # which may hold a password, and Tune writes these into files
        return {
            "name": name,
            "piece": piece,
            "settings": json.dumps(own),
            "test_split": config.test_split if piece.stage == "final" else "",
        }

    def _look(self) -> tuple[Piece, TrainConfig] | None:
        """The next piece that is not done, with its settings checked."""
        while True:
            self._look_at_budget()
            if (piece := self._search.next()) is None:
                return None
            trial = self._trial(piece)
            name = space.trial_name(trial)
            if self._is_done(piece, trial):
                self._search.record(piece, self._merits(trial))
                continue
            try:
                trial = checks.prepared(trial, self.sweep)[0]
            except SettingsError as error:
                self.record.ended(name, f"settings: {error}")
                self._search.record(piece, [], lost="failed")
                print(f"tune: {name}: {error}", file=sys.stderr)
                self._count_failure()
                continue
            return piece, trial

    def _tell_stage(self, piece: Piece) -> None:
        if piece.stage == "search" or self._told_final:
            return
        self._told_final = True
        self.record.write(final=self.pairs())
        fresh, pairs = self._search.fresh_seeds(), self._search.pairs
        first = [Piece(block.configuration, block.seeds[0], 0) for pair in pairs for block in pair]
        names = [space.trial_name(self._trial(piece, write=False)) for piece in first]
        winners = ", ".join(name.rpartition("-")[0] for name in names)
        print(
            f"tune: the search is over; the final comparison: {len(names) * len(fresh)} trainings, of "
            f"{winners} on seeds {', '.join(map(str, fresh))}",
            file=sys.stderr,
            flush=True,
        )

    def end(self, name: str, piece: Piece, error: str) -> None:
        """A piece has ended, in whatever way."""
        self._running.discard(name)
        trial = self._trial(piece, write=False)
        merits, diverged = self._merits(trial), read_json(trial.run, "failure.json")
        self.record.ended(name, error)
        if error:
            self._count_failure()
        lost = "failed" if error else "diverged" if diverged is not None else ""
        self._search.record(piece, merits, lost)
        why = error if error else diverged["message"].partition("\n")[0] if diverged is not None else ""
        self._say(name, piece, merits, f"{lost}: {why}" if lost else "")

    def _count_failure(self) -> None:
        self._failed += 1
        if self.config.max_failed_trials and self._failed >= self.config.max_failed_trials:
            self.state = "too many failures"
            self._search.stop()

    def _look_at_budget(self) -> None:
        hours, gpu_hours = self.config.hours, self.config.gpu_hours
        spent = bool(hours) and self.record.seconds > hours * 3600
        spent |= bool(gpu_hours) and self.record.gpu_seconds() > gpu_hours * 3600
        if spent and self._search.spend():
            self.state = "budget spent"
            print("tune: the budget is spent; no further training of the search begins", file=sys.stderr)

    def pairs(self) -> list[dict[str, Any]]:
        """The final comparisons, as sweep.json has them."""
        return [
            {
                "backbone": method.configuration.arm.backbone,
                "baseline": baseline.configuration.number,
                "method": method.configuration.number,
                "seeds": list(self._search.fresh_seeds()),
            }
            for baseline, method in self._search.pairs
        ]

    @property
    def is_done(self) -> bool:
        """Whether nothing runs, and nothing will."""
        return self._search.is_done

    def under_way(self) -> list[str]:
        """Folders of the trials that run now."""
        return [locations.join(self.sweep, name) for name in tuple(self._running)]

    def place(self, threads: int, gpus: float) -> None:
        """Threads and GPUs of each trial, once the cluster is known."""
        self._threads, self._gpus = threads, gpus

    def best(self) -> dict[str, Any]:
        """The best configuration, and which of its trials."""
        block = self._search.best(self._search.arms)
        if block is None:
            return {}
        number = block.configuration.number
        merits = {}
        for trial in self.record.trials.values():
            if trial["configuration"] == number:
                result = read_json(locations.join(self.sweep, trial["name"]), "result.json")
                if result is not None:  # those of the search first, as the choice was made by them
                    merit = self._of_history([result["last"]])[0]
                    merits[trial["name"]] = trial["stage"] == "search", merit
        return {"configuration": number, "trial": max(merits, key=merits.__getitem__)} if merits else {}

    def _restore(self) -> None:
        """What trials of earlier starts have come to; of a grid all trials are on record from the start."""
        trials, shared = self.record.trials, self.record.asked["shared"]
        known = {name: record.complete(self.sweep, trial, False, shared) for name, trial in trials.items()}
        for name, now in known.items():
            if now["status"] == "waiting" and not now["seconds"]:
                del trials[name]  # of an earlier space, or it comes again
        for block in self._search.blocks:
            for seed in block.seeds:
                trial = self._trial(Piece(block.configuration, seed, 0))
                if (name := space.trial_name(trial)) not in known:  # its folder may be there all the same
                    known[name] = record.complete(self.sweep, trials[name], False, shared)
        self._search.searched |= {each["seed"] for each in trials.values() if each["stage"] == "search"}
        for name, each in trials.items():
            block = self._search.known(each["backbone"], each["arm"] == "baseline", _tuples(each["values"]))
            each["configuration"] = block.configuration.number
            if each["seed"] in block.seeds:
                each["stage"] = "search"  # a final one, where more seeds are searched on now
                merits = self._of_history(known[name]["history"])
                lost = "diverged" * (known[name]["status"] == "diverged")
                if known[name]["result"] is None and not lost:
                    # Killed between its last epoch and its result: the same training goes on and writes it.
                    merits = merits[: self._search.rungs[-1] - 1]
                self._search.restore(block, each["seed"], merits, lost)
        self._search.start()
        if self._search.has_pairs:
            self.record.asked["fresh_seeds"] = list(self._search.fresh_seeds())
        self.record.asked["planned"] = self._search.planned

    def _trial(self, piece: Piece, write: bool = True) -> TrainConfig:
        configuration = piece.configuration
        trial = space.settings(self.config, configuration, piece.seed, self.sweep)
        if write:
            self.record.add(
                space.trial_name(trial),
                trial,
                stage=piece.stage,
                configuration=configuration.number,
                arm=configuration.arm.name,
                backbone=configuration.arm.backbone,
                seed=piece.seed,
                values=search.as_record(configuration.values),
            )
        return trial

    def _is_done(self, piece: Piece, trial: TrainConfig) -> bool:
        if read_json(trial.run, "failure.json") is not None and piece.stage == "final":
            return True
        measured = piece.stage == "search" or not self.config.test_split or read_json(trial.run, "test.json")
        return bool(measured) and read_json(trial.run, "result.json") is not None

    def _merits(self, trial: TrainConfig) -> list[float]:
        result = read_json(trial.run, "result.json")
        lines = (run_folder.read_text(trial.run, "metrics.jsonl") or "").splitlines()
        return self._of_history(result["history"] if result else [json.loads(line) for line in lines])

    def _of_history(self, history: list[dict[str, float]]) -> list[float]:
        metric = metric_named(self.config.train.objective)
        return [search.merit_of(run_folder.merit(epoch, metric)) for epoch in history]

    def _say(self, name: str, piece: Piece, merits: list[float], why: str) -> None:
        """A line a piece, with the time left."""
        metric = metric_named(self.config.train.objective)
        rungs = self.config.rungs
        self._done_epochs += rungs[piece.rung] - (rungs[piece.rung - 1] if piece.rung else 0)
        elapsed = time.monotonic() - self._start
        left = elapsed / self._done_epochs * max(0, self._search.epochs_left())
        what = why
        if not why:
            value = merits[-1] if metric.higher_is_better else -merits[-1]
            epoch = f", epoch {len(merits)} of {rungs[-1]}" if len(merits) < rungs[-1] else ""
            what = f"{metric.title} {metric.shown(value)}{epoch}"
        fresh = " (fresh seed)" if piece.stage == "final" else ""
        share = 100 * elapsed / max(1e-9, elapsed + left)
        print(f"{share:3.0f} %  {name:40} {what}{fresh}  {left:.0f} s left", file=sys.stderr, flush=True)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _asked(config: TuneConfig, parent: str, searched: search.Search, variants: dict[str, str]) -> Content:
    """What sweep.json says of the sweep itself."""
    train = config.train
    return {
        "store": run_folder.address(train.store),
        "objective": train.objective,
        "preset": train.preset,
        "tracking_uri": tracking.masked(train.track.tracking_uri),
        "parent_run": parent,
        "search": config.search,
        "scheduler": config.scheduler,
        "rungs": list(config.rungs),
        "axes": space.axes_told(searched.arms),
        "seeds": list(config.seeds),
        "fresh_seeds": [],
        "eval_split": train.data.eval_split,
        "test_split": config.test_split,
        "budget": {
            "trials": config.trials,
            "hours": config.hours,
            "gpu_hours": config.gpu_hours,
            "max_failed_trials": config.max_failed_trials,
        },
        "commit": commit(),
        "variants": variants,
        "shared": {**flat(train), "tracking_uri": tracking.masked(train.track.tracking_uri)},
    }
