"""What a sweep may vary: any setting of a training, as a list of values or as a range to draw from."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pipeline.errors import SettingsError
from training.config import TrainConfig
from training.settings import Free
from tuning.config import SET_BY_SWEEP

_RANGE = re.compile(r"(log|uniform|int)\(([^()]*)\)")
_GRID_POINTS = 3
"""Of a range in a grid, where it does not say how many."""


@dataclass(frozen=True)
class Axis:
    """A setting and what it may be: `values`, or a range from `low` to `high`, both included."""

    name: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    kind: Literal["values", "log", "uniform", "int"] = "values"
    points: int = _GRID_POINTS

    @property
    def text(self) -> str:
        """As `--axis` has it behind the name."""
        if self.kind == "values":
            return ",".join(str(value) for value in self.values)
        points = f",{self.points}" if self.points != _GRID_POINTS else ""
        return f"{self.kind}({self.low:g},{self.high:g}{points})"

    def holds(self, value: Any) -> bool:
        """Whether a value is one of its."""
        if self.kind == "values":
            return value in self.values
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and self.low <= value <= self.high

    def inside(self, value: float) -> float:
        """A number with three significant digits, in the range still."""
        return min(max(tidy(value), self.low), self.high)

    def grid(self) -> tuple[Any, ...]:
        """The values that a grid has: of a range, `points` evenly spread ones."""
        if self.kind == "values":
            return self.values
        count = self.points if self.kind != "int" else min(self.points, int(self.high - self.low) + 1)
        shares = [place / max(1, count - 1) for place in range(count)]
        if self.kind == "log":
            return tuple(self.inside(self.low * (self.high / self.low) ** share) for share in shares)
        spread = [self.low + (self.high - self.low) * share for share in shares]
        return tuple(
            dict.fromkeys(round(value) if self.kind == "int" else self.inside(value) for value in spread)
        )


def tidy(value: float) -> float:
    """To three significant digits: what stands in a folder's name is then the value itself."""
    return float(f"{value:.3g}")


def parse(text: str, objective: str) -> Axis:
    """An axis from `NAME=VALUE,VALUE` or `NAME=log(LOW,HIGH)`, `uniform(...)`, `int(...)`, where a third
    number says how many points a grid has.

    Raises:
        SettingsError: it names no setting that decides a training, or its values are none of that setting.
    """
    name, separator, given = text.partition("=")
    name = name.strip().removeprefix("--").replace("-", "_").lower()
    if not separator or not given.strip():
        message = f"axis={text!r}: must be NAME=VALUE,VALUE or NAME=log(LOW,HIGH), such as lr=log(1e-4,1e-2)."
        raise SettingsError(message)
    kinds = _kinds(objective)
    if name not in kinds:
        message = f"axis={text!r}: {_why_none(name, kinds, objective)}".rstrip(".?") + "."
        raise SettingsError(message)
    if match := _RANGE.fullmatch(given.strip()):
        return _range(text, name, match[1], match[2], kinds[name])
    values = tuple(_value(text, each.strip(), kinds[name]) for each in given.split(","))
    if len(set(values)) != len(values):
        message = f"axis={text!r}: give each value once."
        raise SettingsError(message)
    return Axis(name, values)


def _why_none(name: str, kinds: Mapping[str, Any], objective: str) -> str:
    flag = name.replace("_", "-")
    if name in SET_BY_SWEEP:
        return f"a sweep sets {name} for each trial; {SET_BY_SWEEP[name].rstrip('?')}"
    if name in TrainConfig.kinds(objective):
        return f"{name} is the same for all trials of a sweep; pass --{flag}, and another --sweep for another"
    close = difflib.get_close_matches(name, kinds, n=3)
    return f"{name} is no setting; " + (
        f"did you mean {', '.join(close)}" if close else "see gpt4image train --help"
    )


def _range(text: str, name: str, kind: Any, numbers: str, type_of: Any) -> Axis:
    try:
        given = [float(each) for each in numbers.split(",")]
    except ValueError:
        given = []
    whole = type_of is int
    faults = []
    if len(given) not in (2, 3) or not all(math.isfinite(each) for each in given):
        faults.append(f"{kind}(...) takes LOW,HIGH and perhaps the points of a grid")
    elif given[0] >= given[1]:
        faults.append("LOW must be below HIGH")
    elif kind == "log" and given[0] <= 0:
        faults.append("LOW must be above 0 on a logarithmic scale")
    elif kind == "int" and not all(each == int(each) for each in given[:2]):
        faults.append("LOW and HIGH must be whole numbers")
    elif len(given) == 3 and (given[2] != int(given[2]) or given[2] < 2):
        faults.append("a grid has 2 points or more")
    if type_of not in (int, float):
        faults.append(f"{name} is no number; list its values")
    elif whole != (kind == "int"):
        faults.append(f"{name} is a {'whole ' if whole else ''}number; use {'int' if whole else 'log'}(...)")
    if faults:
        message = f"axis={text!r}: {'; '.join(faults)}."
        raise SettingsError(message)
    points = int(given[2]) if len(given) == 3 else _GRID_POINTS
    return Axis(name, low=given[0], high=given[1], kind=kind, points=points)


def _value(text: str, given: str, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        if given in get_args(kind):
            return given
        message = f"axis={text!r}: {given!r} is none of {', '.join(get_args(kind))}."
        raise SettingsError(message)
    try:
        if kind is bool:
            return {"true": True, "false": False}[given.lower()]
        return kind(given)
    except (KeyError, ValueError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "such a value")
        message = f"axis={text!r}: {given!r} must be {wanted}."
        raise SettingsError(message) from None


def _kinds(objective: str) -> Mapping[str, Any]:
    """The type of each setting that decides what a training does."""
    groups = TrainConfig.groups(objective)
    deciding = [kind for kind in groups.values() if not issubclass(kind, Free)]
    hints = {name: hint for kind in deciding for name, hint in get_type_hints(kind).items()}
    names = {each.name for kind in deciding for each in fields(kind)}
    plain = (bool, int, float, str)
    return {name: hints[name] for name in names if hints[name] in plain or get_origin(hints[name]) is Literal}
