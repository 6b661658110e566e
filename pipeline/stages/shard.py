"""What all stages share: the table that a shard travels in, and which of its rows are to do.

A table between two steps has one row, the shard, with its pictures as one nested column: whatever Ray does
with blocks and batches, a shard stays whole and in order. `redo` limits a step to the rows that failed
before.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from pipeline.store import Stage, Store


def shard_table(
    shard: int, redo: bool, column: str, rows: list[dict[str, Any]], kind: pa.DataType, **more: Any
) -> pa.Table:
    nested = pa.array([rows], type=kind)
    return pa.table(
        {"shard": [shard], "redo": [redo], column: nested, **{name: [value] for name, value in more.items()}}
    )


@dataclass(frozen=True, kw_only=True)
class Done:
    """What the driver hears of a finished shard."""

    shard: int
    rows: int
    failed: int
    tokens: int


def done_table(done: Done) -> pa.Table:
    return pa.table({name: [value] for name, value in asdict(done).items()})


def one_thread() -> ThreadPoolExecutor:
    """The thread that a model is loaded and called in.

    Ray makes an actor in one thread and calls it in another. Each thread that computes has an OpenMP team of
    its own, and once teams have more threads than there are cores, OpenMP sleeps at each barrier and no
    longer spins.
    """
    return ThreadPoolExecutor(1, thread_name_prefix="model")


def already_done(store: Store, stage: Stage, variant: str, shard: int, redo: bool) -> pa.Table | None:
    """The result of a shard that another run, or a worker that died afterwards, has finished meanwhile.

    Several shards share a block where a shard is quick, and Ray repeats the whole block of a worker that
    died.
    """
    if redo or not store.is_finished(stage, variant, shard):
        return None
    receipt = store.receipt(stage, variant, shard)
    return done_table(Done(shard=shard, rows=receipt.rows, failed=receipt.failed, tokens=0))


def rows_to_do(store: Store, stage: Stage, variant: str, shard: int, redo: bool, count: int) -> list[int]:
    if not redo:
        return list(range(count))
    errors = store.read_shard(stage, variant, shard, ["error"])["error"]
    return [row for row, error in enumerate(errors.to_pylist()) if error is not None]


def merged(
    store: Store, stage: Stage, variant: str, shard: int, redo: bool, fresh: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The shard's rows with the fresh ones in their places."""
    rows = store.read_shard(stage, variant, shard).to_pylist() if redo else [{}] * len(fresh)
    for new in fresh:
        rows[new["row"]] = {name: value for name, value in new.items() if name != "row"}
    return rows


def attempt(store: Store, stage: Stage, variant: str, shard: int, redo: bool) -> int:
    return store.receipt(stage, variant, shard).attempt + 1 if redo else 1
