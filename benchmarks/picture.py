"""The picture of docs/evidence.md: gains over the baseline, seed by seed, drawn from tables of ablations.

Run `python benchmarks/picture.py [ROWS.jsonl ...] [--to docs/evidence.png]`. The tables are those that
`benchmarks/evidence.py` (runs/evidence/rows.jsonl) and `benchmarks/ablation.py` write; by default the figures
of docs/evidence.md, as they stand there. A point is a seed: the arm minus the baseline of the same seed; the
bar is Student's 95 % interval of their mean. Of two seeds nothing is coloured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tuning.report.significance import FEWEST_SEEDS, student_interval  # noqa: E402

Scores = dict[int, float]
Key = tuple[str, str, str]

# Panels with scales of their own: set, backbone, arm, and what the picture calls it.
PANELS = {
    "drawn scenes, captions of the picture, the recipe": [
        ("demo", "test_resnet", "class means", "the demo: mean text of the class"),
        ("scenes", "test_resnet", "class means", "other pictures: mean text of the class"),
        ("scenes", "test_resnet", "random", "control: random vectors"),
        ("scenes", "test_resnet", "permuted", "control: another class's text"),
        ("scenes", "test_resnet", "own", "own caption"),
    ],
    "drawn scenes, captions of the picture, a head of two layers": [
        ("two-layers", "test_resnet", "class means", "mean text of the class"),
        ("two-layers", "test_resnet", "similar labels", "no head: labels spread over similar classes"),
        ("three-captions", "test_resnet", "class means", "mean of three captions a picture, of the class"),
        ("three-captions", "test_resnet", "half way, one drawn", "one of three drawn, half way to the class"),
        ("three-captions", "test_resnet", "own, mean of three", "mean of a picture's own three"),
        ("wrong-50", "test_resnet", "half way", "half of the labels wrong: half way"),
        ("wrong-50", "test_resnet", "own", "half of the labels wrong: own caption"),
        ("tail", "test_resnet", "class means", "twenty pictures a class down to two"),
        ("tail", "test_resnet", "own", "the same: own caption"),
        ("relations", "test_resnet", "class means", "classes that no caption tells of"),
    ],
    "photographs, sentences of the class: mean text of the class": [
        ("cifar10", "convnext_atto", "class means, balanced", "CIFAR-10, 500 a class: ConvNeXt"),
        ("cifar10", "convnext_atto", "permuted, balanced", "the same, control: another class's text"),
        ("cifar10", "vit_tiny", "class means, balanced", "CIFAR-10, 500 a class: ViT"),
        ("cifar10", "resnet18", "class means, balanced", "CIFAR-10, 500 a class: ResNet-18"),
        ("cifar10-50", "resnet18", "class means, balanced", "CIFAR-10, 50 a class: ResNet-18"),
        ("caltech101", "resnet18", "class means, balanced", "Caltech-101, 30 a class: ResNet-18"),
        ("caltech101", "resnet18", "permuted, balanced", "the same, control: another class's text"),
        ("caltech101", "convnext_atto", "class means, balanced", "Caltech-101, 30 a class: ConvNeXt"),
    ],
}
PUBLISHED = ROOT / "benchmarks" / "results" / "evidence_rows.jsonl"
GAIN, LOSS, UNCLEAR = "#009E73", "#D55E00", "#56606B"


def main() -> int:
    """Draws the picture; says which of its lines have no rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", default=[str(PUBLISHED)], help="tables of JSON lines")
    parser.add_argument("--to", default=str(ROOT / "docs" / "evidence.png"))
    options = parser.parse_args()
    scores = read(options.rows)
    panels = {title: [line for line in lines if differences(scores, line)] for title, lines in PANELS.items()}
    for title, lines in PANELS.items():
        for line in set(lines) - set(panels[title]):
            print(f"{title}: no rows of {', '.join(line[:3])}", file=sys.stderr)
    draw(scores, panels, options.to)
    return 0


def read(tables: list[str]) -> dict[Key, Scores]:
    """Top-1 by set, backbone and arm, and seed; of two rows of one seed the first counts, as in the text."""
    found: dict[Key, Scores] = defaultdict(dict)
    for row in (json.loads(line) for table in tables for line in Path(table).read_text().splitlines()):
        found[row["set"], row["backbone"], row["arm"]].setdefault(row["seed"], row["top1"])
    return found


def differences(scores: dict[Key, Scores], line: tuple[str, str, str, str]) -> list[float]:
    """Of each seed that both have."""
    arm, base = scores[line[0], line[1], line[2]], scores[line[0], line[1], "baseline"]
    return [arm[seed] - base[seed] for seed in sorted(arm.keys() & base.keys())]


def draw(scores: dict[Key, Scores], panels: dict[str, list[tuple[str, str, str, str]]], to: str) -> None:
    """Points, means and intervals; an interval beyond the panel ends in an arrow."""
    from matplotlib.figure import Figure

    heights = [len(lines) for lines in panels.values()]
    figure = Figure(figsize=(9.5, 0.42 * sum(heights) + 1.7), layout="constrained")
    axes = figure.subplots(len(panels), 1, height_ratios=heights)
    for panel, (title, lines) in zip(axes, panels.items(), strict=True):
        found = [differences(scores, line) for line in lines]
        reach = 1.25 * max(abs(value) for each in found for value in each)
        for place, each in enumerate(found):
            low, high = student_interval(each)
            colour = UNCLEAR
            if len(each) >= FEWEST_SEEDS and not low <= 0 <= high:
                colour = GAIN if low > 0 else LOSS
            mean, height = statistics.fmean(each), len(found) - 1 - place
            panel.plot([max(low, -reach), min(high, reach)], [height] * 2, color=colour, lw=2.2, alpha=0.75)
            for end, beyond, mark in ((-reach, low < -reach, "<"), (reach, high > reach, ">")):
                if beyond:
                    panel.plot([end], [height], marker=mark, color=colour, ms=7, clip_on=False)
            panel.scatter(each, [height] * len(each), s=18, color="white", edgecolor=colour, zorder=3)
            panel.plot([mean], [height], marker="D", color=colour, ms=6, zorder=4)
            told = f"{mean:+.1f}  ({len(each)} seeds)"
            panel.annotate(
                told, (1.025, height), xycoords=("axes fraction", "data"), va="center", fontsize=8.5
            )
        panel.axvline(0, color="black", lw=0.8)
        panel.set_yticks(range(len(found)), [line[3] for line in reversed(lines)], fontsize=8.5)
        panel.set_xlim(-reach, reach)
        panel.set_ylim(-0.6, len(found) - 0.4)
        panel.set_title(title, fontsize=10, loc="left")
        panel.grid(axis="x", color="#e3e6ea")
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    axes[-1].set_xlabel(
        "points of top-1 over the baseline of the same seed; diamond: mean; bar: 95 %, coloured where it "
        "leaves out 0 by itself",
        fontsize=9,
    )
    figure.savefig(to, dpi=110)


if __name__ == "__main__":
    raise SystemExit(main())
