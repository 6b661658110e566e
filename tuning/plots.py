"""The drawings of the page: curves, heat maps, paired differences, lengths of captions."""

from __future__ import annotations

import io
from typing import Any

from pipeline.store import Store
from training.run_folder import headline, judged_by
from tuning.significance import Paired

BASELINE, ALIGNED = "#7a7f87", "#1f6feb"


def lengths_plot(store: Store, captions: str, most_shards: int = 200) -> str:
    """Caption lengths in words, over at most 200 shards."""
    words: list[int] = []
    for shard in store.finished("captions", captions)[:most_shards]:
        texts = store.read_shard("captions", captions, shard, ["caption"])["caption"].to_pylist()
        words += [len(text.split()) for text in texts if text]
    figure, axes = _figure(5.2, 2.4)
    axes.hist(words, bins=range(0, max(words, default=1) + 2), color=ALIGNED)
    axes.set_xlabel("words in a caption")
    axes.set_ylabel("captions")
    return _svg(figure)


def curves_plot(trials: list[dict[str, Any]]) -> str:
    """Top-1 by epoch: a panel a backbone; baselines grey, aligned runs by weight."""
    backbones = sorted({trial["config"]["backbone"] for trial in trials})
    figure, axes = _figure(5.2 * len(backbones), 3.0, len(backbones))
    for panel, backbone in zip([axes] if len(backbones) == 1 else list(axes), backbones, strict=True):
        labels = set()
        for trial in (trial for trial in trials if trial["config"]["backbone"] == backbone):
            weight = trial["config"]["alignment_weight"]
            label = f"weight {weight:g}" if weight else "baseline"
            colour = BASELINE if not weight else {0.3: "#58a6ff"}.get(weight, ALIGNED)
            history, metric = trial["result"]["history"], judged_by(trial["config"])
            panel.plot(
                [m["epoch"] for m in history],
                [headline(m, metric.name) for m in history],
                color=colour,
                linewidth=1.4,
                linestyle="-" if weight else "--",
                label=None if label in labels else label,
            )
            labels.add(label)
        panel.set_title(backbone, fontsize=10)
        panel.set_xlabel("epoch")
        panel.set_ylabel("top-1, %")
        panel.legend(fontsize=8, frameon=False)
    return _svg(figure)


def heat_maps(trials: list[dict[str, Any]]) -> list[str]:
    """Mean top-1 by weight and dimension, one map a backbone; none for a grid of a single column."""
    plots = []
    for backbone in sorted({trial["config"]["backbone"] for trial in trials}):
        cells: dict[tuple[float, int], list[float]] = {}
        base: list[float] = []
        for trial in (trial for trial in trials if trial["config"]["backbone"] == backbone):
            config = trial["config"]
            score = headline(trial["result"]["last"], judged_by(config).name)
            if config["alignment_weight"]:
                cells.setdefault((config["alignment_weight"], config["projection_dim"]), []).append(score)
            else:
                base.append(score)
        if len(cells) > 1:
            plots.append(_heat_map(backbone, cells, base))
    return plots


def _heat_map(backbone: str, cells: dict[tuple[float, int], list[float]], base: list[float]) -> str:
    import numpy as np

    weights = sorted({weight for weight, _ in cells})
    dims = sorted({dim for _, dim in cells}, key=lambda dim: dim or 10**9)
    grid = np.full((len(weights), len(dims)), np.nan)
    for (weight, dim), values in cells.items():
        grid[weights.index(weight), dims.index(dim)] = sum(values) / len(values)
    figure, axes = _figure(4.2, 2.6)
    axes.imshow(grid, cmap="Blues", aspect="auto")
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            axes.text(
                column,
                row,
                f"{value:.1f}",
                ha="center",
                va="center",
                color="white" if value > middle else "black",
            )
    axes.set_xticks(range(len(dims)), [str(dim or "D") for dim in dims])
    axes.set_yticks(range(len(weights)), [f"{weight:g}" for weight in weights])
    axes.set_xlabel("projection dimension")
    axes.set_ylabel("weight")
    baseline = f", baseline {sum(base) / len(base):.1f}" if base else ""
    axes.set_title(f"{backbone}: top-1{baseline}", fontsize=10)
    return _svg(figure)


def paired_plot(result: Paired) -> str:
    """A line a seed from baseline to aligned."""
    figure, axes = _figure(3.2, 2.6)
    for seed, baseline, aligned in zip(result.seeds, result.baseline, result.aligned, strict=True):
        axes.plot([0, 1], [baseline, aligned], marker="o", color=ALIGNED, linewidth=1.2)
        axes.annotate(f"seed {seed}", (1, aligned), xytext=(6, -3), textcoords="offset points", fontsize=8)
    axes.set_xticks([0, 1], ["baseline", f"weight {result.weight:g}"])
    axes.set_xlim(-0.2, 1.5)
    axes.set_ylabel("top-1, %")
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
