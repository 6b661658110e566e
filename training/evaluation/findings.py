"""What `evaluate` shows: a table for people, and with --to the files for further work."""

from __future__ import annotations

import csv
import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.captioners.prompts import class_name
from pipeline.store import Store
from training.data.order import ROW, SHARD
from training.evaluation import figures, measures
from training.objectives.registry import metric_named

if TYPE_CHECKING:
    from training.evaluation.evaluate import Judgement
    from training.evaluation.outputs import Outputs

Array = npt.NDArray[Any]


def table(summary: dict[str, Any]) -> str:
    """The summary as lines for a terminal."""
    classified = "top1" in summary
    of = f", {summary['classes']} classes" if classified else ""
    heading = (
        f"{summary['run']} ({summary['checkpoint']}, epoch {summary['epoch']}, {summary['weights']} weights) "
        f"on {summary['split']}: {summary['images']} images{of}"
    )
    lines = [heading, *(_accuracy_lines(summary) if classified else _metric_lines(summary))]
    if knn := summary.get("knn"):
        lines.append(
            _line(
                "k-NN top-1",
                knn["top1"],
                f"k = {knn['k']}, T = {knn['temperature']}, {knn['bank']} training images",
            )
        )
    if probe := summary.get("linear_probe"):
        note = f"penalty {probe['penalty']:g}, fitted to {probe['images']} images"
        lines.append(_line("linear probe top-1", probe["top1"], note))
    for told in summary.get("findings", ()):
        text = f"  {told['name']:18}  {told['note']}"
        lines.append(text if told["value"] is None else _line(told["name"], told["value"], told["note"]))
    if retrieval := summary.get("retrieval"):
        recalls = ", ".join(f"R@{k} {retrieval[f'recall{k}']:.2f}" for k in (1, 5, 10))
        lines.append(
            f"  own caption found   {recalls} %, median rank {retrieval['median_rank']:g} of "
            f"{retrieval['captions']} captions"
        )
    if scores := summary.get("zero_shot"):
        lines += _zero_shot_lines(scores)
    return "\n".join([*lines, *(_mistake_lines(summary) if classified else ())])


def _metric_lines(summary: dict[str, Any]) -> list[str]:
    """What a method without a classifier is judged by, and what else its evaluator found."""
    metric = metric_named(summary["objective"])
    if metric.name not in summary:
        return [f"  {metric.title:18}  left out: {summary['left_out']}"]
    others = [name for name, value in summary.items() if isinstance(value, float) and name != metric.name]
    return [
        f"  {metric.title:18}  {metric.shown(summary[metric.name])}",
        *(f"  {name.replace('_', ' '):18}  {metric.shown(summary[name])}" for name in others),
    ]


def _accuracy_lines(summary: dict[str, Any]) -> list[str]:
    low, high = summary["top1_interval"]
    return [
        _line("top-1", summary["top1"], f"95 % interval {low:.2f} to {high:.2f}"),
        _line("top-5", summary["top5"]),
        _line("mean over classes", summary["mean_per_class"]),
        _line(
            "calibration error",
            summary["ece"],
            f"15 equal bins; mean confidence {summary['confidence']:.2f} %",
        ),
    ]


def _mistake_lines(summary: dict[str, Any]) -> list[str]:
    worst = ", ".join(f"{row['class']} {row['accuracy']:.1f} %" for row in summary["worst_classes"][:5])
    confused = ", ".join(
        f"{row['true']} as {row['predicted']} ({row['images']})" for row in summary["confused"][:5]
    )
    return [f"  worst classes       {worst}", f"  most confused       {confused or 'none'}"]


def _zero_shot_lines(scores: dict[str, Any]) -> list[str]:
    left_out = f", {scores['left_out']} images of other classes left out" if scores["left_out"] else ""
    lines = [
        _line("zero-shot top-1", scores["top1"], f"among {scores['classes']} classes{left_out}"),
        _line("zero-shot top-5", scores["top5"]),
    ]
    if scores["unseen_images"]:
        lines += [
            _line("  seen classes", scores["seen_top1"], f"{scores['seen_images']} images"),
            _line(
                "  unseen classes",
                scores["unseen_top1"],
                f"{scores['unseen_images']} images, among all classes",
            ),
            _line("  harmonic mean", scores["harmonic_mean"]),
            _line("  unseen, apart", scores["unseen_only_top1"], "among the unseen classes alone"),
        ]
    return lines


