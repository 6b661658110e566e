"""Failed rows: how many are too many, and what the commonest reasons are."""

from __future__ import annotations

import errno
import re
from collections import Counter

from pipeline.store import Stage, Store


class TooManyFailuresError(RuntimeError):
    """More rows failed than `max_failure_rate` allows; what is done stays done. Exit code 3."""


class RunStoppedError(RuntimeError):
    """Something other than the pictures stopped the run (disk, network, engine); what is done stays done. Exit code 1."""


def plain_error(verb: str, store: Store, error: BaseException) -> BaseException:
    """What a worker's failure comes to for the user: a message with the mend where the kind is known, else the error itself."""
    origin = error
    while (deeper := getattr(origin, "cause", None) or origin.__cause__) is not None:
        origin = deeper
    again = f"What is done is kept: the same `gpt4image {verb.split()[0]}` goes on where it stopped."
    if isinstance(origin, OSError) and origin.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunStoppedError(f"store={store.uri}: no space left to write to ({origin.strerror}). Make room. {again}")
    if isinstance(origin, OSError) or type(origin).__name__ in ("EngineDeadError", "BudgetSpentError"):
        return RunStoppedError(f"{type(origin).__name__}: {origin}. {again}")
    return ValueError(str(origin)) if type(origin) is ValueError else error


def check_failures(store: Store, stage: Stage, variant: str, failed: int, max_rate: float) -> None:
    """Stops when more rows have failed than a share of all the store's rows.

    Raises:
        TooManyFailuresError: with the commonest reasons and the mend.
    """
    if failed <= max_rate * store.dataset.rows:
        return
    reasons = "\n".join(f"  {count} x {reason}" for reason, count in commonest_errors(store, stage, variant))
    message = (
        f"{stage}: {failed} of {store.dataset.rows} rows failed, more than --max-failure-rate {max_rate} allows.\n{reasons}\n"
        f"What is done is kept. Mend the causes and run `gpt4image retry --store {store.uri}`, or raise --max-failure-rate."
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
    return [(f"{example[kind][0]} (such as {example[kind][1]})", count) for kind, count in counts.most_common(limit)]
