"""What a source holds: the pictures of an image folder, of WebDataset tars, Parquet files or a JSONL list, one `Entry` each.

One function a kind; each reads names, sizes, labels and splits, and no picture.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
from pyarrow import fs

from pipeline import locations
from pipeline.config import SourceConfig
from pipeline.images import EXTENSIONS

SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
IN_A_NAME = re.compile(r"(?:^|[^a-z])(train|training|val|valid|validation|test)(?:[^a-z]|$)")
LABEL_COLUMNS = ("label", "labels", "class", "cls", "fine_label")
IMAGE_COLUMNS = ("image", "img", "jpg", "picture")
READERS = 16  # listing waits for answers and not for a processor


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One picture of the source, before classes are numbered.

    `id` is its key within the source, `place` where its bytes are (see `locations`; for Parquet FILE#g<row group>-<row>),
    `group` what keeps rows together in the order (the row's own id where nothing has to).
    """

    id: str
    label: str
    split: str
    size: int
    place: str
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a source holds; `keys` are the classes, in order, also those without a picture."""

    entries: list[Entry]
    keys: list[str]
    skipped: int = 0
    names: tuple[str, ...] = ()


def kind_of(uri: str) -> str:
    ending = uri.partition("?")[0].rsplit(".", 1)[-1].lower()
    by_ending = {"tar": "webdataset", "parquet": "parquet", "jsonl": "jsonl", "ndjson": "jsonl"}
    if ending in by_ending:
        return by_ending[ending]
    filesystem, root = locations.resolve(uri)
    if filesystem.get_file_info(root).type == fs.FileType.NotFound:
        message = (
            f"images={uri}: no such folder or file; pass --images with a folder of class folders, tars, Parquet files or a list."
        )
        raise ValueError(message)
    # Tars and Parquet files lie at the top or one folder down; pictures of an image folder lie below class folders.
    names = [name for name, _ in _files(uri, depth=2)]
    for kind in ("tar", "parquet"):
        if any(name.lower().endswith(f".{kind}") for name in names):
            return by_ending[kind]
    return "folder"


def _list_folder(config: SourceConfig) -> Listing:
    files = _files(config.images)
    folders = _class_folders(config.images, files)
    # Where the first level holds splits, only they count; otherwise the first level is the classes.
    has_splits = any(folder.lower() in SPLIT_NAMES for folder, _ in folders)
    entries: list[Entry] = []
    skipped = 0
    for key, size in files:
        parts = key.split("/")
        split = SPLIT_NAMES.get(parts[0].lower(), "") if has_splits else ""
        if has_splits != bool(split) or len(parts) < (3 if has_splits else 2):
            continue
        if not key.lower().endswith(EXTENSIONS):
            skipped += 1
            continue
        label = parts[1] if has_splits else parts[0]
        split = split or _hashed_split(key, config.val_fraction)
        entries.append(Entry(id=key, label=label, split=split, size=size, place=key))
    if not entries:
        message = (
            f"images={config.images}: no pictures found; expected DIR/<class>/*.jpg or DIR/<split>/<class>/*.jpg "
            f"with splits train, val or test and endings {' '.join(EXTENSIONS)}; or tars, Parquet files or a .jsonl."
        )
        raise ValueError(message)
    keys = {below if has_splits else top for top, below in folders if not has_splits or top.lower() in SPLIT_NAMES}
    return Listing(entries=entries, keys=sorted(keys - {""}), skipped=skipped)


def _class_folders(uri: str, files: list[tuple[str, int]]) -> set[tuple[str, str]]:
    """The first two folder levels; on a disk also those without a file, since an empty class is a class."""
    found = {(parts[0], parts[1] if len(parts) > 2 else "") for key, _ in files if len(parts := key.split("/")) > 1}
    if locations.is_local(uri):
        _, root = locations.resolve(uri)
        for top in _folders(root):
            found |= {(top, below) for below in ["", *_folders(os.path.join(root, top))]}
    return found


def _list_tars(config: SourceConfig) -> Listing:
    root, files = _named(config.images, ".tar")
    skipped = 0
    entries: list[Entry] = []
    with ThreadPoolExecutor(READERS) as pool:
        for file, members in zip(files, pool.map(lambda file: _tar_members(root, file), files), strict=True):
            samples: dict[str, dict[str, tuple[int, int, bytes]]] = {}
            for name, offset, size, small in members:
                folder, _, base = name.rpartition("/")
                stem, _, ending = base.partition(".")
                samples.setdefault(f"{folder}/{stem}" if folder else stem, {})[ending.lower()] = (offset, size, small)
            for key, parts in samples.items():
                pictures = [part for ending, part in parts.items() if f".{ending}".endswith(EXTENSIONS)]
                if not pictures:
                    skipped += 1
                    continue
                offset, size, _ = pictures[0]
                row = f"{file}#{key}"
                split = _split_in(file) or _hashed_split(row, config.val_fraction)
                label = _tar_label(file, key, parts)
                entries.append(Entry(id=row, label=label, split=split, size=size, place=f"{file}#{offset}-{size}"))
    return _with_labels(config, entries, skipped)


def _tar_members(root: str, file: str) -> list[tuple[str, int, int, bytes]]:
    """(name, offset, size, content if it is a small side file) of every plain file, from headers only: pictures are not read."""
    filesystem, path = locations.resolve(locations.join(root, file))
    found = []
    try:
        with filesystem.open_input_file(path) as stream:
            # Headers are small and next to each other's labels: 8 KiB at a time, so that a remote tar costs few requests.
            buffered: Any = io.BufferedReader(_Raw(stream), 8192)
            with tarfile.open(fileobj=buffered, mode="r:") as tar:
                for member in tar:
                    if not member.isreg() or member.issparse():
                        continue
                    side = member.name.lower().endswith((".cls", ".json", ".txt")) and member.size < 2**16
                    opened = tar.extractfile(member) if side else None
                    found.append((member.name, member.offset_data, member.size, opened.read() if opened else b""))
    except (tarfile.TarError, EOFError) as error:
        message = f"{file}: cannot be read as a tar ({error}); it must be whole, and not compressed (pictures are read in place)."
        raise ValueError(message) from None
    return found


class _Raw(io.RawIOBase):
    """An Arrow file as Python's raw file, so that Python can buffer it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._stream.seek(offset, whence))

    def tell(self) -> int:
        return int(self._stream.tell())


