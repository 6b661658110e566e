"""A run's folder, on a disk or s3://: what it says of the run, how that is read again, and the lines on the
screen made of it.

config.json holds all settings and a version. A setting that an older release did not know has the value that
stands for what that release did; one that this release does not know ends in an error, since nothing can be
said of what it did.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Self

from pipeline.errors import MissingError, OtherSettingsError, SettingsError
from pipeline.inspect.metrics import Watched
from pipeline.store import Store, files, locations
from training import tracking
from training.config import NO_SETTINGS, TrainConfig
from training.objectives.metric import Metric
from training.objectives.registry import SHORT_LOSSES, metric_named
from training.presets import FORMER, RECIPES, known
from training.settings import fitting, flat

Recorded = dict[str, Any]

# Raised when a setting keeps its name and changes its meaning. Records without a version are older than
# versions.
VERSION = 1

# What releases did that did not know a setting, where that is not the setting's default.
_BEFORE: Recorded = {"ema_warmup": False}


def written(
    config: TrainConfig,
    store_contents: str,
    before: Recorded | None = None,
    *,
    commit: str = "",
    variants: Mapping[str, str] | None = None,
) -> Recorded:
    """The content of config.json.

    Args:
        config: the run's settings.
        store_contents: see `Store.contents`.
        before: what it was, of a run that goes on: that tells what the run was begun with.
        commit: of the code; empty: not known.
        variants: of the store, as they are trained on; see `Facts.variants`.
    """
    masked = {"tracking_uri": tracking.masked(config.track.tracking_uri)}
    return {
        "version": VERSION,
        "recipes": RECIPES if before is None else _recipes(before),
        "store_contents": store_contents,
        "commit": commit if before is None else before.get("commit", ""),
        "variants": dict(variants or {}) if before is None else before.get("variants", dict(variants or {})),
        **flat(config),
        **masked,
    }


def _recipes(recorded: Recorded) -> int:
    """Which recipes a run was begun with (`presets.RECIPES`)."""
    return int(recorded.get("recipes", int("epoch_repeats" in recorded)))


def read_file(file: str) -> Recorded:
    """The content of a file of settings, a path or an address.

    Raises:
        SettingsError: it is not there, or no JSON object.
    """
    folder, _, name = file.rpartition("/")
    try:
        content = json.loads(locations.fetch(folder or ("/" if file.startswith("/") else "."), name))
    except (FileNotFoundError, NotADirectoryError):
        message = f"config={file}: there is no such file."
        raise MissingError(message) from None
    except (IsADirectoryError, PermissionError) as error:
        message = f"config={file}: {error.strerror or error}; name a file, such as RUN/config.json."
        raise SettingsError(message) from None
    except ValueError as error:
        message = f"config={file}: is no JSON ({error})."
        raise SettingsError(message) from None
    if not isinstance(content, dict):
        message = f'config={file}: must hold an object of settings by name, such as {{"epochs": 10}}.'
        raise SettingsError(message)
    return content


def of_file(content: Recorded, recipe: Recorded) -> Recorded:
    """The settings that a file's content gives a new run.

    Args:
        content: a record of a run, or some settings by their names.
        recipe: the settings of the preset, its name and the method's; what the file does not name has their
            value. (A record names all that its release knew; the rest is what that release did.)

    Raises:
        SettingsError: a newer release's record, names that are no settings, or values of a wrong kind.
    """
    version = content.get("version", 0)
    if not isinstance(version, int) or version > VERSION:
        message = f"version={version!r}: this release reads up to {VERSION}; use the one that wrote it."
        raise SettingsError(message)
    known = TrainConfig.kinds(recipe["objective"])
    left = {*NO_SETTINGS, "run", "parent_run"}
    given = {name: value for name, value in content.items() if name not in left}
    if "***" in str(given.get("tracking_uri", "")):  # its password is not on record
        del given["tracking_uri"]
    faults = []
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            faults.append(f"{name}: is no setting" + (f"; did you mean {close[0]}?" if close else "."))
            continue
        try:
            given[name] = fitting(known[name], value)
        except ValueError as error:
            faults.append(f"{name}={json.dumps(value)}: must be {error}.")
    if faults:
        raise SettingsError("\n".join(faults))
    names = {name: recipe[name] for name in ("preset", "objective")}
    recorded = {name: value for name, value in _BEFORE.items() if name in known}
    return (names | recorded if "version" in content else recipe) | given | names


def check_store(run: str, recorded: Recorded, store: Store) -> None:
    """Whether the store is the one that a run was begun on; early releases did not record which.

    Raises:
        OtherSettingsError: it was made anew since, at the same place, of other pictures, labels, splits or
            shards.
    """
    if recorded.get("store_contents", store.contents) != store.contents:
        message = (
            f"run={run}: was begun on another store; pass another --run.\n"
            f"  {store.uri} has other pictures, classes, splits or shards now than when the run began"
        )
        raise OtherSettingsError(message)


def settings(run: str, recorded: Recorded) -> TrainConfig:
    """The settings of a record, whichever release wrote it.

    Args:
        run: whose it is.
        recorded: the content of its config.json.

    Raises:
        ValueError: a newer release wrote it, or it holds settings that this one does not know.
    """
    version = recorded.get("version", 0)
    values = {name: recorded[name] for name in recorded if name not in NO_SETTINGS}
    known = TrainConfig.defaults(values.get("objective", "align"))
    unknown = sorted(values.keys() - known.keys())
    if version > VERSION or unknown:
        message = (
            f"run={run}: was begun by another release: its config.json has version {version}, this one reads "
            f"up to {VERSION}; settings unknown here: {', '.join(unknown) or 'none'}. Use the release that "
            "began it, or pass another --run."
        )
        raise SettingsError(message)
    before = {name: value for name, value in _BEFORE.items() if name in known}
    config = TrainConfig.of(**before | values)
    empty = () if config.method.is_baseline else config.method.left_open
    return config.but(**{name: _tracked(run, name) for name in empty if not getattr(config.method, name)})


def read(run: str) -> TrainConfig:
    """The settings that a run was made with; its store, if it is still there, must be the one that it was
    made on.

    Raises:
        FileNotFoundError: `run` is no folder of a run.
        ValueError: see `settings` and `check_store`.
    """
    try:
        text = locations.fetch(run, "config.json")
    except (FileNotFoundError, NotADirectoryError):
        message = f"run={run}: holds no config.json, so it is no run; `gpt4image train` makes one."
        raise MissingError(message) from None
    recorded = json.loads(text)
    config = settings(run, recorded)
    if Store.exists(config.store):
        check_store(run, recorded, Store(config.store))
    return config


def resumed(config: TrainConfig, recorded: Recorded) -> TrainConfig:
    """The settings that a run goes on with: those given, and the recorded ones of what was left open.

    Left open is what a method finds for itself where nothing is named, such as the embeddings, and what the
    release that began the run did not know.

    Raises:
        ValueError: a setting that decides what is computed is another one now.
    """
    if (method := recorded.get("objective", "align")) != config.objective:
        raise _changed(config.run, [f"objective: {method!r} then, {config.objective!r} now"])
    then = settings(config.run, recorded)
    then = then.but(store=address(then.store))
    plain, given, before = TrainConfig.defaults(config.objective), flat(config), flat(then)
    open_ = {name for name in plain if name not in recorded and given[name] == plain[name]}
    if config.preset in FORMER and recorded.get("preset") == config.preset:
        (last, former), recipe = FORMER[config.preset], plain | known()[config.preset]
        if _recipes(recorded) <= last:
            # Begun when the recipe said something else; what it says now was not asked for.
            open_ |= {n for n in former if recorded.get(n) == former[n] and given[n] == recipe[n]}
    for name in config.method.left_open:
        if not given[name]:
            open_.add(name)
        elif not before.get(name):  # begun by a release that did not record it: who names it knows
            before[name] = given[name]
    now = config.but(**{name: before[name] for name in open_ & before.keys()})
    deciding = now.deciding()
    changed = [
        f"{name}: {before.get(name)!r} then, {value!r} now"
        for name, value in deciding.items()
        if before.get(name) != value
    ]
    if "version" not in recorded and then.optim.loss == "bce":
        message = (
            f"run={config.run}: was begun when --loss bce was a mean over classes; it is a sum now, which "
            "weighs as much as cross entropy. Go on with the release that began it, or pass another --run."
        )
        raise SettingsError(message)
    if changed:
        raise _changed(config.run, changed)
    return now


def _changed(run: str, lines: list[str]) -> OtherSettingsError:
    listed = "\n  ".join(lines)
    return OtherSettingsError(f"run={run}: was begun with other settings; pass another --run.\n  {listed}")


def address(folder: str) -> str:
    """A folder's path from the root, or a URI as it is: workers have working directories of their own."""
    return folder.rstrip("/") if "://" in folder else os.path.abspath(os.path.expanduser(folder))


