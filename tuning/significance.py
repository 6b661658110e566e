"""Paired comparison over seeds: same recipe, same seed, weight 0 against weight above 0; mean difference with
an interval."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from training.run_folder import judged_by, merit


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Aligned minus baseline, in percentage points of top-1, over the seeds that both have."""

    backbone: str
    weight: float
    dim: int
    seeds: list[int]
    baseline: list[float]
    aligned: list[float]
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
    """Every aligned setting against its baseline; two-sided Student interval of the mean difference.

    Args:
        trials: those of sweep.json that have a result.
        which: `last` epoch's top-1, or `best` epoch's.
        confidence: of the interval.
    """
    scores: dict[tuple[str, float, int], dict[int, float]] = {}
    for trial in trials:
        config, result = trial["config"], trial["result"]
        weight = config["alignment_weight"]
        key = (config["backbone"], weight, config["projection_dim"] if weight else 0)
        metric = judged_by(config)
        score = (
            merit(result["last"], metric)
            if which == "last"
            else merit({metric.name: result["best_top1"]}, metric)
        )
        scores.setdefault(key, {})[config["seed"]] = score
    found = []
    for (backbone, weight, dim), aligned in scores.items():
        baseline = scores.get((backbone, 0.0, 0), {})
        seeds = sorted(aligned.keys() & baseline.keys())
        if weight and seeds:
            found.append(_compare(backbone, weight, dim, seeds, baseline, aligned, confidence))
    return found


def _compare(
    backbone: str,
    weight: float,
    dim: int,
    seeds: list[int],
    baseline: dict[int, float],
    aligned: dict[int, float],
    level: float,
) -> Paired:
    differences = [aligned[seed] - baseline[seed] for seed in seeds]
    mean = statistics.fmean(differences)
    half = _half_width(differences, level)
    return Paired(
        backbone=backbone,
        weight=weight,
        dim=dim,
        seeds=seeds,
        baseline=[baseline[seed] for seed in seeds],
        aligned=[aligned[seed] for seed in seeds],
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
