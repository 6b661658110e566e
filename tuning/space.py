"""What a sweep consists of: arms, their configurations, and the trainings of each.

An arm is a backbone with the training method or with its baseline. Both have the same part of the search
(learning rate, decay, ...), so that a gain is never one over a rival that nobody tuned; what belongs to the
method is searched in its own arm alone. A configuration is trained with every seed.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from math import prod
from typing import Any

from pipeline.errors import SettingsError
from pipeline.store import locations
from training import preparation
from training.config import TrainConfig
from training.settings import flat
from tuning import axes
from tuning.axes import Axis
from tuning.config import SET_BY_SWEEP, TuneConfig

Values = dict[str, Any]

_NO_AXES = {
    "epochs": "configurations are compared after the same number of them",
    "min_epoch_steps": "configurations are compared after the same number of epochs",
    "train_split": "a sweep trains on one split",
    "eval_split": "the choice is made on one split",
}
_LONGEST = 150
"""Characters of a trial's name: Tune appends to it, and file systems take 255 bytes."""


@dataclass(frozen=True)
class Arm:
    """A backbone with the method, or with its baseline."""

    backbone: str
    is_baseline: bool
    fixed: Values = field(hash=False)
    """Settings that make it this arm."""
    cells: tuple[Values, ...] = field(hash=False)
    """Of a method whose grid is no product of axes: its cells; otherwise one empty one."""
    axes: tuple[Axis, ...]

    @property
    def name(self) -> str:
        """baseline or method."""
        return "baseline" if self.is_baseline else "method"

    def grid(self) -> Iterator[Values]:
        """Every combination."""
        values = [axis.grid() for axis in self.axes]
        for cell, found in itertools.product(self.cells, itertools.product(*values)):
            yield cell | {axis.name: value for axis, value in zip(self.axes, found, strict=True)}

    def fits(self, values: Values) -> bool:
        """Whether values of an earlier start are a point of today's space."""
        names = {axis.name for axis in self.axes}
        cell = {name: value for name, value in values.items() if name not in names}
        return (
            names <= values.keys() and cell in self.cells and all(a.holds(values[a.name]) for a in self.axes)
        )

    @property
    def size(self) -> float:
        """How many combinations there are; infinite with a range."""
        if any(axis.kind in ("log", "uniform") for axis in self.axes):
            return float("inf")
        whole = [axis for axis in self.axes if axis.kind == "int"]
        listed = prod(len(axis.values) for axis in self.axes if axis.kind == "values")
        return len(self.cells) * listed * prod(int(axis.high - axis.low) + 1 for axis in whole)


@dataclass(frozen=True)
class Configuration:
    """One setting of an arm; its trainings differ in their seed."""

    number: int
    arm: Arm
    values: Values = field(hash=False)


def arms(config: TuneConfig) -> list[Arm]:
    """The arms of a sweep: for each backbone the baseline, where the method has one, and the method.

    Raises:
        SettingsError: an axis that a sweep has already, or that is named twice.
    """
    method = config.train.method
    given = [axes.parse(text, config.train.objective) for text in config.axis]
    _check(config, given)
    own = {each.name for each in fields(method)}
    shared = tuple(axis for axis in given if axis.name not in own)
    grid, cells = _of_grid(config, given)
    methods = (*grid, *(axis for axis in given if axis.name in own))
    found = []
    for backbone in config.backbones or (config.train.model.backbone,):
        if method.baseline:
            found.append(Arm(backbone, True, dict(method.baseline), ({},), shared))
        if cells:
            found.append(Arm(backbone, False, {}, cells, methods + shared))
    return found


def axes_told(arms: Sequence[Arm]) -> dict[str, str]:
    """What varies, as `--axis` has it."""
    return {axis.name: axis.text for arm in arms for axis in arm.axes}


