"""Batches from the store, decoded ahead of the step.

Decoding runs in threads of the training process, or in actors on any node of the cluster (`run.py`); either
way each decoder gets its own slice of every batch, which `order.Sequence` deals out by shard, so that it
keeps few shards in memory.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from training.data.decoder import Array, Decoder, Part
from training.data.order import SHARD, Sequence

AHEAD = 3  # batches in work while one is trained on


@dataclass(frozen=True)
class Batch:
    """One worker's share of a global batch."""

    images: Tensor
    """[b, 3, S, S] uint8, channels last in memory."""
    labels: Tensor
    """[b] int64."""
    columns: dict[str, Tensor]
    """[b, ...] each; what the method reads beside pictures and labels."""
    samples: Array
    """[b, 4], see `training.data.order`."""

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""

        def move(part: Tensor) -> Tensor:
            return part.to(device, non_blocking=True)

        columns = {name: move(column) for name, column in self.columns.items()}
        return Batch(move(self.images), move(self.labels), columns, self.samples)

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return sum(part.nbytes for part in (self.images, self.labels, *self.columns.values()))


class Kept:
    """Batches that are the same whenever they are asked for, kept after the first time if all of them fit.

    A small set's views for evaluation are decoded once and not after every epoch, which took a fifth of its
    training.
    """

    LIMIT = 256 * 2**20
    """Bytes a worker keeps at most: 1,700 pictures of 224 pixels, 21,000 of 64."""

    def __init__(self, make: Callable[[], Iterator[Batch]], limit: int = LIMIT) -> None:
        self._make, self._limit = make, limit
        self._batches: list[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self._batches is not None:
            yield from self._batches
            return
        found: list[Batch] = []
        size = 0
        for batch in self._make():
            size += batch.nbytes
            if size <= self._limit:
                found.append(batch)
            else:  # nor another time
                self._limit = 0
                found.clear()
            yield batch
        if size <= self._limit:
            self._batches = found


class Decoding(Protocol):
    """Several decoders, numbered from 0; `start` returns a function that waits for the part and gives it."""

    decoders: int

    def start(self, number: int, samples: Array, train: bool) -> Callable[[], Part]: ...

    def prefetch(self, number: int, shards: list[int]) -> None: ...


def _executor(threads: int, name: str) -> ThreadPoolExecutor:
    """Threads that compute alone.

    Resizing a picture would otherwise start a team of OpenMP threads for each decoder, and with more threads
    than cores libgomp sleeps at every barrier of the training step.
    """
    # torch counts threads for each thread: the one that trains, which is this one, takes its number now.
    torch.get_num_threads()
    return ThreadPoolExecutor(
        threads, thread_name_prefix=name, initializer=functools.partial(torch.set_num_threads, 1)
    )


class ThreadDecoding:
    """Decoders that are threads of this process and share one cache of shards."""

    def __init__(self, decoder: Decoder, threads: int) -> None:
        self.decoders = threads
        self._decoder = decoder
        self._pool = _executor(threads, "decode")
        self._reader = _executor(2, "read")

    def start(self, number: int, samples: Array, train: bool) -> Callable[[], Part]:
        """Decodes in whichever thread is free."""
        return self._pool.submit(self._decoder, samples, train).result

    def prefetch(self, number: int, shards: list[int]) -> None:
        """Reads beside decoding: it waits for a disk or a server."""
        self._reader.submit(self._decoder.prefetch, shards)


class Loader:
    """This worker's batches."""

    def __init__(self, decoding: Decoding, *, lookahead: int, pin: bool = False) -> None:
        """`lookahead` is how many batches before its first use a shard is fetched; `pin` puts batches into
        page-locked memory."""
        self._decoding, self._lookahead, self._pin = decoding, max(lookahead, AHEAD), pin
        # Joining the decoders' parts is a copy of the whole batch: one thread, and not the training step,
        # makes it.
        self._joiner = _executor(1, "join")

    def train(self, sequence: Sequence, start: int, stop: int, rank: int, world: int) -> Iterator[Batch]:
        """Steps `start` to `stop` of a sequence."""
        yield from self._ahead(
            (sequence.share(step, rank, world) for step in range(start, stop)), self._lookahead, train=True
        )

    def evaluate(self, samples: Array, batch: int, rank: int, world: int) -> Iterator[Batch]:
        """This worker's batches of some rows: the same ones whatever the number of workers, each on exactly
        one of them."""
        batches = [samples[start : start + batch] for start in range(0, len(samples), batch)]
        mine = [batches[number] for number in np.array_split(np.arange(len(batches)), world)[rank]]
        # These batches are small and read shard after shard: two shards are fetched ahead.
        lookahead = math.ceil(2 * len(batches) / max(1, len(np.unique(samples[:, SHARD]))))
        yield from self._ahead(mine, max(lookahead, AHEAD), train=False)

    def _ahead(self, shares: Iterable[Array], lookahead: int, *, train: bool) -> Iterator[Batch]:
        coming: deque[Array] = deque()
        working: deque[Future[Batch]] = deque()
        fetched: list[set[int]] = [set() for _ in range(self._decoding.decoders)]
        source = iter(shares)
        while True:
            while len(coming) < lookahead and (share := next(source, None)) is not None:
                coming.append(share)
                self._fetch(share, fetched)
            while len(working) < AHEAD and coming:
                working.append(self._start(coming.popleft(), train))
            if not working:
                return
            yield working.popleft().result()

    def _fetch(self, share: Array, fetched: list[set[int]]) -> None:
        for number, part in enumerate(np.array_split(share, self._decoding.decoders)):
            shards = set(np.unique(part[:, SHARD]).tolist())
            if new := sorted(shards - fetched[number]):
                self._decoding.prefetch(number, new)
            fetched[number] = shards

    def _start(self, share: Array, train: bool) -> Future[Batch]:
        parts = np.array_split(share, self._decoding.decoders)
        waits = [self._decoding.start(number, part, train) for number, part in enumerate(parts) if len(part)]
        return self._joiner.submit(self._join, share, waits)

    def _join(self, share: Array, waits: list[Callable[[], Part]]) -> Batch:
        parts = [wait() for wait in waits]
        columns = {
            name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]
        }
        if self._pin:
            columns = {name: column.pin_memory() for name, column in columns.items()}
        images, labels = columns.pop("images").permute(0, 3, 1, 2), columns.pop("labels")
        return Batch(images, labels, columns, share)


def lookahead(sequence: Sequence, rows_a_shard: float, window: int) -> int:
    """Batches that half a window of shards lasts for."""
    return math.ceil(rows_a_shard * window / 2 / sequence.batch)
