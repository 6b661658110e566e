"""A source cut into shards; what it holds is found by the file of its kind.

Rows are ordered by split and then by a hash of their id. So a shard is a random sample of its split (the
first ones predict time and cost of all, and a training window mixes classes), while the order depends on
nothing but the names. Rows of Parquet files keep together by row group, the least that can be read of such a
file.

Every picture of the listing is a row. One that the listing finds fault with has the error from the start, no
place, and the label -1 where it has none; more of them than --max-failure-rate allows, and nothing is
started.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import SourceConfig
from pipeline.errors import SettingsError
from pipeline.sources import files
from pipeline.sources.entries import Entry, Listing
from pipeline.sources.kinds import LISTINGS, kind_of
from pipeline.store import SCHEMA_VERSION, Dataset, Split, locations


@dataclass(frozen=True, kw_only=True)
class Row:
    """One picture of a shard still to be ingested; with an `error`, which no retry mends, there is none."""

    id: str
    label: int
    split: str
    place: str
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A source cut into shards; equal for equal names, sizes, labels and settings, on any machine."""

    dataset: Dataset
    shards: list[list[Row]]


def make_plan(config: SourceConfig) -> Plan:
    """Lists the source and cuts it into shards.

    Raises:
        ValueError: there is no such source, it holds no pictures or no labels, or too many of its rows cannot
            be used.
    """
    if locations.escaped(config.images) != config.images:
        message = (
            f"images={locations.escaped(config.images)}: the source's own address must be UTF-8; rename or "
            "link the folder."
        )
        raise SettingsError(message)
    kind = config.source_kind if config.source_kind != "auto" else kind_of(config.images)
    if kind == "parquet" and not config.pack:
        message = "no-pack: pictures inside Parquet files cannot be fetched one by one; leave --no-pack out."
        raise SettingsError(message)
    listing = LISTINGS[kind](config)
    entries, notes = _with_splits(_with_own_ids(listing.entries), config.val_fraction)
    if (
        not config.class_names
        and not listing.names
        and kind != "folder"
        and all(key.isdigit() for key in listing.keys)
    ):
        notes.append(
            "classes are numbers: --class-names FILE gives them names, which {label} in prompts and "
            "zero-shot go by"
        )
    _check_faults(entries, config)
    entries.sort(
        key=lambda e: (_split_order(e.split), _digest(e.row_group or e.id), e.row_group, _digest(e.id))
    )
    entries = _limited(entries, config.limit)
    numbers = {key: number for number, key in enumerate(listing.keys)}
    shards: list[list[Row]] = []
    splits: dict[str, Split] = {}
    if empty := sorted(set(listing.keys) - {entry.label for entry in entries if entry.split == "train"}):
        notes.append(
            f"{len(empty)} of {len(listing.keys)} classes have no picture to train on, such as "
            f"{_some(set(empty))}"
        )
    for split in dict.fromkeys(entry.split for entry in entries):
        of_split = [entry for entry in entries if entry.split == split]
        cut = _cut(of_split, config.shard_rows, config.shard_bytes)
        splits[split] = Split(rows=len(of_split), first_shard=len(shards), num_shards=len(cut))
        shards += [[_row(entry, numbers) for entry in shard] for shard in cut]
    # In a list an id of its own may stand for another file than before; elsewhere the place follows from the
    # id.
    elsewhere = {
        e.id: f"\t{e.place}"
        for e in entries
        if kind == "jsonl" and e.place and e.place != locations.place_of(e.id)
    }
    listed = "\n".join(f"{e.id}\t{e.size}\t{e.split}\t{e.label}{elsewhere.get(e.id, '')}" for e in entries)
    source = {
        "kind": kind,
        "uri": _recorded_uri(config.images, kind),
        "val_fraction": config.val_fraction,
        "limit": config.limit,
        "shard_rows": config.shard_rows,
        "shard_bytes": config.shard_bytes,
        "max_pixels": config.max_pixels,
        "max_bytes": config.max_bytes,
        "max_edge": config.max_edge,
        "pack": config.pack,
        "skipped_files": listing.skipped,
        "cut": hashlib.sha256(json.dumps([len(shard) for shard in shards]).encode()).hexdigest()[:16],
        "notes": [*listing.notes, *notes],
        "fingerprint": hashlib.sha256(listed.encode(errors="surrogateescape")).hexdigest(),
    }
    dataset = Dataset(
        schema_version=SCHEMA_VERSION,
        classes=_class_names(listing, config.class_names),
        splits=splits,
        rows=len(entries),
        shards=len(shards),
        source=source,
    )
    return Plan(dataset=dataset, shards=shards)


# Settings of a source that decide what its rows hold. What shard_rows and shard_bytes come to is compared,
# and not they; so are val_fraction and limit, by way of the rows' splits and number.
_DECIDING = ("kind", "uri", "max_pixels", "max_bytes", "max_edge", "pack")


