"""Pictures of an evaluation: confusion matrix and reliability diagram, drawn by matplotlib without a
display."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from training.evaluation.measures import Calibration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]

SHOWN_EDGE, GAP = 160, 6  # pixels
MOST_LABELS = 30  # classes; beyond it their names would run into each other


def confusion_figure(
    matrix: Array, names: list[str], pairs: list[tuple[int, int, int]], title: str
) -> Figure:
    """The confusion matrix [C, C], each row as shares of its class, and beside it the commonest mistakes (see
    `judging`)."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    axes, beside = figure.subplots(1, 2, width_ratios=(8, 5))
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    # The square root shows the few per cent of a mistake that would be white on a linear scale.
    picture = axes.imshow(
        shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest", aspect="equal"
    )
    figure.colorbar(picture, ax=axes, label="share of the true class", shrink=0.8)
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    if len(names) <= MOST_LABELS:
        short = [_short(name, 24) for name in names]
        axes.set_xticks(range(len(names)), short, rotation=90)
        axes.set_yticks(range(len(names)), short)
    beside.axis("off")
    lines = [
        f"{count:>5}  {_short(names[true], 22)} \N{RIGHTWARDS ARROW} {_short(names[other], 22)}"
        for true, other, count in pairs
    ]
    text = "\n".join(["images  true \N{RIGHTWARDS ARROW} predicted", "", *(lines or ["no mistakes"])])
    beside.text(
        0, 1, text, va="top", family="monospace", fontsize=9, transform=beside.transAxes, parse_math=False
    )
    return figure


def reliability_figure(calibration: Calibration, title: str) -> Figure:
    """Accuracy against confidence in each bin (DeGroot and Fienberg's reliability diagram), and how many
    images each holds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 7), layout="constrained")
    axes, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    width = calibration.edges[1] - calibration.edges[0]
    centres = calibration.edges[:-1] + width / 2
    filled = calibration.counts > 0
    axes.bar(
        centres[filled],
        calibration.accuracy[filled],
        width,
        edgecolor="white",
        color="tab:blue",
        label="accuracy",
    )
    axes.plot(
        calibration.confidence[filled],
        calibration.accuracy[filled],
        "o",
        color="tab:orange",
        label="at the mean confidence",
    )
    axes.plot([0, 1], [0, 1], "--", color="grey", label="perfect calibration")
    axes.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title=f"{title}\nECE {100 * calibration.ece:.2f} %")
    axes.legend(loc="upper left")
    below.bar(
        centres, calibration.counts / max(1, calibration.counts.sum()), width, edgecolor="white", color="grey"
    )
    below.set(xlabel="confidence", ylabel="share of images")
    return figure


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def side_by_side(rows: list[list[Array]]) -> Array:
    """[h, w, 3] uint8 of pictures of one size, uint8 too, on white; small ones are enlarged, pixel by
    pixel."""
    height, width, _ = rows[0][0].shape
    factor = max(1, SHOWN_EDGE // max(height, width))
    tall, wide = (factor * edge + GAP for edge in (height, width))
    page = np.full((tall * len(rows) + GAP, wide * max(map(len, rows)) + GAP, 3), 255, np.uint8)
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            large = picture.repeat(factor, 0).repeat(factor, 1)
            top, left = GAP + row * tall, GAP + column * wide
            page[top : top + len(large), left : left + large.shape[1]] = large
    return page
