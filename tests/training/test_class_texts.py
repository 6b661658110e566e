"""Texts of a class: their mean, variation within classes and between, which class is like which."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from pipeline.store import Store
from training import preparation
from training.__main__ import parse_train
from training.config import TrainConfig
from training.data import few_shot
from training.data.texts import classes as class_texts
from training.data.texts import targets as text_targets
from training.data.texts import vectors as text_vectors
from training.data.texts.negatives import Negatives
from training.engine import loop
from training.losses.classification import CrossEntropy, SimilarLabels, criterion
from training.objectives.align import OBJECTIVE
from tuning import space
from tuning.__main__ import parse_tune
from tuning.cells import cell_of

MakeStore = Callable[..., Path]
Array = class_texts.Array


class Drawn(class_texts.Described):
    """Texts that are not of a store."""

    shards: list[tuple[Array, Array]]

    def texts(self) -> Iterator[tuple[Array, Array]]:
        yield from self.shards

    def once(self, what: str, fit: Callable[[], dict[str, Array]]) -> dict[str, Array]:
        return fit()


def drawn(folder: Path, make_store: MakeStore, vectors: Array, classes: Array) -> Drawn:
    store = Store(str(make_store(folder / "s", classes=int(classes.max()) + 1)))
    described = Drawn(store, "test", "train")
    half = len(vectors) // 2
    shards = [(vectors[:half], classes[:half]), (vectors[half:], classes[half:])]
    object.__setattr__(described, "shards", shards)
    return described


def settings(store: Path, **changed: Any) -> TrainConfig:
    own = {"projection_dim": 0, "batch_size": 8, "positives": "class", "class_target": "estimated"}
    return TrainConfig.of(**{"store": str(store), **own, **changed})


def test_variance_components_are_those_that_texts_were_drawn_with(
    tmp_path: Path, make_store: MakeStore
) -> None:
    """Classes of unequal size, most of two or three: the mean of few texts varies by itself, which counts as
    within."""
    rng = np.random.default_rng(0)
    sizes = rng.choice([1, 2, 3, 9], 3000)
    classes = rng.permutation(np.repeat(np.arange(3000), sizes))
    centres = rng.normal(0, 0.2**0.5, (3000, 6))
    vectors = 5 + centres[classes] + rng.normal(0, 0.5**0.5, (len(classes), 6))
    found = class_texts.shrinkage(drawn(tmp_path, make_store, vectors, classes))
    assert found == pytest.approx(3.0 / 4.2, rel=0.02)


def test_only_directions_that_tell_classes_apart_are_kept(tmp_path: Path, make_store: MakeStore) -> None:
    rng = np.random.default_rng(1)
    two, _ = np.linalg.qr(rng.normal(size=(6, 2)))
    centres, away = rng.normal(size=(5, 2)) @ two.T, rng.normal(size=(5, 4, 6))
    vectors = np.concatenate([centres[:, None] + away, centres[:, None] - away], axis=1).reshape(-1, 6)
    described = drawn(tmp_path, make_store, vectors, np.repeat(np.arange(5), 8))
    projector, kept = class_texts.directions(described)
    np.testing.assert_allclose(projector, two @ two.T, atol=1e-5)
    assert kept == 2


def test_texts_that_tell_nothing_of_their_class(tmp_path: Path, make_store: MakeStore) -> None:
    vectors = np.tile([[1.0, 0.0], [0.0, 1.0]], (6, 1))
    apart = drawn(tmp_path, make_store, vectors, np.repeat(np.arange(6), 2))
    assert class_texts.shrinkage(apart) == 1
    with pytest.raises(ValueError, match="tell no classes apart"):
        class_texts.directions(apart)
    alike = drawn(tmp_path / "alike", make_store, np.ones((4, 2)), np.array([0, 0, 1, 1]))
    assert class_texts.shrinkage(alike) == 1, "no variance at all"
    single = drawn(tmp_path / "single", make_store, vectors[:3], np.arange(3))
    with pytest.raises(ValueError, match=r"3 pictures of 3 classes have a description.*class-target shrunk"):
        class_texts.shrinkage(single)
    assert class_texts.directions(single)[1] == 1, "which directions there are is seen from one each"


def test_estimated_and_projected_targets_are_what_they_say(tmp_path: Path, make_store: MakeStore) -> None:
    folder = make_store(tmp_path / "s", dim=8, train=40, val=20, missing_captions=3)
    store = Store(str(folder))
    config = settings(folder)
    estimated = text_targets.of_config(config, store)
    described = text_targets.of_classes(config, store)
    share, (projector, kept) = class_texts.shrinkage(described), class_texts.directions(described)
    assert 0 < share < 1 and estimated.shrinkage == share
    same = text_targets.of_config(config.but(class_target="shrunk", class_shrinkage=share), store)
    ignored = text_targets.of_config(config.but(class_shrinkage=0.1), store)
    projected = text_targets.of_config(config.but(class_target="projected"), store)
    for shard in store.split_shards("train"):
        of = [
            text_targets.target_columns(each, store, shard)[0]
            for each in (estimated, same, ignored, projected)
        ]
        np.testing.assert_array_equal(of[0], of[1])
        np.testing.assert_array_equal(of[0], of[2])
        there = np.linalg.norm(of[3], axis=1) > 0
        np.testing.assert_allclose((of[3] @ projector)[there], of[3][there], atol=1e-5)
    assert kept == np.linalg.matrix_rank(projector, tol=1e-3) == 2, "three classes"
    plain = text_targets.of_judging(config.but(class_target="projected"), store)
    vectors = text_vectors.rows_of(store.read_shard("embeddings", "test", 4)["embedding"])
    np.testing.assert_allclose(plain.project(vectors) @ projector, plain.project(vectors), atol=1e-5)
    told = OBJECTIVE.notes(config, store, OBJECTIVE.check(config, store))[0]
    assert told == f"targets are drawn by {share:.2f} towards the mean of their class"
    given = config.but(class_target="projected")
    told = OBJECTIVE.notes(given, store, OBJECTIVE.check(given, store))[0]
    assert told == "classes differ in 2 of the texts' 8 directions"


def test_it_is_told_what_changes_nothing(tmp_path: Path, make_store: MakeStore) -> None:
    folder = make_store(tmp_path / "s", dim=8, train=24)
    store = Store(str(folder))
    mean = settings(folder, class_shrinkage=1.0, positives="class", class_target="shrunk")
    facts = OBJECTIVE.check(mean, store)
    assert OBJECTIVE.notes(mean, store, facts) == ()
    (drawn,) = OBJECTIVE.notes(mean.but(several_captions="draw"), store, facts)
    assert "--several-captions draw changes nothing" in drawn
    assert facts.targets is not None and facts.targets.class_means is not None
    one = facts.targets.class_means.copy()
    one[:] = one[0]
    alike = replace(facts, targets=replace(facts.targets, class_means=one))
    (told,) = OBJECTIVE.notes(mean, store, alike)
    assert "texts of all classes are the same" in told
    (frozen,) = OBJECTIVE.notes(mean.but(freeze_backbone=True), store, facts)
    assert "the backbone is frozen" in frozen
    assert OBJECTIVE.notes(mean.but(several_captions="draw", class_shrinkage=0.5), store, facts) == ()
    how = OBJECTIVE.describe(mean.but(balance="gradients", alignment_weight=0.25), store).how
    assert how == (
        "0.75 times cross entropy plus 0.25 times an alignment to the mean description of each class, "
        "gradients balanced"
    )


def test_what_is_refused_by_hand_is_refused_when_it_is_found(tmp_path: Path, make_store: MakeStore) -> None:
    folder = make_store(tmp_path / "s", dim=8, train=40)
    with patch.object(class_texts, "shrinkage", lambda described: 0.9995):
        with pytest.raises(ValueError, match=r"shrinkage 1\.000.*add --positives class"):
            text_targets.of_config(settings(folder, positives="caption"), Store(str(folder)))
        assert text_targets.of_config(settings(folder), Store(str(folder))).shrinkage == 0.9995


def test_of_few_shots_no_other_labels_are_looked_at(tmp_path: Path, make_store: MakeStore) -> None:
    folder = make_store(tmp_path / "s", dim=8, train=40)
    store = Store(str(folder))
    config = settings(folder, shots=3, class_target="shrunk", class_shrinkage=1.0)
    chosen = few_shot.rows_of(config, store, "train", training=True).rows
    vectors, classes = [], []
    for shard, rows in chosen.items():
        table = store.read_shard("embeddings", "test", shard, ["embedding"])["embedding"]
        vectors.append(text_vectors.rows_of(table)[rows].astype(np.float64))
        classes.append(text_vectors.classes_of(store, shard)[rows])
    joint, labels = np.concatenate(vectors), np.concatenate(classes)
    assert len(labels) == 9
    found = text_targets.of_config(config, store).class_means
    wanted = np.stack([joint[labels == number].mean(0) for number in range(3)])
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert not (folder / "embeddings/test/class-means.safetensors").exists(), "it is not of the split"
    targets = text_targets.of_config(config.but(shots=2), store)
    drawn_ones = Negatives(store, targets, "train", 100, seed=0).draw(0, torch.device("cpu"))
    assert len(drawn_ones.targets_Bd) == 6, "nor among negatives"
    whole = text_targets.of_config(config.but(shots=0), store).class_means
    assert whole is not None and np.abs(whole - wanted).max() > 1e-3


def test_labels_are_spread_by_the_likeness_of_classes(tmp_path: Path, make_store: MakeStore) -> None:
    vectors = np.array([[1.0, 0.1, 0.0], [1.0, -0.1, 0.0], [-1.0, 0.0, 0.3]]).repeat(2, 0)
    described = drawn(tmp_path, make_store, vectors, np.array([0, 0, 1, 1, 3, 3]))
    similar = class_texts.similar(described, 0.1)
    np.testing.assert_allclose(similar.sum(1), 1, atol=1e-6)
    assert not similar.diagonal()[[0, 1, 3]].any(), "what is spread leaves its own class"
    assert similar[0, 1] > 0.999 and similar[3, 0] == pytest.approx(0.5, abs=0.01)
    assert similar[2].tolist() == [0, 0, 1, 0] and not similar[[0, 1, 3], 2].any(), "no text, no likeness"
    alone = drawn(tmp_path / "alone", make_store, vectors[:2], np.array([1, 1]))
    assert class_texts.similar(alone, 0.001).tolist() == [[1, 0], [0, 1]]
    with pytest.raises(ValueError, match=r"no picture of the split train .* leave out --similar-labels"):
        class_texts.similar(drawn(tmp_path / "none", make_store, vectors[:2] * 0, np.array([1, 1])), 0.1)

    loss = SimilarLabels(criterion("cross-entropy", 0.0), torch.from_numpy(similar), 0.2)
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 1, 2, 3, 0])
    labels = 0.8 * torch.eye(4)[classes] + 0.2 * torch.from_numpy(similar)[classes]
    wanted = -(labels * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss(logits, classes), wanted)
    torch.testing.assert_close(loss(logits, torch.eye(4)[classes]), wanted, msg="of mixed labels likewise")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(logits, torch.eye(4)[classes]), wanted, msg="exact in bfloat16, too")
    none = SimilarLabels(CrossEntropy(0.1), torch.from_numpy(similar), 0.0)
    torch.testing.assert_close(none(logits, classes), CrossEntropy(0.1)(logits, classes))


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("loss", ["cross-entropy", "bce"])
def test_spread_labels_train_with_and_without_an_alignment(
    tmp_path: Path, make_store: MakeStore, weight: float, loss: str
) -> None:
    folder = make_store(tmp_path / "s", train=24)
    flags = ["--preset", "smoke", "--store", str(folder), "--run", str(tmp_path / "run"), "--workers", "1"]
    flags += ["--batch-size", "8", "--loss", loss, "--alignment-weight", str(weight), "--projection-dim", "0"]
    spread, _ = preparation.prepare(parse_train([*flags, "--similar-labels", "0.3"]))
    assert spread.method.embeddings == "test" and not spread.method.is_baseline
    title = preparation.title(spread)
    assert title.endswith("labels0.3-d0-s0" if weight == 0 else "w0.5-d0-s0")
    losses = []
    for config in (spread, parse_train(flags)):
        (last,) = loop.fit(config, torch.device("cpu"), 0, None, lambda metrics, take: None)
        losses.append(last["cross_entropy"])
        assert ("alignment" in last) == (weight > 0)
    assert losses[0] != losses[1]
    told = OBJECTIVE.describe(spread, Store(str(folder)))
    assert "0.3 of each label spread" in told.how and ("alignment" in told.how) == (weight > 0)
    assert ("balance" in told.settings) == (weight > 0)
    with pytest.raises(ValueError, match=r"takes the place of label smoothing, which is 0\.1"):
        preparation.prepare(parse_train([*flags, "--similar-labels", "0.3", "--label-smoothing", "0.1"]))


def test_labels_alone_ask_nothing_of_an_alignment(tmp_path: Path, make_store: MakeStore) -> None:
    """No width, no PCA, no two pictures of a class."""
    folder = make_store(tmp_path / "s", dim=8, train=24)
    changed = {"alignment_weight": 0.0, "similar_labels": 0.2, "projection_dim": 256, "shots": 1}
    facts = OBJECTIVE.check(settings(folder, **changed), Store(str(folder)))
    assert facts.targets is None and not facts.columns and facts.variants["captions"] == "test"
    assert not list((folder / "embeddings/test").glob("*.safetensors"))


def test_a_sweep_keeps_a_plain_model_beside_spread_labels() -> None:
    flags = ["--store", "s", "--sweep", "w", "--similar-labels", "0.2", "--projection-dims", "0"]
    arms = space.arms(parse_tune([*flags, "--alignment-weights", "0", "0.5"]))
    assert [arm.is_baseline for arm in arms] == [True, False]
    assert arms[0].fixed["similar_labels"] == 0
    weights = {values.get("alignment_weight") for values in arms[1].grid()}
    assert weights == {0.0, 0.5}
    asked = [*flags[:4], "--projection-dims", "0", "--axis", "similar_labels=0.1,0.2", "--alignment-weights"]
    assert [arm.is_baseline for arm in space.arms(parse_tune([*asked, "0"]))] == [True, False]
    cells = list(space.arms(parse_tune([*asked, "0", "0.5"]))[1].grid())
    assert len(cells) == 4 and {cell["similar_labels"] for cell in cells} == {0.1, 0.2}
    doubled = [*flags[:6], "--projection-dims", "0", "--alignment-weights", "0", "0.5"]
    with pytest.raises(ValueError, match="similar_labels: a value of it is the baseline"):
        space.arms(parse_tune([*doubled, "--axis", "similar_labels=0,0.2"]))
    with pytest.raises(
        ValueError, match="min_epoch_steps: configurations are compared after the same number"
    ):
        space.arms(parse_tune([*doubled, "--axis", "min_epoch_steps=1,50"]))
    told = cell_of({"backbone": "b", "alignment_weight": 0.0, "similar_labels": 0.2})
    assert (told.is_baseline, told.shown) == (False, ("0", "-"))