def differences(recorded: Dataset, now: Dataset) -> list[str]:
    """What a store was begun with and is not the same now, a line each; empty where a run may go on."""
    before, after = recorded.source, now.source
    # Limits that `retry` has raised since: the first ones fit as well.
    begun = before.get("ingested_with", {})
    lines = [
        f"{name}: {before[name]!r} then, {after[name]!r} now"
        for name in _DECIDING
        if after[name] not in (before.get(name), begun.get(name, before.get(name)))
    ]
    if {"max_pixels", "max_bytes"} & {line.partition(":")[0] for line in lines}:
        lines.append(
            "(rows that a limit left out are redone by: gpt4image retry, which takes --max-pixels and "
            "--max-bytes)"
        )
    if before["fingerprint"] != after["fingerprint"]:
        lines.append(
            f"pictures: {recorded.rows} then, {now.rows} now, or other names, sizes, labels or splits"
        )
        # Only where the rows differ: a source with a val split has no use for the first.
        row_settings = (
            "val_fraction",
            "limit",
        )
        lines += [
            f"{name}: {before[name]!r} then, {after[name]!r} now"
            for name in row_settings
            if before.get(name) != after[name]
        ]
        if "cut" not in before:
            lines.append(
                "(an earlier release began it, which took sizes and --val-fraction otherwise: finish it with "
                "that one)"
            )
    elif _cut_of(before, after) != _cut_of(after, before):
        cut = "shard_rows={shard_rows}, shard_bytes={shard_bytes}"
        lines.append(
            f"cut into shards: {recorded.shards} then ({cut.format(**before)}), {now.shards} now "
            f"({cut.format(**after)})"
        )
    if recorded.classes != now.classes:
        before_only, now_only = (
            set(recorded.classes) - set(now.classes),
            set(now.classes) - set(recorded.classes),
        )
        gone, new = _some(before_only), _some(now_only)
        class_changes = [f"gone: {gone}"] * bool(gone) + [f"new: {new}"] * bool(new) or ["in another order"]
        lines.append(f"classes: {'; '.join(class_changes)}")
    return lines


def _cut_of(source: dict[str, Any], other: dict[str, Any]) -> Any:
    """Stores of earlier releases have no record of the cut, only of the settings that it was made by."""
    return (
        source["cut"] if "cut" in source and "cut" in other else (source["shard_rows"], source["shard_bytes"])
    )


