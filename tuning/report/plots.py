"""Drawings over time and seeds: caption lengths, learning curves, paired differences, cost against result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pipeline.store import Store
from training.objectives.metric import Metric
from tuning.report import drawing
from tuning.report.comparison import Comparison
from tuning.report.configurations import Configuration, Trial, best_of, score

_MOST_LABELS = 24
_LONGEST_NAME = 40


def lengths_plot(store: Store, captions: str, most_shards: int = 200) -> str:
    """Caption lengths in words, over at most 200 shards."""
    words: list[int] = []
    for shard in store.finished("captions", captions)[:most_shards]:
        texts = store.read_shard("captions", captions, shard, ["caption"])["caption"].to_pylist()
        words += [len(text.split()) for text in texts if text]
    made, axes = drawing.figure(4.6, 2.4)
    axes.hist(words, bins=range(0, max(words, default=1) + 2), color=drawing.BLUE)
    axes.set_xlabel("words in a caption")
    axes.set_ylabel("captions")
    return drawing.svg(made, f"Lengths of {len(words)} captions in words")


def curves_plot(found: Sequence[Configuration]) -> str:
    """The metric by epoch, of one backbone: the baseline dashed in black, the best setting thick, what ended
    early thin and with a mark at its end. Empty before the first epoch has ended.

    Args:
        found: configurations of one backbone and stage.
    """
    if not any(trial["history"] for each in found for trial in each.trials):
        return ""
    from matplotlib.ticker import MaxNLocator

    highest = best_of(each for each in found if not each.is_baseline)
    best, metric = highest.number if highest else -1, found[0].metric
    made, axes = drawing.figure(4.6, 3.2)
    labels: set[str] = set()
    for configuration in sorted(found, key=lambda each: (each.number == best, each.is_baseline)):
        for trial in configuration.trials:
            points = [(m["epoch"], score(m, metric)) for m in trial["history"]]
            points = [point for point in points if math.isfinite(point[1])]
            if not points:
                continue
            label, look = _look(trial, configuration, best)
            if len(points) == 1 and "marker" not in look:
                look |= {"marker": "o", "markersize": 4}
            axes.plot(*zip(*points, strict=True), label=None if label in labels else label, **look)
            labels.add(label)
    stage = "final comparison" if found[0].stage == "final" else "learning curves"
    drawing.titled(axes, f"{drawing.shortened(found[0].backbone)}: {stage}")
    axes.set_xlabel("epoch")
    axes.set_xlim(0, 1.03 * max((trial["epochs"] for each in found for trial in each.trials), default=1) or 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(metric.axis)
    if labels:
        # Below the axes, where no curve runs.
        made.legend(fontsize=drawing.SMALL, frameon=False, loc="outside lower center", ncols=3)
    return drawing.svg(made, f"Learning curves of {found[0].backbone}: {metric.title} after each epoch")


def _look(trial: Trial, configuration: Configuration, best: int) -> tuple[str, dict[str, Any]]:
    """Name in the legend and how the line is drawn: the arm by its colour and dashes, how it ended by its
    mark."""
    is_best = configuration.number == best and not configuration.is_baseline
    status = trial["status"]
    look = {"color": drawing.SKY, "linestyle": "-", "linewidth": 1.1}
    label = "other settings"
    if is_best:
        look |= {"color": drawing.BLUE, "linewidth": 2.2}
        label = "best setting"
    if configuration.is_baseline:
        look |= {"color": drawing.BLACK, "linestyle": (0, (4, 2)), "linewidth": 1.5}
        label = "plain model"
    if status == "complete":
        return label, look
    colours = {"stopped": drawing.GREY, "running": drawing.ORANGE}
    marks = {"stopped": "x", "running": ">", "diverged": "X", "failed": "X"}
    words = {"stopped": "stopped early", "running": "running"}
    look |= {"linewidth": 0.7, "marker": marks.get(status, "x"), "markevery": [-1], "markersize": 5}
    look |= {"zorder": 3}  # their ends lie on the curves of others
    if not configuration.is_baseline:
        look |= {"color": colours.get(status, drawing.VERMILLION)}
    plain = "plain, " if configuration.is_baseline else ""
    return f"{plain}{words.get(status, 'diverged or failed')}", look


def paired_plot(found: Sequence[Comparison]) -> str:
    """Differences from the baseline: of one comparison a row a seed, of several a row each with its seeds as
    points; mean and interval as a diamond with whiskers.

    Args:
        found: at least one, of one backbone. Settings with long names go by their numbers.
    """
    metric = found[0].metric
    if len(found) == 1:
        rows = [f"seed {seed}" for seed in found[0].seeds] + ["mean"]
        points = [[value] for value in found[0].differences] + [[]]
        means = [*[None] * len(found[0].seeds), found[0]]
    else:
        rows = [each.method.words for each in found]
        if max(map(len, rows)) > _LONGEST_NAME:
            rows = [f"setting {each.method.number}" for each in found]
        points = [each.differences for each in found]
        means = list(found)
    made, axes = drawing.figure(5.2, 1.0 + 0.26 * len(rows))
    axes.axvline(0, color=drawing.BLACK, linewidth=0.9, linestyle=(0, (4, 2)))
    for place, (values, mean) in enumerate(zip(points, means, strict=True)):
        low = place if len(found) == 1 else place + 0.22  # of several the seeds stand below the mean
        axes.plot(
            values, [low] * len(values), "o", color=drawing.SKY, markersize=5, markeredgecolor=drawing.BLUE
        )
        if mean is not None:
            _interval(axes, mean, place)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.08)
    better = "right" if metric.higher_is_better else "left"
    what = f"{metric.difference[0].upper()}{metric.difference[1:]}"
    made.supxlabel(f"{what} more than the plain model ({better} of 0: better)", fontsize=drawing.PLAIN)
    if len(found) > 1:
        drawing.titled(axes, drawing.shortened(found[0].method.backbone))
    return drawing.svg(made, _told(found))


def _interval(axes: Any, mean: Comparison, place: float) -> None:
    low, high = mean.interval
    if math.isfinite(low):
        axes.plot([low, high], [place, place], color=drawing.BLUE, linewidth=1.8, solid_capstyle="butt")
        axes.plot([low, high], [place, place], "|", color=drawing.BLUE, markersize=9, markeredgewidth=1.8)
    axes.plot([mean.mean], [place], "D", color=drawing.BLUE, markersize=6)


def _told(found: Sequence[Comparison]) -> str:
    digits = found[0].metric.digits
    told = (
        f"{each.method.backbone} {each.method.words}: {each.mean:+.{digits}f} on {len(each.seeds)} seeds"
        for each in found[:_MOST_LABELS]
    )
    return f"Differences from the plain model: {'; '.join(told)}"


def cost_plot(found: Sequence[Configuration]) -> str:
    """Mean cost of a training against its metric, of all configurations; those that none beats in both are
    joined. Empty without a single result.
    """
    shown = [(each, *point) for each in found if (point := _cost(each)) is not None]
    if not shown:
        return ""
    metric = found[0].metric
    on_gpus = any(trial["gpu_seconds"] for each, *_ in shown for trial in each.trials)
    made, axes = drawing.figure(4.6, 3.2)
    backbones = list(dict.fromkeys(each.backbone for each, *_ in shown))
    marks = "os^Dv<>ph*"
    for each, cost, value, is_whole in shown:
        mark = marks[backbones.index(each.backbone) % len(marks)]
        colour = drawing.BLACK if each.is_baseline else drawing.BLUE
        # Half filled: told apart from the method's without their colours, too.
        fill = ("bottom" if each.is_baseline else "full") if is_whole else "none"
        axes.plot(cost, value, mark, markersize=6, color=colour, fillstyle=fill, markeredgewidth=1)
    front = _front([(cost, value) for _, cost, value, _ in shown], metric)
    axes.step(*zip(*front, strict=True), where="post", color=drawing.VERMILLION, linewidth=1.1)
    costs = [cost for _, cost, *_ in shown]
    if min(costs) > 0 and math.log10(max(costs) / min(costs)) > 1:
        axes.set_xscale("log")
    axes.set_xlabel(f"{'GPU seconds' if on_gpus else 'seconds'} for a training")
    axes.set_ylabel(metric.axis)
    drawing.titled(axes, "Cost against result")
    arms = [each.is_baseline for each, *_ in shown]
    has_early, has_front = any(not whole for *_, whole in shown), len(front) > 1
    _cost_legend(made, arms, backbones, marks, has_early, has_front)
    return drawing.svg(made, f"Cost of a training against {metric.title}, {len(shown)} settings")


def _cost(each: Configuration) -> tuple[float, float, bool] | None:
    """(seconds, metric, whether of whole trainings), means over seeds; what ended early stands where it came
    to."""
    whole = list(each.whole().values())
    ended = whole or [trial for trial in each.trials if trial["status"] == "stopped" and trial["history"]]
    values = [score(trial["history"][-1], each.metric) for trial in ended if trial["history"]]
    if not values or not all(map(math.isfinite, values)):
        return None
    costs = [trial["gpu_seconds"] or trial["seconds"] for trial in ended]
    return sum(costs) / len(costs), each.mean if whole else sum(values) / len(values), bool(whole)


def _front(points: Sequence[tuple[float, float]], metric: Metric) -> list[tuple[float, float]]:
    """The points that none beats in both cost and metric, from the cheapest."""
    sign = 1 if metric.higher_is_better else -1
    front: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda each: (each[0], -sign * each[1])):
        if not front or sign * point[1] > sign * front[-1][1]:
            front.append(point)
    return front


def _cost_legend(
    made: Any, arms: Sequence[bool], backbones: list[str], marks: str, has_early: bool, has_front: bool
) -> None:
    from matplotlib.lines import Line2D

    def entry(label: str, **look: Any) -> Any:
        return Line2D([], [], label=label, linestyle=look.pop("linestyle", "none"), **look)

    entries = []
    if True in arms:
        entries.append(entry("plain model", marker="o", color=drawing.BLACK, fillstyle="bottom"))
    if False in arms:
        entries.append(entry("the method", marker="o", color=drawing.BLUE))
    if has_early:
        entries.append(entry("stopped early", marker="o", color=drawing.BLUE, fillstyle="none"))
    if has_front:
        entries.append(entry("none is better and cheaper", linestyle="-", color=drawing.VERMILLION))
    if len(backbones) > 1:
        entries += [
            entry(drawing.shortened(name, 24), marker=marks[place % len(marks)], color=drawing.GREY)
            for place, name in enumerate(backbones)
        ]
    made.legend(handles=entries, fontsize=drawing.SMALL, frameon=False, loc="outside lower center", ncols=2)
