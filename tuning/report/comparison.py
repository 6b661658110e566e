"""Which comparisons a sweep allows: a configuration of the method against the best baseline of its backbone,
over the seeds that both have.

The final one (the winner against the baseline's best on fresh seeds, of pictures that nothing was chosen on
where there are such) is the one that counts. Without it the search's own are shown, whose winner flatters:
it was chosen because it came out high.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

from training.objectives.metric import Metric
from tuning.report import significance
from tuning.report.configurations import Configuration, Content, Trial, best_of, configurations, last_score


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A setting minus the baseline, in units of the metric, over the seeds that both have."""

    sweep: str
    method: Configuration
    baseline: Configuration
    split: str
    """Whose pictures it is measured on."""
    untouched: bool
    """Whether nothing was chosen on these pictures."""
    among: int
    """Configurations of the method that the setting was chosen from, those of its backbone in the search."""
    seeds: tuple[int, ...]
    befores: tuple[float, ...]
    """The baseline's metric by seed."""
    afters: tuple[float, ...]
    """The method's, in the same order."""
    missing: tuple[int, ...]
    """Seeds of either side that are left out: still to come, diverged or failed."""
    adjusted: float = math.nan
    """Its p, corrected for all comparisons of the report; NaN: too few seeds for a test."""

    @property
    def metric(self) -> Metric:
        """What both are judged by."""
        return self.method.metric

    @property
    def is_final(self) -> bool:
        """Whether it is of fresh seeds, after the search."""
        return self.method.stage == "final"

    @property
    def flatters(self) -> bool:
        """Whether the setting was chosen by the pictures that it is measured on."""
        return self.among > 1 and not self.untouched

    @property
    def differences(self) -> list[float]:
        """By seed."""
        return [after - before for before, after in zip(self.befores, self.afters, strict=True)]

    @property
    def mean(self) -> float:
        """Mean difference."""
        return statistics.fmean(self.differences)

    @property
    def interval(self) -> tuple[float, float]:
        """Student's, 95 %; without end where it says nothing."""
        return significance.student_interval(self.differences)

    @cached_property
    def over_pictures(self) -> tuple[float, float]:
        """The interval that other pictures of the kind are in, too: hierarchical, of which pictures were
        recognised; NaN where that is not on record."""
        sides = [
            [(trials[seed]["test"] or {}).get("right", "") for seed in self.seeds]
            for trials in (self.baseline.whole(), self.method.whole())
        ]
        if not self.untouched or len({len(right) for side in sides for right in side}) != 1:
            return math.nan, math.nan
        before, after = ([[mark == "1" for mark in right] for right in side] for side in sides)
        low, high = significance.hierarchical_interval(before, after)
        return 100 * low, 100 * high

    @property
    def p(self) -> float:
        """Of the paired t-test, by itself."""
        return significance.paired_p(self.differences)

    @property
    def verdict(self) -> str:
        """What may be said, by the corrected p."""
        return significance.verdict(self.mean, self.adjusted, higher_is_better=self.metric.higher_is_better)

    @property
    def step(self) -> float:
        """The difference that `seeds_needed` is about: a point, or a hundredth of the baseline where the
        metric is no percentage."""
        return 1.0 if self.metric.unit == "%" else abs(statistics.fmean(self.befores)) / 100

    @property
    def seeds_needed(self) -> int:
        """To show a difference of `step` four times in five; 0: not known from these."""
        if len(self.seeds) < significance.FEWEST_SEEDS:
            return 0
        return significance.seeds_needed(significance.deviation(self.differences), self.step)


def comparisons(contents: Sequence[Content]) -> list[Comparison]:
    """Those of one or more sweeps that stand in one report, best first within a sweep; their p-values are
    corrected for all of them."""
    found = [each for content in contents for each in _of_sweep(content)]
    adjusted = significance.holm([each.p for each in found])
    return [replace(each, adjusted=value) for each, value in zip(found, adjusted, strict=True)]


def _of_sweep(content: Content) -> list[Comparison]:
    for groups in (_finals(content), _by_backbone(content)):
        found = [each for group in groups for each in _of_backbone(content, group)]
        if found:
            return found
    return []


def _by_backbone(content: Content) -> list[list[Configuration]]:
    ordered = sorted(configurations(content, "search"), key=_backbone)
    return [list(group) for _, group in groupby(ordered, key=_backbone)]


def _finals(content: Content) -> list[list[Configuration]]:
    """Of each backbone the pair that the search ended with; winners of earlier starts, with other values, are
    no part of it: the best of several on the test split would be chosen there."""
    found = []
    for pair in content["final"]:
        seeds = set(pair["seeds"])
        found.append(
            [
                replace(each, trials=tuple(trial for trial in each.trials if trial["seed"] in seeds))
                for each in configurations(content, "final")
                if each.number in (pair["baseline"], pair["method"])
            ]
        )
    return found


def _backbone(each: Configuration) -> str:
    return each.backbone


def _of_backbone(content: Content, found: list[Configuration]) -> list[Comparison]:
    baseline = best_of(each for each in found if each.is_baseline)
    if baseline is None:
        return []
    tried = [
        each
        for each in configurations(content)
        if each.backbone == baseline.backbone and not each.is_baseline and each.scores()
    ]
    made = (_compared(content, each, baseline, len(tried)) for each in found if not each.is_baseline)
    sign = -1 if baseline.metric.higher_is_better else 1
    return sorted((each for each in made if each is not None), key=lambda c: sign * c.mean)


def _compared(
    content: Content, method: Configuration, baseline: Configuration, among: int
) -> Comparison | None:
    metric, ours, theirs = method.metric, method.whole(), baseline.whole()
    shared = sorted(ours.keys() & theirs.keys())
    tested = [seed for seed in shared if _has_test(ours[seed]) and _has_test(theirs[seed])]
    untouched = method.stage == "final" and bool(tested)
    seeds = tested if untouched else shared
    if not seeds:
        return None

    def measured(trials: dict[int, Trial]) -> tuple[float, ...]:
        kind = _test_score if untouched else last_score
        return tuple(kind(trials[seed], metric) for seed in seeds)

    wanted = {trial["seed"] for each in (method, baseline) for trial in each.trials}
    return Comparison(
        sweep=content["sweep"],
        method=method,
        baseline=baseline,
        split=content["test_split"] if untouched else content["eval_split"],
        untouched=untouched,
        among=among,
        seeds=tuple(seeds),
        befores=measured(theirs),
        afters=measured(ours),
        missing=tuple(sorted(wanted - set(seeds))),
    )


def _has_test(trial: Trial) -> bool:
    return trial["test"] is not None


def _test_score(trial: Trial, metric: Metric) -> float:
    test = trial["test"]
    return float(test.get(metric.name, test.get("top1", math.nan)))


def of_sweep(found: Iterable[Comparison], content: Content) -> list[Comparison]:
    """Those of one sweep among the report's."""
    return [each for each in found if each.sweep == content["sweep"]]
