"""Which samples a step sees."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.store import Store
from training.config import TrainConfig
from training.data.order import PASS, REPEAT, ROW, SHARD, Rows, Sequence, deal
from training.engine import build, loop

MakeStore = Callable[..., Path]


def rows_of(folder: Path, make_store: MakeStore, **sizes: int) -> Rows:
    return Rows(Store(str(make_store(folder, **sizes))), "train")


def test_a_pass_holds_every_row_once_in_an_order_of_seed_and_pass_alone(
    tmp_path: Path, make_store: MakeStore
) -> None:
    rows = rows_of(tmp_path / "s", make_store, train=57, shard_rows=10)
    first = rows.shuffled(0, 0, 2)
    assert len({tuple(pair) for pair in first}) == len(first) == 57
    np.testing.assert_array_equal(first, rows.shuffled(0, 0, 2))
    for other in (rows.shuffled(0, 1, 2), rows.shuffled(1, 0, 2)):
        assert (first != other).any() and {tuple(p) for p in other} == {tuple(p) for p in first}


def test_rows_mix_within_a_window_of_shards_only(tmp_path: Path, make_store: MakeStore) -> None:
    order = rows_of(tmp_path / "s", make_store, train=60, shard_rows=10).shuffled(0, 0, 2)
    windows = [set(order[start : start + 20, 0]) for start in range(0, 60, 20)]
    assert all(len(window) == 2 for window in windows)
    assert not windows[0] & windows[1]


@pytest.mark.parametrize("batch", [8, 19, 57, 100])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_sample_comes_once_an_epoch_whatever_the_workers(
    tmp_path: Path, make_store: MakeStore, batch: int, world: int
) -> None:
    """All steps of four epochs visit each row four times, but for what fills up the last batch; and no batch
    is short."""
    sequence = Sequence(rows_of(tmp_path / "s", make_store, train=57), seed=3, window=2, batch=batch)
    steps = sequence.steps(4)
    assert (steps - 1) * batch < 4 * 57 <= steps * batch
    seen: Counter[tuple[int, ...]] = Counter()
    for step in range(steps):
        shares = [sequence.share(step, rank, world) for rank in range(world)]
        assert sum(map(len, shares)) == batch and max(map(len, shares)) - min(map(len, shares)) <= 1
        seen.update(tuple(sample) for share in shares for sample in share.tolist())
    assert set(seen.values()) == {1}, "a sample is a row in a pass"
    whole = [sample for sample in seen if sample[PASS] < 4]
    assert len(whole) == 4 * 57 and len(seen) == steps * batch


def test_an_epoch_of_several_passes_has_the_batches_of_as_many_epochs(
    tmp_path: Path, make_store: MakeStore
) -> None:
    rows = rows_of(tmp_path / "s", make_store, train=57)
    single = Sequence(rows, seed=3, window=2, batch=10, repeats=2)
    several = Sequence(rows, seed=3, window=2, batch=10, repeats=2, epoch_samples=3 * 57)
    assert several.epoch_samples == 3 * single.epoch_samples and several.steps(2) == single.steps(6)
    for step in range(several.steps(2)):
        np.testing.assert_array_equal(several.share(step, 0, 1), single.share(step, 0, 1))


def test_a_step_is_the_same_batch_for_any_number_of_workers_and_from_any_start(
    tmp_path: Path, make_store: MakeStore
) -> None:
    rows = rows_of(tmp_path / "s", make_store, train=57, shard_rows=10)
    alone = Sequence(rows, seed=3, window=2, batch=10)
    for step in (0, 4, 5, 6, 17):
        fresh = Sequence(rows, seed=3, window=2, batch=10)  # as after a restart
        joint = np.concatenate([fresh.share(step, rank, 4) for rank in range(4)])
        np.testing.assert_array_equal(joint, alone.share(step, 0, 1))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_dealt_by_place_the_batches_are_the_same_ones(
    tmp_path: Path, make_store: MakeStore, world: int
) -> None:
    rows = rows_of(tmp_path / "s", make_store, train=57, shard_rows=10)
    by_shard, by_place = (
        Sequence(rows, seed=3, window=2, batch=19, repeats=2, by=by) for by in ("shard", "place")
    )
    for step in range(7):
        shares = [by_place.share(step, rank, world) for rank in range(world)]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        joint = np.concatenate(shares)
        np.testing.assert_array_equal(joint[np.lexsort(joint.T[::-1])], by_shard.share(step, 0, 1))


def test_every_worker_sees_all_classes_of_a_parquet_source_sorted_by_class() -> None:
    """Class k is shard k, as in row groups of a sorted file; four workers with 64 pictures each."""
    rows = Rows.__new__(Rows)
    rows.rows = {shard: np.arange(100) for shard in range(16)}

    def classes_of_shares(source: str) -> list[int]:
        by = deal({"kind": source}, looks_across=True)
        sequence = Sequence(rows, seed=0, window=16, batch=256, by=by)
        return [len(set(sequence.share(step, rank, 4)[:, SHARD])) for step in range(6) for rank in range(4)]

    assert max(classes_of_shares("folder")) <= 6, "few shards to open: of other sources a shard is a sample"
    assert min(classes_of_shares("parquet")) >= 14
    # Within a share views of a picture, and rows of a shard, still come one after the other.
    share = Sequence(rows, seed=0, window=16, batch=256, repeats=3, by="place").share(0, 1, 4)
    assert (np.diff(share[:, SHARD]) >= 0).all() and len(np.unique(share[:, [SHARD, ROW]], axis=0)) <= len(
        share
    ) / 3 + 2
    # A loss that looks at single pictures and at the whole batch does not mind who has which.
    assert deal({"kind": "parquet"}, looks_across=False) == deal({}, looks_across=True) == "shard"


@pytest.mark.parametrize(
    ("backbone", "settings", "by"),
    [("test_resnet", {}, "place"), ("test_vit", {}, "shard"), ("test_vit", {"mixup": 0.2}, "place")],
)
def test_a_run_deals_a_parquet_source_out_as_its_model_needs_it(
    tmp_path: Path,
    make_store: MakeStore,
    monkeypatch: pytest.MonkeyPatch,
    backbone: str,
    settings: dict[str, Any],
    by: str,
) -> None:
    store = make_store(tmp_path / "s", train=16, val=4)
    recorded = json.loads((store / "dataset.json").read_text())
    recorded["source"]["kind"] = "parquet"
    (store / "dataset.json").write_text(json.dumps(recorded))
    made: list[Sequence] = []

    def sequence(*arguments: Any, **more: Any) -> Sequence:
        made.append(Sequence(*arguments, **more))
        return made[-1]

    monkeypatch.setattr(build, "Sequence", sequence)
    config = TrainConfig.of(
        store=str(store),
        backbone=backbone,
        image_size=32,
        epochs=1,
        batch_size=16,
        alignment_weight=0,
        **settings,
    )
    loop.fit(config, torch.device("cpu"), 0, None, lambda metrics, take: None)
    assert made[0].by == by


def test_a_worker_opens_its_part_of_the_shards() -> None:
    rows = Rows.__new__(Rows)
    rows.rows = {shard: np.arange(512) for shard in range(16)}
    sequence = Sequence(rows, seed=0, window=16, batch=1024)
    for rank in range(8):
        opened = {shard for step in range(8) for shard in sequence.share(step, rank, 8)[:, SHARD].tolist()}
        assert len(opened) <= 16 / 8 + 2


def test_repeated_augmentation_shows_each_picture_thrice_in_a_batch_in_views_of_their_own(
    tmp_path: Path, make_store: MakeStore
) -> None:
    sequence = Sequence(rows_of(tmp_path / "s", make_store, train=60), seed=0, window=2, batch=12, repeats=3)
    assert sequence.steps(1) == 5, "an epoch keeps its number of images"
    views: Counter[tuple[int, ...]] = Counter()
    for step in range(sequence.steps(3)):
        share = sequence.share(step, 0, 1)
        assert Counter(map(tuple, share[:, 1:3].tolist())).most_common()[-1][1] == 3
        views.update(tuple(sample) for sample in share.tolist())
    assert len(views) == 180 and set(views.values()) == {1} and {view[REPEAT] for view in views} == {0, 1, 2}
