"""`status`: what is done and still to do, and files that are not those on their receipts."""

from __future__ import annotations

from typing import Any

from pipeline.store.schema import STAGES, part_name
from pipeline.store.store import Store


def summary(store: Store) -> dict[str, Any]:
    """What is done and still to do, stage by stage: the object that `status --json` prints."""
    stages = []
    for stage in STAGES:
        for variant in store.variants(stage):
            receipts = store.receipts(stage, variant).values()
            stages.append(
                {
                    "stage": stage,
                    "variant": variant,
                    "done_shards": len(receipts),
                    "rows": sum(r.rows for r in receipts),
                    "failed": sum(r.failed for r in receipts),
                    "remaining_shards": store.dataset.shards - len(receipts),
                }
            )
    return {"rows": store.dataset.rows, "shards": store.dataset.shards, "stages": stages}


def damaged(store: Store) -> list[dict[str, str]]:
    """Files of any stage that are not those on their receipts: what `status --verify` prints."""
    return [
        {
            "file": f"{store.folder(stage, variant)}/{part_name(shard)}.parquet",
            "receipt": f"{store.folder(stage, variant)}/receipts/{part_name(shard)}.json",
            "flaw": flaw,
        }
        for stage in STAGES
        for variant in store.variants(stage)
        for shard, flaw in store.damaged(stage, variant)
    ]
