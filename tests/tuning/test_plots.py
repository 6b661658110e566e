"""The drawings of the page, read back from their SVG."""

from __future__ import annotations

import itertools
import re

from training.objectives.settings import Metric
from tuning.cells import Cell
from tuning.plots import paired_plot
from tuning.significance import Paired


def test_names_of_seeds_with_close_values_stand_apart_and_all_are_there() -> None:
    cell = Cell("b", (0.5, 0), ("weight", "dim"), ("0.5", "D"), is_baseline=False)
    method = [97.5, 90.0, 98.0, 98.0, 77.0]
    result = Paired(
        cell=cell,
        metric=Metric(),
        seeds=[1, 2, 3, 4, 5],
        baseline=[84.0, 65.0, 91.0, 73.0, 35.0],
        method=method,
        mean=0.0,
        low=0.0,
        high=0.0,
    )
    found = re.findall(r"<!-- seed (\d) -->\s*<g[^>]*translate\([\d.]+ ([\d.]+)\)", paired_plot(result))
    heights = {int(seed): float(height) for seed, height in found}  # from the top, in points
    assert sorted(heights) == result.seeds
    ordered = sorted(heights.values())
    assert min(b - a for a, b in itertools.pairwise(ordered)) >= 7, "of 8 point letters"
    assert heights[5] == max(ordered) and heights[2] > heights[1] > heights[3]