def headline(metrics: Mapping[str, float], name: str = "top1") -> float:
    """A metric of an epoch, of the weights that an export takes: those of the moving average, where there is
    one."""
    return metrics.get(f"ema_{name}", metrics[name])


def judged_by(recorded: Mapping[str, Any]) -> Metric:
    """What a run is judged by, from its settings as they are on record."""
    return metric_named(recorded.get("objective", "align"))


def merit(metrics: Mapping[str, float], metric: Metric) -> float:
    """The metric of an epoch, so that more is better."""
    return headline(metrics, metric.name) * (1 if metric.higher_is_better else -1)


def headline_name(config: TrainConfig) -> str:
    """The name that the metric has in every epoch of a run."""
    name = metric_named(config.objective).name
    return f"ema_{name}" if config.optim.ema else name


def _tracked(run: str, name: str) -> str:
    """What MLflow was told that a run found, such as its embeddings, for releases that recorded an empty
    name; empty where nothing is known."""
    if not locations.is_local(run):
        return ""
    try:  # the first record is the run's creation
        line = locations.fetch(run, "tracking/journal.jsonl", 2**16).partition(b"\n")[0]
        return str(json.loads(line)["tags"][name])
    except (OSError, ValueError, KeyError):
        return ""


def read_json(run: str, name: str) -> dict[str, Any] | None:
    """A JSON file of a run; None where there is none."""
    text = read_text(run, name)
    if text is None:
        return None
    content: dict[str, Any] = json.loads(text)
    return content


