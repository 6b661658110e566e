"""What the page's drawings have in common: colours, sizes, and SVG that says what it shows.

Colours are Okabe and Ito's, which colour-blind readers tell apart, and scales are cividis; nothing is said by
colour alone.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from html import escape
from typing import Any

from training.objectives.metric import Metric

BLACK, GREY = "#000000", "#767676"
BLUE, SKY, ORANGE, GREEN, VERMILLION = "#0072B2", "#56B4E9", "#E69F00", "#009E73", "#D55E00"
SMALL, PLAIN = 8, 9


def figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    axes: Any = made.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL)
    axes.xaxis.label.set_size(PLAIN)
    axes.yaxis.label.set_size(PLAIN)
    return made, axes


def titled(axes: Any, title: str) -> None:
    """A title from the left edge, where long ones have room."""
    axes.set_title(title, fontsize=PLAIN, loc="left", fontweight="bold")


def svg(made: Any, label: str, css: str = "") -> str:
    """Inline SVG with a name that is read aloud and shown as a hint.

    Args:
        made: the figure.
        label: what it shows, in words.
        css: class of the element.
    """
    sink = io.StringIO()
    made.savefig(sink, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = sink.getvalue()
    start = text.index("<svg")
    end = text.index(">", start)
    named = f'{text[start:end]} role="img" aria-label="{escape(label)}" class="{css}">'
    return f"{named}<title>{escape(label)}</title>{text[end + 1 :]}"


def scaled(values: Iterable[float]) -> Any:
    """matplotlib's Normalize over finite values; a single one lies in the middle."""
    from matplotlib.colors import Normalize

    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    pad = 0.5 if low == high else 0.04 * (high - low)  # so that the ends of the scale are seen to be ends
    return Normalize(low - pad, high + pad)


def scale_of(metric: Metric) -> str:
    """matplotlib's name of a scale on which better is brighter."""
    return "cividis" if metric.higher_is_better else "cividis_r"


def colour_of(norm: Any, value: float, metric: Metric) -> Any:
    """Of the scale."""
    from matplotlib import colormaps

    return colormaps[scale_of(metric)](norm(value))


def ink_on(colour: Any) -> str:
    """Black or white, whichever reads better on a colour (relative luminance, WCAG 2)."""
    red, green, blue = (
        part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]
    )
    light = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "black" if light > 0.179 else "white"


def shortened(text: str, most: int = 34) -> str:
    """Fits a title; its end, which tells models of a family apart, stays."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most - most // 2) :]}"
