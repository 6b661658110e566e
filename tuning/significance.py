"""Paired comparison over seeds: same recipe, same seed, a setting of the method against its baseline; mean
difference with an interval."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from training.objectives.settings import Metric
from training.run_folder import headline, judged_by
from tuning.cells import Cell, cell_of


@dataclass(frozen=True, kw_only=True)
class Paired:
    """A setting minus the baseline, in units of the metric, over the seeds that both have."""

    cell: Cell
    metric: Metric
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
        above, below = ("a gain", "a loss") if self.metric.higher_is_better else ("a loss", "a gain")
        if self.low > 0:
            return above
        return below if self.high < 0 else "no difference shown"


def paired(trials: list[dict[str, Any]], *, which: str = "last", confidence: float = 0.95) -> list[Paired]:
    """Every setting against its baseline; two-sided Student interval of the mean difference.

    Args:
        trials: those of sweep.json that have a result; all of one training method.
        which: `last` epoch's metric, or `best` epoch's.
        confidence: of the interval.
    """
    metric = judged_by(trials[0]["config"]) if trials else Metric()
    scores: dict[Cell, dict[int, float]] = {}
    for trial in trials:
        result = trial["result"]
        score = headline(result["last"], metric.name) if which == "last" else result["best_top1"]
        scores.setdefault(cell_of(trial["config"]), {})[trial["config"]["seed"]] = score
    # Of a baseline the axes decide nothing, so that a backbone has one cell of it.
    baselines = {cell.backbone: score for cell, score in scores.items() if cell.is_baseline}
    comparisons = []
    for cell, method in scores.items():
        baseline = baselines.get(cell.backbone, {})
        seeds = sorted(method.keys() & baseline.keys())
        if not seeds or cell.is_baseline:
            continue
        differences = [method[seed] - baseline[seed] for seed in seeds]
        mean, half = statistics.fmean(differences), half_width(differences, confidence)
        comparisons.append(
            Paired(
                cell=cell,
                metric=metric,
                seeds=seeds,
                baseline=[baseline[seed] for seed in seeds],
                method=[method[seed] for seed in seeds],
                mean=mean,
                low=mean - half,
                high=mean + half,
            )
        )
    return comparisons


def half_width(differences: list[float], level: float) -> float:
    """Of the Student interval of the mean of paired differences; infinite for fewer than two."""
    from scipy.stats import t

    if len(differences) < 2:
        return math.inf
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return float(t.ppf(0.5 + level / 2, len(differences) - 1)) * error
