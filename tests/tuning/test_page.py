"""What is told of a sweep: comparisons, words, table; and the page, in a real browser."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.store import CAPTIONS, Store
from tests.browser import Browse, Page, browser
from tests.tuning import contents
from tuning import report
from tuning.report import page, words
from tuning.report.comparison import comparisons
from tuning.report.table import rows


def lead(content: dict[str, Any]) -> str:
    return " ".join(words.lead(content, comparisons([content])))


def test_the_final_comparison_alone_counts_where_there_is_one() -> None:
    content = contents.large()
    (found,) = comparisons([content])
    tests = {
        (trial["arm"], trial["seed"]): trial["test"]["top1"] for trial in content["trials"] if trial["test"]
    }
    assert found.seeds == (2, 3, 4, 5, 6) and found.split == "test" and found.untouched
    assert found.differences == [tests["method", seed] - tests["baseline", seed] for seed in found.seeds]
    assert not found.flatters and found.verdict == "a gain"
    low, high = found.over_pictures
    assert (
        low < found.mean < high
        and "of other pictures of the kind, and other seeds, 95 % [+" in report.text([content])
    )
    assert re.match(
        r"Descriptions raise resnet18 from 70\.3 to 7\d\.\d % of test pictures right \(\+\d\.\d points, "
        r"95 % \+\d\.\d to \+\d\.\d, five fresh seeds\)\.$",
        lead(content),
    )
    for trial in content["trials"]:
        (trial["test"] or {}).pop("right", None)
    assert "other pictures" not in report.text([content])
    for trial in content["trials"]:
        trial["test"] = None
    (found,) = comparisons([content])
    assert found.split == "val" and found.flatters and "flatters" in lead(content)
    assert "These figures flatter" in report.text([content])


def test_a_winner_of_an_earlier_start_is_no_part_of_the_comparison() -> None:
    content = contents.large()
    for trial in [each for each in content["trials"] if (each["stage"], each["arm"]) == ("final", "method")]:
        lucky = {"split": "test", "top1": 99.0, "images": 100}
        content["trials"].append(trial | {"name": f"{trial['name']}-x", "configuration": 99, "test": lucky})
    (found,) = comparisons([content])
    assert found.method.number != 99 and max(found.afters) < 99
    assert "an earlier winner was measured on them, too" in report.text([content])


def test_seeds_that_are_missing_are_told() -> None:
    content = contents.large()
    lost = next(t for t in content["trials"] if t["stage"] == "final" and t["arm"] == "method")
    lost |= {
        "status": "diverged",
        "result": None,
        "test": None,
        "failure": "step 3: the loss is no finite number.",
    }
    (found,) = comparisons([content])
    assert found.seeds == (3, 4, 5, 6) and found.missing == (2,)
    told = report.text([content])
    assert "without seeds 2 (diverged)" in told and f"{lost['name']} diverged: step 3" in told


def test_searches_are_corrected_for_all_that_is_shown_and_said_to_flatter() -> None:
    content = contents.grid([2.0, 0.0, -3.0, 0.9], noise=0.35)
    found = comparisons([content])
    assert found[0].method.number == 1 and len(found) == 4
    assert [each.verdict for each in found] == [
        "a gain",
        "no difference shown",
        "no difference shown",
        "a loss",
    ]
    close = found[1]
    assert close.p < 0.05 < close.adjusted and close.interval[0] > 0, "by itself it would be a gain"
    both = comparisons([content, contents.grid([0.0, 0.1]) | {"sweep": "/runs/other"}])
    assert len(both) == 6 and all(b.adjusted >= a.adjusted for a, b in zip(found, both, strict=False))
    assert "4 settings were tried" in lead(content) and "a final comparison on fresh seeds" in lead(content)
    alone = lead(contents.grid([2.0]))
    assert alone.startswith("Descriptions raise resnet18 from 51.0 to 53.0 % of val pictures right")
    assert "flatters" not in alone, "where nothing was chosen"


def test_a_method_is_compared_with_the_best_baseline_of_its_backbone() -> None:
    content = contents.grid([2.0])
    for seed, level in enumerate((51.9, 52.9, 53.9)):
        content["trials"].append(
            contents.trial(
                f"b2-s{seed}", [level], arm="baseline", configuration=7, seed=seed, values={"lr": 0.1}
            )
        )
    # One lucky seed is no better baseline, and another backbone none at all.
    content["trials"].append(contents.trial("b3", [99.0], arm="baseline", configuration=8))
    content["trials"].append(contents.trial("b4", [99.0], arm="baseline", configuration=9, backbone="vit"))
    (found,) = comparisons([content])
    assert found.baseline.words == "baseline, lr 0.1" and abs(found.mean - 0.1) < 0.2
    assert "over the baseline, lr 0.1" in words.sentence(found)


def test_leads_say_what_is_known_and_what_is_not() -> None:
    assert lead(contents.large(final=False)) == "Not known yet: 68 of 72 trainings have run."
    waiting = contents.content([contents.trial("t", [], status="waiting")], state="running", seconds=0.0)
    assert lead(waiting) == "Not known yet: 0 of 1 trainings have run." and "t" in report.text([waiting])
    assert lead(contents.content([])) == "Nothing is known: no training came to its end."
    assert lead(contents.single()).startswith("Only the plain model was trained")
    assert words.title([contents.single()]) == "How the plain model did"
    assert "descriptions" in words.title([contents.single(), contents.grid([2.0])])
    assert "fewer than three seeds cannot tell that from chance" in lead(contents.grid([2.0], seeds=1))
    nothing = lead(contents.grid([0.0]))
    assert nothing.startswith(
        "Nothing beats the plain model of resnet18: 51.0 % of val pictures right, and 5"
    )
    assert lead(contents.grid([-2.0])).startswith("Descriptions lower resnet18 from 51.0 to 49.0 % of val")
    running = contents.grid([2.0]) | {"state": "running"}
    assert lead(running).startswith("So far: Descriptions raise resnet18")
    toy = lead(contents.toy())
    assert "The best of 3 settings is resnet18, noise 0.1: error 0.00" in toy and "No plain model" in toy


def test_a_method_whose_metric_falls_gains_by_falling() -> None:
    content = contents.toy()
    for seed in (0, 1, 2):
        for arm, number, noise, level in (("baseline", 8, 0.0, 0.02), ("method", 9, 0.7, 0.001)):
            values = {"noise": noise} if arm == "method" else {}
            made = contents.trial(
                f"{arm}{seed}",
                [level + seed / 9000 + number * seed * 1e-6],
                arm=arm,
                configuration=number,
                seed=seed,
                values=values,
                objective="tests.toy_objective",
                metric="colour_error",
            )
            made["config"] |= {"noise": noise}
            content["trials"].append(made)
    best = comparisons([content])[0]
    assert best.method.shown == {"noise": "0.7"} and best.mean < 0 and best.verdict == "a gain"
    assert lead(content).startswith(
        "The method toy_objective improves resnet18 from 0.0201 to 0.0011 error on"
    )
    ordered = [row.metric for row in rows(content)]
    assert ordered == sorted(ordered)


def test_the_table_tells_of_every_training() -> None:
    content = contents.large(final=False)
    told = report.text([content])
    for status in ("complete", "stopped", "running", "waiting", "diverged", "failed"):
        assert re.search(rf"search +{status} ", told)
    assert (
        "diverged: step 41: the loss is no finite number." in told and "failed: worker 0 was killed" in told
    )
    assert "68 of 72 trainings ended" in told and "of a budget of 80 configurations an arm, 6 hours" in told
    assert "gpt4image train --config /runs/sweep/best.json --run runs/winner" in told
    found = rows(content)
    assert len(found) == 72 and [row.status for row in found] == sorted(
        (row.status for row in found),
        key=("complete", "stopped", "running", "waiting", "diverged", "failed").index,
    )
    assert all(math.isnan(row.metric) for row in found if row.status in ("diverged", "failed", "waiting"))


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    return browser(tmp_path)


def test_a_browser_reads_the_numbers_of_the_content_off_the_page(
    tmp_path: Path, make_store: Callable[..., Path], browse: Browse
) -> None:
    store = Store(str(make_store(tmp_path / "store")))
    captions = store.read_shard("captions", "test", 0).to_pylist()
    captions[0]["caption"] = "<script>alert('caption')</script>"
    store.write_shard("captions", "test", 0, pa.Table.from_pylist(captions, schema=CAPTIONS), seconds=0)
    content = contents.large() | {"store": store.uri}
    content["trials"][0]["name"] = 'a"><script>alert(1)</script>'
    file = tmp_path / "report.html"
    page.write(str(file), [content], pictures=6)
    shown = browse(file, "--dump-dom")
    assert "CONSOLE" not in shown.stderr, shown.stderr
    read = Page(shown.stdout)

    trials = {each["trial"]: each for each in read.of("trial")}
    assert trials.keys() == {trial["name"] for trial in content["trials"]} and len(trials) == 82
    for trial in content["trials"]:
        data = trials[trial["name"]]
        assert (data["status"], data["stage"], int(data["epochs"])) == (
            trial["status"],
            trial["stage"],
            trial["epochs"],
        )
        if trial["status"] in ("complete", "stopped"):
            assert float(data["metric"]) == trial["history"][-1]["top1"]
        else:
            assert data["metric"] == ""
        assert float(data["test"] or "nan") == pytest.approx(
            (trial["test"] or {}).get("top1", math.nan), nan_ok=True
        )

    (found,) = comparisons([content])
    (told,) = read.of("comparison")
    names = ("mean", "low", "high", "wide-low", "wide-high", "p", "adjusted")
    numbers = [float(told[name]) for name in names]
    assert numbers == [found.mean, *found.interval, *found.over_pictures, found.p, found.adjusted]
    assert (told["verdict"], told["seeds"], told["stage"]) == ("a gain", "5", "final")
    differences = [float(each["difference"]) for each in read.of("difference")]
    assert differences == pytest.approx(found.differences)
    assert words.lead(content, [found])[0] in shown.stdout
    assert "gpt4image train --config /runs/sweep/best.json" in shown.stdout

    text = file.read_text()
    assert "<script" not in text and text.count("&lt;script&gt;") >= 2, "of a name and of a caption"
    assert "@import" not in text and "mlflow ui --backend-store-uri sqlite:///x.db" in text
    assert not re.search(r"""(?:src|href)=["'](?!data:|#|http://127\.0\.0\.1:5000)""", text)
    svgs = re.findall(r"<svg[^>]*>", text)
    assert len(svgs) >= 11 and all("aria-label" in svg for svg in svgs)
    assert text.count("data:image/jpeg;base64") == 6

    browse(file, f"--screenshot={tmp_path / 'page.png'}", "--window-size=1200,1600")
    browse(file, f"--print-to-pdf={tmp_path / 'page.pdf'}")
    assert (tmp_path / "page.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "page.png").stat().st_size > 50_000, "white alone is smaller"
    assert (tmp_path / "page.pdf").read_bytes()[:5] == b"%PDF-"
    assert (tmp_path / "page.pdf").stat().st_size > 50_000


def test_nothing_sticks_out_of_a_narrow_screen(tmp_path: Path, browse: Browse) -> None:
    """In a frame of 420 pixels, since a window has 500 at least: what is wider scrolls by itself."""
    file, frame = tmp_path / "report.html", tmp_path / "frame.html"
    page.write(str(file), [contents.large(final=False), contents.single() | {"sweep": "/other"}], pictures=0)
    # The frame's own scroll bar takes some of it.
    script = "const e = document.documentElement; document.title = `${e.scrollWidth} of ${e.clientWidth}`"
    measured = f"<script>addEventListener('load', () => {{ {script} }})</script></body>"
    quoted = file.read_text().replace("</body>", measured).replace("&", "&amp;").replace('"', "&quot;")
    frame.write_text(
        f'<iframe id="f" width="420" height="900" srcdoc="{quoted}"></iframe><p id="w"></p>'
        "<script>addEventListener('load', () => { w.textContent = f.contentDocument.title })</script>"
    )
    needs, has = re.findall(r'id="w">(\d+) of (\d+)<', browse(frame, "--dump-dom").stdout)[0]
    assert int(needs) <= int(has) <= 420


@pytest.mark.parametrize(
    "content",
    [contents.single(), contents.toy(), contents.content([]), contents.grid([1.0, 2.0], seeds=1)],
    ids=["single", "toy", "empty", "one seed"],
)
def test_small_sweeps_have_a_page_even_when_the_store_is_gone(
    content: dict[str, Any], tmp_path: Path
) -> None:
    page.write(str(tmp_path / "report.html"), [content], pictures=6)
    text = (tmp_path / "report.html").read_text()
    assert words.lead(content, comparisons([content]))[0] in text.replace("&#39;", "'")
    assert "which is not there any more" in text
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)


def test_no_order_of_the_trials_changes_what_is_said() -> None:
    content = contents.large()
    told = report.text([content])
    random.Random(0).shuffle(content["trials"])
    assert [line for line in report.text([content]).splitlines() if "fresh" in line] == [
        line for line in told.splitlines() if "fresh" in line
    ]
