"""Several captions a picture: each with its own vector, one drawn in each pass, some left out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.__main__ import main
from pipeline.config import EmbedConfig
from pipeline.encoders.models import resolve
from pipeline.encoders.text import TextEncoder
from pipeline.stages.embed import EmbedCaptions
from pipeline.stages.variants import EmbedVariant
from pipeline.store import Store
from tests.stores import several_captions
from training.config import TrainConfig
from training.data import order
from training.data.texts import targets as text_targets
from training.data.texts import vectors as text_vectors
from training.data.views import Draw, Viewed
from training.engine import loop
from training.engine.build import Run

MakeStore = Callable[..., Path]
DRAWN = {"embeddings": "several", "several_captions": "draw", "projection_dim": 0}


def samples_of(passes: int, shards: int = 3, rows: int = 20, repeats: int = 1) -> order.Array:
    grid = np.meshgrid(*map(np.arange, (passes, shards, rows, repeats)), indexing="ij")
    return np.stack(grid, -1).reshape(-1, 4)


def test_a_draw_is_of_the_picture_and_the_step_alone() -> None:
    samples = samples_of(passes=2, repeats=2)
    many = np.stack([order.shares(3, "caption", step, samples) for step in range(50)])
    assert many.min() >= 0 and many.max() < 1
    mixed = np.random.default_rng(0).permutation(len(samples))[:100]
    np.testing.assert_array_equal(order.shares(3, "caption", 7, samples[mixed]), many[7][mixed])
    views = many.reshape(50, 2, 60, 2)
    assert (views == views[:, :1, :, :1]).all(), "views of a picture in a step share it"
    once = views[:, 0, :, 0]
    assert len(np.unique(once)) == once.size
    counts, _ = np.histogram(once, 10, (0, 1))
    chi_square = ((counts - once.size / 10) ** 2 / (once.size / 10)).sum()
    assert chi_square < 27.9, "evenly distributed: 99.9 % of nine degrees of freedom"
    for seed, purpose in ((4, "caption"), (3, "dropout")):
        other = np.stack([order.shares(seed, purpose, step, samples[:120:2]) for step in range(50)])
        assert abs(np.corrcoef(once.ravel(), other.ravel())[0, 1]) < 0.06
    assert abs(np.corrcoef(once[:-1].ravel(), once[1:].ravel())[0, 1]) < 0.06


def config_of(store: Path, **settings: object) -> TrainConfig:
    recipe = {"image_size": 32, "batch_size": 9, "backbone": "test_vit", "seed": 5, "loader_workers": 1}
    return TrainConfig.of(store=str(store), **recipe | settings)


def draw_of(step: int) -> Draw:
    return Draw(seed=5, step=step, rank=0, world=1, batch_size=9)


def run_of(store: Path, **settings: object) -> Run:
    return Run.of(config_of(store, **settings), torch.device("cpu"), 0, None, None)


def test_every_caption_of_a_picture_is_drawn_as_often_as_the_others(
    tmp_path: Path, make_store: MakeStore
) -> None:
    folder = make_store(tmp_path / "s", train=18, val=6)
    store = Store(str(folder))
    several_captions(store)
    run = run_of(folder, **DRAWN)
    drawn: Counter[tuple[str, int]] = Counter()
    passes = 150
    for step, batch in enumerate(run.loader.train(run.sequence, 0, 2 * passes, 0, 1)):
        targets, groups, _ = run.task._texts(batch, draw_of(step))
        for sample, target, group in zip(batch.samples, targets.numpy(), groups.tolist(), strict=True):
            _, shard, row, _ = sample.tolist()
            record = store.read_shard("embeddings", "several", shard, ["each"])["each"][row].as_py()
            each = np.reshape(np.asarray(record, np.float32), (-1, 8))
            if row == 0:
                assert group == -1 and not target.any(), "without a caption"
                continue
            [place] = np.flatnonzero(np.abs(each - target).max(1) < 1e-3)
            text = store.read_shard("captions", "several", shard).to_pylist()[row]
            wanted = [text["caption"], *(text["others"] or [])][place]
            assert group == text_targets._group(wanted, None)
            drawn[f"{shard}/{row}", int(place)] += 1
    for picture in {name for name, _ in drawn}:
        counts = [count for (name, _), count in drawn.items() if name == picture]
        assert len(counts) == 1 + int(picture.split("/")[1]) % 3
        assert sum(counts) == passes and min(counts) > 0.6 * passes / len(counts)


def test_a_picture_is_judged_by_the_mean_of_its_captions(tmp_path: Path, make_store: MakeStore) -> None:
    folder = make_store(tmp_path / "s", train=18, val=6)
    several_captions(Store(str(folder)))
    run = run_of(folder, **DRAWN)
    [batch] = run.loader.evaluate(run.eval_rows.in_order(), 64, 0, 1)
    assert set(batch.columns) == {"targets", "groups"}
    shard = int(batch.samples[0, order.SHARD])
    means = text_vectors.rows_of(
        Store(str(folder)).read_shard("embeddings", "several", shard, ["embedding"])["embedding"]
    )
    np.testing.assert_allclose(batch.columns["targets"].numpy(), means.astype(np.float32), atol=1e-3)


def test_drawn_captions_are_drawn_towards_their_class_and_have_its_positives(
    tmp_path: Path, make_store: MakeStore
) -> None:
    folder = make_store(tmp_path / "s", train=18, val=6)
    several_captions(Store(str(folder)))
    towards = {**DRAWN, "class_shrinkage": 0.5, "positives": "class", "center_texts": True}
    run = run_of(folder, **towards)
    batch = next(iter(run.loader.train(run.sequence, 0, 1, 0, 1)))
    targets, groups, _ = run.task._texts(batch, draw_of(0))
    plain = run_of(folder, **DRAWN)
    first = next(iter(plain.loader.train(plain.sequence, 0, 1, 0, 1)))
    alone, _, _ = plain.task._texts(first, draw_of(0))
    found = text_targets.of_config(config_of(folder, **towards), run.store)
    labels = batch.labels.numpy()
    described = groups.numpy() >= 0
    np.testing.assert_array_equal(groups.numpy()[described], labels[described])
    wanted = found.project(alone.numpy(), labels)
    np.testing.assert_allclose(targets.numpy()[described], wanted[described], atol=1e-3)


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_dropped_captions_are_others_in_each_pass(
    tmp_path: Path, make_store: MakeStore, share: float
) -> None:
    run = run_of(make_store(tmp_path / "s", train=18), caption_dropout=share, projection_dim=0)
    left = {}
    for step, batch in enumerate(run.loader.train(run.sequence, 0, 200, 0, 1)):
        _, groups, dropped = run.task._texts(batch, draw_of(step))
        assert (groups >= 0).all(), "other pictures are told apart from their texts"
        left |= {tuple(sample): not gone for sample, gone in zip(batch.samples, dropped, strict=True)}
    found = np.array([bool(kept) for kept in left.values()])
    assert len(found) == 1800 and found.mean() == pytest.approx(1 - share, abs=0.04)
    pictures = {key[1:3] for key in left}
    assert all(0 < sum(bool(left[k]) for k in left if k[1:3] == picture) < 100 for picture in pictures)


def test_a_mixture_whose_picture_is_dropped_aims_at_no_text(tmp_path: Path, make_store: MakeStore) -> None:
    """Not at the one of the picture that is mixed in, either."""
    run = run_of(make_store(tmp_path / "s", train=18), caption_dropout=0.5, projection_dim=0)
    batch = next(iter(run.loader.train(run.sequence, 0, 1, 0, 1)))
    partner, weights = torch.arange(8, -1, -1), torch.full((9,), 0.95)

    def mixing(images: torch.Tensor, labels: torch.Tensor, draw: Draw) -> Viewed:
        return Viewed(run.stepper.views.norm(images), labels, partner, weights)

    inputs = run.task.prepare(batch, mixing, draw_of(0))
    dropped = torch.from_numpy(order.shares(5, "dropout", 0, batch.samples) < 0.5)
    assert 0 < dropped.sum() < 9
    groups = batch.columns["groups"]
    assert (inputs.goal.groups_bK[dropped] == -1).all()
    kept = torch.stack([groups, groups[partner]], 1)[~dropped]
    assert (inputs.goal.groups_bK[~dropped] == kept).all()


def test_it_trains(tmp_path: Path, make_store: MakeStore) -> None:
    """Also where whole batches have no text left."""
    folder = make_store(tmp_path / "s", train=18, val=6)
    several_captions(Store(str(folder)))
    lost = {"batch_size": 3, "epochs": 2, "caption_dropout": 0.8}
    config = config_of(folder, **DRAWN, **lost, balance="gradients", alignment_weight=0.5)
    history = loop.fit(config, torch.device("cpu"), 0, None, lambda metrics, take: None)
    assert [np.isfinite(epoch["loss"]) and np.isfinite(epoch["alignment"]) for epoch in history] == [
        True,
        True,
    ]


def test_captions_from_a_file_keep_their_vectors(tmp_path: Path, make_store: MakeStore) -> None:
    """A file with several a picture, the real encoder, and a draw of each."""
    folder = make_store(tmp_path / "s", train=12, val=4)
    store = Store(str(folder))
    file = tmp_path / "captions.jsonl"
    lines = []
    for shard in range(store.dataset.shards):
        for row, key in enumerate(store.read_shard("images", "", shard, ["id"])["id"].to_pylist()):
            if row % 2:
                lines.append({"path": key, "captions": [f"a red thing, number {row}", " ", "a blue\nthing"]})
            else:
                lines.append({"path": key, "caption": f"a green thing, number {row}"})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["import-captions", str(file), "--store", str(folder)]) == 0
    [captions] = [name for name in store.variants("captions") if name != "test"]
    assert store.variant("captions", captions)["captions_per_image"] == 2
    config = EmbedConfig(store=str(folder), captions=captions, each_caption=True)
    model = resolve(config.encoder)
    variant = EmbedVariant.of(config, model)
    plain = EmbedVariant.of(EmbedConfig(store=str(folder), captions=captions), model)
    assert plain.name != variant.name and "each_caption" not in plain.record()
    assert EmbedVariant.recorded(variant.record()) == variant
    store.write_variant("embeddings", variant.name, {**variant.record(), "versions": {}})
    step = EmbedCaptions(config, model, captions, variant.name)
    for shard in range(store.dataset.shards):
        step(pa.table({"shard": [shard], "redo": [False]}))
    encoder = TextEncoder(model, "mean")
    settings = {"embeddings": variant.name, "several_captions": "draw", "projection_dim": 0}
    targets = text_targets.of_config(TrainConfig.of(store=str(folder), **settings), store)
    shard = store.split_shards("train")[0]
    found, groups = text_targets.each_columns(targets, store, shard)
    assert (
        found.shape[1:] == (2, 384)
        and ((groups >= 0).sum(1) == [1 + row % 2 for row in range(len(found))]).all()
    )
    wanted = encoder(["a red thing, number 1", "a blue thing"]).embeddings.astype(np.float32)
    np.testing.assert_allclose(found[1], wanted, atol=2e-3)
    assert groups[1, 1] == groups[3, 1] != groups[1, 0], "equal captions are positives of each other"
    assert not found[0, 1].any()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"embeddings": "test", "several_captions": "draw"}, "are one a picture"),
        ({"embeddings": "means", "several_captions": "draw"}, r"embed --each-caption --captions several"),
    ],
)
def test_a_store_without_vectors_of_each_is_refused(
    tmp_path: Path, make_store: MakeStore, settings: dict[str, str], said: str
) -> None:
    folder = make_store(tmp_path / "s")
    store = Store(str(folder))
    several_captions(store)
    store.write_variant("embeddings", "means", {"captions": "several", "encoder": "none", "versions": {}})
    for shard in range(store.dataset.shards):
        table = store.read_shard("embeddings", "several", shard).drop_columns(["each"])
        store.write_shard("embeddings", "means", shard, table, seconds=0)
    config = TrainConfig.of(store=str(folder), projection_dim=0, **settings)
    with pytest.raises(ValueError, match=said):
        text_targets.of_config(config, store)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"several_captions": "draw", "store_negatives": 8}, "goes with no --store-negatives"),
        ({"caption_dropout": 1.0}, "leaves no picture a text"),
        ({"caption_dropout": -0.1}, "caption_dropout"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainConfig.of(store="s", **settings)
