"""What a store holds, counted over all of its rows in one pass over the small columns: what `gallery` shows
around its sample."""

from __future__ import annotations

import bisect
import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from pipeline.store import STAGES, Stage, Store

# More failed rows of one reason than this are counted, not remembered.
REMEMBERED = 20_000


@dataclass
class Tally:
    """What one pass over the small columns of all finished shards finds. Row arrays are in store order, a row
    a picture."""

    caption_variant: str
    embedding_variant: str
    shards: list[int] = field(default_factory=list)
    captioned: set[int] = field(default_factory=set)
    embedded: set[int] = field(default_factory=set)
    starts: list[int] = field(default_factory=list)
    rows: int = 0
    done: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    edges: Counter[int] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    failures: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    failed_rows: int = 0
    truncated: int = 0
    shard_failed: dict[int, set[int]] = field(default_factory=dict)
    shard_labels: list[np.ndarray] = field(default_factory=list)
    shard_splits: list[np.ndarray] = field(default_factory=list)
    shard_hashes: dict[str, list[np.ndarray]] = field(
        default_factory=lambda: {"pictures": [], "captions": []}
    )
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    splits: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int8))
    groups: dict[str, Groups] = field(default_factory=dict)

    def row(self, shard: int, row: int) -> int:
        """A shard's row, counted over all finished shards."""
        return self.starts[bisect.bisect_left(self.shards, shard)] + row

    def shard_and_row(self, row: int) -> tuple[int, int]:
        """(shard, row in it) of a row counted over all finished shards."""
        position = bisect.bisect_right(self.starts, row) - 1
        return self.shards[position], row - self.starts[position]


class Groups:
    """Rows of equal hash, the largest group first; a hash of 0 stands for nothing to compare."""

    def __init__(self, hashes: np.ndarray, labels: np.ndarray, splits: np.ndarray) -> None:
        """Takes three arrays of one value a row: uint64 hash, class, split."""
        self._order = np.argsort(hashes, kind="stable")
        values, starts, counts = np.unique(hashes[self._order], return_index=True, return_counts=True)
        mixed = [np.zeros(0, bool)] * 2
        if len(values):
            ordered = [column[self._order] for column in (labels, splits)]
            mixed = [np.minimum.reduceat(c, starts) != np.maximum.reduceat(c, starts) for c in ordered]
        repeated = np.flatnonzero((counts > 1) & (values != 0))
        repeated = repeated[np.argsort(-counts[repeated], kind="stable")]
        self._starts = starts[repeated]
        self.counts, self.several_classes, self.several_splits = (
            column[repeated] for column in (counts, *mixed)
        )
        rank = np.full(len(values), -1, np.int64)
        rank[repeated] = np.arange(len(repeated))
        self._of_row = np.full(len(hashes), -1, np.int64)
        self._of_row[self._order] = np.repeat(rank, counts)

    def __len__(self) -> int:
        return len(self.counts)

    def members(self, number: int) -> np.ndarray:
        """Rows of a group, in store order."""
        return self._order[self._starts[number] : self._starts[number] + self.counts[number]]

    def number(self, row: int) -> int | None:
        """The group of a row; None where no other row has its hash."""
        number = int(self._of_row[row])
        return None if number < 0 else number


def count_rows(store: Store, caption_variant: str, embedding_variant: str) -> Tally:
    tally = Tally(
        caption_variant=caption_variant, embedding_variant=embedding_variant, shards=store.finished("images")
    )
    tally.captioned = set(store.finished("captions", caption_variant)) if caption_variant else set()
    tally.embedded = set(store.finished("embeddings", embedding_variant)) if embedding_variant else set()
    for shard in tally.shards:
        tally.starts.append(tally.rows)
        errors = [_count_images(store, tally, shard)]
        if shard in tally.captioned:
            errors.append(_count_captions(store, tally, shard))
        else:
            tally.shard_hashes["captions"].append(np.zeros(len(errors[0]), np.uint64))
        if shard in tally.embedded:
            errors.append(_count_embeddings(store, tally, shard))
        _count_failures(tally, shard, errors)
        tally.rows += len(errors[0])
    if tally.shards:
        tally.labels, tally.splits = np.concatenate(tally.shard_labels), np.concatenate(tally.shard_splits)
        for kind, hashes in tally.shard_hashes.items():
            tally.groups[kind] = Groups(np.concatenate(hashes), tally.labels, tally.splits)
    return tally


def _count_images(store: Store, tally: Tally, shard: int) -> list[str | None]:
    names = ["content_hash", "label", "split", "width", "height", "error"]
    table = store.read_shard("images", "", shard, names)
    columns = {name: table[name].to_pylist() for name in names}
    tally.shard_labels.append(np.array(columns["label"], np.int32))
    known = {name: number for number, name in enumerate(store.dataset.splits)}
    tally.shard_splits.append(np.array([known.get(split, -1) for split in columns["split"]], np.int8))
    tally.shard_hashes["pictures"].append(_hashes(columns["content_hash"]))
    sizes = zip(columns["width"], columns["height"], strict=True)
    tally.edges.update(max(width, height) for width, height in sizes if width and height)
    return _count_done(tally, "images", columns["error"])


def _count_captions(store: Store, tally: Tally, shard: int) -> list[str | None]:
    table = store.read_shard(
        "captions", tally.caption_variant, shard, ["caption", "output_tokens", "flag", "error"]
    )
    captions = table["caption"].to_pylist()
    tally.words.update(len(caption.split()) for caption in captions if caption)
    tally.tokens.update(count for count in table["output_tokens"].to_pylist() if count is not None)
    tally.flags.update(flag for flag in table["flag"].to_pylist() if flag)
    tally.shard_hashes["captions"].append(_hashes(captions))
    return _count_done(tally, "captions", table["error"].to_pylist())


def _count_embeddings(store: Store, tally: Tally, shard: int) -> list[str | None]:
    table = store.read_shard("embeddings", tally.embedding_variant, shard, ["truncated", "error"])
    tally.truncated += sum(bool(cut) for cut in table["truncated"].to_pylist())
    return _count_done(tally, "embeddings", table["error"].to_pylist())


def _count_done(tally: Tally, stage: Stage, errors: list[str | None]) -> list[str | None]:
    tally.done[stage] += len(errors)
    tally.failed[stage] += len(errors) - errors.count(None)
    return errors


def _count_failures(tally: Tally, shard: int, errors: list[list[str | None]]) -> None:
    """A row's reason is its first stage's error; what the later stages say follows from it."""
    for row, of_row in enumerate(zip(*errors, strict=True)):
        stage = next((number for number, error in enumerate(of_row) if error is not None), None)
        if stage is not None:
            reason = reason_of(STAGES[stage], of_row[stage] or "")
            tally.reasons[reason] += 1
            tally.failed_rows += 1
            tally.shard_failed.setdefault(shard, set()).add(row)
            remembered = tally.failures.setdefault(reason, [])
            if len(remembered) < REMEMBERED:
                remembered.append((shard, row))


def reason_of(stage: Stage, error: str) -> str:
    """An error without its numbers and names, so that equal causes count as one."""
    return f"{stage}: " + re.sub(r"\d+|'[^']*'", "#", error)[:200]


def _hashes(texts: list[str | None]) -> np.ndarray:
    """uint64 hashes of texts; 0 for none."""
    made = (hashlib.blake2b(text.encode(), digest_size=8).digest() if text else bytes(8) for text in texts)
    return np.frombuffer(b"".join(made), np.uint64)
