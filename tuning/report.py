"""`report`: what a sweep found, as a table on the terminal; `page.py` makes the page from the same rows."""

from __future__ import annotations

import math
from typing import Any

from pipeline.errors import MissingError
from training.objectives.settings import Metric
from training.run_folder import headline, judged_by, read_json
from tuning.cells import cell_of
from tuning.significance import Paired, paired


def read_sweep(folder: str) -> dict[str, Any]:
    """The content of a sweep's sweep.json.

    Raises:
        MissingError: `folder` is no folder of a sweep.
    """
    content = read_json(folder, "sweep.json")
    if content is None:
        message = f"sweep={folder}: holds no sweep.json, so it is no sweep; `gpt4image tune` makes one."
        raise MissingError(message)
    return content


def finished(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The trials with a result."""
    return [trial for trial in content["trials"] if trial["result"] is not None]


def unfinished(content: dict[str, Any]) -> list[str]:
    """What is to be said of the trials without a result."""
    diverged = [trial for trial in content["trials"] if trial.get("failure")]
    lines = [f"{trial['name']} diverged: {trial['failure']}" for trial in diverged]
    missing = len(content["trials"]) - len(finished(content)) - len(diverged)
    return [*lines, f"{missing} trials have no result"] if missing else lines


def rows(content: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a finished trial, best first."""
    found: list[dict[str, Any]] = []
    metric = Metric()
    for trial in finished(content):
        config, result = trial["config"], trial["result"]
        metric = judged_by(config)
        found.append(
            {
                "backbone": config["backbone"],
                "axes": cell_of(config).shown,
                "seed": config["seed"],
                "top1": headline(result["last"], metric.name),
                "top5": headline(result["last"], "top5") if "top5" in result["last"] else math.nan,
                "best_top1": result["best_top1"],
                "best_epoch": result["best_epoch"],
                "images_per_s": result["last"]["images_per_s"],
                "run_id": result["run_id"],
            }
        )
    return sorted(found, key=lambda row: -row["top1"] if metric.higher_is_better else row["top1"])


def table(content: dict[str, Any]) -> str:
    """The trials as a table; last epoch beside the best one, which was chosen on the same images and so
    flatters."""
    metric = metric_of(content)
    found = rows(content)
    heads = "".join(f" {head:>6}" for head in headings(content))
    lines = [
        f"{'backbone':24}{heads} {'seed':>4} {metric.title:>7} {'top-5':>7} {'best':>7} {'epoch':>5} "
        f"{'img/s':>7}"
    ]
    for r in found:
        axes = "".join(f" {value:>6}" for value in r["axes"])
        top5 = "-" if math.isnan(r["top5"]) else f"{r['top5']:.2f}"
        lines.append(
            f"{r['backbone']:24}{axes} {r['seed']:>4} {metric.shown(r['top1']):>7} {top5:>7} "
            f"{metric.shown(r['best_top1']):>7} {r['best_epoch']:>5} {r['images_per_s']:>7.0f}"
        )
    return "\n".join(lines + unfinished(content))


def headings(content: dict[str, Any]) -> tuple[str, ...]:
    """How a table heads the axes of the sweep's training method."""
    return cell_of(content["trials"][0]["config"]).headings if content["trials"] else ()


def metric_of(content: dict[str, Any]) -> Metric:
    """What the trials of a sweep are judged by."""
    return judged_by(content["trials"][0]["config"]) if content["trials"] else Metric()


def sentence(result: Paired) -> str:
    """One comparison in words."""
    metric, setting = result.metric, f"{result.cell.backbone}, {result.cell.words}"
    mean, low, high = (f"{value:+.{metric.digits}f}" for value in (result.mean, result.low, result.high))
    told = f"{setting}: {mean} {metric.difference} over the baseline"
    if len(result.seeds) < 2:
        return f"{told} on one seed; too few for an interval"
    return f"{told}, 95 % [{low}, {high}], {len(result.seeds)} seeds: {result.verdict}"


def comparisons(content: dict[str, Any]) -> str:
    """The paired comparisons as sentences."""
    return "\n".join(sentence(result) for result in paired(finished(content)))
