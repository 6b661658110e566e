"""Batches from the store: pictures, labels and text targets read side by side from the shards, decoded ahead of the step.

Decoding runs in threads of the training process, or in actors on any node of the cluster (`run.py`); either way each decoder
gets its own slice of every batch, which `order.Sequence` deals out by shard, so that it keeps few shards in memory.
"""

from __future__ import annotations

import functools
import hashlib
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.errors import RunStoppedError, SettingsError
from pipeline.store import Store
from training.augment import Augment
from training.order import ROW, SHARD, Sequence
from training.order import Rows as Rows
from training.targets import Targets, vectors_of

Array = npt.NDArray[Any]
Part = dict[str, Array]
"""Columns of some samples: images [n, S, S, 3] uint8, labels [n]; with text targets texts [n, D] float32 and groups [n]."""

AHEAD = 3  # batches in work while one is trained on


@dataclass(frozen=True)
class Batch:
    """One worker's share of a global batch."""

    images: Tensor
    """[b, 3, S, S] uint8, channels last in memory."""
    labels: Tensor
    """[b] int64."""
    texts: Tensor | None
    """[b, d] float32, unit length; zero rows where there is no text."""
    groups: Tensor | None
    """[b] int64, equal for equal captions; -1 where there is no text."""
    samples: Array
    """[b, 4], see `training.order`."""

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""

        def move(part: Tensor | None) -> Any:
            return None if part is None else part.to(device, non_blocking=True)

        return Batch(move(self.images), move(self.labels), move(self.texts), move(self.groups), self.samples)


@dataclass(frozen=True)
class _Shard:
    pictures: pa.ChunkedArray
    uris: pa.ChunkedArray
    hashes: pa.ChunkedArray
    sizes: Array
    labels: Array
    texts: Array | None
    groups: Array | None


class ShardReader:
    """Reads shards of all stages side by side and keeps the most recent ones; ids are checked to be the same rows.

    Any thread may ask; a shard is read once, by the thread that asks first.
    """

    def __init__(self, store: Store, targets: Targets | None, keep: int) -> None:
        self._store, self._targets, self._keep = store, targets, keep
        self._cache: OrderedDict[int, Future[_Shard]] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, shard: int) -> _Shard:
        with self._lock:
            future = self._cache.get(shard)
            mine = future is None
            if future is None:
                future = self._cache[shard] = Future()
                while len(self._cache) > self._keep:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(shard)
        if mine:
            try:
                future.set_result(self._read(shard))
            except BaseException as error:
                with self._lock:
                    self._cache.pop(shard, None)
                future.set_exception(error)
        return future.result()

    def _read(self, shard: int) -> _Shard:
        table = self._store.read_shard("images", "", shard, ["id", "content_hash", "image", "uri", "label", "width", "height"])
        labels = table["label"].to_numpy().astype(np.int64)
        sizes = np.array([table["width"].to_pylist(), table["height"].to_pylist()], dtype=np.float64).T  # nan where it failed
        if self._targets is None:
            return _Shard(table["image"], table["uri"], table["content_hash"], sizes, labels, None, None)
        captions = self._store.read_shard("captions", self._targets.captions, shard, ["id", "caption", "others"])
        vectors = self._store.read_shard("embeddings", self._targets.embeddings, shard, ["id", "embedding"])
        if not table["id"].equals(captions["id"]) or not table["id"].equals(vectors["id"]):
            message = f"shard {shard}: images, captions and embeddings hold different rows; was the store copied in part?"
            raise SettingsError(message)
        texts, groups = text_columns(self._targets, captions, vectors)
        return _Shard(table["image"], table["uri"], table["content_hash"], sizes, labels, texts, groups)


def text_columns(targets: Targets, captions: pa.Table, vectors: pa.Table) -> tuple[Array, Array]:
    """([n, d] float32 text targets, [n] int64 groups) of a shard's captions and vectors; zero and -1 where there is no text."""
    wide = vectors_of(vectors["embedding"])
    present = np.abs(wide).sum(1) > 0
    texts = np.where(present[:, None], targets.project(wide), 0).astype(np.float32)
    texts_of = zip(captions["caption"].to_pylist(), captions["others"].to_pylist(), strict=True)
    groups = np.array([_group(text, others) for text, others in texts_of], dtype=np.int64)
    return texts, np.where(present, groups, -1)


def _group(caption: str | None, others: list[str] | None) -> int:
    """Equal for pictures all of whose captions are equal: their one vector is made of all of them."""
    if caption is None:
        return -1
    text = "\n".join([caption, *(others or [])])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1  # 63 bits: never negative