def _some(names: set[str], most: int = 3) -> str:
    return ", ".join(sorted(names)[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def notes(dataset: Dataset) -> list[str]:
    """What is to be said of a source before anything is made of it: what is left out, and splits that
    training will miss."""
    lines = list(dataset.source.get("notes", []))
    if skipped := dataset.source.get("skipped_files"):
        lines.append(
            f"{skipped} files without a picture's ending, or linked folders inside a class, are left out"
        )
    again = "to train on this source, ingest into a new store with --val-fraction 0.1"
    if "train" not in dataset.splits:
        lines.append(
            "there is no train split: captions can be made, but nothing can be trained on this store"
        )
    elif "val" not in dataset.splits:
        lines.append(
            "there is no val split, by which training is judged: "
            + (f"train with --eval-split test, or {again}" if "test" in dataset.splits else again)
        )
    return lines


def _row(entry: Entry, numbers: dict[str, int]) -> Row:
    return Row(
        id=entry.id,
        label=numbers.get(entry.label, -1),
        split=entry.split,
        place=entry.place,
        error=entry.error,
    )


def _recorded_uri(uri: str, kind: str) -> str:
    """What places are relative to: the source itself, or the folder that a list or a single file lies in."""
    single = kind == "jsonl" or locations.split_options(uri)[0].lower().endswith((".tar", ".parquet"))
    if single:
        return files.parent(uri)
    if "://" in uri:
        base, options = locations.split_options(uri)
        return base.rstrip("/") + options
    return os.path.abspath(os.path.expanduser(uri))


def _class_names(listing: Listing, file: str) -> list[str]:
    """The names that prompts and reports say, in the order of the keys.

    Raises:
        ValueError: the file names other classes than the source has.
    """
    if not file:
        return list(listing.names or listing.keys)
    try:
        with open(os.path.expanduser(file), encoding="utf-8-sig", errors="surrogateescape") as stream:
            text = locations.escaped(stream.read())
        mapping = json.loads(text) if text.lstrip().startswith("{") else {}
    except (OSError, ValueError) as error:
        message = f"class_names={file}: cannot be read ({error})."
        raise SettingsError(message) from None
    if mapping:
        named = {str(key): str(name) for key, name in mapping.items()}
    else:
        lines = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
        pairs = [_key_and_name(line, set(listing.keys)) for line in lines]
        if any("\t" in line for line in lines) or all(pairs):
            if wrong := next((line for line, pair in zip(lines, pairs, strict=True) if pair is None), None):
                message = (
                    f"class_names={file}: {wrong[:80]!r} is not a class of the source, a tab and its name."
                )
                raise SettingsError(message)
            named = {pair[0]: pair[1] for pair in pairs if pair is not None}
        elif len(lines) == len(listing.keys):
            named = dict(zip(listing.keys, lines, strict=True))
        elif all(key.isdigit() for key in listing.keys) and len(lines) > len(listing.keys):
            # Numbered classes: the file knows more of them than this source has pictures of.
            listing.keys.extend(str(number) for number in range(len(listing.keys), len(lines)))
            named = dict(zip(listing.keys, lines, strict=True))
        else:
            message = (
                f"class_names={file}: {len(lines)} lines for {len(listing.keys)} classes "
                f"({', '.join(listing.keys[:3])}, ...)."
            )
            raise SettingsError(message)
    missing = [key for key in listing.keys if key not in named]
    if missing:
        message = f"class_names={file}: no name for {len(missing)} classes, such as {', '.join(missing[:3])}."
        raise SettingsError(message)
    return [named[key] for key in listing.keys]


def _key_and_name(line: str, keys: set[str]) -> tuple[str, str] | None:
    """A class and its name, with a tab between them, or else blanks; None where the line begins with no
    class."""
    key, tab, name = line.partition("\t")
    if tab:
        return (key.strip(), name.strip()) if key.strip() in keys and name.strip() else None
    blanks = [match.start() for match in re.finditer(" +", line)]
    end = next((blank for blank in reversed(blanks) if line[:blank] in keys and line[blank:].strip()), None)
    return None if end is None else (line[:end], line[end:].strip())


def _with_own_ids(entries: list[Entry]) -> list[Entry]:
    """Of rows with one id the first keeps it; the others get one of their own, and an error."""
    counts = Counter(entry.id for entry in entries)
    if len(counts) == len(entries):
        return list(entries)
    unique, taken = [], set[str]()
    # Rows without a fault come first: a row that cannot be used anyway must not take the id of one that can.
    for entry in sorted(entries, key=lambda entry: bool(entry.error)):
        if entry.id in taken:
            number = counts[entry.id]
            while (key := f"{entry.id}#again-{number}") in counts:
                number += 1
            counts[key] = 1
            error = (
                f"{entry.id} is there twice: ids must be unique (in a list, give each an `id`); ingest into "
                "a new store"
            )
            entry = replace(entry, id=key, label="", place="", error=entry.error or error)
        taken.add(entry.id)
        unique.append(entry)
    return unique


def _with_splits(entries: list[Entry], val_fraction: float) -> tuple[list[Entry], list[str]]:
    """Every row in a split: train where the source tells none, less the share that is drawn for a val split
    that it lacks."""
    has_val = any(entry.split == "val" for entry in entries)
    if has_val and val_fraction and all(entry.split for entry in entries):
        return entries, ["--val-fraction is not used: the source has a val split of its own"]
    splits = [
        "val"
        if entry.split in _drawn_from(has_val) and _draw(entry.id) < val_fraction
        else entry.split or "train"
        for entry in entries
    ]
    return [replace(entry, split=split) for entry, split in zip(entries, splits, strict=True)], []


def _drawn_from(has_val: bool) -> tuple[str, ...]:
    return ("",) if has_val else ("", "train")


def _draw(key: str) -> float:
    return int.from_bytes(_digest(f"split:{key}")[:8], "big") / 2**64


def _check_faults(entries: list[Entry], config: SourceConfig) -> None:
    faults = [entry for entry in entries if entry.error]
    if len(faults) <= config.max_failure_rate * len(entries):
        return
    kinds: dict[str, list[Entry]] = {}
    for entry in faults:
        kinds.setdefault(re.sub(r"\d+|'[^']*'", "#", entry.error), []).append(entry)
    commonest = sorted(kinds.values(), key=len, reverse=True)[:5]
    reasons = "\n".join(f"  {len(alike)} x {alike[0].error} (such as {alike[0].id})" for alike in commonest)
    message = (
        f"images={config.images}: {len(faults)} of {len(entries)} rows cannot be used, more than "
        f"--max-failure-rate {config.max_failure_rate} allows.\n{reasons}"
    )
    raise SettingsError(message)


def _limited(entries: list[Entry], limit: int) -> list[Entry]:
    """The first rows of each split, in proportion: a random sample, since the order is."""
    if not limit or limit >= len(entries):
        return entries
    limited: list[Entry] = []
    for split in dict.fromkeys(entry.split for entry in entries):
        rows = [entry for entry in entries if entry.split == split]
        limited += rows[: max(1, round(limit * len(rows) / len(entries)))]
    return limited


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
