"""What paired differences over seeds allow to say: intervals, p-values, their correction, seeds needed.

Functions of numbers alone; which differences there are is `comparison.py`'s. A difference is a setting minus
the baseline at the same seed, in units of the metric.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

FEWEST_SEEDS = 3
"""Below this nothing is tested: of two differences the deviation is a guess of one degree of freedom."""
LEVEL = 0.95
"""Of every interval."""
ERROR = 0.05
"""Chance of a false alarm that is taken, over all comparisons together."""
POWER = 0.8
"""With which a difference is to be seen; Cohen, Statistical Power Analysis, 2nd ed. 1988, 2.4."""

_MOST_SEEDS = 100_000


def deviation(differences: Sequence[float]) -> float:
    """Sample deviation; 0.0 where all are equal but for rounding, NaN for fewer than two or with a NaN."""
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return math.nan
    found = statistics.stdev(differences)
    return found if found > 1e-9 * max(map(abs, differences)) else 0.0


def student_interval(differences: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Two-sided interval of the mean difference: mean -+ t(n-1) s / sqrt(n).

    Student, The probable error of a mean, Biometrika 6, 1908. Without end where it says nothing: for fewer
    than two differences, and where all are equal (one without width would be no evidence); NaN with a NaN.
    """
    from scipy.stats import t

    spread = deviation(differences)
    if any(map(math.isnan, differences)):
        return math.nan, math.nan
    if not spread > 0:
        return -math.inf, math.inf
    count = len(differences)
    half = float(t.ppf(0.5 + level / 2, count - 1)) * spread / math.sqrt(count)
    mean = statistics.fmean(differences)
    return mean - half, mean + half


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p of "the mean difference is zero", by the paired t-test; NaN for fewer than FEWEST_SEEDS or
    with a NaN.

    Where all differences are equal t has no meaning, and the exact sign test takes its place (Dixon and Mood,
    The statistical sign test, JASA 41, 1946): 2 / 2^n, so that six seeds or more can show something.
    """
    from scipy.stats import t

    count, spread = len(differences), deviation(differences)
    if count < FEWEST_SEEDS or math.isnan(spread):
        return math.nan
    mean = statistics.fmean(differences)
    if spread == 0:
        return 2.0 ** (1 - count) if mean else 1.0
    return float(2 * t.sf(abs(mean) / (spread / math.sqrt(count)), count - 1))


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for there being several: the chance of a single false alarm among all of them stays
    below the level. NaN (not tested) stays NaN and does not count.

    Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6, 1979;
    the comparisons may depend on each other, as those with one baseline do.
    """
    tested = sorted((value, place) for place, value in enumerate(values) if not math.isnan(value))
    adjusted, least = [math.nan] * len(values), 0.0
    for rank, (value, place) in enumerate(tested):
        least = max(least, min(1.0, (len(tested) - rank) * value))
        adjusted[place] = least
    return adjusted


def verdict(mean: float, adjusted: float, *, higher_is_better: bool = True, error: float = ERROR) -> str:
    """What may be said of a difference: by the corrected p, not by the interval, which knows nothing of the
    other comparisons."""
    if math.isnan(adjusted):
        return "too few seeds"
    if adjusted >= error or mean == 0:
        return "no difference shown"
    return "a gain" if (mean > 0) == higher_is_better else "a loss"


def power(effect: float, seeds: int, level: float = LEVEL) -> float:
    """Chance that the paired t-test of so many seeds shows a difference of `effect` deviations.

    Exact, by the noncentral t (Cohen 1988, 2.5; Owen, Biometrika 55, 1968).
    """
    from scipy.stats import nct, t

    bound = float(t.ppf(0.5 + level / 2, seeds - 1))
    shift = abs(effect) * math.sqrt(seeds)
    above = float(nct.sf(bound, seeds - 1, shift))
    below = float(nct.cdf(-bound, seeds - 1, shift))
    return (1.0 if math.isnan(above) else above) + (0.0 if math.isnan(below) else below)


def seeds_needed(spread: float, difference: float, *, level: float = LEVEL, chance: float = POWER) -> int:
    """Fewest seeds with which a true `difference` is shown with the given chance; 0: not known, because the
    deviation is not, or there is none.

    Args:
        spread: deviation of paired differences over seeds; an estimate from few seeds is a rough one.
        difference: in the same units.
    """
    if not (spread > 0 and difference):
        return 0
    effect, low, high = abs(difference) / spread, 1, 2
    while power(effect, high, level) < chance:  # more seeds show more: doubling, then halving
        low, high = high, 2 * high
        if high > _MOST_SEEDS:
            return _MOST_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(effect, middle, level) >= chance else (middle, high)
    return max(high, FEWEST_SEEDS)


def bootstrap_interval(
    differences: Sequence[float], level: float = LEVEL, *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of differences drawn again with replacement.

    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13. Supposes no normal distribution,
    but of few seeds it is too narrow (by sqrt((n-1)/n) and the missing tails of t): a check of Student's
    interval from ten seeds or so, not its replacement. NaN for fewer than FEWEST_SEEDS or with a NaN.
    """
    values = np.asarray(differences, np.float64)
    if len(values) < FEWEST_SEEDS or not np.isfinite(values).all():
        return math.nan, math.nan
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    return _percentiles(values[drawn].mean(1), level)


def hierarchical_interval(
    baseline: Any, method: Any, level: float = LEVEL, *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean difference over seeds and pictures, both drawn again.

    Every seed is judged on the same pictures, so pictures are drawn once for all seeds of a resample: the
    pigeonhole bootstrap (Owen, Annals of Applied Statistics 1, 2007), which errs on the wide side. It says
    what other seeds and other pictures of the kind would give; Student's over seeds keeps these pictures.

    Args:
        baseline: [seeds, pictures], whether right (or any score of a picture), in the order of `method`.
        method: the same of the setting that is compared.

    Returns:
        Bounds in the units of the scores; of right and wrong a share, 0.01 is one point. NaN for fewer than
        FEWEST_SEEDS seeds or without pictures.

    Raises:
        ValueError: the two have not the same seeds and pictures.
    """
    first, second = np.asarray(baseline, np.float64), np.asarray(method, np.float64)
    if first.shape != second.shape or first.ndim != 2:
        message = (
            f"baseline{list(first.shape)}, method{list(second.shape)}: must be [seeds, pictures] of the same "
            "seeds and pictures."
        )
        raise ValueError(message)
    seeds, pictures = first.shape
    if seeds < FEWEST_SEEDS or not pictures:
        return math.nan, math.nan
    difference = second - first
    draw = np.random.default_rng(seed)
    means = np.empty(resamples)
    for number in range(resamples):
        by_picture = difference[draw.integers(seeds, size=seeds)].mean(0)
        means[number] = by_picture[draw.integers(pictures, size=pictures)].mean()
    return _percentiles(means, level)


def _percentiles(means: Any, level: float) -> tuple[float, float]:
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)
