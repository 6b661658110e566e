"""Where a trial stands in its sweep: its configuration.

Trials of one configuration differ in their seed; final trials are configurations of their own, since they are
never mixed with the search's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from training.objectives.metric import Metric
from training.objectives.registry import metric_named, settings_of
from training.run_folder import headline
from training.settings import restored

Trial = dict[str, Any]
Content = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """Trials that differ in their seed only."""

    number: int
    stage: str
    backbone: str
    is_baseline: bool
    values: dict[str, Any]
    """Of the searched axes, by heading; a baseline has none of the method's."""
    shown: dict[str, str]
    """The values as tables show them."""
    metric: Metric
    trials: tuple[Trial, ...]

    @property
    def words(self) -> str:
        """Such as "weight 0.3, dim D" or "baseline"."""
        told = [f"{heading} {text}" for heading, text in self.shown.items()]
        return ", ".join(["baseline", *told] if self.is_baseline else told) or "the method"

    def whole(self) -> dict[int, Trial]:
        """Trainings of full length with a finite metric, by seed."""
        return {
            trial["seed"]: trial for trial in self.trials if math.isfinite(last_score(trial, self.metric))
        }

    def scores(self) -> dict[int, float]:
        """Metric of the last epoch on the eval split by seed, of whole trainings."""
        return {seed: last_score(trial, self.metric) for seed, trial in self.whole().items()}

    @property
    def mean(self) -> float:
        """Over the seeds that are there; NaN without any."""
        scores = self.scores().values()
        return statistics.fmean(scores) if scores else math.nan

    def reached(self, epoch: int) -> float:
        """Mean metric after so many epochs, of the trials that came so far; NaN without any."""
        points = [at_epoch(trial, self.metric, epoch) for trial in self.trials]
        found = [point for point in points if math.isfinite(point)]
        return statistics.fmean(found) if found else math.nan


def score(metrics: Mapping[str, float], metric: Metric) -> float:
    """The metric of an epoch; NaN where it has none."""
    known = metric.name in metrics or f"ema_{metric.name}" in metrics
    return float(headline(metrics, metric.name)) if known else math.nan


def last_score(trial: Trial, metric: Metric) -> float:
    """Metric of the last epoch of a whole training; NaN of others."""
    return score(trial["result"]["last"], metric) if trial["result"] else math.nan


def at_epoch(trial: Trial, metric: Metric, epoch: int) -> float:
    """Metric after so many epochs; NaN where the trial has not come so far."""
    return next((score(m, metric) for m in trial["history"] if m["epoch"] == epoch), math.nan)


def metric_of(content: Content) -> Metric:
    """What the trials of a sweep are judged by."""
    return metric_named(content["objective"])


def configurations(content: Content, stage: str = "search") -> list[Configuration]:
    """Those of a stage, in the order of the record."""
    groups: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in content["trials"]:
        if trial["stage"] == stage:
            key = (trial["backbone"], trial["arm"], trial["configuration"])
            groups.setdefault(key, []).append(trial)
    return [
        Configuration(
            number=number,
            stage=stage,
            backbone=backbone,
            is_baseline=arm == "baseline",
            values={heading_of(name, content): value for name, value in trials[0]["values"].items()},
            shown=shown_values(trials[0]),
            metric=metric_of(content),
            trials=tuple(trials),
        )
        for (backbone, arm, number), trials in groups.items()
    ]


def heading_of(name: str, content: Content) -> str:
    """How tables head a setting: as the method says it, or by its flag."""
    return settings_of(content["objective"]).axes.get(name, name.replace("_", "-"))


def legend(content: Content) -> list[tuple[str, str]]:
    """What the headings of a method's own settings mean."""
    kind = settings_of(content["objective"])
    return [(heading, kind.legend[name]) for name, heading in kind.axes.items() if name in kind.legend]


def shown_values(trial: Trial) -> dict[str, str]:
    """The values of the searched axes as tables show them, by heading; the method says how its own look."""
    kind = settings_of(trial["config"].get("objective", "align"))
    told = restored(kind, trial["config"]).told()
    return {
        (heading := kind.axes.get(name, name.replace("_", "-"))): told.get(heading, shown_value(value))
        for name, value in trial["values"].items()
    }


def shown_value(value: Any) -> str:
    """A value as tables show it: numbers with four significant digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(shown_value, value)) if isinstance(value, list | tuple) else str(value)


def headings(content: Content) -> list[str]:
    """Of the searched axes that any trial has, in their order."""
    return list(dict.fromkeys(heading for trial in content["trials"] for heading in shown_values(trial)))


def best_of(found: Iterable[Configuration]) -> Configuration | None:
    """The best mean among those with the most seeds, so that none wins by a single lucky one; None where no
    training is whole."""
    ranked = [each for each in found if each.scores()]
    most = max((len(each.scores()) for each in ranked), default=0)
    sign = 1 if ranked and ranked[0].metric.higher_is_better else -1
    return max(
        (each for each in ranked if len(each.scores()) == most), key=lambda c: sign * c.mean, default=None
    )
