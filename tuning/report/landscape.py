"""Drawings of the space that was searched: heat maps, parallel coordinates, how much each setting matters."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from training.objectives.metric import Metric
from tuning.report import drawing
from tuning.report.configurations import Configuration
from tuning.report.scales import Scale, scales

FEWEST_CONFIGURATIONS = 8
"""For the importance of settings: a forest of trees over fewer says nothing."""

_MOST_TICKS = 7
_MOST_LETTERS = 40
_FEWEST_LINES = 3
_SHELF = -0.16
"""Where settings that ended early lie on the metric's axis: they have none that compares."""


def heat_map(found: Sequence[Configuration], order: Sequence[str] = ()) -> str:
    """Mean of the metric by two settings, of one backbone, with the baseline's level on the scale; empty
    where less than two settings varied.

    Args:
        found: configurations of one backbone and stage, baselines among them.
        order: settings by importance, of which the first two are shown where there are more.
    """
    methods = [each for each in found if not each.is_baseline and each.values]
    known = {scale.heading: scale for scale in scales(methods)}
    if len(known) < 2 or not any(each.scores() for each in methods):
        return ""
    chosen = [known[name] for name in order if name in known] or list(known.values())
    chosen += [scale for scale in known.values() if scale not in chosen]
    rows, columns = sorted(chosen[:2], key=list(known.values()).index)
    return _heat_map(methods, [each for each in found if each.is_baseline], Bins(rows), Bins(columns))


def _heat_map(
    methods: Sequence[Configuration], baselines: Sequence[Configuration], rows: Bins, columns: Bins
) -> str:
    import numpy as np

    metric, backbone = methods[0].metric, methods[0].backbone
    cells: dict[tuple[int, int], list[float]] = {}
    begun: set[tuple[int, int]] = set()
    for each in methods:
        place = rows.of(each), columns.of(each)
        if any(trial["history"] for trial in each.trials):
            begun.add(place)
        if each.scores():
            cells.setdefault(place, []).append(each.mean)
    grid = np.full((len(rows.labels), len(columns.labels)), np.nan)
    for place, values in cells.items():
        grid[place] = statistics.fmean(values)
    level = _best_mean(baselines, metric)
    norm = drawing.scaled([*grid.ravel().tolist(), level])
    made, axes = drawing.figure(4.6, max(2.4, 1.3 + 0.42 * len(rows.labels)))
    image = axes.imshow(grid, cmap=drawing.scale_of(metric), norm=norm, aspect="auto", origin="lower")
    for (row, column), value in np.ndenumerate(grid):
        if math.isfinite(value):
            ink = drawing.ink_on(drawing.colour_of(norm, value, metric))
            text = f"{value:.{metric.digits - 1}f}"
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=drawing.SMALL)
        elif (row, column) in begun:
            axes.text(column, row, "ended\nearly", ha="center", va="center", color=drawing.GREY, fontsize=7)
    axes.set_xticks(range(len(columns.labels)), columns.labels)
    if sum(map(len, columns.labels)) > _MOST_LETTERS:
        axes.tick_params(axis="x", rotation=30)
    axes.set_yticks(range(len(rows.labels)), rows.labels)
    axes.set_xlabel(columns.heading)
    axes.set_ylabel(rows.heading)
    axes.spines[:].set_visible(False)
    bar = made.colorbar(image, ax=axes, pad=0.03)
    bar.ax.tick_params(labelsize=drawing.SMALL)
    bar.outline.set_visible(False)
    said = ""
    if math.isfinite(level):
        bar.ax.axhline(level, color=drawing.VERMILLION, linewidth=2.5)
        bar.ax.plot([0.5], [level], "D", color=drawing.VERMILLION, markeredgecolor="white", markersize=6)
        said = f" (◆ plain model {level:.{metric.digits - 1}f})"
    drawing.titled(axes, f"{drawing.shortened(backbone, 22)}: {metric.title}{said}")
    label = f"{metric.title} of {backbone} by {rows.heading} and {columns.heading}{said.replace('◆ ', '')}"
    return drawing.svg(made, label)


class Bins:
    """The rows or columns of a heat map: a setting's values, or, where it has many, ranges of them."""

    def __init__(self, scale: Scale) -> None:
        self.heading, self._scale = scale.heading, scale
        self._edges: list[float] = []
        self.labels = list(scale.levels)
        if len(scale.numbers) > _MOST_TICKS:
            count = 5
            self._edges = [(place + 1) / count for place in range(count - 1)]
            bounds = [scale.at(place / count) for place in range(count + 1)]
            shown = [f"{bound:.2g}" for bound in bounds]
            self.labels = [f"{low}–{high}" for low, high in pairwise(shown)]

    def of(self, each: Configuration) -> int:
        """Index of a configuration's row or column."""
        text = each.shown[self.heading]
        if not self._edges:
            return self.labels.index(text)
        place = self._scale.place(each.values[self.heading], text)
        return sum(place >= edge for edge in self._edges)


def _best_mean(found: Sequence[Configuration], metric: Metric) -> float:
    means = [each.mean for each in found if each.scores()]
    if not means:
        return math.nan
    return max(means) if metric.higher_is_better else min(means)


