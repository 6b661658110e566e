"""Further negatives from the store: texts are frozen, so random ones cost no forward pass and no
communication.

Every worker draws the same texts at a step, from a pool of shards that changes every `PERIOD` steps; both
depend on (seed, step) alone, so that a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.store import Store
from training.data.texts.targets import Targets, target_columns
from training.losses.alignment import Texts

Array = npt.NDArray[Any]
PERIOD = 64
POOL_SHARDS = 16


class Negatives:
    """Texts of a split to draw from."""

    def __init__(self, store: Store, targets: Targets, split: str, count: int, seed: int) -> None:
        """`count` texts a step, fewer where the pool holds fewer."""
        self._store, self._targets, self._count, self._seed = store, targets, count, seed
        self._shards = np.array(store.split_shards(split))
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="negatives")
        self._pools: dict[int, Future[tuple[Array, Array]]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Negatives:
        """Itself: the copy of a task that holds the moving average draws nothing."""
        return self

    def draw(self, step: int, device: torch.device) -> Texts:
        """The texts of a step: targets [K, d] and groups [K], without repetition of rows."""
        period = step // PERIOD
        self._pools = {p: pool for p, pool in self._pools.items() if p >= period}
        for number in (period, period + 1):  # the next pool is read while this one is used
            if number not in self._pools:
                self._pools[number] = self._reader.submit(self._pool, number)
        targets, groups = self._pools[period].result()
        rows = np.random.default_rng([self._seed, 1, step]).permutation(len(groups))[: self._count]
        return Texts(torch.from_numpy(targets[rows]).to(device), torch.from_numpy(groups[rows]).to(device))

    def _pool(self, period: int) -> tuple[Array, Array]:
        rng = np.random.default_rng([self._seed, 2, period])
        rows = self._targets.rows
        shards = self._shards if rows is None else np.array(sorted(rows))
        shards = rng.permutation(shards)[:POOL_SHARDS]
        parts = [self._of_shard(int(shard)) for shard in np.sort(shards)]
        targets, groups = (np.concatenate(column) for column in zip(*parts, strict=True))
        return targets[groups >= 0], groups[groups >= 0]

    def _of_shard(self, shard: int) -> tuple[Array, Array]:
        targets, groups = target_columns(self._targets, self._store, shard)
        if (rows := self._targets.rows) is None:
            return targets, groups
        own = rows.get(shard, np.array([], dtype=np.int64))  # the labels of others are not to be looked at
        return targets[own], groups[own]