def write_json(run: str, name: str, content: dict[str, Any]) -> None:
    """Writes a JSON file of a run, whole or not at all."""
    write_text(run, name, json.dumps(content, indent=2) + "\n")


def write_text(run: str, name: str, text: str) -> None:
    """Writes a text file of a run, whole or not at all."""
    filesystem, root = locations.resolve(run)
    lasting = name != "progress.json"  # written every few seconds, and of no use after a power loss
    files.write_whole(filesystem, f"{root}/{name}", text.encode(), lasting)


def read_text(run: str, name: str) -> str | None:
    """A text file of a run; None where there is none."""
    if not run:
        return None
    try:
        return locations.fetch(run, name).decode()
    except FileNotFoundError:
        return None


def epochs_told(run: str) -> int:
    """How many epochs metrics.jsonl tells of."""
    return len((read_text(run, "metrics.jsonl") or "").splitlines())


@contextmanager
def waits(run: str, *, aloud: bool) -> Iterator[Callable[[str], None]]:
    """Where a run's wait for room is told: here, or, of a process that nobody hears, in its folder
    (waiting.json), for whoever started it (`Listener`)."""

    def say(text: str) -> None:
        if aloud:
            print(text, file=sys.stderr, flush=True)
        else:
            write_json(run, "waiting.json", {"told": text})

    try:
        yield say
    finally:
        if not aloud and read_json(run, "waiting.json") is not None:
            filesystem, path = locations.resolve(run)
            filesystem.delete_file(f"{path}/waiting.json")


class Listener:
    """Prints what runs that nobody hears say while they wait for room.

    Args:
        runs: gives those that are under way.
        pause: seconds between two looks.
    """

    def __init__(self, runs: Callable[[], Iterable[str]], pause: float = 5.0) -> None:
        self._runs = runs
        self._told: dict[str, str] = {}
        self._pause = pause
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="waits", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _listen(self) -> None:
        while not self._stop.wait(self._pause):
            for run in self._runs():
                with suppress(OSError, ValueError):
                    now = (read_json(run, "waiting.json") or {"told": ""})["told"]
                    if now and now != self._told.get(run):
                        print(now, file=sys.stderr, flush=True)
                    self._told[run] = now


