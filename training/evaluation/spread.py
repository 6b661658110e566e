"""Several runs side by side: mean and deviation of each figure that `evaluate` found for all of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from training import run_folder
from training.objectives.registry import metric_named

_ACCURACY = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean over classes",
    "ece": "calibration error",
}


def of_runs(summaries: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """`mean` and `deviation` by a figure's name; the deviation is a sample's, divided by one less than the
    number of runs."""
    found = [_figures(summary) for summary in summaries]
    common = [name for name in found[0] if all(name in each for each in found)]
    values = {name: [each[name] for each in found] for name in common}
    return {
        "mean": {name: statistics.fmean(each) for name, each in values.items()},
        "deviation": {name: statistics.stdev(each) for name, each in values.items()},
    }


def table(summaries: Sequence[dict[str, Any]]) -> str:
    """As lines for a terminal, with each run's value."""
    told, found = of_runs(summaries), [_figures(summary) for summary in summaries]
    splits, methods = ({summary[name] for summary in summaries} for name in ("split", "objective"))
    lines = [f"{len(summaries)} runs on {', '.join(sorted(splits))}: mean +- deviation"]
    metrics = [metric_named(objective) for objective in methods]
    digits = {metric.title: metric.digits for metric in metrics}
    if differ := sorted({name for summary in summaries for name in _differing(summaries[0], summary)}):
        lines.append(f"  they differ in more than their seed: {', '.join(differ)}")
    for name, mean in told["mean"].items():
        places = digits.get(name, 2)
        values = " ".join(f"{each[name]:.{places}f}" for each in found)
        lines.append(f"  {name:18}  {mean:6.{places}f} +- {told['deviation'][name]:.{places}f}   ({values})")
    return "\n".join(lines)


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Settings of two runs that are not the same, but for seeds and places."""
    mine, theirs = (run_folder.read(summary["run"]).deciding() for summary in (one, other))
    names = (mine.keys() | theirs.keys()) - {"seed", "init_from", "init_state"}
    return [name for name in names if mine.get(name) != theirs.get(name)]


def _figures(summary: dict[str, Any]) -> dict[str, float]:
    metric = metric_named(summary["objective"])
    found: dict[str, Any] = {title: summary.get(name) for name, title in _ACCURACY.items()}
    found |= {metric.title: summary.get(metric.name)}
    found |= {
        title: summary.get(name, {}).get("top1")
        for name, title in (
            ("knn", "k-NN top-1"),
            ("linear_probe", "linear probe top-1"),
            ("zero_shot", "zero-shot top-1"),
        )
    }
    found |= {"own caption, R@1": summary.get("retrieval", {}).get("recall1")}
    found |= {told["name"]: told["value"] for told in summary.get("findings", ())}
    return {name: float(value) for name, value in found.items() if value is not None}
