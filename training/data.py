"""Batches from the store: pictures, labels and text targets read side by side from the shards, decoded ahead by threads.

The order of an epoch is a function of (seed, epoch) alone: shards are shuffled, and rows are shuffled within windows of
`shuffle_shards`. Global batch n is a slice of that order and each worker takes its part of the slice, so what is seen at
step n does not depend on the number of workers. Augmentation draws from (seed, epoch, row). Threads suffice: decoding and
resizing release the interpreter lock.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from pipeline import images
from pipeline.store import Store
from training.targets import Targets, vectors_of

Array = npt.NDArray[Any]
ImageArray = npt.NDArray[np.uint8]
Decode = Callable[[bytes, Array], ImageArray]


@dataclass(frozen=True)
class Batch:
    """One worker's share of a global batch."""

    images: Tensor
    """[b, 3, S, S] uint8."""
    labels: Tensor
    """[b] int64."""
    texts: Tensor | None
    """[b, d] float32, unit length; zero rows where there is no text."""
    groups: Tensor | None
    """[b] int64, equal for equal captions; -1 where there is no text."""

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""

        def move(part: Tensor | None) -> Any:
            return None if part is None else part.to(device, non_blocking=True)

        return Batch(move(self.images), move(self.labels), move(self.texts), move(self.groups))


@dataclass(frozen=True)
class _Shard:
    pictures: list[bytes | None]
    uris: list[str | None]
    labels: Array
    texts: Array | None
    groups: Array | None


class ShardReader:
    """Reads shards of all stages side by side and keeps the most recent ones; ids are checked to be the same rows."""

    def __init__(self, store: Store, targets: Targets | None, keep: int) -> None:
        self._store, self._targets, self._keep = store, targets, keep
        self._cache: OrderedDict[int, _Shard] = OrderedDict()

    def __getitem__(self, shard: int) -> _Shard:
        if shard not in self._cache:
            self._cache[shard] = self._read(shard)
            if len(self._cache) > self._keep:
                self._cache.popitem(last=False)
        self._cache.move_to_end(shard)
        return self._cache[shard]

    def _read(self, shard: int) -> _Shard:
        table = self._store.read_shard("images", "", shard, ["id", "image", "uri", "label"])
        pictures, uris = table["image"].to_pylist(), table["uri"].to_pylist()
        labels = table["label"].to_numpy().astype(np.int64)
        if self._targets is None:
            return _Shard(pictures, uris, labels, None, None)
        captions = self._store.read_shard("captions", self._targets.captions, shard, ["id", "caption", "others"])
        vectors = self._store.read_shard("embeddings", self._targets.embeddings, shard, ["id", "embedding"])
        if not table["id"].equals(captions["id"]) or not table["id"].equals(vectors["id"]):
            message = f"shard {shard}: images, captions and embeddings hold different rows; was the store copied in part?"
            raise ValueError(message)
        wide = vectors_of(vectors["embedding"])
        present = np.abs(wide).sum(1) > 0
        texts = np.where(present[:, None], self._targets.project(wide), 0).astype(np.float32)
        texts_of = zip(captions["caption"].to_pylist(), captions["others"].to_pylist(), strict=True)
        groups = np.array([_group(text, others) for text, others in texts_of], dtype=np.int64)
        return _Shard(pictures, uris, labels, texts, np.where(present, groups, -1))


def _group(caption: str | None, others: list[str] | None) -> int:
    """Equal for pictures all of whose captions are equal: their one vector is made of all of them."""
    if caption is None:
        return -1
    text = "\n".join([caption, *(others or [])])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1  # 63 bits: never negative


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
        """[n, 2] of (shard, row), as stored."""
        return np.concatenate([_pairs(shard, rows) for shard, rows in self.rows.items()])

    def shuffled(self, seed: int, epoch: int, window: int) -> Array:
        """[n, 2] of (shard, row) in the order of one epoch."""
        rng = np.random.default_rng([seed, epoch])
        shards = rng.permutation(list(self.rows))
        parts = []
        for start in range(0, len(shards), window):
            pairs = np.concatenate([_pairs(shard, self.rows[shard]) for shard in shards[start : start + window]])
            parts.append(rng.permutation(pairs))
        return np.concatenate(parts)


