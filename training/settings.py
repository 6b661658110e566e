"""What groups of settings have in common. A group stands beside the part that reads it; `config.TrainConfig`
holds one of each, and its flags and records are flat: no two groups have a setting of the same name."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, cast, get_args, get_origin

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A group of settings."""

    def faults(self) -> list[str]:
        """What is wrong with it by itself, a line each."""
        return []


class Deciding(Settings):
    """Settings that decide what is computed: a run must go on with them as it was begun."""


@dataclass(frozen=True, kw_only=True)
class Grid(Settings):
    """Values that a sweep tries, a tuple a field; this one has none."""

    def cells(self) -> list[dict[str, Any]]:
        """Settings of each cell, by name."""
        return [{}]


@dataclass(frozen=True, kw_only=True)
class MethodSettings(Deciding):
    """Those of a training method, and what tables and sweeps must know of them.

    Values are None, numbers, strings, or tuples of such: they are written as JSON and compared when a run
    goes on.
    """

    own_model: ClassVar[str] = ""
    """What stands for --backbone where the method brings a model of its own and takes none of timm's."""
    left_open: ClassVar[tuple[str, ...]] = ()
    """Settings that a run finds for itself where they are empty; a resumed run keeps what was found."""
    axes: ClassVar[dict[str, str]] = {}
    """Settings that tell runs of the method apart in sweeps, and how a table heads them."""
    legend: ClassVar[dict[str, str]] = {}
    """What an axis is, for readers of a report who do not know the flags."""
    grid: ClassVar[type[Grid]] = Grid
    """Values of the axes, as flags of a sweep."""
    baseline: ClassVar[dict[str, Any]] = {}
    """Settings that make it the baseline, which every sweep has; empty: the method has none."""

    @property
    def is_baseline(self) -> bool:
        """Whether this is what others of the method are compared with; its axes decide nothing then."""
        return False

    def told(self) -> dict[str, str]:
        """The axes as tables show them: heading and value."""
        return {heading: str(getattr(self, name)) for name, heading in self.axes.items()}

    def title(self) -> str:
        """What tells the run apart from others of the method, for names of folders; empty: nothing does."""
        told = "-".join(f"{heading}{getattr(self, name)}" for name, heading in self.axes.items())
        return re.sub("[^A-Za-z0-9._-]", "_", told)


def flaws(kind: Any) -> list[str]:
    """What is wrong with the type of a method's settings."""
    if not (isinstance(kind, type) and issubclass(kind, MethodSettings)):
        return [f"settings is {kind!r} and no subclass of MethodSettings"]
    found = []
    for each, base in ((kind, MethodSettings), (kind.grid, Grid)):
        if not issubclass(each, base):
            return [f"grid is {each!r} and no subclass of Grid"]
        names = {own.name for own in fields(each)}
        hinted = {name for name, hint in inspect.get_annotations(each).items() if "ClassVar" not in str(hint)}
        found += [
            f"{name} is no field: is @dataclass missing on {each.__name__}?"
            for name in sorted(hinted - names)
        ]
        found += [
            f"{name} must be a ClassVar"
            for name in ("own_model", "left_open", "axes", "legend", "grid", "baseline")
            if name in names
        ]
    unknown = sorted(
        {*kind.left_open, *kind.axes, *kind.legend, *kind.baseline} - {own.name for own in fields(kind)}
    )
    found += [f"left_open, axes, legend or baseline name {name}, which is no setting" for name in unknown]
    found += [
        f"grid: {own.name} must have a tuple of values"
        for own in fields(kind.grid)
        if not isinstance(own.default, tuple)
    ]
    return found


def is_recordable(value: object) -> bool:
    """Whether a record gives the value back as it was."""
    if isinstance(value, tuple):
        return all(is_recordable(each) for each in value)
    return value is None or isinstance(value, bool | int | float | str)


def restored(kind: type[T], values: Mapping[str, Any]) -> T:
    """A group from settings by name, as JSON gives them back; others are left out."""
    own = {each.name: values[each.name] for each in fields(cast(Any, kind)) if each.name in values}
    return kind(**{name: _as_tuple(value) for name, value in own.items()})


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(each) for each in value) if isinstance(value, list) else value


def fitting(kind: Any, value: Any) -> Any:
    """A JSON value as a setting of a type holds it.

    Raises:
        ValueError: it is of another kind; the text says which one it must be.
    """
    origin, options = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for option in options:
            with suppress(ValueError):
                return fitting(option, value)
    elif origin is Literal:
        if value in options:
            return value
    elif origin is tuple and isinstance(value, list):
        kinds = options[:1] * len(value) if options[1:] == (...,) else options
        if len(kinds) == len(value):
            return tuple(fitting(one, each) for one, each in zip(kinds, value, strict=True))
    elif kind is float and type(value) is int:
        return float(value)
    elif kind in (bool, int, float, str, NoneType):
        if type(value) is kind:
            return value
    elif origin is not tuple:  # of a method's own, which judges it
        return _as_tuple(value)
    told = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    if origin is Literal:
        told[kind] = f"one of {', '.join(json.dumps(option) for option in options)}"
    raise ValueError(told.get(kind, f"a value of {kind}"))


class Free(Settings):
    """Settings of where a run is computed, how it is watched and kept: it may go on with others."""


def flat(settings: Any) -> dict[str, Any]:
    """Every setting by its name, those of groups among them."""
    found: dict[str, Any] = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        found |= flat(value) if is_dataclass(value) else {field.name: value}
    return found


def not_finite(settings: dict[str, Any]) -> list[str]:
    """Faults of numbers that are none."""
    wrong = {
        name: value
        for name, value in settings.items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    return [f"{name}={value}: must be a finite number." for name, value in wrong.items()]


def template_fault(name: str, template: str) -> str:
    """What is wrong with a prompt template, or nothing."""
    try:
        fits = template.format(label="\0") != template.format(label="")
    except (KeyError, IndexError, ValueError, AttributeError):
        fits = False
    return (
        ""
        if fits
        else f"{name}={template!r}: must hold {{label}} and no other braces: 'a photo of a {{label}}'."
    )


def below(least: int, settings: Any, *names: str) -> list[str]:
    """Faults of those that must be `least` or more."""
    demand = "0 or more" if least == 0 else f"at least {least}"
    values = {name: getattr(settings, name) for name in names}
    return [f"{name}={value}: must be {demand}." for name, value in values.items() if value < least]


def no_share(settings: Any, *names: str) -> list[str]:
    """Faults of those that must lie between 0 and 1."""
    values = {name: getattr(settings, name) for name in names}
    return [
        f"{name}={value}: must lie between 0 and 1." for name, value in values.items() if not 0 <= value <= 1
    ]
