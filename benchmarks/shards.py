"""What a shard costs when its work is nothing: time and memory of the driver at 1,000 and at 20,000 shards,
and a resume.

Run `python benchmarks/shards.py [--shards 1000 20000]`. Shards of one row go through `pipeline.run._run`, the
code that drives every verb: "drive" does nothing and "write" writes a row of vectors and its receipt, in one
pool, like `ingest` and `embed`; "captions" goes through three pools with a block for each shard, like
`caption`. Each case has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import record

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline import placement, run  # noqa: E402
from pipeline.session import start_ray  # noqa: E402
from pipeline.store import (  # noqa: E402
    SCHEMA_VERSION,
    Dataset,
    Split,
    Stage,
    Store,
    embeddings_table,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import ray.data

GOAL_RESUME, GOAL_MEMORY = 10.0, 1.3
VARIANT = "empty"


def main() -> int:
    """Prints a table and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shards", type=int, nargs=2, default=[1000, 20000], help="a few and many (default 1000 20000)"
    )
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/shards.md")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        kind, uri, count = options.case
        print(json.dumps(_resume(uri) if kind == "resume" else _case(kind, uri, int(count))), flush=True)
        return 0
    few, many = options.shards
    with tempfile.TemporaryDirectory() as folder:
        found = {
            (kind, count): _in_process(kind, f"{folder}/{kind}-{count}", count)
            for kind, count in (
                ("drive", few),
                ("drive", many),
                ("write", few),
                ("write", many),
                ("captions", few),
                ("captions", 4 * few),
            )
        }
        start = time.monotonic()
        resume = _in_process("resume", f"{folder}/write-{many}", many)
        resume["process"] = time.monotonic() - start
    heads = f"{'':9}{'shards':>7}{'ms a shard':>12}{'first fifth':>13}{'last fifth':>12}{'driver CPU ms':>15}"
    table = [f"{heads}  driver MiB: start, fifths, peak"]
    for (kind, count), case in found.items():
        marks = ", ".join(
            f"{value:.0f}" for value in [case["rss_start"], *case["rss_fifths"], case["rss_peak"]]
        )
        parts = f"{case['ms']:>12.2f}{case['first_ms']:>13.2f}{case['last_ms']:>12.2f}{case['cpu_ms']:>15.2f}"
        table.append(f"{kind:9}{count:>7}{parts}  {marks}")
    growth = found["write", many]["ms"] / found["write", few]["ms"]
    memory = found["write", many]["rss_peak"] / found["write", few]["rss_peak"]
    table += [
        "",
        f"time a shard, {many} over {few}: {growth:.2f}; peak memory of the driver: {memory:.2f} (goal at "
        f"most {GOAL_MEMORY})",
        f"resume of the finished {many} shards: {resume['process']:.2f} s for the process (goal under "
        f"{GOAL_RESUME:.0f}); of it listing {resume['listing']:.2f} s, reading receipts "
        f"{resume['receipts']:.2f} s",
    ]
    record.publish(
        "shards",
        "Shards: what driving one costs",
        "python benchmarks/shards.py",
        table,
        ("ray", "pyarrow"),
        save=options.save,
        value={
            "ms_a_shard": round(found["write", many]["ms"], 2),
            "growth": round(growth, 2),
            "memory": round(memory, 2),
        }
        | {"resume_s": round(resume["process"], 2)},
        unit="milliseconds, ratios, seconds",
        goal={"memory": GOAL_MEMORY, "resume_s": GOAL_RESUME},
        holds=memory <= GOAL_MEMORY and resume["process"] < GOAL_RESUME,
    )
    return 0


class HandOn:
    """The step of a pool before the last."""

    def __call__(self, table: pa.Table) -> pa.Table:
        """The shard as it came."""
        return table


class Finish:
    """The last step: one row of vectors and its receipt, or nothing; then the row that the driver waits
    for."""

    def __init__(self, store: str) -> None:
        self._store = Store(store) if store else None

    def __call__(self, table: pa.Table) -> pa.Table:
        """Columns in: shard, redo. Out: those of `Done`."""
        shard = table["shard"][0].as_py()
        if self._store:
            row = {
                "id": f"{shard}.jpg",
                "embedding": [1.0] + [0.0] * 7,
                "tokens": 4,
                "truncated": False,
                "error": None,
            }
            self._store.write_shard("embeddings", VARIANT, shard, embeddings_table([row], 8), seconds=0.0)
        return pa.table({"shard": [shard], "rows": [1], "failed": [0], "tokens": [4]})


