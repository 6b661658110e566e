"""A source cut into shards, and its pictures read by their place. What a source holds is found by `listings`.

Rows are ordered by split and then by a hash of their id. So a shard is a random sample of its split (the first ones predict
time and cost of all, and a training window mixes classes), while the order depends on nothing but the names. Rows of Parquet
files keep together by row group, the least that can be read of such a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from pipeline import listings, locations
from pipeline.config import SourceConfig
from pipeline.listings import Entry, Listing
from pipeline.store import SCHEMA_VERSION, Dataset, Split


@dataclass(frozen=True, kw_only=True)
class Row:
    """One picture of a shard still to be ingested."""

    id: str
    label: int
    split: str
    place: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A source cut into shards; equal for equal names, sizes, labels and settings, on any machine."""

    dataset: Dataset
    shards: list[list[Row]]


def plan(config: SourceConfig) -> Plan:
    """Lists the source and cuts it into shards.

    Raises:
        ValueError: there is no such source, it holds no pictures or no labels, or ids repeat.
    """
    kind = config.source_kind if config.source_kind != "auto" else listings.kind_of(config.images)
    if kind == "parquet" and not config.pack:
        message = "no-pack: pictures inside Parquet files cannot be fetched one by one; leave --no-pack out."
        raise ValueError(message)
    listing = listings.LISTINGS[kind](config)
    entries = sorted(listing.entries, key=lambda e: (_split_order(e.split), _digest(e.group or e.id), e.group, _digest(e.id)))
    _check_unique(entries, config)
    entries = _limited(entries, config.limit)
    numbers = {key: number for number, key in enumerate(listing.keys)}
    shards: list[list[Row]] = []
    splits: dict[str, Split] = {}
    for split in dict.fromkeys(entry.split for entry in entries):
        of_split = [entry for entry in entries if entry.split == split]
        cut = _cut(of_split, config.shard_rows, config.shard_bytes)
        splits[split] = Split(rows=len(of_split), first_shard=len(shards), num_shards=len(cut))
        shards += [[Row(id=e.id, label=numbers[e.label], split=e.split, place=e.place) for e in part] for part in cut]
    listed = "\n".join(f"{e.id}\t{e.size}\t{e.split}\t{e.label}" for e in entries)
    source = {
        "kind": kind, "uri": _recorded_uri(config.images, kind), "val_fraction": config.val_fraction, "limit": config.limit,
        "shard_rows": config.shard_rows, "shard_bytes": config.shard_bytes, "max_pixels": config.max_pixels,
        "max_bytes": config.max_bytes, "max_edge": config.max_edge, "pack": config.pack, "skipped_files": listing.skipped,
        "fingerprint": hashlib.sha256(listed.encode(errors="surrogateescape")).hexdigest(),
    }  # fmt: skip
    dataset = Dataset(
        schema_version=SCHEMA_VERSION,
        classes=_class_names(listing, config.class_names),
        splits=splits,
        rows=len(entries),
        shards=len(shards),
        source=source,
    )
    return Plan(dataset=dataset, shards=shards)


class Reader:
    """Reads pictures by their place. Rows of one Parquet row group come one after the other: the last group is kept."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._group: tuple[str, list[Any]] = ("", [])

    def __call__(self, place: str, max_bytes: int) -> bytes:
        """The bytes, at most `max_bytes` of them plus one.

        Raises:
            OSError: they cannot be read.
        """
        match = re.fullmatch(r"(.*)#g(\d+)-(\d+)", place, re.DOTALL)
        if match is None:
            return locations.fetch(self._root, place, max_bytes)
        file, group, row = match[1], int(match[2]), int(match[3])
        if self._group[0] != f"{file}#{group}":
            self._group = (f"{file}#{group}", self._row_group(file, group))
        picture = self._group[1][row]
        if isinstance(picture, dict):
            # Hugging Face's `image`: bytes, or a path beside the file.
            picture = picture.get("bytes") or picture.get("path")
        if isinstance(picture, str):
            if "://" in picture or picture.startswith("/") or ".." in picture.split("/"):
                message = f"the row names {picture[:200]!r}, which is not beside its file"
                raise OSError(message)  # a data set from elsewhere must not say what is read on this machine
            return locations.fetch(self._root, "/".join([*file.split("/")[:-1], picture]), max_bytes)
        if picture is None:
            message = "the row holds neither bytes nor a path"
            raise OSError(message)
        return bytes(picture[: max_bytes + 1])

    def _row_group(self, file: str, group: int) -> list[Any]:
        filesystem, path = locations.resolve(locations.join(self._root, file))
        with filesystem.open_input_file(path) as stream:
            parquet = pq.ParquetFile(stream)
            pictures: list[Any] = (
                parquet.read_row_group(group, columns=[listings.image_column(parquet, file)]).column(0).to_pylist()
            )
        return pictures


def _recorded_uri(uri: str, kind: str) -> str:
    """What places are relative to: the source itself, or the folder that a list or a single file lies in."""
    single = kind == "jsonl" or uri.partition("?")[0].lower().endswith((".tar", ".parquet"))
    if single:
        return listings.parent(uri)
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))


def _class_names(listing: Listing, file: str) -> list[str]:
    """The names that prompts and reports say, in the order of the keys.

    Raises:
        ValueError: the file names other classes than the source has.
    """
    if not file:
        return list(listing.names or listing.keys)
    with open(os.path.expanduser(file), encoding="utf-8") as stream:
        text = stream.read()
    if text.lstrip().startswith("{"):
        named = {str(key): str(name) for key, name in json.loads(text).items()}
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        pairs = [re.split(r"[\t ]+", line, maxsplit=1) for line in lines]
        if all(len(pair) == 2 and pair[0] in listing.keys for pair in pairs):
            named = {key: name for key, name in pairs}
        elif len(lines) == len(listing.keys):
            named = dict(zip(listing.keys, lines, strict=True))
        elif all(key.isdigit() for key in listing.keys) and len(lines) > len(listing.keys):
            # Numbered classes: the file knows more of them than this source has pictures of.
            listing.keys.extend(str(number) for number in range(len(listing.keys), len(lines)))
            named = dict(zip(listing.keys, lines, strict=True))
        else:
            message = (
                f"class_names={file}: {len(lines)} lines for {len(listing.keys)} classes ({', '.join(listing.keys[:3])}, ...)."
            )
            raise ValueError(message)
    missing = [key for key in listing.keys if key not in named]
    if missing:
        message = f"class_names={file}: no name for {len(missing)} classes, such as {', '.join(missing[:3])}."
        raise ValueError(message)
    return [named[key] for key in listing.keys]


def _check_unique(entries: list[Entry], config: SourceConfig) -> None:
    seen: set[str] = set()
    for entry in entries:
        if entry.id in seen:
            message = f"images={config.images}: {entry.id} is there twice; ids must be unique (in a list, give each an `id`)."
            raise ValueError(message)
        seen.add(entry.id)


def _limited(entries: list[Entry], limit: int) -> list[Entry]:
    """The first rows of each split, in proportion: a random sample, since the order is."""
    if not limit or limit >= len(entries):
        return entries
    kept: list[Entry] = []
    for split in dict.fromkeys(entry.split for entry in entries):
        rows = [entry for entry in entries if entry.split == split]
        kept += rows[: max(1, round(limit * len(rows) / len(entries)))]
    return kept


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


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
