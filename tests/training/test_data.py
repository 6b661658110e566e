"""Batches: order, shares of workers, text targets, crops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.store import Store
from training import targets
from training.data import Augment, Batch, Loader, Rows, _group, _random_box

MakeStore = Callable[..., Path]


def loader(store: Store, found: targets.Targets | None, seed: int = 0) -> Loader:
    augment = Augment(size=16, crop_scale=0.5, flip=0.5, crop_pct=0.875, interpolation="bicubic", seed=seed)
    return Loader(store, found, augment, threads=2, window=2)


def test_an_epoch_holds_every_row_once_in_an_order_of_seed_and_epoch_alone(tmp_path: Path, make_store: MakeStore) -> None:
    rows = Rows(Store(str(make_store(tmp_path / "s", train=57, shard_rows=10))), "train")
    first = rows.shuffled(0, 0, 2)
    assert len({tuple(pair) for pair in first}) == len(first) == 57
    np.testing.assert_array_equal(first, rows.shuffled(0, 0, 2))
    for other in (rows.shuffled(0, 1, 2), rows.shuffled(1, 0, 2)):
        assert (first != other).any() and {tuple(p) for p in other} == {tuple(p) for p in first}


def test_rows_mix_within_a_window_of_shards_only(tmp_path: Path, make_store: MakeStore) -> None:
    rows = Rows(Store(str(make_store(tmp_path / "s", train=60, shard_rows=10))), "train")
    order = rows.shuffled(0, 0, 2)
    windows = [set(order[start : start + 20, 0]) for start in range(0, 60, 20)]
    assert all(len(window) == 2 for window in windows)
    assert not windows[0] & windows[1]


@pytest.mark.parametrize("world", [2, 4])
def test_what_a_step_sees_does_not_depend_on_the_number_of_workers(tmp_path: Path, make_store: MakeStore, world: int) -> None:
    store = Store(str(make_store(tmp_path / "s", train=50)))
    found = targets.load(store, embeddings="", dim=4, split="train")
    order = Rows(store, "train").shuffled(0, 3, 2)
    alone = list(loader(store, found).train(order, 8, 0, 1, 3))
    shares = [list(loader(store, found).train(order, 8, rank, world, 3)) for rank in range(world)]
    assert len(alone) == 50 // 8
    for step, whole in enumerate(alone):
        for field in ("images", "labels", "texts", "groups"):
            joint = torch.cat([getattr(share[step], field) for share in shares])
            assert torch.equal(joint, getattr(whole, field)), field


def test_evaluation_sees_every_row_once_whatever_the_workers(tmp_path: Path, make_store: MakeStore) -> None:
    store = Store(str(make_store(tmp_path / "s", val=23)))
    order = Rows(store, "val").in_order()
    counts = [sum(len(batch.labels) for batch in loader(store, None).evaluate(order, 4, rank, 3)) for rank in range(3)]
    assert sum(counts) == 23


def test_texts_belong_to_their_pictures_and_equal_captions_share_a_group(tmp_path: Path, make_store: MakeStore) -> None:
    store = Store(str(make_store(tmp_path / "s", classes=3, train=40, missing_captions=2)))
    found = targets.load(store, embeddings="", dim=0, split="train")
    order = Rows(store, "train").in_order()
    batches: list[Batch] = list(loader(store, found).train(order, 10, 0, 1, 0))
    vectors: dict[int, torch.Tensor] = {}
    for batch in batches:
        assert batch.texts is not None and batch.groups is not None
        for label, text, group in zip(batch.labels, batch.texts, batch.groups, strict=True):
            if group < 0:
                assert text.abs().sum() == 0
                continue
            torch.testing.assert_close(text.norm(), torch.tensor(1.0), atol=2e-3, rtol=0)
            assert torch.equal(vectors.setdefault(int(group), text), text)
            assert 0 <= int(label) < 3
    assert batches[0].groups is not None and int((batches[0].groups < 0).sum()) == 2
    assert len(vectors) == 6, "two captions a class"


def test_a_row_with_a_bad_picture_is_left_out(tmp_path: Path, make_store: MakeStore) -> None:
    store = Store(str(make_store(tmp_path / "s", train=20)))
    table = store.read_shard("images", "", 0)
    rows = table.to_pylist()
    rows[3] |= {"error": "damaged", "image": None}
    store.write_shard("images", "", 0, type(table).from_pylist(rows, schema=table.schema), seconds=0)
    assert len(Rows(store, "train")) == 19
    assert [0, 3] not in Rows(store, "train").in_order().tolist()


def test_shards_of_different_rows_are_never_paired(tmp_path: Path, make_store: MakeStore) -> None:
    store = Store(str(make_store(tmp_path / "s")))
    table = store.read_shard("captions", "test", 0)
    store.write_shard("captions", "test", 0, table.take(list(reversed(range(len(table))))), seconds=0)
    found = targets.load(store, embeddings="", dim=0, split="train")
    with pytest.raises(ValueError, match="different rows"):
        list(loader(store, found).train(Rows(store, "train").in_order(), 4, 0, 1, 0))


def test_crops_lie_in_the_picture_and_keep_the_share_asked_for() -> None:
    rng = np.random.default_rng(0)
    for width, height in ((100, 60), (31, 200), (64, 64)):
        for _ in range(200):
            left, top, right, bottom = _random_box(rng, width, height, 0.3)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            assert (right - left) * (bottom - top) >= 0.3 * width * height * 0.999


def test_evaluation_crops_as_timm_validates(tmp_path: Path) -> None:
    from timm.data import create_transform

    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (90, 130, 3), dtype=np.uint8))
    picture.save(tmp_path / "p.png")
    for kind in ("bicubic", "bilinear"):
        augment = Augment(size=64, crop_scale=1, flip=0, crop_pct=0.875, interpolation=kind, seed=0)
        found = augment.evaluate((tmp_path / "p.png").read_bytes())
        reference = create_transform(64, is_training=False, interpolation=kind, crop_pct=0.875, use_prefetcher=True)
        np.testing.assert_array_equal(found, np.asarray(reference(picture)).transpose(1, 2, 0))


def test_pca_is_fitted_once_kept_in_the_store_and_keeps_what_varies(tmp_path: Path, make_store: MakeStore) -> None:
    folder = make_store(tmp_path / "s", dim=8)
    store = Store(str(folder))
    first = targets.load(store, embeddings="", dim=3, split="train")
    kept = (folder / "embeddings/test/pca.safetensors").read_bytes()
    second = targets.load(store, embeddings="", dim=5, split="train")
    assert (folder / "embeddings/test/pca.safetensors").read_bytes() == kept
    assert first.basis is not None and second.basis is not None
    np.testing.assert_array_equal(first.basis, second.basis[:, :3])
    np.testing.assert_allclose(second.basis.T @ second.basis, np.eye(5), atol=1e-5)
    vectors = targets.vectors_of(store.read_shard("embeddings", "test", 0)["embedding"])
    np.testing.assert_allclose(np.linalg.norm(first.project(vectors), axis=1), 1, atol=1e-5)
    with pytest.raises(ValueError, match="have 8 dimensions; pass --projection-dim 8 or less"):
        targets.load(store, embeddings="", dim=9, split="train")


def test_pictures_with_several_captions_share_a_group_when_all_are_equal() -> None:
    assert _group("a dog", ["a wet dog"]) == _group("a dog", ["a wet dog"]) != _group("a dog", ["a brown dog"])
    assert _group("a dog", None) == _group("a dog", []) != _group(None, None) == -1
