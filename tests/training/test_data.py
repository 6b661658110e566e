"""Batches: order, shares of workers, text targets, crops."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.encoders.cut import Cut
from pipeline.store import Store
from training.config import TrainConfig
from training.data.augment import Augment, random_box
from training.data.decoder import DecoderSpec
from training.data.loader import Batch, Kept, Loader, ThreadDecoding
from training.data.order import Rows, Sequence
from training.data.texts import targets as text_targets
from training.data.texts import vectors as text_vectors
from training.data.texts.targets import _group

MakeStore = Callable[..., Path]


def augment(**changed: Any) -> Augment:
    settings = {
        "size": 16,
        "crop_scale": 0.5,
        "flip": 0.5,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "seed": 0,
    }
    return Augment(**(settings | changed))


def loader(store: Store, found: text_targets.Targets | None, **changed: Any) -> Loader:
    columns = (text_targets.TextColumns(found),) if found else ()
    spec = DecoderSpec(store=store.uri, columns=columns, augment=augment(**changed), keep=3)
    return Loader(ThreadDecoding(spec.build(), 2), lookahead=2)


def column(batch: Batch, name: str) -> torch.Tensor:
    found: torch.Tensor = batch.columns[name] if name in batch.columns else getattr(batch, name)
    return found


def sequence(store: Store, batch: int, **settings: Any) -> Sequence:
    return Sequence(Rows(store, "train"), seed=0, window=2, batch=batch, **settings)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_what_a_step_sees_does_not_depend_on_the_number_of_workers(
    tmp_path: Path, make_store: MakeStore, world: int
) -> None:
    store = Store(str(make_store(tmp_path / "s", train=50)))
    found = text_targets.load(store, embeddings="", dim=4, split="train")
    alone = list(loader(store, found).train(sequence(store, 8), 3, 9, 0, 1))
    shares = [
        list(loader(store, found).train(sequence(store, 8), 3, 9, rank, world)) for rank in range(world)
    ]
    assert len(alone) == 6, "two of them in the second pass"
    for step, whole in enumerate(alone):
        for field in ("images", "labels", "targets", "groups"):
            joint = torch.cat([column(share[step], field) for share in shares])
            assert torch.equal(joint, column(whole, field)), field
        assert whole.images.is_contiguous(memory_format=torch.channels_last)


def test_a_loader_that_starts_later_goes_on_with_the_very_same_batches(
    tmp_path: Path, make_store: MakeStore
) -> None:
    store = Store(str(make_store(tmp_path / "s", train=50)))
    straight = list(loader(store, None).train(sequence(store, 8), 0, 12, 0, 1))
    for start in (1, 6, 7):
        later = list(loader(store, None).train(sequence(store, 8), start, 12, 0, 1))
        assert len(later) == 12 - start
        for mine, other in zip(later, straight[start:], strict=True):
            assert torch.equal(mine.images, other.images) and (mine.samples == other.samples).all()


def test_views_of_a_picture_differ_and_come_from_one_decoding(
    tmp_path: Path, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.sources import images

    store = Store(str(make_store(tmp_path / "s", train=50)))
    decoded: list[int] = []
    decode = images.decode
    monkeypatch.setattr(images, "decode", lambda data, **kw: decoded.append(1) or decode(data, **kw))  # type: ignore[func-returns-value]
    batch = next(loader(store, None).train(sequence(store, 12, repeats=3), 0, 1, 0, 1))
    assert len(decoded) == 4
    views = batch.images.reshape(4, 3, -1)
    assert all(not torch.equal(view[0], view[1]) and not torch.equal(view[1], view[2]) for view in views)
    assert torch.equal(batch.labels.reshape(4, 3).amax(1), batch.labels.reshape(4, 3).amin(1))


def test_timms_policies_draw_from_the_seed_alone() -> None:
    rng = np.random.default_rng(0)
    sink = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(sink, "PNG")
    sample = np.array([[2, 0, 5, 0]])
    plain = augment(size=32).train(sink.getvalue(), 60, 40, sample)[0]
    for settings in ({"auto_augment": "rand-m9-mstd0.5-inc1"}, {"color_jitter": 0.4}, {"auto_augment": "3a"}):
        policy = augment(size=32, **settings)
        assert policy.needs_own_process and not augment().needs_own_process
        first = policy.train(sink.getvalue(), 60, 40, sample)[0]
        torch.rand(3), np.random.rand(3), random.random()
        np.testing.assert_array_equal(first, policy.train(sink.getvalue(), 60, 40, sample)[0])
        others = [policy.train(sink.getvalue(), 60, 40, np.array([[2, 0, 5, view]]))[0] for view in range(4)]
        assert any((other != first).any() for other in others) and (first != plain).any()


def test_a_large_jpeg_is_decoded_at_a_fraction_that_keeps_every_crop_sharp() -> None:
    """The same crop from all pixels and from a fraction differs by less than a pixel's shift, and has as much
    detail."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8))
    sinks = [io.BytesIO(), io.BytesIO()]
    picture = small.resize((1600, 1200), Image.Resampling.BICUBIC)
    picture.save(sinks[0], "JPEG", quality=95)
    picture.save(sinks[1], "PNG")
    for row in range(8):
        sample = np.array([[0, 0, row, 0]])
        jpeg, png = (
            augment(size=64, crop_scale=0.2).train(sink.getvalue(), 1600, 1200, sample)[0].astype(int)
            for sink in sinks
        )
        shifted = np.abs(png[:, 1:] - png[:, :-1]).mean()
        assert np.abs(jpeg - png).mean() < shifted
        detail = [
            np.abs(np.diff(view, axis=0)).mean() + np.abs(np.diff(view, axis=1)).mean()
            for view in (jpeg, png)
        ]
        assert detail[0] == pytest.approx(detail[1], rel=0.1)