def _of_grid(config: TuneConfig, given: Sequence[Axis]) -> tuple[list[Axis], tuple[Values, ...]]:
    """The method's own grid, as axes where it is a product of them, and its cells where it is not; no cells
    at all where it holds nothing but the baseline."""
    cells: list[Values] = []
    for cell in config.grid.cells():
        left = {name: value for name, value in cell.items() if name not in {axis.name for axis in given}}
        if left not in cells and not all(_baselines(config, cell, given)):
            cells.append(left)
    names = list(dict.fromkeys(name for cell in cells for name in cell))
    values = {name: tuple(dict.fromkeys(cell[name] for cell in cells if name in cell)) for name in names}
    is_product = len(cells) == prod(len(each) for each in values.values())
    if cells and is_product and all(cell.keys() == set(names) for cell in cells):
        return [Axis(name, each) for name, each in values.items()], ({},)
    return [], tuple(cells)


def _check(config: TuneConfig, given: list[Axis]) -> None:
    names = Counter(axis.name for axis in given)
    faults = [f"axis={name}: named twice." for name, count in names.items() if count > 1]
    faults += [f"axis={name}: {SET_BY_SWEEP[name].rstrip('?')}." for name in names if name in SET_BY_SWEEP]
    faults += [f"axis={name}: {why}; leave it out." for name, why in _NO_AXES.items() if name in names]
    if faults:
        raise SettingsError("\n".join(faults))
    named = " and ".join(axis.name for axis in given if axis.name in config.train.method.baseline)
    found = [{*_baselines(config, cell, given)} for cell in config.grid.cells()]
    # What is neither baseline nor method throughout would be trained twice.
    if named and found and (any(len(each) > 1 for each in found) or all(each == {True} for each in found)):
        message = f"axis={named}: a value of it is the baseline, which is there in any case."
        raise SettingsError(message)


def _baselines(config: TuneConfig, cell: Values, given: Sequence[Axis]) -> list[bool]:
    """Whether a cell of the method's grid is the baseline, with each value of the axes that decide it."""
    own = [axis for axis in given if axis.name in config.train.method.baseline]
    ends = [axis.values if axis.kind == "values" else (axis.low,) for axis in own]
    names, shared = [axis.name for axis in own], flat(config.train) | cell
    return [
        bool(TrainConfig.of(**shared | dict(zip(names, values, strict=True))).method.is_baseline)
        for values in itertools.product(*ends)
    ]


def settings(config: TuneConfig, configuration: Configuration, seed: int, sweep: str) -> TrainConfig:
    """One training: the settings, with a run folder of its own below `sweep`.

    Trials log no models: the sweep logs its best one.
    """
    own = {"backbone": configuration.arm.backbone, "seed": seed, "log_artifacts": "none", "register_as": ""}
    shared = flat(config.train)
    trial = TrainConfig.of(**shared | configuration.arm.fixed | configuration.values | own)
    return trial.but(run=locations.join(sweep, _name(trial, configuration)))


def check_names(trials: list[TrainConfig]) -> None:
    """Raises SettingsError where two trainings would share a folder."""
    names = Counter(trial_name(trial) for trial in trials)
    if twice := [name for name, count in names.items() if count > 1]:
        message = (
            f"trials of one name, which would share a folder: {', '.join(twice)}; leave one of each out of "
            "the grid."
        )
        raise SettingsError(message)


def _name(trial: TrainConfig, configuration: Configuration) -> str:
    """The method's own name of a training, and what further axes it has."""
    told = set(trial.method.axes) if trial.method.title() else set()
    # By name: the same axes in another order are the same sweep.
    further = [f"{name}{value}" for name, value in sorted(configuration.values.items()) if name not in told]
    head, _, seed = preparation.title(trial).rpartition("-")
    name = "-".join([head, *(re.sub("[^A-Za-z0-9._+-]", "_", each) for each in further)])
    if len(name) > _LONGEST:
        name = f"{name[:_LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return f"{name}-{seed}"


def trial_name(trial: TrainConfig) -> str:
    """backbone-weight-dimension-seed, or backbone-baseline-seed, with further axes before the seed: the name
    of its folder.

    A backbone of the hub or a folder is pinned after its trial was named.
    """
    return locations.split_options(trial.run)[0].rstrip("/").rpartition("/")[2]
