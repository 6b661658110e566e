"""Text targets of training: which embedding variant, how wide, and PCA for a shared space narrower than the
embeddings.

PCA is fitted once for an embedding variant and the split that is trained on, streaming over its shards in
float64, and kept in the store beside the vectors (`pca.safetensors`), so that every trial and every resumed
run projects alike.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import SettingsError
from pipeline.store import Store
from training.config import TrainConfig

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What training needs to know of its texts; `mean` and `basis` ([D], [D, dim]) are None where texts stay
    as they are."""

    embeddings: str
    captions: str
    dim: int
    mean: Array | None = None
    basis: Array | None = None

    def project(self, embeddings: Array) -> Array:
        """[n, D] unit-length text embeddings to [n, dim] unit-length text targets in float32."""
        full = embeddings.astype(np.float32)
        if self.mean is None or self.basis is None:
            return full
        reduced = (full - self.mean) @ self.basis
        unit: Array = reduced / np.maximum(np.linalg.norm(reduced, axis=1, keepdims=True), 1e-12)
        return unit


def of_config(config: TrainConfig, store: Store) -> Targets:
    """The targets of a run; as wide as the embeddings where the run learns its own projection of them."""
    dim = 0 if config.method.text_projection == "learned" else config.method.projection_dim
    return load(store, embeddings=config.method.embeddings, dim=dim, split=config.data.train_split)


def load(store: Store, *, embeddings: str, dim: int, split: str) -> Targets:
    """The targets of an embedding variant at width `dim` (0: as wide as the embeddings).

    Raises:
        ValueError: no such variant, an unfinished one, or a `dim` above its width.
    """
    name = store.only_variant("embeddings", embeddings)
    store.require_complete("embeddings", name)
    captions = str(store.variant("embeddings", name)["captions"])
    width = int(
        store.read_shard("embeddings", name, 0, ["embedding"]).schema.field("embedding").type.list_size
    )
    if dim > width:
        message = (
            f"projection_dim={dim}: the embeddings of {name} have {width} dimensions; pass --projection-dim "
            f"{width} or less."
        )
        raise SettingsError(message)
    if dim in (0, width):
        return Targets(embeddings=name, captions=captions, dim=width)
    mean, basis = _pca(store, name, split, width)
    return Targets(embeddings=name, captions=captions, dim=dim, mean=mean, basis=basis[:, :dim])


@dataclass(frozen=True)
class TextColumns:
    """Columns `targets` and `groups` (see `columns.Columns`)."""

    targets: Targets

    def read(self, store: Store, shard: int, ids: pa.ChunkedArray) -> dict[str, Array]:
        """[n, d] float32 text targets of unit length, zero where there is no text, and [n] int64 groups, -1
        there."""
        captions = store.read_shard("captions", self.targets.captions, shard, ["id", "caption", "others"])
        embeddings = store.read_shard("embeddings", self.targets.embeddings, shard, ["id", "embedding"])
        if not ids.equals(captions["id"]) or not ids.equals(embeddings["id"]):
            message = (
                f"shard {shard}: images, captions and embeddings hold different rows; was the store copied "
                "in part?"
            )
            raise SettingsError(message)
        targets, groups = target_columns(self.targets, captions, embeddings)
        return {"targets": targets, "groups": groups}


def target_columns(settings: Targets, captions: pa.Table, embeddings: pa.Table) -> tuple[Array, Array]:
    """([n, d] float32 text targets, [n] int64 groups) of a shard's captions and text embeddings; zero and -1
    where there is no text."""
    full = rows_of(embeddings["embedding"])
    present = np.abs(full).sum(1) > 0
    targets = np.where(present[:, None], settings.project(full), 0).astype(np.float32)
    texts = zip(captions["caption"].to_pylist(), captions["others"].to_pylist(), strict=True)
    groups = np.array([_group(caption, others) for caption, others in texts], dtype=np.int64)
    return targets, np.where(present, groups, -1)


def _group(caption: str | None, others: list[str] | None) -> int:
    """Equal for pictures all of whose captions are equal: their one vector is made of all of them."""
    if caption is None:
        return -1
    text = "\n".join([caption, *(others or [])])
    # 63 bits: never negative.
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def rows_of(column: Any) -> Array:
    """[n, D] float16 of a chunked fixed-size-list column; failed rows are zero."""
    array = column.combine_chunks()
    width = array.type.list_size
    return np.asarray(array.flatten()).reshape(-1, width)


def _pca(store: Store, name: str, split: str, width: int) -> tuple[Array, Array]:
    from safetensors.numpy import load as from_bytes
    from safetensors.numpy import save as to_bytes

    path = f"embeddings/{name}/pca{'' if split == 'train' else f'-{split}'}.safetensors"
    of = _vectors_of_split(store, name, split)
    data = store.read_file(path)
    # Vectors that were made anew have another basis; files of earlier releases do not say of which they are,
    # and are believed.
    if data is None or _made_of(data) not in ("", of):
        mean, basis, variance = _fit(store, name, split, width)
        data = to_bytes({"mean": mean, "basis": basis, "variance": variance}, metadata={"vectors": of})
        store.write_file(path, data)
    parts = from_bytes(data)
    return parts["mean"], parts["basis"]


def _vectors_of_split(store: Store, name: str, split: str) -> str:
    receipts = store.receipts("embeddings", name)
    digest = hashlib.sha256()
    for shard in store.split_shards(split):
        digest.update(receipts[shard].checksum.encode())
    return digest.hexdigest()


def _made_of(data: bytes) -> str:
    """What a file of safetensors says of its vectors: its header, JSON behind the length of it in eight
    bytes."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return str(header.get("__metadata__", {}).get("vectors", ""))


def _fit(store: Store, name: str, split: str, width: int) -> tuple[Array, Array, Array]:
    count, total, second = 0, np.zeros(width), np.zeros((width, width))
    for shard in store.split_shards(split):
        vectors = rows_of(store.read_shard("embeddings", name, shard, ["embedding"])["embedding"]).astype(
            np.float64
        )
        vectors = vectors[np.abs(vectors).sum(1) > 0]
        count += len(vectors)
        total += vectors.sum(0)
        second += vectors.T @ vectors
    if count < 2:
        message = (
            f"embeddings={name}: {count} vectors in split {split}, too few for PCA; pass --projection-dim 0."
        )
        raise SettingsError(message)
    mean = total / count
    variance, basis = np.linalg.eigh(second / count - np.outer(mean, mean))
    order = np.argsort(variance)[::-1]
    basis = basis[:, order]
    # Eigenvectors have no sign of their own; the largest component positive makes two fits agree.
    basis = basis * np.sign(basis[np.abs(basis).argmax(0), np.arange(width)])
    return (
        mean.astype(np.float32),
        np.ascontiguousarray(basis, dtype=np.float32),
        variance[order].astype(np.float32),
    )
