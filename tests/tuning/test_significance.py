"""The statistics against known values and against scipy's own."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from tuning.report.significance import (
    bootstrap_interval,
    hierarchical_interval,
    holm,
    paired_p,
    power,
    seeds_needed,
    student_interval,
    verdict,
)

DIFFERENCES = [2.1, 1.2, 3.9, 0.4, 2.6]


def test_interval_and_p_are_students() -> None:
    # Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t(0.975, 2) = 4.303.
    low, high = student_interval([1, 2, 3])
    assert (low, high) == (pytest.approx(2 - 2.484, abs=1e-3), pytest.approx(2 + 2.484, abs=1e-3))
    assert paired_p(DIFFERENCES) == pytest.approx(stats.ttest_1samp(DIFFERENCES, 0).pvalue)
    found = stats.ttest_1samp(DIFFERENCES, 0).confidence_interval(0.9)
    assert student_interval(DIFFERENCES, 0.9) == pytest.approx((found.low, found.high))


def test_what_is_no_evidence_gives_none() -> None:
    for few in ([], [1.0], [1.0, 1.0]):
        assert student_interval(few) == (-math.inf, math.inf) and math.isnan(paired_p(few))
    # 0.3 - 0.2 and 0.2 - 0.1 differ by rounding only.
    equal = [0.3 - 0.2, 0.2 - 0.1, 0.1]
    assert student_interval(equal) == (-math.inf, math.inf)
    assert paired_p(equal) == 0.25, "a sign test: one in four"
    assert paired_p([1.0] * 6) == pytest.approx(1 / 32) and paired_p([0.0] * 9) == 1
    assert paired_p([1.0, 1.5]) != paired_p([1.0, 1.5]), "two seeds are not tested"
    assert math.isfinite(student_interval([1.0, 1.5])[0]), "but have an interval"
    assert math.isnan(paired_p([1.0, math.nan, 2.0])) and math.isnan(student_interval([1, 2, math.nan])[0])
    assert math.isnan(bootstrap_interval([1.0, 2.0])[0]) and seeds_needed(0.0, 1.0) == 0
    assert seeds_needed(math.nan, 1.0) == 0 and seeds_needed(1.0, 0.0) == 0


def test_holms_correction_is_that_of_the_paper_and_skips_what_was_not_tested() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    one, two, three = holm([0.02, math.nan, 0.5])
    assert (one, three) == (0.04, 0.5) and math.isnan(two)
    assert holm([0.7, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_the_verdict_follows_the_corrected_p_and_the_metrics_direction() -> None:
    assert verdict(2.0, 0.04) == "a gain" and verdict(-2.0, 0.04) == "a loss"
    assert verdict(-2.0, 0.04, higher_is_better=False) == "a gain"
    assert verdict(2.0, 0.05) == "no difference shown" and verdict(2.0, math.nan) == "too few seeds"
    low, high = student_interval(DIFFERENCES)
    assert low > 0 and high > 0, "alone it would be a gain"
    several = holm([paired_p(DIFFERENCES), 0.3, 0.4, 0.5])
    assert verdict(2.0, several[0]) == "no difference shown", "among four it is not"


def test_seeds_needed_are_those_of_the_tables() -> None:
    """Sizes of the paired t-test at 0.05 two-sided and power 0.8, by the effect in deviations of the
    differences, as G*Power 3.1 gives them."""
    for effect, size in ((0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)):
        assert seeds_needed(1.0, effect) == size
        assert power(effect, size) >= 0.8 > power(effect, size - 1)
    assert seeds_needed(2.0, 1.0) == 34 and seeds_needed(0.01, 1.0) == 3
    assert seeds_needed(1000.0, 1.0) == 100_000, "more than anybody trains"
    draw = np.random.default_rng(0).normal(1.0, 1.0, (20_000, 10))
    shown = (stats.ttest_1samp(draw, 0, axis=1).pvalue < 0.05).mean()
    assert power(1.0, 10) == pytest.approx(shown, abs=0.01), "and as often as drawn samples show it"


def test_the_bootstrap_over_seeds_is_seeded_and_close_to_the_normal_interval_of_many() -> None:
    many = np.random.default_rng(1).normal(1.0, 2.0, 400).tolist()
    low, high = bootstrap_interval(many)
    assert (low, high) == bootstrap_interval(many) != bootstrap_interval(many, seed=1)
    assert (low, high) == pytest.approx(student_interval(many), abs=0.02)
    narrow = bootstrap_interval(DIFFERENCES)
    wide = student_interval(DIFFERENCES)
    assert wide[0] < narrow[0] < narrow[1] < wide[1], "of five seeds it is too narrow, as its docstring says"


def test_the_hierarchical_interval_knows_seeds_and_pictures() -> None:
    draw = np.random.default_rng(2)
    seeds, pictures = 6, 500
    hard = draw.uniform(0.4, 0.9, pictures)  # what pictures have in common over seeds
    baseline = draw.uniform(size=(seeds, pictures)) < hard
    method = draw.uniform(size=(seeds, pictures)) < np.clip(hard + 0.08, 0, 1)
    low, high = hierarchical_interval(baseline, method)
    differences = (method.mean(1) - baseline.mean(1)).tolist()
    mean = float(np.mean(differences))
    assert low < mean < high and (low, high) == hierarchical_interval(baseline, method)
    over_seeds = bootstrap_interval(differences)
    assert high - low > over_seeds[1] - over_seeds[0], "other pictures are a further chance"
    same = np.broadcast_to(baseline[:1], (3, pictures))
    assert hierarchical_interval(same, same) == (0.0, 0.0)
    assert math.isnan(hierarchical_interval(baseline[:2], method[:2])[0])
    with pytest.raises(ValueError, match="same seeds and pictures"):
        hierarchical_interval(baseline, method[:, :9])


def test_of_reports_without_any_true_difference_one_in_twenty_at_most_shows_one() -> None:
    """Six settings against one baseline, five seeds, nothing to be found: corrected, and read one by one."""
    draw = np.random.default_rng(4)
    corrected = single = 0
    reports = 600
    for _ in range(reports):
        baseline = draw.normal(size=5)
        values = [paired_p((draw.normal(size=5) - baseline).tolist()) for _ in range(6)]
        single += min(values) < 0.05
        corrected += min(holm(values)) < 0.05
    assert corrected / reports < 0.05 + 0.02, "two deviations of such a count"
    assert single / reports > 0.1, "which is why they are corrected"
