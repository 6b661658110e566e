"""Measures against loops that spell their definitions out."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from training.evaluation import figures, measures, zeroshot

Array = npt.NDArray[Any]


def unit(rng: np.random.Generator, rows: int, width: int) -> Array:
    found = rng.normal(size=(rows, width))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def test_calibration_is_the_sum_over_bins_of_the_gap() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 1, 500)
    confidence[:6] = [1 / 15, 2 / 15, 1.0, 0.0, 1e-9, 14 / 15]  # edges belong to the bin below
    correct = rng.random(500) < confidence**2
    found = measures.calibration(confidence, correct)
    total = 0.0
    for m in range(15):
        inside = [
            n
            for n in range(500)
            if found.edges[m] < confidence[n] <= found.edges[m + 1] or (m == 0 and confidence[n] == 0)
        ]
        assert found.counts[m] == len(inside)
        if inside:
            accuracy = sum(bool(correct[n]) for n in inside) / len(inside)
            mean = sum(float(confidence[n]) for n in inside) / len(inside)
            assert (found.accuracy[m], found.confidence[m]) == (pytest.approx(accuracy), pytest.approx(mean))
            total += len(inside) / 500 * abs(accuracy - mean)
    assert found.counts.sum() == 500
    assert found.ece == pytest.approx(total)


def test_a_sure_and_right_model_is_calibrated_and_a_sure_and_wrong_one_is_not() -> None:
    assert measures.calibration(np.ones(10), np.ones(10, bool)).ece == 0
    assert measures.calibration(np.ones(10), np.zeros(10, bool)).ece == 1


def test_confusion_and_its_commonest_mistakes_are_counts() -> None:
    rng = np.random.default_rng(1)
    labels, predicted = rng.integers(7, size=300), rng.integers(7, size=300)
    matrix = measures.confusion(labels, predicted, 7)
    for true in range(7):
        for other in range(7):
            assert matrix[true, other] == sum((labels == true) & (predicted == other))
    pairs = measures.confused_pairs(matrix, 5)
    mistakes = sorted((int(matrix[a, b]) for a in range(7) for b in range(7) if a != b), reverse=True)
    assert [count for _, _, count in pairs] == mistakes[:5]
    assert all(true != other and matrix[true, other] == count for true, other, count in pairs)
    assert measures.confused_pairs(np.diag([3, 4]), 5) == []


def test_the_interval_is_wilsons() -> None:
    z, share, n = 1.959963984540054, 0.8, 50
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    assert measures.interval(40, 50) == (pytest.approx(centre - half), pytest.approx(centre + half))


@pytest.mark.parametrize("same", [False, True])
def test_nearest_neighbours_vote_with_the_exponential_of_their_cosine(
    same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "_BLOCK", 7 * 60)  # several blocks
    rng = np.random.default_rng(2)
    bank, labels = rng.normal(size=(60, 5)).astype(np.float32) * 3, rng.integers(4, size=60)
    queries = bank if same else rng.normal(size=(33, 5)).astype(np.float32)
    found = measures.nearest(queries, bank, labels, 4, k=9, temperature=0.07, same=same)
    for n, query in enumerate(queries):
        cosines = [float(query @ row / np.linalg.norm(query) / np.linalg.norm(row)) for row in bank]
        order = sorted((m for m in range(60) if not (same and m == n)), key=lambda m: -cosines[m])[:9]
        votes = [sum(np.exp(cosines[m] / 0.07) for m in order if labels[m] == c) for c in range(4)]
        assert found[n] == int(np.argmax(votes))


def test_a_bank_smaller_than_k_votes_as_a_whole() -> None:
    bank = np.eye(3, dtype=np.float32)
    assert measures.nearest(bank, bank, np.array([2, 0, 1]), 3).tolist() == [2, 0, 1]


def test_a_captions_rank_counts_different_captions_and_ties_against_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measures, "_BLOCK", 50)
    rng = np.random.default_rng(3)
    kinds = unit(rng, 12, 6)
    kinds[11] = kinds[4]  # another caption with the same vector
    groups = rng.integers(12, size=80)
    texts = kinds[groups]
    z = unit(rng, 80, 6)
    one_of, own = measures.different_texts(texts, 10**17 + groups)
    assert len(one_of) == len({tuple(row) for row in texts.tolist()}) < len(set(groups.tolist()))
    assert all((texts[one_of[own[n]]] == texts[n]).all() for n in range(80))
    ranks = measures.caption_ranks(z, texts[one_of], own)
    different = {tuple(row) for row in texts.tolist()}
    for n in range(80):
        mine = float(z[n] @ texts[n])
        assert ranks[n] == 1 + sum(float(z[n] @ np.array(row)) > mine + 1e-6 for row in different)
    found = measures.retrieval(ranks)
    assert found["recall5"] == pytest.approx(100 * sum(rank <= 5 for rank in ranks) / 80)
    assert found["median_rank"] == np.median(ranks)
    collapsed = measures.caption_ranks(np.zeros_like(z), texts[one_of], own)
    assert set(collapsed.tolist()) == {len(one_of)}
    assert set(measures.caption_ranks(np.full_like(z, np.nan), texts[one_of], own).tolist()) == {len(one_of)}


def test_best_texts_are_those_of_the_largest_cosine() -> None:
    rng = np.random.default_rng(4)
    z, texts = unit(rng, 20, 6), unit(rng, 9, 6)
    found = measures.best_texts(z, texts, 5)
    assert found.tolist() == np.argsort(-(z @ texts.T), axis=1)[:, :5].tolist()
    assert measures.best_texts(z, texts[:3], 5).shape == (20, 3)


def test_the_harmonic_mean_is_none_of_a_model_that_knows_only_what_it_saw() -> None:
    assert measures.harmonic_mean(80.0, 20.0) == pytest.approx(32.0)
    assert measures.harmonic_mean(80.0, 0.0) == 0


def test_zero_shot_tells_seen_from_unseen_and_leaves_out_what_was_not_asked_for() -> None:
    rng = np.random.default_rng(8)
    classes = zeroshot.candidates(["a", "b", "n01440764_c_d", "e", "f"])
    assert classes.names == ["a", "b", "c d", "e", "f"]
    asked = zeroshot.Candidates(names=["f", "x", "a", "c d", "y", "b"], of_class=np.array([2, 5, 3, -1, 0]))
    seen = np.array([True, False, True, True, False])
    labels, z, prompts = rng.integers(5, size=200), unit(rng, 200, 4), unit(rng, 6, 4)
    z += 0.6 * np.where(asked.of_class[labels, None] >= 0, prompts[asked.of_class[labels]], 0)
    found = zeroshot.judge(z, labels, prompts, asked, seen)
    hits: dict[str, list[bool]] = {
        "top1": [],
        "top5": [],
        "seen_top1": [],
        "unseen_top1": [],
        "unseen_only_top1": [],
    }
    for n, label in enumerate(labels):
        true = int(asked.of_class[label])
        if true < 0:
            continue
        order = sorted(range(6), key=lambda m: -float(z[n] @ prompts[m]))
        hits["top1"].append(order[0] == true)
        hits["top5"].append(true in order[:5])
        hits["seen_top1" if seen[label] else "unseen_top1"].append(order[0] == true)
        if not seen[label]:  # "a" and "c d" were seen; "x" and "y" are nobody's, but unseen all the same
            hits["unseen_only_top1"].append(next(m for m in order if m not in (2, 3)) == true)
    for name, values in hits.items():
        assert found[name] == round(100 * sum(values) / len(values), 3), name
    assert found["images"] + found["left_out"] == 200 and found["left_out"] == (labels == 3).sum()
    seen_top1, unseen_top1 = found["seen_top1"], found["unseen_top1"]
    assert found["harmonic_mean"] == pytest.approx(
        2 * seen_top1 * unseen_top1 / (seen_top1 + unseen_top1), abs=1e-3
    )


def test_a_thousand_classes_and_fifty_thousand_images_take_seconds() -> None:
    rng = np.random.default_rng(5)
    labels, predicted, confidence = (
        rng.integers(1000, size=50_000),
        rng.integers(1000, size=50_000),
        rng.random(50_000),
    )
    start = time.process_time()
    matrix = measures.confusion(labels, predicted, 1000)
    measures.confused_pairs(matrix, 30)
    measures.calibration(confidence, labels == predicted)
    assert time.process_time() - start < 2
    assert matrix.sum() == 50_000


@pytest.mark.parametrize("classes", [5, 400])
def test_figures_name_few_classes_and_drop_the_names_of_many(classes: int) -> None:
    rng = np.random.default_rng(6)
    matrix = rng.integers(5, size=(classes, classes)) + 40 * np.eye(classes, dtype=int)
    names = [f"a class called {n}" for n in range(classes)]
    figure = figures.confusion_figure(matrix, names, measures.confused_pairs(matrix, 30), "a title")
    ticks = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert (ticks == names) == (classes == 5)
    beside = next(text.get_text() for axes in figure.axes for text in axes.texts)
    assert len(beside.splitlines()) == 2 + min(30, classes * classes - classes - int((matrix == 0).sum()))


def test_the_reliability_diagram_draws_one_bar_a_filled_bin() -> None:
    found = measures.calibration(np.array([0.5, 0.95, 0.96]), np.array([True, True, False]))
    axes = figures.reliability_figure(found, "a title").axes[0]
    assert [round(bar.get_height(), 3) for bar in axes.patches] == [1.0, 0.5]
    assert "ECE" in axes.get_title()
