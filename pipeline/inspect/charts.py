"""The distributions of the page: histograms, and the commonest of a kind as bars."""

from __future__ import annotations

from collections import Counter
from typing import Any
from urllib.parse import quote

import numpy as np

from pipeline.inspect.counts import Tally
from pipeline.store import Store

MOST = 20
"""Of a kind that are listed."""
BINS = 40


def histograms(tally: Tally) -> list[dict[str, Any]]:
    sizes = np.bincount(tally.labels[tally.labels >= 0])
    of_classes = Counter(sizes.tolist() if len(sizes) > 2 * MOST else [])  # fewer are listed by name
    charts = [
        ("Words in a caption", "captions", tally.words),
        ("Tokens written for a picture", "pictures", tally.tokens),
        ("Longer edge of a picture, in pixels", "pictures", tally.edges),
        ("Pictures in a class", "classes", of_classes),
    ]
    return [_histogram(title, what, counts) for title, what, counts in charts if counts]


def _histogram(title: str, what: str, counts: Counter[int]) -> dict[str, Any]:
    """Columns of equal width for whole numbers; the last holds what lies beyond 99.5 % too, so that one giant
    hides nothing."""
    values = np.array(sorted(counts))
    weights = np.array([counts[int(value)] for value in values])
    reached = np.cumsum(weights) / weights.sum()
    low, high, most = int(values[0]), int(values[np.searchsorted(reached, 0.995)]), int(values[-1])
    high = most if most - high <= (most - low) // 4 else high
    width = -(-(high - low + 1) // BINS)
    bins = (high - low) // width + 1
    heights = np.bincount(np.minimum((values - low) // width, bins - 1), weights, bins).astype(int).tolist()
    columns = []
    for index, height in enumerate(heights):
        start = low + index * width
        end = most if index == bins - 1 else start + width - 1
        label = f"{start}" if start == end else f"{start} to {end}"
        columns.append({"label": f"{label}: {height} {what}", "share": round(100 * height / max(heights), 2)})
    beyond = f"{high} and more, up to {most}" if most > low + bins * width - 1 else f"{most}"
    median = int(values[np.searchsorted(reached, 0.5)])
    return {"title": title, "columns": columns, "low": low, "high": beyond, "median": median}


def lists(store: Store, tally: Tally) -> list[dict[str, Any]]:
    """Bars by name: classes (with many, the largest and the smallest), splits, reasons of failure, flags."""
    sizes = np.bincount(tally.labels[tally.labels >= 0], minlength=len(store.dataset.classes)).tolist()
    classes = sorted(zip(store.dataset.classes, sizes, strict=True), key=lambda pair: (-pair[1], pair[0]))
    splits = np.bincount(tally.splits[tally.splits >= 0], minlength=len(store.dataset.splits)).tolist()
    lists = [("Classes", "class", classes)]
    if len(classes) > 2 * MOST:
        lists = [
            ("Largest classes", "class", classes[:MOST]),
            ("Smallest classes", "class", classes[-MOST:]),
        ]
    lists.append(("Splits", "split", list(zip(store.dataset.splits, splits, strict=True))))
    lists.append(("Why rows failed", "errors", tally.reasons.most_common(MOST)))
    lists.append(("Flags", "flag", tally.flags.most_common(MOST)))
    return [_bars(title, key, pairs) for title, key, pairs in lists if pairs]


def _bars(title: str, key: str, pairs: list[tuple[str, int]]) -> dict[str, Any]:
    most = max(1, *(count for _, count in pairs))
    bars = [
        {
            "name": name,
            "count": count,
            "share": round(100 * count / most, 2),
            "link": f"#{key}={quote(name, safe='')}",
        }
        for name, count in pairs
    ]
    return {"title": title, "bars": bars, "wide": key == "errors"}
