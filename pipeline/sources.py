"""Where pictures come from: an image folder, listed once in a fixed order and cut into shards.

Rows are ordered by split and then by a hash of their id. So a shard is a random sample of its split (the first ones predict
time and cost of all, and a training window mixes classes), while the order depends on nothing but the names.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

from pipeline.config import SourceConfig
from pipeline.images import EXTENSIONS
from pipeline.store import SCHEMA_VERSION, Dataset, Split

SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One picture of the source; `id` is its path below the folder, with forward slashes."""

    id: str
    label: str
    split: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A source cut into shards; equal for equal file names, sizes and settings, on any machine."""

    dataset: Dataset
    shards: list[list[Entry]]


def plan(config: SourceConfig) -> Plan:
    """Lists the image folder and cuts it into shards.

    Raises:
        ValueError: the folder does not exist or holds no pictures in class folders.
    """
    entries, classes, skipped = _list_folder(config)
    entries.sort(key=lambda e: (_split_order(e.split), hashlib.sha256(e.id.encode()).digest()))
    shards: list[list[Entry]] = []
    splits: dict[str, Split] = {}
    for split in dict.fromkeys(entry.split for entry in entries):
        rows = [entry for entry in entries if entry.split == split]
        cut = _cut(rows, config.shard_rows, config.shard_bytes)
        splits[split] = Split(rows=len(rows), first_shard=len(shards), num_shards=len(cut))
        shards += cut
    listing = "\n".join(f"{e.id}\t{e.size}\t{e.split}" for e in entries)
    source = {
        "kind": "folder", "uri": os.path.abspath(os.path.expanduser(config.images)), "val_fraction": config.val_fraction,
        "shard_rows": config.shard_rows, "shard_bytes": config.shard_bytes, "max_pixels": config.max_pixels,
        "max_bytes": config.max_bytes, "skipped_files": skipped,
        "fingerprint": hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest(),
    }  # fmt: skip
    dataset = Dataset(
        schema_version=SCHEMA_VERSION,
        classes=classes,
        splits=splits,
        rows=len(entries),
        shards=len(shards),
        source=source,
    )
    return Plan(dataset=dataset, shards=shards)


def read(root: str, entry_id: str, max_bytes: int) -> bytes:
    """The file behind an id, at most `max_bytes` of it plus one (so that the caller can tell a longer file)."""
    with open(os.path.join(root, *entry_id.split("/")), "rb") as stream:
        return stream.read(max_bytes + 1)


def _list_folder(config: SourceConfig) -> tuple[list[Entry], list[str], int]:
    root = os.path.expanduser(config.images)
    if not os.path.isdir(root):
        message = f"images={config.images}: no such folder; pass --images with a folder of class folders."
        raise ValueError(message)
    split_folders = {name: SPLIT_NAMES[name.lower()] for name in _folders(root) if name.lower() in SPLIT_NAMES}
    entries: list[Entry] = []
    classes: set[str] = set()
    skipped = 0
    for folder, split in sorted(split_folders.items()) or [("", "")]:
        for label in _folders(os.path.join(root, folder)):
            classes.add(label)
            prefix = f"{folder}/{label}" if folder else label
            for name, size in _files(os.path.join(root, *prefix.split("/"))):
                if not name.lower().endswith(EXTENSIONS):
                    skipped += 1
                    continue
                key = f"{prefix}/{name}"
                entries.append(Entry(id=key, label=label, split=split or _hashed_split(key, config.val_fraction), size=size))
    if not entries:
        message = (
            f"images={config.images}: no pictures found; expected DIR/<class>/*.jpg or DIR/<split>/<class>/*.jpg "
            f"with splits train, val or test and endings {' '.join(EXTENSIONS)}."
        )
        raise ValueError(message)
    return entries, sorted(classes), skipped


def _folders(path: str) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))


def _files(path: str) -> list[tuple[str, int]]:
    """Files below a class folder, nested ones too, as (relative path, bytes); links to folders are not followed."""
    found = []
    for directory, folders, names in os.walk(path):
        folders.sort()
        below = os.path.relpath(directory, path).replace(os.sep, "/")
        for name in sorted(names):
            if not name.startswith("."):
                key = name if below == "." else f"{below}/{name}"
                found.append((key, os.path.getsize(os.path.join(directory, name))))
    return found


def _hashed_split(key: str, val_fraction: float) -> str:
    draw = int.from_bytes(hashlib.sha256(f"split:{key}".encode()).digest()[:8], "big") / 2**64
    return "val" if draw < val_fraction else "train"


def _split_order(split: str) -> int:
    return ("train", "val", "test").index(split)


def _cut(rows: list[Entry], max_rows: int, max_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in rows:
        if shards[-1] and (len(shards[-1]) >= max_rows or size + entry.size > max_bytes):
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.size
    return shards
