"""Searched settings as scales of drawings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tuning.report.configurations import Configuration

LOG_DECADES = 1.5
"""Numbers that span more stand on a logarithmic scale."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A searched setting as a scale: numbers by size, evenly or by their logarithm, anything else as
    levels."""

    heading: str
    numbers: tuple[float, ...]
    """Distinct ones, rising; empty: the axis has levels."""
    levels: tuple[str, ...]
    """Distinct texts: numbers by size, then words, such as D."""

    @property
    def is_log(self) -> bool:
        """Whether its numbers span so much that they stand by their logarithm."""
        return bool(self.numbers) and (
            self.numbers[0] > 0 and math.log10(self.numbers[-1] / self.numbers[0]) > LOG_DECADES
        )

    def place(self, value: Any, text: str) -> float:
        """Between 0 and 1; the middle where all values are one."""
        if not self.numbers:
            return self.levels.index(text) / (len(self.levels) - 1) if len(self.levels) > 1 else 0.5
        low, high, here = (self._scaled(each) for each in (self.numbers[0], self.numbers[-1], float(value)))
        return (here - low) / (high - low) if high > low else 0.5

    def at(self, place: float) -> float:
        """The number that stands there, between 0 and 1."""
        low, high = self._scaled(self.numbers[0]), self._scaled(self.numbers[-1])
        here = low + place * (high - low)
        return float(10**here) if self.is_log else here

    def ticks(self) -> dict[float, str]:
        """What stands where: all values if they are few, or the ends and the middle."""
        if not self.numbers:
            return {self.place(None, text): text for text in self.levels}
        values = self.numbers
        if len(values) > 6:
            values = (values[0], self.at(0.5), values[-1])
        return {self.place(value, ""): f"{value:.3g}" for value in values}

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.is_log else value


def scales(found: Iterable[Configuration], *, varying: bool = True) -> list[Scale]:
    """Of the axes of configurations; `varying`: only those with more than one value."""
    found = list(found)
    names = dict.fromkeys(heading for each in found for heading in each.values)
    made = [_scale(name, [each for each in found if name in each.values]) for name in names]
    return [scale for scale in made if len(scale.levels) > 1 or not varying]


def _scale(heading: str, found: Sequence[Configuration]) -> Scale:
    values = {each.shown[heading]: each.values[heading] for each in found}
    numeric = {text for text, value in values.items() if _is_number(value) and _reads_as_number(text)}

    def order(text: str) -> tuple[bool, float, str]:
        return text not in numeric, float(values[text]) if text in numeric else 0.0, text

    all_numbers = len(numeric) == len(values)
    numbers = sorted({float(each.values[heading]) for each in found}) if all_numbers else []
    return Scale(heading=heading, numbers=tuple(numbers), levels=tuple(sorted(values, key=order)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _reads_as_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
