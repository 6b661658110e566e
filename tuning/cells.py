"""Where a trial stands in its sweep: what of the training method's axes it has, read back from its record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from training.objectives.registry import settings_of
from training.settings import restored


@dataclass(frozen=True)
class Cell:
    """Backbone and values of the axes; trials of one cell differ in their seed."""

    backbone: str
    values: tuple[Any, ...]
    """Of the axes, in the order of `headings`; of a baseline, which has none, all empty."""
    headings: tuple[str, ...] = field(compare=False)
    shown: tuple[str, ...] = field(compare=False)
    """The values as tables show them."""
    is_baseline: bool
    names: tuple[str, ...] = field(compare=False, default=())
    """Of the axes' settings."""

    @property
    def words(self) -> str:
        """Such as "weight 0.3, dim D"; empty where the method has no axes."""
        if self.is_baseline:
            return "baseline"
        return ", ".join(f"{head} {text}" for head, text in zip(self.headings, self.shown, strict=True))


def cell_of(recorded: Mapping[str, Any]) -> Cell:
    """The cell of a trial, from the content of its config.json."""
    kind = settings_of(recorded.get("objective", "align"))
    method = restored(kind, recorded)
    values = tuple(getattr(method, name) for name in kind.axes)
    told = method.told()
    return Cell(
        backbone=recorded["backbone"],
        values=("",) * len(values) if method.is_baseline else values,
        headings=tuple(told),
        shown=tuple(told.values()),
        is_baseline=method.is_baseline,
        names=tuple(kind.axes),
    )
