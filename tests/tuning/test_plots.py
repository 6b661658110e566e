"""The drawings of the page, read back from their SVG, and what they are made of."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from tests.tuning import contents
from tuning.report import landscape, plots
from tuning.report.comparison import comparisons
from tuning.report.configurations import Configuration, configurations
from tuning.report.scales import scales


def of(content: dict[str, Any], backbone: str = "resnet18", stage: str = "search") -> list[Configuration]:
    return [each for each in configurations(content, stage) if each.backbone == backbone]


def texts(svg: str) -> list[str]:
    """matplotlib notes each text beside its letters, which are paths."""
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img" and root.get("aria-label")
    assert root[0].tag.endswith("title") and root[0].text == root.get("aria-label")
    return re.findall(r"<!-- (.*?) -->", svg)


def test_every_seed_of_a_final_comparison_has_a_row_and_the_mean_the_last() -> None:
    (found,) = comparisons([contents.large()])
    svg = plots.paired_plot([found])
    rows = re.findall(r"<!-- (seed \d|mean) -->\s*<g[^>]*translate\([\d.]+ ([\d.]+)\)", svg)
    heights = [float(height) for _, height in rows]
    assert [name for name, _ in rows] == [*(f"seed {seed}" for seed in found.seeds), "mean"]
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 10, "of 8 point letters"


def test_curves_tell_how_trainings_ended() -> None:
    shown = texts(plots.curves_plot(of(contents.large(final=False))))
    for name in ("plain model", "best setting", "other settings", "stopped early", "running"):
        assert name in shown
    assert "diverged or failed" in shown and "resnet18: learning curves" in shown
    only = texts(plots.curves_plot(of(contents.single())))
    assert "plain model" in only and "best setting" not in only
    waiting = contents.content([contents.trial("t", [], status="waiting")])
    assert plots.curves_plot(of(waiting)) == "", "no empty diagram before the first epoch"


def test_the_heat_map_has_means_and_the_baselines_level() -> None:
    trials = [contents.trial("b", [50.0], arm="baseline", configuration=9)]
    for number, (weight, dim, value) in enumerate(
        [(0.1, 64, 51.0), (0.1, 0, 53.0), (0.9, 64, 55.25), (0.9, 10, 20.0)]
    ):
        values = {"alignment_weight": weight, "projection_dim": dim}
        status = "stopped" if dim == 10 else "complete"
        trials.append(
            contents.trial(f"t{number}", [value], configuration=number, values=values, status=status)
        )
    shown = texts(landscape.heat_map(of(contents.content(trials))))
    assert {"51.0", "53.0", "55.2", "ended", "early"} <= set(shown), "20.0 is of fewer epochs"
    assert "20.0" not in shown and "resnet18: top-1 (◆ plain model 50.0)" in shown
    columns = [text for text in shown if text in ("64", "10", "D")]
    assert columns == ["10", "64", "D"], "numbers by size, then the embedding's own width"
    assert landscape.heat_map(of(contents.grid([1, 2]))) == "", "of one setting that varied"


def test_many_values_of_a_map_are_ranges_and_the_most_important_settings_come_first() -> None:
    found = of(contents.large())
    lines = {line.heading: line for line in scales(each for each in found if not each.is_baseline)}
    assert lines["lr"].is_log and not lines["weight"].is_log and lines["dim"].levels == ("64", "128", "D")
    shown = texts(landscape.heat_map(found, ["dim", "lr"]))
    assert "dim" in shown and "lr" in shown and "weight" not in shown
    bins = landscape.Bins(lines["lr"])
    methods = [each for each in found if not each.is_baseline]
    assert {bins.of(each) for each in methods} <= set(range(5)) and len(bins.labels) == 5
    assert bins.of(min(methods, key=lambda each: each.values["lr"])) == 0
    assert bins.of(max(methods, key=lambda each: each.values["lr"])) == 4


def test_scales_place_numbers_by_size_or_logarithm_and_words_after_them() -> None:
    def one(*values: Any) -> Any:
        trials = [
            contents.trial(f"t{number}", [1.0], configuration=number, values={"lr": value})
            for number, value in enumerate(values)
        ]
        return scales(of(contents.content(trials)), varying=False)[0]

    assert one(0.001, 0.01, 0.1).place(0.01, "") == pytest.approx(0.5)
    assert one(1.0, 2.0, 4.0).place(2.0, "") == pytest.approx(1 / 3)
    assert one(10, -2, 2).numbers == (-2, 2, 10)
    assert one("b", 3, "a", 2).levels == ("2", "3", "a", "b")
    assert one(3).place(3, "3") == 0.5 and one("x").place("x", "x") == 0.5
    assert one([0.9, 0.95], [0.9, 0.99]).levels == ("0.9, 0.95", "0.9, 0.99")
    assert list(one(*range(1, 9)).ticks()) == [0, 0.5, 1]


def test_the_importance_is_that_of_the_setting_that_decides() -> None:
    trials = []
    for number in range(24):
        values = {"lr": 10 ** (-4 + number % 6 / 3), "alignment_weight": (0.1, 0.3, 0.9)[number % 3]}
        top1 = 50 + 10 * values["alignment_weight"] + number % 2 / 10
        status = "stopped" if number >= 20 else "complete"
        curve = [top1 - 20, top1][: 1 if status == "stopped" else 2]
        trials.append(contents.trial(f"t{number}", curve, configuration=number, values=values, status=status))
    found = of(contents.content(trials))
    shares, epoch = landscape.importance(found, [1, 2])
    assert epoch == 2 and next(iter(shares)) == "weight" and shares["weight"] > 0.9
    assert sum(shares.values()) == pytest.approx(1) and shares == landscape.importance(found, [1, 2])[0]
    assert landscape.importance(found[:7], [1, 2]) == ({}, 0)
    shown = texts(landscape.importance_plot(shares, "resnet18", epoch))
    assert f"{100 * shares['weight']:.0f} %" in shown


def test_parallel_coordinates_hold_every_setting() -> None:
    svg = landscape.parallel_plot(of(contents.large()))
    shown = texts(svg)
    assert {"lr", "weight", "dim", "top-1", "ended early", "64", "128", "D", "0.3"} <= set(shown)
    assert "16 settings" in svg and landscape.parallel_plot(of(contents.single())) == ""


def test_the_front_is_what_none_beats_in_cost_and_result() -> None:
    content = contents.grid([1.0])
    metric = configurations(content)[0].metric
    points = [(3.0, 7.0), (1.0, 5.0), (2.0, 4.0), (2.0, 6.0), (4.0, 7.0)]
    assert plots._front(points, metric) == [(1.0, 5.0), (2.0, 6.0), (3.0, 7.0)]
    assert "GPU seconds for a training" in texts(
        plots.cost_plot(
            configurations(contents.content([contents.trial("b", [1.0], arm="baseline", gpu_seconds=9.0)]))
        )
    )
    assert (
        plots.cost_plot(configurations(contents.content([contents.trial("t", [], status="waiting")]))) == ""
    )


def test_metrics_that_are_no_numbers_are_in_no_drawing() -> None:
    content = contents.grid([1.0, 2.0], seeds=2)
    content["trials"].append(
        contents.trial("n", [math.nan], configuration=9, values={"alignment_weight": 7.0})
    )
    assert plots.curves_plot(of(content)) and landscape.parallel_plot(of(content))
    assert plots.cost_plot(of(content))


@pytest.mark.filterwarnings("error")
def test_settings_with_long_names_go_by_their_numbers() -> None:
    content = contents.grid([1.0, 2.0, 3.0])
    assert "weight 0.1, dim 64" in texts(plots.paired_plot(comparisons([content])))
    for trial in content["trials"]:
        trial["values"] |= {"weight_decay": 0.0123, "drop_path": 0.05, "label_smoothing": 0.1}
    found = comparisons([content])
    shown = texts(plots.paired_plot(found))
    assert [text for text in shown if "setting" in text] == ["setting 3", "setting 2", "setting 1"]
