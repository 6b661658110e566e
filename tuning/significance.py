"""Paired comparison over seeds: same recipe, same seed, a setting of the method against its baseline; mean
difference with an interval."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from training.run_folder import judged_by, merit
from tuning.cells import Cell, cell_of


@dataclass(frozen=True, kw_only=True)
class Paired:
    """A setting minus the baseline, in units of the metric, over the seeds that both have."""

    cell: Cell
    seeds: list[int]
    baseline: list[float]
    method: list[float]
    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """What the interval allows to say."""
        if math.isinf(self.low):
            return "too few seeds for an interval"
        if self.low > 0:
            return "a gain"
        return "a loss" if self.high < 0 else "no difference shown"


def paired(trials: list[dict[str, Any]], *, which: str = "last", confidence: float = 0.95) -> list[Paired]:
    """Every setting against its baseline; two-sided Student interval of the mean difference.

    Args:
        trials: those of sweep.json that have a result.
        which: `last` epoch's top-1, or `best` epoch's.
        confidence: of the interval.
    """
    scores: dict[Cell, dict[int, float]] = {}
    for trial in trials:
        config, result = trial["config"], trial["result"]
        metric = judged_by(config)
        score = (
            merit(result["last"], metric)
            if which == "last"
            else merit({metric.name: result["best_top1"]}, metric)
        )
        scores.setdefault(cell_of(config), {})[config["seed"]] = score
    found = []
    baselines = {cell.backbone: score for cell, score in scores.items() if cell.is_baseline}
    for cell, method in scores.items():
        baseline = baselines.get(cell.backbone, {})
        seeds = sorted(method.keys() & baseline.keys())
        if seeds and not cell.is_baseline:
            found.append(_compare(cell, seeds, baseline, method, confidence))
    return found


def _compare(
    cell: Cell,
    seeds: list[int],
    baseline: dict[int, float],
    method: dict[int, float],
    level: float,
) -> Paired:
    differences = [method[seed] - baseline[seed] for seed in seeds]
    mean = statistics.fmean(differences)
    half = _half_width(differences, level)
    return Paired(
        cell=cell,
        seeds=seeds,
        baseline=[baseline[seed] for seed in seeds],
        method=[method[seed] for seed in seeds],
        mean=mean,
        low=mean - half,
        high=mean + half,
    )


def _half_width(differences: list[float], level: float) -> float:
    from scipy.stats import t

    if len(differences) < 2:
        return math.inf
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return float(t.ppf(0.5 + level / 2, len(differences) - 1)) * error
