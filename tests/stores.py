"""Pictures ingested in this process: the plan and the step of `ingest`, without Ray between them."""

from __future__ import annotations

from dataclasses import asdict

import pyarrow as pa

from pipeline.config import SourceConfig
from pipeline.sources.plan import make_plan
from pipeline.stages.ingest import IngestShard
from pipeline.store import Store


def ingest(config: SourceConfig) -> Store:
    """The store that `ingest` makes."""
    cut = make_plan(config)
    store = Store.create(config.store, cut.dataset)
    step = IngestShard(config.store)
    for shard, rows in enumerate(cut.shards):
        items = [asdict(row) for row in rows]
        step(pa.table({"shard": [shard], "redo": [False], "rows": [items]}))
    return store
