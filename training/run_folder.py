"""A run's folder, on a disk or s3://: what it says of the run, and how that is read again.

config.json holds all settings and a version. A setting that an older release did not know has the value that
stands for what that release did; one that this release does not know ends in an error, since nothing can be
said of what it did.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from typing import Any

from pipeline.errors import MissingError, OtherSettingsError, SettingsError
from pipeline.store import Store, files, locations
from training import tracking
from training.config import NO_SETTINGS, TrainConfig
from training.objectives.metric import Metric
from training.objectives.registry import metric_named
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
    recipe = plain | (known().get(config.preset, {}) if recorded.get("preset") == config.preset else {})
    open_ = {n for n in plain if n not in recorded and given[n] in (plain[n], recipe[n])}
    if config.preset in FORMER and recorded.get("preset") == config.preset:
        for last, former in FORMER[config.preset]:
            if _recipes(recorded) <= last:
                # Begun when the recipe said something else; what it says now was not asked for.
                # A recipe's settings of one method are no other's.
                mine = former.keys() & before.keys() & recipe.keys()
                open_ |= {n for n in mine if before[n] == former[n] and given[n] == recipe[n]}
    for name in (*config.method.left_open, "init_state"):
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
    few = then.data.shots or then.data.class_half != "all"
    drawn = before.get("class_shrinkage") and not then.method.is_baseline
    if "min_epoch_steps" not in recorded and few and drawn:
        message = (
            f"run={config.run}: was begun when means of classes were those of the whole split, also of "
            "pictures that --shots and --class-half leave out; they are not any more. Go on with the release "
            "that began it, or pass another --run."
        )
        raise SettingsError(message)
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
