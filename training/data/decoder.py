"""Samples to arrays: shards of all stages read side by side, pictures decoded and augmented. Knows neither
threads nor Ray."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import RunStoppedError
from pipeline.store import Store
from training.data.augment import Augment
from training.data.columns import Columns
from training.data.order import ROW, SHARD

Array = npt.NDArray[Any]
Part = dict[str, Array]
"""Of some samples: images [n, S, S, 3] uint8, labels [n], and the columns that the method reads, [n, ...]
each."""


_ENCODED = ("image", "uri", "content_hash")


@dataclass(frozen=True)
class _Shard:
    pictures: pa.ChunkedArray | None
    """With `uris` and `hashes` None where no pictures are wanted."""
    uris: pa.ChunkedArray | None
    hashes: pa.ChunkedArray | None
    sizes: Array
    labels: Array
    columns: dict[str, Array]


class ShardReader:
    """Reads shards of all stages side by side and keeps the most recent ones; ids are checked to be the same
    rows.

    Any thread may ask; a shard is read once, by the thread that asks first.
    """

    def __init__(
        self, store: Store, columns: tuple[Columns, ...], keep: int, *, pictures: bool = True
    ) -> None:
        self._store, self._columns, self._keep = store, columns, keep
        self._kinds = ["id", "label", "width", "height", *(_ENCODED * pictures)]
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
        table = self._store.read_shard("images", "", shard, self._kinds)
        labels = table["label"].to_numpy().astype(np.int64)
        sizes = np.array(
            [table["width"].to_pylist(), table["height"].to_pylist()], dtype=np.float64
        ).T  # nan where it failed
        columns: dict[str, Array] = {}
        for each in self._columns:
            columns |= each.read(self._store, shard, table["id"])
        encoded = {name: table[name] if name in self._kinds else None for name in _ENCODED}
        image, uri, content_hash = encoded.values()
        return _Shard(image, uri, content_hash, sizes, labels, columns)


class Decoder:
    """Samples to arrays; knows neither threads nor Ray."""

    def __init__(
        self,
        store: Store,
        columns: tuple[Columns, ...],
        augment: Augment,
        keep: int,
        *,
        pictures: bool = True,
    ) -> None:
        self._store, self._augment, self._wanted = store, augment, pictures
        self._reader = ShardReader(store, columns, keep, pictures=pictures)

    def __call__(self, samples: Array, train: bool) -> Part:
        """Decodes [n, 4] samples; views of one picture that follow each other are decoded from it once."""
        size = self._augment.size * self._wanted
        pictures = np.empty((len(samples), size, size, 3), np.uint8)
        shards = [self._reader[int(shard)] for shard in samples[:, SHARD]]
        cuts = np.flatnonzero((np.diff(samples[:, [SHARD, ROW]], axis=0) != 0).any(1)) + 1
        for views in np.split(np.arange(len(samples)), cuts) if len(samples) and self._wanted else []:
            shard, row = shards[views[0]], int(samples[views[0], ROW])
            data = self._bytes(shard, row)
            if train:
                width, height = (int(edge) for edge in shard.sizes[row])
                for position, view in zip(
                    views, self._augment.train(data, width, height, samples[views]), strict=True
                ):
                    pictures[position] = view
            else:
                pictures[views] = self._augment.evaluate(data)
        part: Part = {
            "images": pictures,
            "labels": np.array([s.labels[r] for s, r in zip(shards, samples[:, ROW], strict=True)], np.int64),
        }
        for name in shards[0].columns if shards else ():
            part[name] = np.stack([s.columns[name][r] for s, r in zip(shards, samples[:, ROW], strict=True)])
        return part

    def _bytes(self, shard: _Shard, row: int) -> bytes:
        columns = (shard.pictures, shard.uris, shard.hashes)
        image, uri, content_hash = (None if column is None else column[row].as_py() for column in columns)
        try:
            return self._store.picture(image, uri, content_hash)
        except OSError as error:  # of a store that keeps places and no pictures
            message = (
                f"picture {uri} cannot be read any more ({error}). Put it back, and the same command goes "
                "on; a store that is ingested without --no-pack holds its pictures itself."
            )
            raise RunStoppedError(message) from None

    def prefetch(self, shards: Iterable[int]) -> None:
        """Reads shards that will be needed."""
        for shard in shards:
            self._reader[shard]


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """What makes a decoder, here or in another process; `keep` is how many shards it holds, and without
    `pictures` only columns are read."""

    store: str
    columns: tuple[Columns, ...]
    augment: Augment
    keep: int
    pictures: bool = True

    def build(self) -> Decoder:
        """The decoder."""
        return Decoder(Store(self.store), self.columns, self.augment, self.keep, pictures=self.pictures)
