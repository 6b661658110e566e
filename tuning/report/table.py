"""The trials as rows, and as a table for a terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tuning.report.configurations import Content, Trial, headings, metric_of, score, shown_values
from tuning.report.progress import ORDER, clock, trouble


@dataclass(frozen=True, kw_only=True)
class Row:
    """A trial as tables show it."""

    name: str
    stage: str
    backbone: str
    cells: tuple[str, ...]
    """Values of the searched axes, in the order of `headings`."""
    seed: int
    status: str
    epochs: int
    metric: float
    """Of the last epoch so far; NaN before the first and of what diverged or failed."""
    best: float
    """Of the best epoch so far, which was chosen by the same pictures and so flatters."""
    best_epoch: int
    test: float
    """Of the test split; NaN where it was not measured."""
    seconds: float
    gpu_seconds: float
    run_id: str


def rows(content: Content) -> list[Row]:
    """A row a trial: final ones first, whole ones before others, best first."""
    metric = metric_of(content)
    names = headings(content)
    sign = -1 if metric.higher_is_better else 1

    def order(row: Row) -> tuple[bool, int, float, float]:
        value = sign * row.metric if math.isfinite(row.metric) else math.inf
        epochs = 0 if row.status == "complete" else -row.epochs
        return row.stage != "final", ORDER.index(row.status), epochs, value

    return sorted((_row(trial, names, content) for trial in content["trials"]), key=order)


def _row(trial: Trial, names: list[str], content: Content) -> Row:
    metric, result = metric_of(content), trial["result"]
    shown = shown_values(trial)
    last = result["last"] if result else trial["history"][-1] if trial["history"] else {}
    lost = trial["status"] in ("diverged", "failed")
    points = [(score(m, metric), int(m["epoch"])) for m in trial["history"]]
    finite = [point for point in points if math.isfinite(point[0])]
    choose = max if metric.higher_is_better else min
    best = choose(finite, default=(math.nan, 0), key=lambda point: point[0])
    if result:
        best = result["best_top1"], result["best_epoch"]
    test = trial["test"] or {}
    return Row(
        name=trial["name"],
        stage=trial["stage"],
        backbone=trial["backbone"],
        cells=tuple(shown.get(name, "-") for name in names),
        seed=trial["seed"],
        status=trial["status"],
        epochs=trial["epochs"],
        metric=math.nan if lost else score(last, metric),
        best=best[0],
        best_epoch=best[1],
        test=float(test.get(metric.name, test.get("top1", math.nan))),
        seconds=trial["seconds"],
        gpu_seconds=trial["gpu_seconds"],
        run_id=(result or {}).get("run_id", ""),
    )


def table(content: Content) -> str:
    """The trials as a table for a terminal, and what went wrong; last epoch beside the best one, which was
    chosen on the same images and so flatters."""
    metric, found, names = metric_of(content), rows(content), headings(content)
    tested = any(math.isfinite(row.test) for row in found)
    heads = ["backbone", *names, "seed", "stage", "status", "epochs", metric.title]
    heads += [*([content["test_split"]] if tested else []), "best", "epoch", "cost"]
    lines = [heads]
    for row in found:
        measured = [value_shown(row.test, content)] if tested else []
        lines.append(
            [
                row.backbone,
                *row.cells,
                str(row.seed),
                row.stage,
                row.status,
                str(row.epochs),
                value_shown(row.metric, content),
                *measured,
                value_shown(row.best, content),
                str(row.best_epoch or "-"),
                cost_shown(row),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    told = [
        "  ".join(f"{cell:{'<' if not place else '>'}{widths[place]}}" for place, cell in enumerate(line))
        for line in lines
    ]
    return "\n".join(told + trouble(content))


def value_shown(value: float, content: Content) -> str:
    """A metric as tables show it; a dash for none."""
    return metric_of(content).shown(value) if math.isfinite(value) else "-"


def cost_shown(row: Row) -> str:
    """Time that it took, of a GPU where it had one; a dash before its end."""
    if row.gpu_seconds:
        return f"{clock(row.gpu_seconds)} GPU"
    return clock(row.seconds) if row.seconds else "-"
