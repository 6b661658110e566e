"""Which samples a step sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.store import Store
from training.order import PASS, REPEAT, SHARD, Rows, Sequence

MakeStore = Callable[..., Path]


def rows_of(folder: Path, make_store: MakeStore, **sizes: int) -> Rows:
    return Rows(Store(str(make_store(folder, **sizes))), "train")


def test_a_pass_holds_every_row_once_in_an_order_of_seed_and_pass_alone(tmp_path: Path, make_store: MakeStore) -> None:
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
    """All steps of four epochs visit each row four times, but for what fills up the last batch; and no batch is short."""
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


def test_a_step_is_the_same_batch_for_any_number_of_workers_and_from_any_start(tmp_path: Path, make_store: MakeStore) -> None:
    rows = rows_of(tmp_path / "s", make_store, train=57, shard_rows=10)
    alone = Sequence(rows, seed=3, window=2, batch=10)
    for step in (0, 4, 5, 6, 17):
        fresh = Sequence(rows, seed=3, window=2, batch=10)  # as after a restart
        joint = np.concatenate([fresh.share(step, rank, 4) for rank in range(4)])
        np.testing.assert_array_equal(joint, alone.share(step, 0, 1))


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