class Decoder:
    """Samples to arrays; knows neither threads nor Ray."""

    def __init__(self, store: Store, targets: Targets | None, augment: Augment, keep: int) -> None:
        self._store, self._augment = store, augment
        self._reader = ShardReader(store, targets, keep)

    def __call__(self, samples: Array, train: bool) -> Part:
        """Decodes [n, 4] samples; views of one picture that follow each other are decoded from it once."""
        size = self._augment.size
        pictures = np.empty((len(samples), size, size, 3), np.uint8)
        shards = [self._reader[int(shard)] for shard in samples[:, SHARD]]
        cuts = np.flatnonzero((np.diff(samples[:, [SHARD, ROW]], axis=0) != 0).any(1)) + 1
        for views in np.split(np.arange(len(samples)), cuts) if len(samples) else []:
            shard, row = shards[views[0]], int(samples[views[0], ROW])
            data = self._bytes(shard, row)
            if train:
                width, height = (int(edge) for edge in shard.sizes[row])
                for place, view in zip(views, self._augment.train(data, width, height, samples[views]), strict=True):
                    pictures[place] = view
            else:
                pictures[views] = self._augment.evaluate(data)
        part: Part = {
            "images": pictures,
            "labels": np.array([s.labels[r] for s, r in zip(shards, samples[:, ROW], strict=True)], np.int64),
        }
        if shards and shards[0].texts is not None:
            pairs = list(zip(shards, samples[:, ROW], strict=True))
            part["texts"] = np.stack([s.texts[r] for s, r in pairs if s.texts is not None])
            part["groups"] = np.array([s.groups[r] for s, r in pairs if s.groups is not None], np.int64)
        return part

    def _bytes(self, shard: _Shard, row: int) -> bytes:
        image, uri, content_hash = (column[row].as_py() for column in (shard.pictures, shard.uris, shard.hashes))
        try:
            return self._store.picture(image, uri, content_hash)
        except OSError as error:  # of a store that keeps places and no pictures
            message = (
                f"picture {uri} cannot be read any more ({error}). Put it back, and the same command goes on; a store that is "
                "ingested without --no-pack holds its pictures itself."
            )
            raise RunStoppedError(message) from None

    def prefetch(self, shards: Iterable[int]) -> None:
        """Reads shards that will be needed."""
        for shard in shards:
            self._reader[shard]


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """What makes a decoder, here or in another process; `keep` is how many shards it holds."""

    store: str
    targets: Targets | None
    augment: Augment
    keep: int

    def build(self) -> Decoder:
        """The decoder."""
        return Decoder(Store(self.store), self.targets, self.augment, self.keep)


class Decoding(Protocol):
    """Several decoders, numbered from 0; `start` returns a function that waits for the part and gives it."""

    decoders: int

    def start(self, number: int, samples: Array, train: bool) -> Callable[[], Part]: ...

    def prefetch(self, number: int, shards: list[int]) -> None: ...


def _executor(threads: int, name: str) -> ThreadPoolExecutor:
    """Threads that compute alone.

    Resizing a picture would otherwise start a team of OpenMP threads for each decoder, and with more threads than cores libgomp
    sleeps at every barrier of the training step.
    """
    # torch counts threads for each thread: the one that trains, which is this one, takes its number now.
    torch.get_num_threads()
    return ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=functools.partial(torch.set_num_threads, 1))


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
        """`lookahead` is how many batches before its first use a shard is fetched; `pin` puts batches into page-locked memory."""
        self._decoding, self._lookahead, self._pin = decoding, max(lookahead, AHEAD), pin
        # Joining the decoders' parts is a copy of the whole batch: one thread, and not the training step, makes it.
        self._joiner = _executor(1, "join")

    def train(self, sequence: Sequence, start: int, stop: int, rank: int, world: int) -> Iterator[Batch]:
        """Steps `start` to `stop` of a sequence."""
        yield from self._ahead((sequence.share(step, rank, world) for step in range(start, stop)), self._lookahead, train=True)

    def evaluate(self, samples: Array, batch: int, rank: int, world: int) -> Iterator[Batch]:
        """This worker's batches of some rows: the same ones whatever the number of workers, each on exactly one of them."""
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
        columns = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}
        if self._pin:
            columns = {name: column.pin_memory() for name, column in columns.items()}
        pictures = columns["images"].permute(0, 3, 1, 2)
        return Batch(pictures, columns["labels"], columns.get("texts"), columns.get("groups"), share)


def lookahead(sequence: Sequence, rows_a_shard: float, window: int) -> int:
    """Batches that half a window of shards lasts for."""
    return math.ceil(rows_a_shard * window / 2 / sequence.batch)