def _tar_label(file: str, key: str, parts: dict[str, tuple[int, int, bytes]]) -> str:
    """key.cls, else `label` or `cls` of key.json, else the folder that the key lies in; empty where there is none."""
    if "cls" in parts:
        return parts["cls"][2].decode(errors="replace").strip()
    if "json" in parts:
        try:
            content = json.loads(parts["json"][2])
        except ValueError as error:
            message = f"{file}: {key}.json is not JSON ({error})."
            raise ValueError(message) from None
        found = next((content[name] for name in LABEL_COLUMNS if name in content), None) if isinstance(content, dict) else None
        if found is not None:
            return str(found)
    folder = key.rpartition("/")[0]
    return folder.rpartition("/")[2]


def _list_parquet(config: SourceConfig) -> Listing:
    root, files = _named(config.images, ".parquet")
    with ThreadPoolExecutor(READERS) as pool:
        parts = list(pool.map(lambda file: _parquet_rows(root, file, config.val_fraction), files))
    names = next((names for _, names in parts if names), ())
    entries = [entry for rows, _ in parts for entry in rows]
    if names:  # Hugging Face's ClassLabel: the file itself says what the numbers are
        return Listing(entries=entries, keys=[str(number) for number in range(len(names))], names=names)
    return _with_labels(config, entries, 0)


