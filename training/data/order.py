"""Which samples a step sees: an endless, seeded sequence of passes over the usable rows, cut into global
batches.

Pass p visits every row once (`repeats` times in a row under repeated augmentation), in an order that is a
function of (seed, p) alone: shards are shuffled, and rows are shuffled within windows of shards. Global batch
n is samples [n B, (n + 1) B) of the sequence, whatever the number of workers; so a run resumed at step n, on
more or fewer workers, goes on with the very next sample. A batch may reach into the next pass, so that none
is short and no row is left out.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.store import Store

Array = npt.NDArray[Any]
PASS, SHARD, ROW, REPEAT = range(4)
"""Columns of a sample."""
Deal = Literal["shard", "place"]


class Rows:
    """The usable rows of a split: those whose picture decodes."""

    def __init__(self, store: Store, split: str) -> None:
        self.rows: dict[int, Array] = {}
        receipts = store.receipts("images")
        for shard in store.split_shards(split):
            if receipts[shard].failed:
                errors = store.read_shard("images", "", shard, ["error"])["error"]
                self.rows[shard] = np.flatnonzero([error is None for error in errors.to_pylist()])
            else:
                self.rows[shard] = np.arange(receipts[shard].rows)

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.rows.values())

    def in_order(self) -> Array:
        """[n, 4] samples, as stored."""
        return _samples(0, np.concatenate([_pairs(shard, rows) for shard, rows in self.rows.items()]), 1)

    def shuffled(self, seed: int, number: int, window: int) -> Array:
        """[n, 2] of (shard, row) in the order of one pass."""
        rng = np.random.default_rng([seed, number])
        shards = rng.permutation(list(self.rows))
        parts = []
        for start in range(0, len(shards), window):
            pairs = np.concatenate(
                [_pairs(shard, self.rows[shard]) for shard in shards[start : start + window]]
            )
            parts.append(rng.permutation(pairs))
        return np.concatenate(parts)


class Sequence:
    """All samples of a run, in order; `batch` is the global batch size B, `by` what `share` deals it out
    by."""

    def __init__(
        self,
        rows: Rows,
        *,
        seed: int,
        window: int,
        batch: int,
        repeats: int = 1,
        epoch_samples: int = 0,
        by: Deal = "shard",
    ) -> None:
        self.batch, self.by = batch, by
        self.epoch_samples = epoch_samples or len(rows)
        self._rows, self._seed, self._window, self._repeats = rows, seed, window, repeats
        self._passes: dict[int, Array] = {}

    def steps(self, epochs: int) -> int:
        """Steps after which that many epochs of `epoch_samples` are done; by default an epoch has as many as
        there are rows."""
        return math.ceil(epochs * self.epoch_samples / self.batch)

    def share(self, step: int, rank: int, world: int) -> Array:
        """[b, 4] samples of one worker at a step; b differs by at most one between workers.

        Dealt out by shard, a worker opens about 1/world of a window's shards and not all of them; dealt out
        by place in the sequence, its share is a random sample of the window.
        """
        whole = self._slice(step * self.batch, (step + 1) * self.batch)
        if self.by == "place":
            return _sorted(np.array_split(whole, world)[rank])
        return np.array_split(_sorted(whole), world)[rank]

    def _slice(self, start: int, stop: int) -> Array:
        length = len(self._rows) * self._repeats
        parts = []
        while start < stop:
            number, offset = divmod(start, length)
            end = min(stop, (number + 1) * length)
            parts.append(self._pass(number)[offset : end - number * length])
            start = end
        return np.concatenate(parts)

    def _pass(self, number: int) -> Array:
        if number not in self._passes:
            for old in [n for n in self._passes if n < number - 1]:
                del self._passes[old]
            self._passes[number] = _samples(
                number, self._rows.shuffled(self._seed, number, self._window), self._repeats
            )
        return self._passes[number]


def deal(source: dict[str, Any], *, looks_across: bool) -> Deal:
    """How to deal batches out: by shard, but where that would show.

    Shards are random samples of their split, but for those of Parquet files, which keep row groups together:
    in a file sorted by class a worker would see few classes at a time. An exact loss does not mind; what
    looks across a worker's share does.

    Args:
        source: of the store's `dataset.json`.
        looks_across: BatchNorm's statistics are each worker's own, or pictures are mixed with others of the
            share.
    """
    return "place" if looks_across and source.get("kind") == "parquet" else "shard"


def shares(seed: int, purpose: str, step: int, samples: Array) -> Array:
    """[n] float64, evenly distributed in [0, 1): a draw for each picture of a step, whichever worker asks.

    A picture that is twice in a global batch, as another view or of the next pass, has one draw. By
    SplitMix64's finaliser (Steele et al., OOPSLA 2014) over the key's parts.

    Args:
        seed: of the run.
        purpose: what is drawn; another one draws independently.
        step: of the run.
        samples: [n, 4].
    """
    word = int.from_bytes(hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=8).digest(), "big")
    key = np.full(len(samples), word, np.uint64)
    for part in (np.full(len(samples), step), samples[:, SHARD], samples[:, ROW]):
        key += part.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)  # wraps around
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            key = (key ^ (key >> np.uint64(shift))) * np.uint64(factor)
        key ^= key >> np.uint64(31)
    found: Array = (key >> np.uint64(11)) / 2.0**53
    return found


def _sorted(samples: Array) -> Array:
    order = np.lexsort((samples[:, REPEAT], samples[:, ROW], samples[:, SHARD], samples[:, PASS]))
    found: Array = samples[order]
    return found


def _pairs(shard: int, rows: Array) -> Array:
    return np.stack([np.full(len(rows), shard), rows], axis=1)


def _samples(number: int, pairs: Array, repeats: int) -> Array:
    views = np.tile(np.arange(repeats), len(pairs))
    many = np.repeat(pairs, repeats, axis=0)
    return np.column_stack([np.full(len(many), number), many, views])
