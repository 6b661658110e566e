"""What training methods are judged by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What an epoch is judged by: a name of the evaluator's metrics, how it is written, and its direction."""

    name: str = "top1"
    title: str = "top-1"
    digits: int = 2
    """Behind the point; the line of an epoch shows one less."""
    unit: str = "%"
    """Of an axis; empty where it has none."""
    difference: str = "points of top-1"
    """What a difference of two values is called."""
    higher_is_better: bool = True

    def shown(self, value: float) -> str:
        """As tables have it."""
        return f"{value:.{self.digits}f}"

    @property
    def axis(self) -> str:
        """As plots have it."""
        return f"{self.title}, {self.unit}" if self.unit else self.title