def test_evaluation_sees_every_row_once_whatever_the_workers(tmp_path: Path, make_store: MakeStore) -> None:
    store = Store(str(make_store(tmp_path / "s", val=23)))
    order = Rows(store, "val").in_order()
    batches = [list(loader(store, None).evaluate(order, 4, rank, 3)) for rank in range(3)]
    seen = [
        tuple(sample) for share in batches for batch in share for sample in batch.samples[:, 1:3].tolist()
    ]
    assert len(seen) == len(set(seen)) == 23


def test_evaluation_keeps_its_batches_where_they_fit(tmp_path: Path, make_store: MakeStore) -> None:
    store = Store(str(make_store(tmp_path / "s", val=23)))
    order, made = Rows(store, "val").in_order(), []

    def make() -> Iterator[Batch]:
        for batch in loader(store, None).evaluate(order, 4, 0, 1):
            made.append(batch)
            yield batch

    size = sum(batch.nbytes for batch in make())
    for limit, times in ((size, 1), (size - 1, 3)):
        kept = Kept(make, limit)
        next(iter(kept))  # who leaves early leaves nothing half kept
        made.clear()
        passes = [list(kept) for _ in range(3)]
        assert len(made) == 6 * times
        for batches in passes:
            torch.testing.assert_close([b.images for b in batches], [b.images for b in passes[0]])
            assert [b.samples.tolist() for b in batches] == [b.samples.tolist() for b in passes[0]]


def test_evaluation_shows_the_same_batches_whatever_the_workers(
    tmp_path: Path, make_store: MakeStore
) -> None:
    """What is ranked within a batch, or rounded by it, does not depend on how many look."""
    store = Store(str(make_store(tmp_path / "s", val=23)))
    order = Rows(store, "val").in_order()
    alone = [batch.samples.tolist() for batch in loader(store, None).evaluate(order, 4, 0, 1)]
    assert [len(batch) for batch in alone] == [4, 4, 4, 4, 4, 3]
    for world in (2, 3, 5, 8):
        together = [
            batch for rank in range(world) for batch in loader(store, None).evaluate(order, 4, rank, world)
        ]
        assert [batch.samples.tolist() for batch in together] == alone


