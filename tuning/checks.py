"""What can be found wrong with a sweep before its first trial starts."""

from __future__ import annotations

import shlex
from typing import Any

from pipeline.errors import OtherSettingsError, SettingsError
from pipeline.store import Store, locations
from training import preparation, run_folder
from training.config import TrainConfig
from training.run_folder import read_json
from training.settings import flat
from tuning import record, space
from tuning.cells import cell_of
from tuning.config import TuneConfig

Variants = dict[str, str]

_MOST_PREPARED = 50


def checked(config: TuneConfig, sweep: str) -> Variants:
    """Every fault that can be found before a trial starts: of each value by itself, of whole configurations
    where a grid has not too many. Returns the variants of the store that are trained on."""
    found: Variants = {}
    names: list[TrainConfig] = []
    for arm in space.arms(config):
        first = next(arm.grid())
        tried = [first]
        for axis in arm.axes:
            ends = axis.values if axis.kind == "values" else (axis.low, axis.high)
            tried += [first | {axis.name: value} for value in ends if value != first[axis.name]]
        if config.search == "grid":
            cells = list(arm.grid())
            names += [_plain(config, arm, values, sweep) for values in cells]
            tried = cells if len(cells) <= _MOST_PREPARED else tried
        for values in tried:
            found |= prepared(_plain(config, arm, values, sweep), sweep)[1]
    space.check_names(names)
    if config.test_split:
        Store(run_folder.address(config.train.store)).split_shards(config.test_split)
    return {name: value for name, value in found.items() if value}


def _plain(config: TuneConfig, arm: space.Arm, values: space.Values, sweep: str) -> TrainConfig:
    return space.settings(config, space.Configuration(0, arm, values), config.seeds[0], sweep)


def check_test_split(config: TuneConfig, sweep: str) -> None:
    """A sweep's final comparison is measured on one split: figures of two would stand side by side."""
    before = (read_json(sweep, "sweep.json") or {}).get("test_split", "")
    if before and before != config.test_split:
        message = (
            f"test_split={config.test_split!r}: the sweep's final comparison was begun on {before}; pass "
            "that, or another --sweep."
        )
        raise SettingsError(message)


def prepared(trial: TrainConfig, sweep: str) -> tuple[TrainConfig, Variants]:
    """A trial's settings as its run will have them, checked, and the variants that it is trained on."""
    recorded = read_json(trial.run, "config.json") or {}
    if recorded and trial.method.is_baseline and _was_baseline(recorded):  # axes decide nothing
        trial = trial.but(**{name: recorded[name] for name in trial.method.axes if name in recorded})
    try:
        return preparation.prepare(trial)
    except OtherSettingsError as error:
        raise _other_settings(trial, sweep, error) from None


def _was_baseline(recorded: dict[str, Any]) -> bool:
    return cell_of(recorded).is_baseline


def _other_settings(trial: TrainConfig, sweep: str, error: OtherSettingsError) -> OtherSettingsError:
    listed = str(error).partition("\n")[2]
    message = (
        f"sweep={sweep}: its trial {space.trial_name(trial)} was begun with other settings; pass another "
        f"--sweep. In the same one axes, seeds, backbones and budgets may have other values.\n{listed}"
    )
    return OtherSettingsError(message)


def _check_alike(then: TrainConfig, now: TrainConfig) -> None:
    """A run goes on with what its recipe said when it began; new trials have what it says now.

    Raises:
        OtherSettingsError: that is something else.
    """
    before, left_open = then.deciding(), {*now.method.left_open, "init_state"}
    if not now.optim.ema:
        left_open.add("ema_warmup")  # of an average that there is not
    changed = {
        name: value
        for name, value in now.deciding().items()
        if before[name] != value and name not in left_open
    }
    if changed:
        lines = [f"  {name}: {before[name]!r} then, {value!r} now" for name, value in changed.items()]
        flags = " ".join(_flag(name, before[name]) for name in changed)
        raise OtherSettingsError("\n".join(["", *lines, f"  the sweep goes on with {flags}"]))


def _flag(name: str, value: Any) -> str:
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{dashed}" if value else f"--no-{dashed}"
    parts = value if isinstance(value, tuple) else (value,)
    return shlex.join([f"--{dashed}", *map(str, parts)])


def check_earlier(config: TuneConfig, sweep: str) -> None:
    """Trials that are there stand beside those of this start and are compared with them: they must share its
    settings, but for the axes that they were of."""
    if read_json(sweep, "sweep.json") is None:
        return
    arms = {arm.is_baseline: arm for arm in space.arms(config)}
    today = {axis.name for arm in arms.values() for axis in arm.axes}
    for trial in record.read(sweep)["trials"]:
        run = locations.join(sweep, trial["name"])
        if (recorded := read_json(run, "config.json")) is None:
            continue
        arm = arms.get(trial["arm"] == "baseline", next(iter(arms.values())))
        base = _plain(config, arm, next(arm.grid()), sweep)
        method = base.method
        names = {"backbone", "seed", "architecture", "pretrained", *method.axes, *method.left_open}
        began = flat(run_folder.settings(run, recorded))  # also what its release did not know
        own = {name: began[name] for name in names | today | trial["values"].keys() if name in began}
        now = base.but(run=run, store=run_folder.address(base.store), **own)
        try:
            then = run_folder.resumed(now, recorded)
            _check_alike(then, now)
            run_folder.check_store(run, recorded, Store(now.store))
        except OtherSettingsError as error:
            raise _other_settings(now, sweep, error) from None