def _parquet_rows(root: str, file: str, val_fraction: float) -> tuple[list[Entry], tuple[str, ...]]:
    filesystem, path = locations.resolve(locations.join(root, file))
    with filesystem.open_input_file(path) as stream:
        try:
            parquet = pq.ParquetFile(stream)
        except (ValueError, OSError) as error:
            message = f"{file}: cannot be read as Parquet ({error})."
            raise ValueError(message) from None
        columns = parquet.schema_arrow.names
        image_column(parquet, file)
        label = next((name for name in LABEL_COLUMNS if name in columns), None)
        if label is None:
            message = f"{file}: no column of labels ({', '.join(LABEL_COLUMNS)}); it has {', '.join(columns)}."
            raise ValueError(message)
        wanted = [name for name in (label, "split") if name in columns]
        entries = []
        start = 0
        for group in range(parquet.metadata.num_row_groups):
            meta = parquet.metadata.row_group(group)
            size = max(meta.total_byte_size // max(meta.num_rows, 1), 1)  # of one row, about: the cut into shards needs no more
            for row, record in enumerate(parquet.read_row_group(group, columns=wanted).to_pylist()):
                key = f"{file}#{start + row}"
                split = SPLIT_NAMES.get(str(record.get("split", "")).lower(), "") or _split_in(file)
                entries.append(
                    Entry(
                        id=key, label="" if record[label] is None else str(record[label]),
                        split=split or _hashed_split(key, val_fraction), size=size, place=f"{file}#g{group}-{row}",
                        group=f"{file}#g{group}",
                    )
                )  # fmt: skip
            start += meta.num_rows
        return entries, _hugging_face_names(parquet.schema_arrow.metadata, label)


def image_column(parquet: pq.ParquetFile, file: str) -> str:
    columns = parquet.schema_arrow.names
    found = next((name for name in IMAGE_COLUMNS if name in columns), None)
    if found is None:
        message = f"{file}: no column of pictures ({', '.join(IMAGE_COLUMNS)}); it has {', '.join(columns)}."
        raise ValueError(message)
    return found


def _hugging_face_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...]:
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return tuple(str(name) for name in features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def _list_jsonl(config: SourceConfig) -> Listing:
    filesystem, path = locations.resolve(config.images)
    if filesystem.get_file_info(path).type != fs.FileType.File:
        message = f"images={config.images}: no such file."
        raise ValueError(message)
    with filesystem.open_input_stream(path, compression=None) as stream:
        lines = bytes(stream.read()).decode("utf-8-sig").splitlines()
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            place, label = record["path"], record["label"]
        except (ValueError, KeyError, TypeError):
            message = f'{config.images}, line {number}: expected a JSON object like {{"path": "dog/1.jpg", "label": "dog"}}.'
            raise ValueError(message) from None
        key = str(record.get("id", place))
        named = SPLIT_NAMES.get(str(record.get("split", "")).lower(), "")
        split = named or _hashed_split(key, config.val_fraction)
        entries.append(Entry(id=key, label=str(label), split=split, size=int(record.get("bytes", 0)), place=str(place)))
    return _with_labels(config, entries, 0)


LISTINGS: dict[str, Callable[[SourceConfig], Listing]] = {
    "folder": _list_folder, "webdataset": _list_tars, "parquet": _list_parquet, "jsonl": _list_jsonl,
}  # fmt: skip


def _with_labels(config: SourceConfig, entries: list[Entry], skipped: int) -> Listing:
    """Classes from the labels themselves: whole numbers in their order, from 0; names in theirs."""
    if not entries:
        message = f"images={config.images}: no pictures found."
        raise ValueError(message)
    without = [entry.id for entry in entries if not entry.label]
    if without:
        message = f"images={config.images}: {len(without)} of {len(entries)} pictures have no label, such as {without[0]}."
        raise ValueError(message)
    labels = {entry.label for entry in entries}
    if all(re.fullmatch(r"\d{1,7}", label) for label in labels):
        keys = [str(number) for number in range(max(map(int, labels)) + 1)]
        entries = [Entry(**{**vars(entry), "label": str(int(entry.label))}) for entry in entries]
    else:
        keys = sorted(labels)
    return Listing(entries=entries, keys=keys, skipped=skipped)


# Files, names, splits.


def _named(uri: str, ending: str) -> tuple[str, list[str]]:
    """A folder and its files of an ending, relative to it; for the address of one file, the folder that it lies in."""
    if uri.partition("?")[0].lower().endswith(ending):
        filesystem, path = locations.resolve(uri)
        if filesystem.get_file_info(path).type != fs.FileType.File:
            message = f"images={uri}: no such file."
            raise ValueError(message)
        return parent(uri), [path.rpartition("/")[2]]
    files = sorted(name for name, _ in _files(uri) if name.lower().endswith(ending))
    if not files:
        message = f"images={uri}: holds no {ending} files."
        raise ValueError(message)
    return uri, files


def parent(uri: str) -> str:
    base, question, query = uri.partition("?") if "://" in uri else (os.path.abspath(os.path.expanduser(uri)), "", "")
    return base.rpartition("/")[0] + question + query


def _files(uri: str, depth: int = 0) -> list[tuple[str, int]]:
    """(path below the source, bytes) of its files, hidden ones left out; `depth` limits the folder levels (0: all)."""
    filesystem, root = locations.resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        return list(_local_files(root, depth))
    if filesystem.get_file_info(root).type == fs.FileType.NotFound:
        message = f"images={uri}: no such folder."
        raise ValueError(message)
    found = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    listed = [(info.path[len(root) :].lstrip("/"), int(info.size or 0)) for info in found if info.type == fs.FileType.File]
    visible = [(name, size) for name, size in listed if not any(part.startswith(".") for part in name.split("/"))]
    return sorted((name, size) for name, size in visible if not depth or name.count("/") < depth)


def _local_files(root: str, depth: int, below: str = "") -> Iterable[tuple[str, int]]:
    """Links to folders are followed on the first two levels, where splits and classes often are links, and not deeper."""
    level = below.count("/") + 1 if below else 0
    for entry in sorted(os.scandir(os.path.join(root, below)), key=lambda entry: entry.name):
        name = f"{below}/{entry.name}" if below else entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=level < 2):
            if not depth or level + 1 < depth:
                yield from _local_files(root, depth, name)
        elif entry.is_file() or entry.is_symlink():
            yield name, entry.stat().st_size if entry.is_file() else 0


def _folders(path: str) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))


def _split_in(file: str) -> str:
    """The split that a file's name tells, as in train-00000-of-00010.parquet or val/000.tar."""
    found = IN_A_NAME.findall(file.lower())
    return SPLIT_NAMES[found[-1]] if found else ""


def _hashed_split(key: str, val_fraction: float) -> str:
    draw = int.from_bytes(hashlib.sha256(f"split:{key}".encode(errors="surrogateescape")).digest()[:8], "big") / 2**64
    return "val" if draw < val_fraction else "train"