def test_texts_belong_to_their_pictures_and_equal_captions_share_a_group(
    tmp_path: Path, make_store: MakeStore
) -> None:
    store = Store(str(make_store(tmp_path / "s", classes=3, train=40, missing_captions=2)))
    found = text_targets.load(store, embeddings="", dim=0, split="train")
    batches: list[Batch] = list(loader(store, found).evaluate(Rows(store, "train").in_order(), 10, 0, 1))
    vectors: dict[int, torch.Tensor] = {}
    for batch in batches:
        for label, text, group in zip(
            batch.labels, batch.columns["targets"], batch.columns["groups"], strict=True
        ):
            if group < 0:
                assert text.abs().sum() == 0
                continue
            torch.testing.assert_close(text.norm(), torch.tensor(1.0), atol=2e-3, rtol=0)
            assert torch.equal(vectors.setdefault(int(group), text), text)
            assert 0 <= int(label) < 3
    assert int((batches[0].columns["groups"] < 0).sum()) == 2
    assert len(vectors) == 6, "two captions a class"


def test_a_row_with_a_bad_picture_is_left_out(tmp_path: Path, make_store: MakeStore) -> None:
    store = Store(str(make_store(tmp_path / "s", train=20)))
    table = store.read_shard("images", "", 0)
    rows = table.to_pylist()
    rows[3] |= {"error": "damaged", "image": None}
    store.write_shard("images", "", 0, type(table).from_pylist(rows, schema=table.schema), seconds=0)
    assert len(Rows(store, "train")) == 19
    assert [0, 3] not in Rows(store, "train").in_order()[:, 1:3].tolist()


def test_shards_of_different_rows_are_never_paired(tmp_path: Path, make_store: MakeStore) -> None:
    store = Store(str(make_store(tmp_path / "s")))
    table = store.read_shard("captions", "test", 0)
    store.write_shard("captions", "test", 0, table.take(list(reversed(range(len(table))))), seconds=0)
    found = text_targets.load(store, embeddings="", dim=0, split="train")
    with pytest.raises(ValueError, match="different rows"):
        list(loader(store, found).evaluate(Rows(store, "train").in_order(), 4, 0, 1))


def test_crops_lie_in_the_picture_and_keep_the_share_asked_for() -> None:
    rng = np.random.default_rng(0)
    for width, height in ((100, 60), (31, 200), (64, 64)):
        for _ in range(200):
            left, top, right, bottom = random_box(rng, width, height, 0.3)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            assert (right - left) * (bottom - top) >= 0.3 * width * height * 0.999


def test_evaluation_crops_as_timm_validates(tmp_path: Path) -> None:
    from timm.data import create_transform

    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (90, 130, 3), dtype=np.uint8))
    picture.save(tmp_path / "p.png")
    for kind in ("bicubic", "bilinear"):
        found = augment(size=64, interpolation=kind).evaluate((tmp_path / "p.png").read_bytes())
        reference = create_transform(
            64, is_training=False, interpolation=kind, crop_pct=0.875, use_prefetcher=True
        )
        np.testing.assert_array_equal(found, np.asarray(reference(picture)).transpose(1, 2, 0))


def test_evaluation_cuts_as_a_frozen_tower_does() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (93, 131, 3), dtype=np.uint8))
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    for rounds, left in ((True, 34), (False, 33)):  # (131 - 64) / 2, and (93 - 64) / 2 from the top
        cut = Cut(size=64, resize=93, interpolation="bicubic", rounds=rounds)
        own = augment(size=64, cut=cut, fixed=True)
        wanted = np.asarray(picture)[14 : 14 + 64, left : left + 64]
        np.testing.assert_array_equal(own.evaluate(encoded.getvalue()), wanted)
        (view,) = own.train(encoded.getvalue(), 131, 93, np.zeros((1, 4)))
        np.testing.assert_array_equal(view, wanted)
    # No floor of a quotient: 64 / (64 / 93) is a little below 93.
    sizes = [(size, resize) for size in range(16, 400) for resize in range(size, 2 * size)]
    assert all(Cut(size=s, resize=r, interpolation="", rounds=True).at(s).resize == r for s, r in sizes)


