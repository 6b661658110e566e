"""A few pictures of each class and halves of the classes: the same for everybody who asks alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import SettingsError
from pipeline.store import Store
from training.config import TrainConfig
from training.data import few_shot
from training.data.few_shot import classes_of, drawn, rows_of
from training.data.order import Rows
from training.evaluation import zeroshot
from training.models import linear_probe


def config_of(store: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.of(**{"store": str(store)} | changes)


def test_the_first_half_of_the_classes_rounded_up_is_base() -> None:
    assert list(classes_of("base", 5)) == [0, 1, 2] and list(classes_of("new", 5)) == [3, 4]
    assert list(classes_of("all", 3)) == [0, 1, 2] and not classes_of("new", 1)


def test_zero_shot_counts_the_classes_of_the_run_s_half_as_seen(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    store = Store(str(make_store(tmp_path / "store", classes=5, train=60)))
    for half, seen in (("all", [1, 1, 1, 1, 1]), ("base", [1, 1, 1, 0, 0]), ("new", [0, 0, 0, 1, 1])):
        assert zeroshot.seen_classes(store, "train", half).tolist() == seen


def test_a_draw_depends_on_the_seed_and_the_pictures_alone(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    store = make_store(tmp_path / "store", classes=5, train=60)
    found = {
        (shots, seed): drawn(config_of(store, shots=shots, seed=seed), Store(str(store)))
        for shots, seed in ((2, 0), (4, 0), (2, 1))
    }
    two, four, other = found.values()
    assert [len(ids) for ids in two["pictures"].values()] == [2] * 5 and two["digest"] != other["digest"]
    assert all(set(ids) <= set(four["pictures"][name]) for name, ids in two["pictures"].items())
    again = drawn(
        config_of(store, shots=2, objective="coop", clip="none", lr=0.5, class_half="base"), Store(str(store))
    )
    assert again["pictures"] == {name: two["pictures"][name] for name in ("class 0", "class 1", "class 2")}


def test_another_cut_into_shards_draws_the_same(tmp_path: Path, make_store: Callable[..., Path]) -> None:
    import pyarrow as pa

    from pipeline.store import IMAGES, Dataset, Split

    store = Store(str(make_store(tmp_path / "store", classes=4, train=40)))
    rows = [row for shard in range(5) for row in store.read_shard("images", "", shard).to_pylist()]
    of_split = {name: [row for row in rows if row["split"] == name] for name in ("train", "val")}
    shards = [of_split["train"][::-1][:15], of_split["train"][::-1][15:], of_split["val"]]
    splits = {
        "train": Split(rows=40, first_shard=0, num_shards=2),
        "val": Split(rows=9, first_shard=2, num_shards=1),
    }
    told = Dataset(
        schema_version=1, classes=store.dataset.classes, splits=splits, rows=49, shards=3, source={}
    )
    other = Store.create(str(tmp_path / "other"), told)
    for shard, own in enumerate(shards):
        other.write_shard("images", "", shard, pa.Table.from_pylist(own, schema=IMAGES), seconds=0)
    digests = {drawn(config_of(Path(each.uri), shots=3), each)["digest"] for each in (store, other)}
    assert len(digests) == 1


def test_rows_are_of_the_classes_that_take_part_and_few_only_in_training(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    path = make_store(tmp_path / "store", classes=5, train=60, val=30)
    store = Store(str(path))
    config = config_of(path, shots=2, class_half="new")
    labels = {
        shard: store.read_shard("images", "", shard, ["label"])["label"].to_numpy() for shard in range(9)
    }
    for split, training in (("train", True), ("train", False), ("val", False)):
        rows = rows_of(config, store, split, training=training)
        seen = np.concatenate([labels[shard][own] for shard, own in rows.rows.items()])
        assert set(seen) == {3, 4} and (len(seen) == 4) == training
        assert all(np.all(np.diff(own) > 0) for own in rows.rows.values())
    assert len(rows_of(config_of(path), store, "train", training=True)) == len(Rows(store, "train")) == 60
    with pytest.raises(SettingsError, match="class_half=new: the split train has no usable picture"):
        one = make_store(tmp_path / "one", classes=1)
        rows_of(config_of(one, class_half="new"), Store(str(one)), "train")


def test_classes_with_fewer_pictures_than_asked_for_are_told(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    path = make_store(tmp_path / "store", classes=5, train=22, val=10)
    store = Store(str(path))
    counts = {name: len(ids) for name, ids in drawn(config_of(path, shots=99), store)["pictures"].items()}
    least = min(counts.values())
    assert (
        few_shot.scarce(config_of(path), store) == few_shot.scarce(config_of(path, shots=least), store) == ""
    )
    told = few_shot.scarce(config_of(path, shots=least + 1), store)
    few = [name for name, count in sorted(counts.items()) if count == least]
    assert told.startswith(
        f"{len(few)} of 5 classes have fewer than {least + 1} pictures ({few[0]} {least}, "
    )


def test_a_linear_probe_is_the_minimum_of_its_loss_and_tells_blobs_apart() -> None:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 8))
    labels = np.repeat([2, 5, 9], 8)
    features = centres[np.searchsorted([2, 5, 9], labels)] + 0.4 * rng.normal(size=(24, 8))
    probe = linear_probe.fit(features, labels)
    assert (probe(features) == labels).mean() > 0.95 and probe.penalty in linear_probe.PENALTIES
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    theirs = LogisticRegression(C=1 / (probe.penalty * len(labels)), tol=1e-8, max_iter=10_000).fit(
        unit, labels
    )
    ours = probe.weights.numpy()
    logits, wanted = unit @ ours[:-1] + ours[-1], theirs.decision_function(unit)
    centred = [each - each.mean(1, keepdims=True) for each in (logits, wanted)]
    np.testing.assert_allclose(*centred, atol=2e-3)
    assert linear_probe.fit(features[::8], labels[::8]).penalty == linear_probe.USUAL
