"""Failed rows: how many are too many, and what the commonest reasons are."""

from __future__ import annotations

import re
from collections import Counter

from pipeline.errors import (
    MissingError,
    RunStoppedError,
    SettingsError,
    TooManyFailuresError,
    UnreachableError,
)
from pipeline.store import Stage, Store

# Of workers: the disk, the network, the server or the engine is at fault, and the message says it all.
STOPPING = (
    "OSError",
    "StorageError",
    "FileNotFoundError",
    "PermissionError",
    "TimeoutError",
    "ConnectionError",
    "EngineDeadError",
    "BudgetSpentError",
    "ValueError",
)
OURS = tuple(error.__name__ for error in (SettingsError, MissingError, UnreachableError))


def plain_error(verb: str, store: Store, error: Exception) -> Exception:
    """What a worker's failure comes to for the user: a message with the mend where the kind is known, else
    the error itself.

    Ray Data hands on a worker's exception as text only, so its class and message are read from the traceback
    in it.
    """
    text = str(error).split("The above exception was the direct cause")[0]
    raised = re.findall(
        r"^(?:\w+\.)*(\w+(?:Error|Exception)): (.*?)(?=\n\n|\Z)", text.strip(), re.MULTILINE | re.DOTALL
    )
    kind, said = raised[-1] if raised else ("", "")
    again = f"What is done is kept: the same `gpt4image {verb.split()[0]}` goes on where it stopped."
    if kind in ("OSError", "ArrowException") and re.search(
        r"No space left|Disk quota exceeded|\[errno (?:28|122)\]", said, re.I
    ):
        return RunStoppedError(f"store={store.uri}: no space left to write to. Make room. {again}")
    if kind in OURS:
        return RunStoppedError(f"{said.strip()} {again}")
    if kind in STOPPING:
        return RunStoppedError(f"{said.strip()} ({kind}). {again}")
    return error


def check_failures(store: Store, stage: Stage, variant: str, failed: int, max_rate: float) -> None:
    """Stops when more rows have failed than a share of all the store's rows.

    Raises:
        TooManyFailuresError: with the commonest reasons and the mend.
    """
    if failed <= max_rate * store.dataset.rows:
        return
    imported = stage == "captions" and store.variant(stage, variant)["engine"] == "imported"
    mend = (
        "Import again from a file that has the missing ones (which makes a variant of its own; this one may "
        f"be deleted: {store.folder(stage, variant)} in the store)"
        if imported
        else f"Mend the causes and run `gpt4image retry --store {store.uri}`"
    )
    reasons = "\n".join(f"  {count} x {reason}" for reason, count in commonest_errors(store, stage, variant))
    message = (
        f"{stage}: {failed} of {store.dataset.rows} rows failed, more than --max-failure-rate {max_rate} "
        f"allows.\n{reasons}\nWhat is done is kept. {mend}, or raise --max-failure-rate."
    )
    raise TooManyFailuresError(message)


def commonest_errors(store: Store, stage: Stage, variant: str, limit: int = 5) -> list[tuple[str, int]]:
    """Reasons of failure with their counts; numbers and names in them are folded, one example id is shown."""
    counts: Counter[str] = Counter()
    example: dict[str, tuple[str, str]] = {}
    for key, error in store.errors(stage, variant):
        kind = re.sub(r"\d+|'[^']*'", "#", error)
        counts[kind] += 1
        example.setdefault(kind, (error, key))
    reasons = [
        (f"{example[kind][0]} (such as {example[kind][1]})", count)
        for kind, count in counts.most_common(limit)
    ]
    if others := counts.total() - sum(count for _, count in reasons):
        reasons.append((f"of {len(counts) - limit} further kinds", others))
    return reasons


def marks(store: Store, stage: Stage, variant: str, limit: int = 50) -> list[tuple[str, int]]:
    """What captions are marked with and how often, with an example id; counted in the first `limit` shards
    that have any."""
    counts: Counter[str] = Counter()
    example: dict[str, str] = {}
    shards = [shard for shard, receipt in store.receipts(stage, variant).items() if receipt.flagged]
    column = "flag" if stage == "captions" else "truncated"
    for shard in shards[:limit]:
        for row in store.read_shard(stage, variant, shard, ["id", column]).to_pylist():
            if row[column]:
                name = (
                    row[column] if stage == "captions" else "beyond the encoder's limit (see --long-captions)"
                )
                counts[name] += 1
                example.setdefault(name, row["id"])
    where = f" in the first {limit} of {len(shards)} such shards" if len(shards) > limit else ""
    return [(f"{name}{where} (such as {example[name]})", count) for name, count in counts.most_common()]