def test_pca_is_fitted_once_kept_in_the_store_and_keeps_what_varies(
    tmp_path: Path, make_store: MakeStore
) -> None:
    folder = make_store(tmp_path / "s", dim=8)
    store = Store(str(folder))
    first = text_targets.load(store, embeddings="", dim=3, split="train")
    kept = (folder / "embeddings/test/pca.safetensors").read_bytes()
    second = text_targets.load(store, embeddings="", dim=5, split="train")
    assert (folder / "embeddings/test/pca.safetensors").read_bytes() == kept
    assert first.basis is not None and second.basis is not None
    np.testing.assert_array_equal(first.basis, second.basis[:, :3])
    np.testing.assert_allclose(second.basis.T @ second.basis, np.eye(5), atol=1e-5)
    vectors = text_vectors.rows_of(store.read_shard("embeddings", "test", 0)["embedding"])
    np.testing.assert_allclose(np.linalg.norm(first.project(vectors), axis=1), 1, atol=1e-5)
    with pytest.raises(ValueError, match="have 8 dimensions; pass --projection-dim 8 or less"):
        text_targets.load(store, embeddings="", dim=9, split="train")


def test_pictures_with_several_captions_share_a_group_when_all_are_equal() -> None:
    assert (
        _group("a dog", ["a wet dog"]) == _group("a dog", ["a wet dog"]) != _group("a dog", ["a brown dog"])
    )
    assert _group("a dog", None) == _group("a dog", []) != _group(None, None) == -1


def test_decoders_compute_alone_and_the_step_with_all_threads(tmp_path: Path, make_store: MakeStore) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        spec = DecoderSpec(store=str(make_store(tmp_path / "s")), columns=(), augment=augment(), keep=3)
        decoding = ThreadDecoding(spec.build(), 2)
        assert decoding._pool.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def all_rows(store: Store, split: str) -> tuple[np.ndarray, np.ndarray]:
    """[n, D] embeddings and [n] classes of a split's described pictures."""
    vectors, labels = [], []
    for shard in store.split_shards(split):
        vectors.append(text_vectors.rows_of(store.read_shard("embeddings", "test", shard)["embedding"]))
        labels.append(store.read_shard("images", "", shard)["label"].to_numpy())
    rows, classes = np.concatenate(vectors).astype(np.float64), np.concatenate(labels)
    present = np.abs(rows).sum(1) > 0
    return rows[present], classes[present]


def test_targets_are_centred_at_every_width_and_as_before_where_they_are_not(
    tmp_path: Path, make_store: MakeStore
) -> None:
    store = Store(str(make_store(tmp_path / "s", dim=8, train=40, missing_captions=3)))
    rows, _ = all_rows(store, "train")
    centred = rows - rows.mean(0)
    for dim in (0, 8):
        targets = text_targets.load(store, embeddings="", dim=dim, split="train", center=True)
        wanted = centred / np.linalg.norm(centred, axis=1, keepdims=True)
        np.testing.assert_allclose(targets.project(rows), wanted, atol=1e-5)
        plain = text_targets.load(store, embeddings="", dim=dim, split="train")
        np.testing.assert_array_equal(plain.project(rows), rows.astype(np.float32))
    below = [
        text_targets.load(store, embeddings="", dim=3, split="train", center=center).project(rows)
        for center in (True, False)
    ]
    np.testing.assert_array_equal(*below)