def label(run: str) -> str:
    """What a run is called where its address may not be seen: by its folder's name, and what tells it from
    others of that name."""
    return f"{run.rpartition('/')[2]}-{hashlib.sha256(run.encode()).hexdigest()[:6]}"


class Follower:
    """Prints a line an epoch and a bar of the present one, from what rank 0 writes into the run's folder.

    With `watch` Prometheus hears the same: from here, so that it costs the workers nothing.
    """

    def __init__(
        self, run: str, epochs: int, *, show: bool, watch: bool = False, metric: Metric | None = None
    ) -> None:
        self._run, self._epochs, self._show = run, epochs, show
        self._watched = Watched(watch, run=label(run))
        self._metric = metric or Metric()
        self._follows = show or watch
        self._shown = 0
        self._step = 0.0  # of the latest epoch that Prometheus knows
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Follower:
        self._shown = len(self._lines()) if self._follows else 0  # what an earlier start has printed
        if self._shown and self._show:
            print(
                f"train: {self._run} goes on after epoch {self._shown} of {self._epochs}",
                file=sys.stderr,
                flush=True,
            )
        self._watched.show("training_epochs", self._epochs)
        self._watched.show("training_epoch", self._shown)
        if self._follows:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._follows:
            self._stop.set()
            self._thread.join()
        self._watched.end()

    def _lines(self) -> list[str]:
        return (read_text(self._run, "metrics.jsonl") or "").splitlines()

    def _follow(self) -> None:
        from tqdm import tqdm

        pause = 0.5 if locations.is_local(self._run) else 5.0
        told = 0.0
        waited = 0.0
        with tqdm(
            disable=not (self._show and sys.stderr.isatty()),
            bar_format="{desc}",
            leave=False,
            file=sys.stderr,
        ) as bar:
            while True:
                stopping = self._stop.wait(pause)
                waited += pause
                lines = self._lines()
                for line in lines[self._shown :]:
                    self._watch_epoch(json.loads(line))
                    if self._show:
                        tqdm.write(self._epoch_line(json.loads(line)), file=sys.stderr)
                    told = waited
                self._shown = max(self._shown, len(lines))
                if stopping:
                    return
                now = read_json(self._run, "progress.json")
                if now is None:
                    continue
                if now["step"] > self._step:
                    self._watched.show("training_step", now["step"])
                    self._watched.show("training_images_per_second", now["images_per_s"])
                bar.set_description_str(self._step_line(now))
                if self._show and bar.disable and waited - told > 60:  # a log, not a screen: a line a minute
                    print(self._step_line(now), file=sys.stderr, flush=True)
                    told = waited

    def _watch_epoch(self, m: dict[str, float]) -> None:
        if not self._watched.on:
            return
        self._watched.show("training_epoch", m["epoch"])
        self._step = m["step"]
        self._watched.show("training_step", m["step"])
        self._watched.show("training_images_per_second", m["images_per_s"])
        self._watched.show("training_score", headline(m, self._metric.name), metric=self._metric.name)
        for part in ("loss", *SHORT_LOSSES):
            if part in m:
                self._watched.show("training_loss", m[part], part=part)

    def _epoch_line(self, m: dict[str, float]) -> str:
        left = (self._epochs - m["epoch"]) * m["seconds"]
        name, title, digits = self._metric.name, self._metric.title, self._metric.digits - 1
        losses = (
            "  ".join(f"{short} {m[full]:.3f}" for full, short in SHORT_LOSSES.items() if full in m)
            or f"loss {m['loss']:.3f}"
        )
        raw = f" (without averaging {m[name]:.{digits}f})" if f"ema_{name}" in m else ""
        top5 = f"top-5 {headline(m, 'top5'):.1f}  " if "top5" in m else ""
        return (
            f"epoch {m['epoch']:>3.0f}/{self._epochs}  {losses}  {title} {headline(m, name):.{digits}f}{raw} "
            f" {top5}{m['images_per_s']:.0f} img/s  {_clock(left)} left"
        )

    def _step_line(self, now: dict[str, float]) -> str:
        left = (now["steps"] - now["step"]) * now["batch"] / now["images_per_s"]
        where = f"step {now['step']:.0f}/{now['steps']:.0f}  loss {now['loss']:.3f}"
        return f"{where}  {now['images_per_s']:.0f} img/s  {_clock(left)} left"


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