def _pairs(shard: int, rows: Array) -> Array:
    return np.stack([np.full(len(rows), shard), rows], axis=1)


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random resized crop and flip for training; resize and centre crop, as timm validates, for evaluation."""

    size: int
    crop_scale: float
    flip: float
    crop_pct: float
    interpolation: str
    seed: int

    def train(self, data: bytes, epoch: int, shard: int, row: int) -> ImageArray:
        """[S, S, 3] uint8; the draw depends on (seed, epoch, shard, row) only."""
        rng = np.random.default_rng([self.seed, epoch, shard, row])
        image = images.decode(data, max_pixels=2**62, shrink_to=math.ceil(self.size / math.sqrt(max(self.crop_scale, 0.01))))
        box = _random_box(rng, image.width, image.height, self.crop_scale)
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        if rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(image)

    def evaluate(self, data: bytes) -> ImageArray:
        """[S, S, 3] uint8: the shorter edge to size / crop_pct, then the centre."""
        from torchvision.transforms.v2 import functional

        image = images.decode(data, max_pixels=2**62)
        edge = math.floor(self.size / self.crop_pct)
        image = functional.resize(image, [edge], interpolation=functional.InterpolationMode(self.interpolation))
        return np.asarray(functional.center_crop(image, [self.size, self.size]))


def _random_box(rng: np.random.Generator, width: int, height: int, scale: float) -> tuple[float, float, float, float]:
    """A crop with a share of the area in [scale, 1] and an aspect ratio in [3/4, 4/3], as Inception's; else the whole."""
    for _ in range(10):
        area = width * height * rng.uniform(scale, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return x, y, x + w, y + h
    return 0, 0, width, height


class Loader:
    """This worker's batches, decoded by threads two batches ahead of the step."""

    def __init__(self, store: Store, targets: Targets | None, augment: Augment, *, threads: int, window: int) -> None:
        # One shard more than a window: the last batches of one window overlap the first of the next.
        self._reader = ShardReader(store, targets, keep=2 * window)
        self._store = store
        self._augment = augment
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def train(self, order: Array, batch: int, rank: int, world: int, epoch: int) -> Iterator[Batch]:
        """This worker's part of every whole global batch of `order`; the incomplete last batch is left out."""
        local = batch // world
        starts = [n * batch + rank * local for n in range(len(order) // batch)]
        parts = [order[start : start + local] for start in starts]
        yield from self._ahead(parts, lambda data, pair: self._augment.train(data, epoch, int(pair[0]), int(pair[1])))

    def evaluate(self, order: Array, batch: int, rank: int, world: int) -> Iterator[Batch]:
        """Every row of this worker's share, each row on exactly one worker, the last batch as short as it is."""
        mine = order[rank::world]
        parts = [mine[start : start + batch] for start in range(0, len(mine), batch)]
        yield from self._ahead(parts, lambda data, pair: self._augment.evaluate(data))

    def _ahead(self, parts: list[Array], decode: Decode) -> Iterator[Batch]:
        waiting: deque[tuple[Array, list[Future[ImageArray]]]] = deque()
        for part in parts:
            waiting.append((part, [self._pool.submit(self._decoded, decode, *self._stored(pair), pair) for pair in part]))
            if len(waiting) > 2:
                yield self._batch(*waiting.popleft())
        while waiting:
            yield self._batch(*waiting.popleft())

    def _stored(self, pair: Array) -> tuple[bytes | None, str | None]:
        shard, row = self._reader[int(pair[0])], int(pair[1])
        return shard.pictures[row], shard.uris[row]

    def _decoded(self, decode: Decode, data: bytes | None, uri: str | None, pair: Array) -> ImageArray:
        return decode(self._store.picture(data, uri), pair)  # in the pool: a picture stored by reference is fetched here

    def _batch(self, part: Array, decoded: list[Future[ImageArray]]) -> Batch:
        pictures = torch.from_numpy(np.stack([future.result() for future in decoded])).permute(0, 3, 1, 2)
        shards = [(self._reader[int(shard)], int(row)) for shard, row in part]
        labels = torch.tensor([int(shard.labels[row]) for shard, row in shards])
        texts = [shard.texts[row] for shard, row in shards if shard.texts is not None]
        groups = [int(shard.groups[row]) for shard, row in shards if shard.groups is not None]
        if not texts:
            return Batch(pictures, labels, None, None)
        return Batch(pictures, labels, torch.from_numpy(np.stack(texts)), torch.tensor(groups))