def test_whitening_to_the_power_of_one_makes_all_directions_weigh_the_same(
    tmp_path: Path, make_store: MakeStore
) -> None:
    store = Store(str(make_store(tmp_path / "s", dim=4, train=60, classes=9)))
    rows, _ = all_rows(store, "train")
    spread = []
    for power in (0.0, 0.5, 1.0):
        targets = text_targets.load(store, embeddings="", dim=3, split="train", whitening=power)
        assert targets.mean is not None and targets.basis is not None
        scaled = (rows - targets.mean) @ targets.basis * (1 if targets.scale is None else targets.scale)
        deviations = scaled.std(0)
        spread.append(deviations.max() / deviations.min())
        np.testing.assert_allclose(np.linalg.norm(targets.project(rows), axis=1), 1, atol=1e-5)
    assert spread[2] == pytest.approx(1, abs=1e-3) and spread[1] == pytest.approx(spread[0] ** 0.5, rel=1e-3)


@pytest.mark.parametrize("shrinkage", [0.0, 0.4, 1.0])
def test_targets_drawn_to_their_class_are_exact_and_those_of_other_splits_stay(
    tmp_path: Path, make_store: MakeStore, shrinkage: float
) -> None:
    folder = make_store(tmp_path / "s", dim=8, train=40, val=20, missing_captions=3)
    store = Store(str(folder))
    config = TrainConfig.of(
        store=store.uri,
        class_shrinkage=shrinkage,
        positives="class",
        projection_dim=0,
        center_texts=True,
        batch_size=8,
    )
    targets = text_targets.of_config(config, store)
    rows, classes = all_rows(store, "train")
    means = np.stack([rows[classes == c].mean(0) for c in range(len(store.dataset.classes))])
    wanted = (1 - shrinkage) * rows + shrinkage * means[classes] - rows.mean(0)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    for split, plain in (("train", False), ("val", True)):
        found, groups = (
            np.concatenate(column)
            for column in zip(
                *(text_targets.target_columns(targets, store, shard) for shard in store.split_shards(split)),
                strict=True,
            )
        )
        described = groups >= 0
        rows, classes = all_rows(store, split)
        if plain:
            own = text_targets.of_judging(config, store)
            np.testing.assert_array_equal(found[described], own.project(rows))
            assert not np.array_equal(groups[described], classes)
        else:
            np.testing.assert_allclose(found[described], wanted, atol=1e-4)
            np.testing.assert_array_equal(groups[described], classes)
            assert not found[~described].any() and len(groups) - described.sum() == 3
    kept = folder / "embeddings/test/class-means.safetensors"
    assert kept.exists() == bool(shrinkage)
    if shrinkage:
        before = kept.stat().st_mtime_ns
        text_targets.of_config(config, store)
        assert kept.stat().st_mtime_ns == before, "fitted once"


def test_a_row_without_a_label_takes_no_other_along_when_classes_are_asked(
    tmp_path: Path, make_store: MakeStore
) -> None:
    store = Store(str(make_store(tmp_path / "s", dim=8, train=20)))
    config = TrainConfig.of(
        store=store.uri, class_shrinkage=0.5, positives="class", projection_dim=0, batch_size=8
    )
    shard = store.split_shards("train")[0]
    whole = text_targets.target_columns(text_targets.of_config(config, store), store, shard)
    table = store.read_shard("images", "", shard)
    rows = table.to_pylist()
    rows[3] |= {"error": "no label", "label": -1}
    store.write_shard("images", "", shard, type(table).from_pylist(rows, schema=table.schema), seconds=0)
    found = text_targets.target_columns(text_targets.of_config(config, store), store, shard)
    assert found[1][3] == -1
    others = np.arange(len(rows)) != 3
    np.testing.assert_array_equal(found[1][others], whole[1][others])
    with pytest.raises(ValueError, match="class_shrinkage=1: all texts of a class are one"):
        config.but(class_shrinkage=1.0, positives="caption")