class Watched:
    """A data set whose rows are clocked as the driver takes them."""

    def __init__(self, ds: ray.data.Dataset, clock: list[float]) -> None:
        self._ds, self._clock = ds, clock

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        """The rows, as they come."""
        for row in self._ds.iter_rows():
            self._clock.append(time.monotonic())
            yield row


def _case(kind: str, uri: str, count: int) -> dict[str, Any]:
    splits = {"train": Split(rows=count, first_shard=0, num_shards=count)}
    source = {"uri": "none", "fingerprint": "none"}
    store = Store.create(
        uri,
        Dataset(
            schema_version=SCHEMA_VERSION,
            classes=["none"],
            splits=splits,
            rows=count,
            shards=count,
            source=source,
        ),
    )
    start_ray()
    import ray.data  # noqa: F401  # before the memory at the start is taken

    clock: list[float] = []
    memory: list[tuple[float, float]] = []
    threading.Thread(target=_watch_memory, args=(memory,), daemon=True).start()

    def chain(ds: ray.data.Dataset, _: Any) -> Any:
        one: dict[str, Any] = {
            **run._shard_batches(),
            "num_cpus": 0.5,
            "compute": run._actors(placement.Pool(1)),
        }
        for _ in range(2 if kind == "captions" else 0):
            ds = ds.map_batches(HandOn, **one)
        return Watched(
            ds.map_batches(Finish, fn_constructor_args=(uri if kind == "write" else "",), **one), clock
        )

    before = _rss()
    cpu = time.process_time()
    stage: Stage = "captions" if kind == "captions" else "embeddings"
    items = run._shard_items(store.pending(stage, VARIANT), redo=False)
    run._run("bench", store, stage, VARIANT, items, chain, 0.0)
    cpu = time.process_time() - cpu
    assert len(clock) == count, (len(clock), count)
    if kind == "write":
        assert store.finished("embeddings", VARIANT) == list(range(count))
    # The first row comes when the actors are up; that is no cost of a shard.
    fifth = max(1, (count - 1) // 5)
    ends = [clock[min(fifth * n, count - 1)] for n in range(1, 6)]
    return {
        "ms": 1000 * (clock[-1] - clock[0]) / (count - 1),
        "first_ms": 1000 * (clock[fifth] - clock[0]) / fifth,
        "last_ms": 1000 * (clock[-1] - clock[-1 - fifth]) / fifth,
        "cpu_ms": 1000 * cpu / count,
        "rss_start": before,
        "rss_fifths": [max((size for at, size in memory if at <= end), default=before) for end in ends],
        "rss_peak": max(size for _, size in memory),
    }


def _resume(uri: str) -> dict[str, float]:
    """What a verb does on a finished store: is the stage before complete, what is pending, and a drive with
    nothing to do."""
    store = Store(uri)
    start = time.monotonic()
    store.require_complete("embeddings", VARIANT)
    items = run._shard_items(store.pending("embeddings", VARIANT), redo=False)
    listed = time.monotonic()
    run._run("bench", store, "embeddings", VARIANT, items, lambda ds, _: ds, 0.0)
    return {"listing": listed - start, "receipts": time.monotonic() - listed}


def _in_process(kind: str, uri: str, count: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", kind, uri, str(count)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    print(f"{kind}, {count} shards: done", file=sys.stderr, flush=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _watch_memory(samples: list[tuple[float, float]]) -> None:
    while True:
        samples.append((time.monotonic(), _rss()))
        time.sleep(0.2)


def _rss() -> float:
    import psutil

    return float(psutil.Process().memory_info().rss / 2**20)


if __name__ == "__main__":
    start = time.monotonic()
    code = main()
    print(f"{time.monotonic() - start:.0f} s in all", file=sys.stderr)
    raise SystemExit(code)
