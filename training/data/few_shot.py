"""Which pictures count where a run takes a few of each class, or half of the classes (as CoOp, arXiv
2109.01134, and CoCoOp, arXiv 2203.05557, are judged).

Which few: those whose ids hash lowest with the seed. So the same seed draws the very same pictures in every
run of any method, when a run goes on, and however the store is cut into shards; four shots are among eight.
"""

from __future__ import annotations

import hashlib
import heapq
from typing import Any

import numpy as np

from pipeline.errors import SettingsError
from pipeline.store import Store
from training.config import TrainConfig
from training.data.order import Array, Rows


def classes_of(half: str, count: int) -> range:
    """Numbers of the classes that take part: the first half, rounded up, is `base`, the rest `new`."""
    middle = -(-count // 2)
    return {"all": range(count), "base": range(middle), "new": range(middle, count)}[half]


def rows_of(config: TrainConfig, store: Store, split: str, *, training: bool = False) -> Rows:
    """The usable pictures of a split that a run is judged on, or, where it is `training`, that it sees.

    Raises:
        SettingsError: none is of the classes that take part.
    """
    rows, data, count = Rows(store, split), config.data, len(store.dataset.classes)
    shots = data.shots if training else 0
    if data.class_half == "all" and not shots:
        return rows
    wanted = np.asarray(classes_of(data.class_half, count))
    chosen: dict[int, list[tuple[bytes, int, int]]] = {int(number): [] for number in wanted}
    kept: dict[int, Array] = {}
    for shard, own in rows.rows.items():
        table = store.read_shard("images", "", shard, ["id", "label"]).take(own)
        labels = table["label"].to_numpy()
        kept[shard] = own[np.isin(labels, wanted)]
        for row, key, label in zip(own, table["id"].to_pylist(), labels, strict=True) if shots else ():
            if int(label) in chosen:
                chosen[int(label)].append((_rank(config.seed, key), shard, int(row)))
    if shots:
        few = [each for own in chosen.values() for each in heapq.nsmallest(shots, own)]
        kept = {
            shard: np.array(sorted(row for _, at, row in few if at == shard), dtype=np.int64)
            for shard in sorted({at for _, at, _ in few})
        }
    rows.rows = {shard: own for shard, own in kept.items() if len(own)}
    if not rows.rows:
        message = (
            f"class_half={data.class_half}: the split {split} has no usable picture of these classes; pass "
            "another, or another split."
        )
        raise SettingsError(message)
    return rows


def drawn(config: TrainConfig, store: Store) -> dict[str, Any]:
    """What is kept of a draw beside a run: its settings, ids of the pictures by class, and a digest of all.

    Raises:
        SettingsError: see `rows_of`.
    """
    rows, classes = rows_of(config, store, config.data.train_split, training=True), store.dataset.classes
    pictures: dict[str, list[str]] = {}
    for shard, own in rows.rows.items():
        table = store.read_shard("images", "", shard, ["id", "label"]).take(own)
        for key, label in zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True):
            pictures.setdefault(classes[label], []).append(key)
    ordered = {name: sorted(pictures[name]) for name in sorted(pictures)}
    every = "\n".join(key for own in ordered.values() for key in own)
    return {
        "split": config.data.train_split,
        "shots": config.data.shots,
        "class_half": config.data.class_half,
        "seed": config.seed,
        "digest": hashlib.sha256(every.encode()).hexdigest()[:16],
        "pictures": ordered,
    }


def scarce(config: TrainConfig, store: Store) -> str:
    """What to say of classes that have fewer pictures than `shots`, or nothing."""
    shots, classes = config.data.shots, store.dataset.classes
    if not shots:
        return ""
    counts = {classes[number]: 0 for number in classes_of(config.data.class_half, len(classes))}
    counts |= {name: len(ids) for name, ids in drawn(config, store)["pictures"].items()}
    few = sorted((count, name) for name, count in counts.items() if count < shots)
    if not few:
        return ""
    named = ", ".join(f"{name} {count}" for count, name in few[:3]) + (", ..." if len(few) > 3 else "")
    return f"{len(few)} of {len(counts)} classes have fewer than {shots} pictures ({named})"


def _rank(seed: int, key: str) -> bytes:
    return hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).digest()
