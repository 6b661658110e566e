"""Parquet files with a column of pictures, as Hugging Face writes them; labels and splits are read, and no
picture."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import SourceConfig
from pipeline.errors import SettingsError
from pipeline.sources.entries import LABEL_COLUMNS, Entry, Listing, make_entry, with_labels
from pipeline.sources.files import READERS, named_files, opened, split_in, splits_of
from pipeline.store.locations import escaped

IMAGE_COLUMNS = ("image", "img", "jpg", "picture")
LARGE_GROUP = 2**28  # bytes of pictures in a Parquet row group above which it is not held whole


def list_parquet(config: SourceConfig) -> Listing:
    root, files = named_files(config.images, ".parquet")
    with ThreadPoolExecutor(READERS) as pool:
        tables = list(pool.map(lambda file: _parquet_rows(root, file), files))
    splits = dict.fromkeys(files, "") if any(table.has_splits for table in tables) else splits_of(files)
    entries = []
    for file, table in zip(files, tables, strict=True):
        split = splits[file] or split_in(file)
        entries += [replace(entry, split=entry.split or split) for entry in table.entries]
    if not any(table.has_labels for table in tables):
        message = f"images={config.images}: no column of labels ({', '.join(LABEL_COLUMNS)}) in any file."
        raise SettingsError(message)
    notes = []
    if (largest := max(table.largest for table in tables)) > LARGE_GROUP:
        notes.append(
            f"row groups of up to {largest / 2**30:.1f} GiB, each read whole for each shard: ingest goes "
            "many times faster from files written with a row_group_size of some 500 rows"
        )
    known = sorted({table.names for table in tables if table.names})
    if len(known) > 1:
        message = (
            f"images={config.images}: the files name different classes, so their numbers cannot be told "
            "apart."
        )
        raise SettingsError(message)
    if not known:
        return with_labels(config, entries, 0, notes)
    # Hugging Face's ClassLabel: the file itself says what the numbers are.
    keys = [str(number) for number in range(len(known[0]))]
    numbered = set(keys)
    entries = [entry if entry.label in numbered else _without_class(entry, len(keys)) for entry in entries]
    listing = with_labels(config, entries, 0, notes)
    return replace(listing, keys=keys, names=tuple(escaped(name) for name in known[0]))


def _without_class(entry: Entry, classes: int) -> Entry:
    if entry.error or entry.label in ("", "-1"):
        return replace(entry, label="")
    error = (
        f"label {entry.label[:80]!r}: the file names classes 0 to {classes - 1}: mend it, and ingest into a "
        "new store"
    )
    return replace(entry, label="", place="", error=error)


@dataclass(frozen=True, kw_only=True)
class _Table:
    entries: list[Entry]
    names: tuple[str, ...]
    has_labels: bool
    has_splits: bool
    largest: int
    """Bytes of pictures in the largest row group."""


def _parquet_rows(root: str, file: str) -> _Table:
    with opened(root, file) as stream:
        try:
            parquet = pq.ParquetFile(stream)
            columns = parquet.schema_arrow.names
            column = image_column(parquet, file)
            label = next((name for name in LABEL_COLUMNS if name in columns), "")
            wanted = [name for name in (label, "split") if name in columns]
            entries = []
            start = largest = 0
            for row_group in range(parquet.metadata.num_row_groups):
                meta = parquet.metadata.row_group(row_group)
                # Of one row, about: the cut needs no more.
                size = max(meta.total_byte_size // max(meta.num_rows, 1), 1)
                rows = (
                    parquet.read_row_group(row_group, columns=wanted).to_pylist()
                    if wanted
                    else [{}] * meta.num_rows
                )
                for row, record in enumerate(rows):
                    entries.append(
                        make_entry(
                            id=f"{file}#{start + row}",
                            label=record.get(label),
                            split=record.get("split"),
                            size=size,
                            place=f"{escaped(file)}#g{row_group}-{row}",
                            row_group=f"{escaped(file)}#g{row_group}",
                        )
                    )
                start += meta.num_rows
                largest = max(largest, size_of_pictures(parquet, row_group, column))
        except (pa.ArrowException, OSError) as error:
            message = f"{file}: cannot be read as Parquet ({error})."
            raise SettingsError(escaped(message)) from None
        names = _hugging_face_names(parquet.schema_arrow.metadata, label)
        return _Table(
            entries=entries,
            names=names,
            has_labels=bool(label),
            has_splits="split" in columns,
            largest=largest,
        )


def size_of_pictures(parquet: pq.ParquetFile, row_group: int, column: str) -> int:
    """What the pictures of a row group take in memory, about."""
    meta = parquet.metadata.row_group(row_group)
    chunks = (meta.column(number) for number in range(meta.num_columns))
    return sum(
        chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column
    )


def image_column(parquet: pq.ParquetFile, file: str) -> str:
    columns = parquet.schema_arrow.names
    column = next((name for name in IMAGE_COLUMNS if name in columns), None)
    if column is None:
        message = f"{file}: no column of pictures ({', '.join(IMAGE_COLUMNS)}); it has {', '.join(columns)}."
        raise SettingsError(message)
    return column


def _hugging_face_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...]:
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return tuple(str(name) for name in features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()