def parallel_plot(found: Sequence[Configuration]) -> str:
    """A line a configuration of the method through its settings to its metric, of one backbone; dashed where
    it ended early. Empty where nothing varied."""
    methods = [each for each in found if not each.is_baseline and each.values]
    lines, last = scales(methods), len(scales(methods))
    if not lines or len(methods) < _FEWEST_LINES:
        return ""
    metric = methods[0].metric
    level = _best_mean([each for each in found if each.is_baseline], metric)
    values = [each.mean for each in methods if each.scores()]
    early = [each for each in methods if not each.scores() and any(t["history"] for t in each.trials)]
    norm = drawing.scaled([*values, level])
    low, high = float(norm.vmin), float(norm.vmax)
    made, axes = drawing.figure(max(4.6, 1.7 * (last + 1)), 3.6)
    for each in early:
        look = {"color": drawing.GREY, "linewidth": 0.8, "linestyle": (0, (3, 2))}
        axes.plot(range(last + 1), [*_heights(each, lines), _SHELF], **look)
    sign = 1 if metric.higher_is_better else -1
    whole = sorted((each for each in methods if each.scores()), key=lambda each: sign * each.mean)
    for each in whole:  # the best on top
        colour = drawing.colour_of(norm, each.mean, metric)
        axes.plot(range(last + 1), [*_heights(each, lines), norm(each.mean)], color=colour, linewidth=2)
    _uprights(axes, lines)
    axes.axvline(last, color=drawing.BLACK, linewidth=0.8)
    ends = [(0.0, metric.shown(low)), (1.0, metric.shown(high))] if values else []
    for height, text in [*ends, *([(_SHELF, "ended early")] if early else [])]:
        axes.text(last + 0.05, height, text, fontsize=drawing.SMALL, va="center")
    if math.isfinite(level) and values:
        height = float(norm(level))
        axes.plot(
            [last], [height], "D", color=drawing.VERMILLION, markersize=7, markeredgecolor="white", zorder=9
        )
        if 0.08 < height < 0.92:
            axes.text(
                last + 0.07, height, "plain", fontsize=drawing.SMALL, va="center", color=drawing.VERMILLION
            )
    axes.set_xticks(range(last + 1), [*(line.heading for line in lines), metric.title])
    axes.set_xlim(-0.1, last + 0.4)
    said = " (◆ plain model)" if math.isfinite(level) and values else ""
    drawing.titled(axes, f"{drawing.shortened(methods[0].backbone)}: all settings{said}")
    return drawing.svg(
        made, f"{len(methods)} settings of {methods[0].backbone} and their {metric.title}", "wide"
    )


def _uprights(axes: Any, lines: Sequence[Scale]) -> None:
    axes.spines[:].set_visible(False)
    axes.set_yticks([])
    axes.set_ylim(_SHELF - 0.06, 1.06)
    axes.tick_params(axis="x", length=0, pad=2)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
    for place, line in enumerate(lines):
        axes.axvline(place, color=drawing.BLACK, linewidth=0.8)
        for height, text in line.ticks().items():
            axes.text(place + 0.04, height, text, fontsize=drawing.SMALL, va="center", bbox=box, zorder=8)


def _heights(each: Configuration, lines: Sequence[Scale]) -> list[float]:
    return [line.place(each.values[line.heading], each.shown[line.heading]) for line in lines]


def importance(found: Sequence[Configuration], rungs: Sequence[int]) -> tuple[dict[str, float], int]:
    """Share of the metric's variance that each setting explains by itself and with others, largest first, and
    after how many epochs; empty where too few configurations were tried.

    fANOVA (Hutter, Hoos and Leyton-Brown, An efficient approach for assessing hyperparameter importance, ICML
    2014) by Optuna, over the configurations of one backbone; each at the same number of epochs, the highest
    rung that most of them came to, since those that came further are the better ones.
    """
    import optuna
    from optuna.importance import FanovaImportanceEvaluator

    methods = [each for each in found if not each.is_baseline]
    for epoch in sorted(rungs, reverse=True):
        come = [(each, value) for each in methods if math.isfinite(value := each.reached(epoch))]
        if len(come) >= max(FEWEST_CONFIGURATIONS, len(methods) / 2):
            break
    else:
        return {}, 0
    lines = scales(each for each, _ in come)
    lines = [line for line in lines if all(line.heading in each.values for each, _ in come)]
    if not lines or len({value for _, value in come}) < 2:
        return {}, 0
    distributions = {line.heading: _distribution(line) for line in lines}
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(
            direction="maximize" if methods[0].metric.higher_is_better else "minimize"
        )
        for each, value in come:
            params = {
                line.heading: float(each.values[line.heading]) if line.numbers else each.shown[line.heading]
                for line in lines
            }
            study.add_trial(
                optuna.trial.create_trial(params=params, distributions=distributions, value=value)
            )
        shares = optuna.importance.get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    finally:
        optuna.logging.set_verbosity(before)
    if not all(map(math.isfinite, shares.values())):
        return {}, 0
    return dict(sorted(shares.items(), key=lambda item: -item[1])), epoch


def _distribution(line: Scale) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if not line.numbers:
        return CategoricalDistribution(line.levels)
    return FloatDistribution(line.numbers[0], line.numbers[-1], log=line.is_log)


def importance_plot(shares: dict[str, float], backbone: str, epoch: int) -> str:
    """A bar a setting."""
    made, axes = drawing.figure(4.6, 1.0 + 0.32 * len(shares))
    places = range(len(shares))
    axes.barh(places, list(shares.values()), color=drawing.BLUE, height=0.6)
    for place, share in zip(places, shares.values(), strict=True):
        axes.text(share + 0.01, place, f"{100 * share:.0f} %", va="center", fontsize=drawing.SMALL)
    axes.set_yticks(places, list(shares))
    axes.set_xticks([])
    axes.set_xlim(0, 1.12)
    axes.spines["bottom"].set_visible(False)
    axes.invert_yaxis()
    drawing.titled(axes, f"{drawing.shortened(backbone, 24)}: what mattered, after epoch {epoch}")
    told = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
    return drawing.svg(made, f"Share of the variance by setting: {told}")
