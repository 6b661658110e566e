"""The drawings of the page: curves, heat maps, paired differences, lengths of captions."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from typing import Any

from pipeline.store import Store
from training.objectives.settings import Metric
from training.run_folder import headline, judged_by
from tuning.cells import Cell, cell_of
from tuning.significance import Paired

BASELINE, BLUE = "#7a7f87", "#1f6feb"
SHADES = ("#1f6feb", "#d98200", "#0f8a6a", "#8250df", "#bf3989")


def lengths_plot(store: Store, captions: str, most_shards: int = 200) -> str:
    """Caption lengths in words, over at most 200 shards."""
    words: list[int] = []
    for shard in store.finished("captions", captions)[:most_shards]:
        texts = store.read_shard("captions", captions, shard, ["caption"])["caption"].to_pylist()
        words += [len(text.split()) for text in texts if text]
    figure, axes = _figure(5.2, 2.4)
    axes.hist(words, bins=range(0, max(words, default=1) + 2), color=BLUE)
    axes.set_xlabel("words in a caption")
    axes.set_ylabel("captions")
    return _svg(figure)


def curves_plot(trials: list[dict[str, Any]]) -> str:
    """The metric by epoch: a panel a backbone; baselines grey, others by the first axis."""
    backbones = sorted({trial["config"]["backbone"] for trial in trials})
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(5.2 * len(backbones), 3.0, len(backbones))
    colours: dict[str, str] = {}
    for panel, backbone in zip([axes] if len(backbones) == 1 else list(axes), backbones, strict=True):
        labels = set()
        for trial in (trial for trial in trials if trial["config"]["backbone"] == backbone):
            cell = cell_of(trial["config"])
            label, colour, line = "baseline", BASELINE, "--"
            if not cell.is_baseline:
                label = f"{cell.headings[0]} {cell.shown[0]}" if cell.shown else ""
                colour, line = colours.setdefault(label, SHADES[len(colours) % len(SHADES)]), "-"
            history, metric = trial["result"]["history"], judged_by(trial["config"])
            panel.plot(
                [m["epoch"] for m in history],
                [headline(m, metric.name) for m in history],
                color=colour,
                linewidth=1.4,
                linestyle=line,
                label=None if label in labels else label,
            )
            labels.add(label)
        panel.set_title(backbone, fontsize=10)
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_ylabel(judged_by(trials[0]["config"]).axis)
        if labels - {""}:
            panel.legend(fontsize=8, frameon=False)
    return _svg(figure)


def heat_maps(trials: list[dict[str, Any]]) -> list[str]:
    """Mean of the metric by two axes, one map a backbone; none for a single cell, or another number of
    axes."""
    plots = []
    for backbone in sorted({trial["config"]["backbone"] for trial in trials}):
        cells: dict[Cell, list[float]] = {}
        for trial in (trial for trial in trials if trial["config"]["backbone"] == backbone):
            score = headline(trial["result"]["last"], judged_by(trial["config"]).name)
            cells.setdefault(cell_of(trial["config"]), []).append(score)
        base = [score for cell, scores in cells.items() if cell.is_baseline for score in scores]
        others = {cell: scores for cell, scores in cells.items() if not cell.is_baseline}
        if len(others) > 1 and all(len(cell.values) == 2 for cell in others):
            plots.append(_heat_map(backbone, others, base, judged_by(trials[0]["config"])))
    return plots


def _heat_map(backbone: str, cells: dict[Cell, list[float]], base: list[float], metric: Metric) -> str:
    import numpy as np

    first = next(iter(cells))
    rows, columns = (_ticks(cells, axis) for axis in (0, 1))
    grid = np.full((len(rows), len(columns)), np.nan)
    for cell, scores in cells.items():
        row, column = list(rows).index(cell.values[0]), list(columns).index(cell.values[1])
        grid[row, column] = sum(scores) / len(scores)
    figure, axes = _figure(4.2, 2.6)
    axes.imshow(grid, cmap="Blues", aspect="auto")
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            axes.text(
                column,
                row,
                f"{value:.{metric.digits - 1}f}",
                ha="center",
                va="center",
                color="white" if value > middle else "black",
            )
    axes.set_xticks(range(len(columns)), list(columns.values()))
    axes.set_yticks(range(len(rows)), list(rows.values()))
    axes.set_xlabel(first.headings[1])
    axes.set_ylabel(first.headings[0])
    baseline = f", baseline {sum(base) / len(base):.{metric.digits - 1}f}" if base else ""
    axes.set_title(f"{backbone}: {metric.title}{baseline}", fontsize=10)
    return _svg(figure)


def _ticks(cells: Iterable[Cell], axis: int) -> dict[Any, str]:
    """Values of an axis and how they are shown: numbers by size, then what is shown as a word, such as D."""
    shown = {cell.values[axis]: cell.shown[axis] for cell in cells}

    def order(value: Any) -> tuple[bool, float, str]:
        is_number = isinstance(value, int | float) and not shown[value].isalpha()
        return not is_number, value if is_number else 0.0, shown[value]

    return {value: shown[value] for value in sorted(shown, key=order)}


def paired_plot(result: Paired) -> str:
    """A line a seed from baseline to method."""
    figure, axes = _figure(3.2, 2.6)
    for baseline, method in zip(result.baseline, result.method, strict=True):
        axes.plot([0, 1], [baseline, method], marker="o", color=BLUE, linewidth=1.2)
    low, high = axes.get_ylim()
    place = -math.inf
    for method, seed in sorted(zip(result.method, result.seeds, strict=True)):
        place = max(method, place + 0.06 * (high - low))  # where values are close, one name above the other
        axes.annotate(f"seed {seed}", (1, place), xytext=(6, -3), textcoords="offset points", fontsize=8)
    axes.set_ylim(low, max(high, place + 0.05 * (high - low)))  # or the last name would be left out
    axes.set_xticks([0, 1], ["baseline", result.cell.words.replace(", ", "\n")])
    axes.set_xlim(-0.2, 1.5)
    axes.set_ylabel(result.metric.axis)
    return _svg(figure)


def _figure(width: float, height: float, panels: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes: Any = figure.subplots(1, panels)
    for panel in [axes] if panels == 1 else list(axes):
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    sink = io.StringIO()
    figure.savefig(sink, format="svg", metadata={"Date": None})
    text = sink.getvalue()
    return text[text.index("<svg") :]
