"""Stores made in this process, without Ray."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pyarrow as pa

from pipeline.config import SourceConfig
from pipeline.sources.plan import make_plan
from pipeline.stages.ingest import IngestShard
from pipeline.store import CAPTIONS, Store, embeddings_table


def ingest(config: SourceConfig) -> Store:
    """The store that `ingest` makes: its plan and its step, without Ray between them."""
    cut = make_plan(config)
    store = Store.create(config.store, cut.dataset)
    step = IngestShard(config.store)
    for shard, rows in enumerate(cut.shards):
        items = [asdict(row) for row in rows]
        step(pa.table({"shard": [shard], "redo": [False], "rows": [items]}))
    return store


def several_captions(store: Store, dim: int = 8) -> None:
    """Variants `several`: of each picture one to three captions, of the first of a shard none; every caption
    has a vector of its own."""
    rng = np.random.default_rng(2)
    store.write_variant(
        "captions", "several", {"engine": "imported", "captions_per_image": 3, "versions": {}}
    )
    made = {"captions": "several", "encoder": "none", "pooling": "mean", "each_caption": True, "versions": {}}
    store.write_variant("embeddings", "several", made)
    for shard in range(store.dataset.shards):
        captions, embeddings = [], []
        for row, key in enumerate(store.read_shard("images", "", shard, ["id"])["id"].to_pylist()):
            if row == 0:
                failed = {"id": key, "error": "no caption"}
                captions.append(failed)
                embeddings.append(failed)
                continue
            count = 1 + row % 3
            texts = [f"{key}, caption {n}" for n in range(count)]
            vectors = rng.normal(size=(count, dim))
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            mean = vectors.mean(0) / np.linalg.norm(vectors.mean(0))
            captions.append({"id": key, "caption": texts[0], "others": texts[1:] or None})
            embedded = {"embedding": mean, "each": vectors.ravel(), "tokens": 3, "truncated": False}
            embeddings.append({"id": key, "error": None, **embedded})
        table = pa.Table.from_pylist(captions, schema=CAPTIONS)
        store.write_shard("captions", "several", shard, table, seconds=0)
        table = embeddings_table(embeddings, dim, each=True)
        store.write_shard("embeddings", "several", shard, table, seconds=0)