def _line(name: str, value: float | None, note: str = "") -> str:
    text = "     -  " if value is None else f"{value:6.2f} %"
    return f"  {name:18}  {text}{f'   ({note})' if note else ''}"


def write(judgement: Judgement, store: Store, folder: str) -> None:
    """Writes evaluation.json, per_class.csv, predictions.parquet, confusion.png and reliability.png into a
    folder; without a classifier the first. Beside them what the method has to show."""
    from PIL import Image

    os.makedirs(folder, exist_ok=True)
    content = judgement.summary
    if judgement.outputs is not None:
        content = content | {"calibration": _write_classified(judgement, judgement.outputs, store, folder)}
    with open(os.path.join(folder, "evaluation.json"), "w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2, ensure_ascii=False)
    for name, pixels in judgement.pictures.items():
        Image.fromarray(pixels).save(os.path.join(folder, f"{name}.png"))


def _write_classified(
    judgement: Judgement, outputs: Outputs, store: Store, folder: str
) -> list[dict[str, Any]]:
    """All files but evaluation.json; returns the bins of calibration for that."""
    calibration, matrix = judgement.calibration, judgement.matrix
    assert calibration is not None and matrix is not None
    bins = [
        {
            "above": round(float(edge), 6),
            "images": int(count),
            "confidence": _number(mean),
            "accuracy": _number(accuracy),
        }
        for edge, count, mean, accuracy in zip(
            calibration.edges, calibration.counts, calibration.confidence, calibration.accuracy, strict=False
        )
    ]
    _per_class(matrix, judgement.classes, os.path.join(folder, "per_class.csv"))
    pq.write_table(predictions(outputs, store), os.path.join(folder, "predictions.parquet"))
    names = [class_name(name) for name in judgement.classes]
    title = f"{judgement.summary['split']}: top-1 {judgement.summary['top1']:.2f} %"
    pairs = measures.confused_pairs(matrix, 30)
    figures.confusion_figure(matrix, names, pairs, title).savefig(
        os.path.join(folder, "confusion.png"), dpi=120
    )
    figures.reliability_figure(calibration, title).savefig(os.path.join(folder, "reliability.png"), dpi=120)
    return bins


def predictions(outputs: Outputs, store: Store) -> pa.Table:
    """A row an image: id, label, predicted, and the predicted class's probability."""
    shards, rows = outputs.samples[:, SHARD], outputs.samples[:, ROW]
    ids: list[str] = []
    for shard in np.unique(shards):  # in the store's order, as the outputs are
        column = store.read_shard("images", "", int(shard), ["id"])["id"]
        ids += column.take(rows[shards == shard]).to_pylist()
    return pa.table(
        {
            "id": ids,
            "label": outputs.labels.astype(np.int32),
            "predicted": outputs.predicted.astype(np.int32),
            "probability": outputs.confidence,
        }
    )


def _per_class(matrix: Array, classes: list[str], path: str) -> None:
    """A row a class; accuracy and precision in percent, empty where no image is or was called so."""
    images, correct, called = matrix.sum(1), matrix.diagonal(), matrix.sum(0)
    mistakes = matrix.copy()
    np.fill_diagonal(mistakes, 0)
    other = mistakes.argmax(1)
    with open(path, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(
            [
                "label",
                "class",
                "images",
                "correct",
                "accuracy",
                "predicted",
                "precision",
                "confused_with",
                "confused",
            ]
        )
        for label, name in enumerate(classes):
            most = int(mistakes[label, other[label]])
            writer.writerow(
                [
                    label,
                    class_name(name),
                    images[label],
                    correct[label],
                    _percent(correct[label], images[label]),
                    called[label],
                    _percent(correct[label], called[label]),
                    class_name(classes[other[label]]) if most else "",
                    most,
                ]
            )


def _percent(part: Any, whole: Any) -> str:
    return f"{100 * part / whole:.3f}" if whole else ""


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)
