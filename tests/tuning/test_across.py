"""Sweeps beside each other."""

from __future__ import annotations

from typing import Any

from tests.tuning.contents import content, trial
from tuning import report
from tuning.report import across


def of(name: str, scores: dict[int, float], **told: Any) -> dict[str, Any]:
    plain = [trial(f"b-s{s}", [9.0, score], arm="baseline", seed=s) for s, score in scores.items()]
    aligned = [trial(f"w-s{seed}", [9.0, 99.0], seed=seed) for seed in scores]
    return content([*plain, *aligned], sweep=f"/runs/{name}", rungs=[2], **told)


def test_plain_models_are_compared_seed_by_seed() -> None:
    first = of("from-nothing", {1: 10.0, 2: 12.0, 3: 11.0, 7: 90.0})
    second = of("from-mae", {3: 22.0, 2: 21.0, 1: 20.0, 8: 1.0})
    (told,) = across.lines([first, second])
    assert told == (
        "Plain resnet18, from-mae over from-nothing: +10.0 points of top-1 (11.0 to 21.0), "
        "95 % +7.5 to +12.5, 3 seeds."
    )
    assert report.text([first, second]).endswith(told)
    (none,) = across.lines([first, of("other", {1: 11.0, 2: 11.0, 3: 11.5})])
    assert none.endswith("3 seeds: no difference shown.")


def test_what_is_no_pair_is_not_compared() -> None:
    first = of("one", {1: 10.0, 2: 12.0})
    assert across.lines([first]) == []
    for other in (
        of("seed", {1: 10.0, 9: 12.0}),
        of("store", {1: 20.0, 2: 22.0}, store="/another"),
        content([trial(f"b-s{s}", [9.0, 10.0 + s], arm="baseline", seed=s) for s in (1, 2)], rungs=[3]),
        content(
            [trial(f"b{s}", [9.0, 9.0 + s], arm="baseline", seed=s, values={"lr": 1.0}) for s in (1, 2)],
            rungs=[2],
        ),
    ):
        assert across.lines([first, other]) == []


def test_what_the_method_has_beside_its_axes_and_the_plain_model_has_not_is_told() -> None:
    scores = {1: 50.0, 2: 51.0, 3: 52.0}
    spread = report.text([of("labels", scores, shared={"similar_labels": 0.2})])
    assert "All but the plain model have similar-labels 0.2" in spread
    for plain in (of("none", scores), of("zero", scores, shared={"similar_labels": 0.0})):
        assert "plain model have" not in report.text([plain])
