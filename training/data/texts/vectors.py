"""Vectors of the store shard by shard, and what is made of those of a split: once, kept beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.store import Store

Array = npt.NDArray[Any]


def classes_of(store: Store, shard: int) -> Array:
    """[n] int64 classes of a shard's pictures; -1 for one that has none, of which nothing is trained."""
    labels = store.read_shard("images", "", shard, ["label"])["label"]
    classes: Array = labels.to_numpy().astype(np.int64)
    return classes


def rows_of(column: Any) -> Array:
    """[n, D] float16 of a chunked fixed-size-list column; failed rows are zero."""
    array = column.combine_chunks()
    width = array.type.list_size
    return np.asarray(array.flatten()).reshape(-1, width)


def kept(
    store: Store, name: str, split: str, what: str, fit: Callable[[], dict[str, Array]]
) -> dict[str, Array]:
    """What is made of a split's embeddings once and kept beside them."""
    from safetensors.numpy import load as from_bytes
    from safetensors.numpy import save as to_bytes

    path = f"embeddings/{name}/{what}{'' if split == 'train' else f'-{split}'}.safetensors"
    of = _vectors_of_split(store, name, split)
    data = store.read_file(path)
    # Vectors that were made anew have another basis; files of earlier releases do not say of which they are,
    # and are believed.
    if data is None or _made_of(data) not in ("", of):
        data = to_bytes(fit(), metadata={"vectors": of})
        store.write_file(path, data)
    arrays: dict[str, Array] = from_bytes(data)
    return arrays


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
