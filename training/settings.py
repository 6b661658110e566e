"""What groups of settings have in common. A group stands beside the part that reads it; `config.TrainConfig`
holds one of each, and its flags and records are flat: no two groups have a setting of the same name."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A group of settings."""

    def faults(self) -> list[str]:
        """What is wrong with it by itself, a line each."""
        return []


class Deciding(Settings):
    """Settings that decide what is computed: a run must go on with them as it was begun."""


class MethodSettings(Deciding):
    """Those of a training method, and what tables and sweeps must know of them."""

    left_open: ClassVar[tuple[str, ...]] = ()
    """Settings that a run finds for itself where they are empty; a resumed run keeps what was found."""
    axes: ClassVar[dict[str, str]] = {}
    """Settings that tell runs of the method apart in sweeps, and how a table heads them."""
    grid: ClassVar[type[Grid]]
    """Values of the axes, as flags of a sweep."""

    @property
    def is_baseline(self) -> bool:
        """Whether this is what others of the method are compared with."""
        return False

    def told(self) -> dict[str, str]:
        """The axes as tables show them: heading and value."""
        return {heading: str(getattr(self, name)) for name, heading in self.axes.items()}

    def title(self) -> str:
        """What tells the run apart from others of the method, for names of folders; empty: nothing does."""
        return ""


@dataclass(frozen=True, kw_only=True)
class Grid(Settings):
    """Values that a sweep tries, without axes of the method's own."""

    def cells(self) -> list[dict[str, Any]]:
        """Settings of each cell, by name."""
        return [{}]


MethodSettings.grid = Grid


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
