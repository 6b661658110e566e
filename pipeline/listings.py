"""What a source holds: the pictures of an image folder, of WebDataset tars, Parquet files or a JSONL list, one `Entry` each.

One function a kind; each reads names, sizes, labels and splits, and no picture. Every picture has an entry or is counted in a
note. What one line, row or member lacks or gets wrong is its entry's `error`, and never ends the listing:

- No label (null, an empty text, NaN, or -1), or a stray text among class numbers: an error. Where no row of a split has a label,
  as in test sets whose labels are kept secret, the split is left out, with a note.
- A split of another name than train, val, test and their synonyms, or a path that leads out of a list's folder: an error.

This is where names come in: those that are not UTF-8 are written as `locations.escaped` does, here and nowhere else.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import stat
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipeline import locations
from pipeline.config import SourceConfig
from pipeline.errors import SettingsError
from pipeline.images import EXTENSIONS
from pipeline.locations import escaped, place_of

SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# Understood where something is said to be a split; a folder of this name alone may as well be a class.
SYNONYMS = {"dev": "val", "development": "val", "eval": "val", "evaluation": "val"}
ALL_SPLIT_NAMES = SPLIT_NAMES | SYNONYMS
IN_A_NAME = re.compile(rf"(?:^|[^a-z])({'|'.join(sorted(ALL_SPLIT_NAMES, key=len, reverse=True))})(?:[^a-z]|$)")
LABEL_COLUMNS = ("label", "labels", "class", "cls", "fine_label")
IMAGE_COLUMNS = ("image", "img", "jpg", "picture")
READERS = 16  # listing waits for answers and not for a processor
HEADS = 1000  # files of a list that are asked for their sizes one by one; of more, their folder is listed
BESIDE = "pictures are left out: they belong to another of the same key, as key.depth.png does to key.jpg"
STRAY = 0.02  # share of labels that are no numbers, up to which they are taken for faults and not for names
MOST_CLASSES = 100_000  # a single row's label must not make a classifier larger than any
LARGE_GROUP = 2**28  # bytes of pictures in a Parquet row group above which it is not held whole


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One picture of the source, before classes are numbered.

    `id` is its key within the source, `place` where its bytes are (see `locations`; for Parquet FILE#g<row group>-<row>),
    `group` what keeps rows together in the order (the row's own id where nothing has to). `split` is empty where the source
    tells none, `label` where it has none, `place` where `error` says what is wrong.
    """

    id: str
    label: str
    split: str
    size: int
    place: str
    group: str = ""
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a source holds; `keys` are the classes, in order, also those without a picture; `notes` tell what is left out."""

    entries: list[Entry]
    keys: list[str]
    skipped: int = 0
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def kind_of(uri: str) -> str:
    ending = locations.split_options(uri)[0].rsplit(".", 1)[-1].lower()
    by_ending = {"tar": "webdataset", "parquet": "parquet", "jsonl": "jsonl", "ndjson": "jsonl"}
    if ending in by_ending:
        return by_ending[ending]
    filesystem, root = locations.resolve(uri)
    if filesystem.get_file_info(root).type == fs.FileType.NotFound:
        message = (
            f"images={uri}: no such folder or file; pass --images with a folder of class folders, tars, Parquet files or a list."
        )
        raise SettingsError(message)
    # Tars and Parquet files lie at the top or one folder down; pictures of an image folder lie below class folders.
    names = [name for name, _ in _files(uri, depth=2)]
    counts = {kind: sum(name.lower().endswith(f".{kind}") for name in names) for kind in ("tar", "parquet")}
    pictures = sum(name.lower().endswith(EXTENSIONS) for name in names)
    found = {by_ending[kind]: count for kind, count in counts.items() if count} | ({"folder": pictures} if pictures else {})
    if len(found) > 1:
        what = ", ".join(f"{count} of {kind}" for kind, count in found.items())
        message = f"images={uri}: holds files of several kinds ({what}): say which with --source-kind, or move the others away."
        raise SettingsError(message)
    return next(iter(found), "folder")


def _entry(*, id: str, place: str, size: int, label: object, split: object = "", group: str = "", error: str = "") -> Entry:
    """An entry in valid UTF-8, whatever the source holds; what cannot be understood is its error."""
    named, text = _split(split), _label(label)
    if named is None:
        error = error or f"split {str(split)[:80]!r} is none of train, val and test: mend it, and ingest into a new store"
    if text is None:
        error = error or f"a label must be a text or a number, not {type(label).__name__}: mend it, and ingest into a new store"
    return Entry(
        id=escaped(id), label="" if error else escaped(text or ""), split=named or "", size=size, place="" if error else place,
        group=group, error=escaped(error),
    )  # fmt: skip


def _split(value: object) -> str | None:
    """train, val or test; empty where nothing is said; None where it is not understood."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return ""
    return ALL_SPLIT_NAMES.get(str(value).strip().lower())


def _label(value: object) -> str | None:
    """A label as text, empty where there is none; None where it is neither a text nor a number."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # whole numbers beside a null are written as 3.0 by many tools
    if isinstance(value, bytes):
        value = value.decode(errors="surrogateescape")
    if isinstance(value, (list, dict)):
        return None
    return str(value)


def _list_folder(config: SourceConfig) -> Listing:
    files = _files(config.images)
    folders = _class_folders(config.images, files)
    # Where the first level holds splits, only they count; otherwise the first level is the classes. A folder called `train` whose
    # pictures lie in itself is a class beside others.
    named = {top for top, _ in folders if top.lower() in SPLIT_NAMES}
    pictures = [key.split("/") for key, _ in files if key.lower().endswith(EXTENSIONS)]
    deep, flat = ({parts[0] for parts in pictures if (len(parts) > 2) == below} for below in (True, False))
    has_splits = bool(named) and (bool(named & deep) or not named & flat or {top for top, _ in folders} <= named)
    splits = ALL_SPLIT_NAMES if has_splits else {}
    entries: list[Entry] = []
    skipped = loose = 0
    beside: Counter[str] = Counter()
    for key, size in files:
        parts = key.split("/")
        picture = key.lower().endswith(EXTENSIONS)
        if has_splits and len(parts) > 1 and parts[0].lower() not in splits:
            beside[parts[0]] += picture
        elif len(parts) < (3 if has_splits else 2):
            loose += picture
        elif not picture:
            skipped += 1
        else:
            label, split = (parts[1], splits[parts[0].lower()]) if has_splits else (parts[0], "")
            entries.append(_entry(id=key, label=label, split=split, size=size, place=place_of(key)))
    if not entries:
        message = (
            f"images={config.images}: no pictures found; expected DIR/<class>/*.jpg or DIR/<split>/<class>/*.jpg "
            f"with splits train, val or test and endings {' '.join(EXTENSIONS)}; or tars, Parquet files or a .jsonl."
        )
        raise SettingsError(message)
    keys = {below if has_splits else top for top, below in folders if not has_splits or top.lower() in splits}
    notes = []
    if lost := sum(beside.values()):
        where = _some(name for name, count in beside.items() if count)
        notes.append(f"{lost} pictures are left out: they lie beside the splits, in {where} (splits are train, val and test)")
    if loose:
        notes.append(f"{loose} pictures are left out: they lie in no class folder")
    return Listing(entries=entries, keys=sorted(map(escaped, keys - {""})), skipped=skipped, notes=tuple(notes))


def _some(names: Iterable[str]) -> str:
    found = sorted({escaped(name) for name in names})
    return ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")


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
    splits = _splits_of(files)
    skipped, out = 0, Counter[str]()
    entries: list[Entry] = []
    with ThreadPoolExecutor(READERS) as pool:
        for file, members in zip(files, pool.map(lambda file: _tar_members(root, file), files), strict=True):
            found, without = _samples(file, splits[file], members, out)
            entries += found
            skipped += without
    return _with_labels(config, entries, skipped, [f"{count} {what}" for what, count in out.items() if count])


_Member = tuple[str, int, int, bytes]  # name, offset, size, content if it is a small side file; offset -1: a link


def _samples(file: str, split: str, members: list[_Member], out: Counter[str]) -> tuple[list[Entry], int]:
    """The pictures of a tar, and how many samples have none.

    WebDataset's key is a name up to its first dot. Where one picture has the key, the row is named by it. Of several, the one
    that is called key.jpg (or .png and so on) is the sample's, and the others belong to it, as key.depth.png does, unless they
    have a label of their own; where no one is, names have dots in them, and each picture is a row named without its ending.
    """
    latest = {name: (offset, size, content) for name, offset, size, content in members}  # as when a tar is unpacked
    groups: dict[str, list[str]] = {}
    sides: dict[tuple[str, str], bytes] = {}
    for name, (offset, _, content) in latest.items():
        folder, _, base = name.rpartition("/")
        picture = base.lower().endswith(EXTENSIONS)
        if base.startswith(".") or offset < 0:
            out["pictures are left out: hidden files, or links, in tars"] += picture
            continue
        group = groups.setdefault(f"{folder}/{base.partition('.')[0]}" if folder else base.partition(".")[0], [])
        if picture:
            group.append(name)
        else:
            stem, _, ending = name.rpartition(".")
            sides[stem, ending.lower()] = content
    twice = Counter(name for name, *_ in members if name.lower().endswith(EXTENSIONS))
    out["pictures are left out: a later member of their tar has the same name"] += twice.total() - len(twice)
    entries = []
    for key, pictures in groups.items():
        named = [name for name in pictures if name.rpartition("/")[2].count(".") == 1]
        rows = pictures
        if len(named) == 1:
            rows = [name for name in pictures if name in named or sides.keys() & {(_stem(name), end) for end in ("cls", "json")}]
            out[BESIDE] += len(pictures) - len(rows)
        stems = Counter(map(_stem, rows))
        for name in rows:
            own = key if len(rows) == 1 else _stem(name) if stems[_stem(name)] == 1 else name
            offset, size, _ = latest[name]
            label, error = _tar_label(name, sides)
            place = f"{place_of(file)}#{offset}-{size}"
            entries.append(_entry(id=f"{file}#{own}", label=label, split=split, size=size, place=place, error=error))
    return entries, sum(not pictures for pictures in groups.values())


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _tar_label(name: str, sides: dict[tuple[str, str], bytes]) -> tuple[object, str]:
    """(label, error): key.cls, else `label` or `cls` of key.json, else the folder that the picture lies in; else none.

    The key is the longest beginning of the name, up to a dot, that has such a file.
    """
    folder, _, base = name.rpartition("/")
    parts = base.split(".")[:-1]
    for count in range(len(parts), 0, -1):
        key = name[: len(name) - len(base)] + ".".join(parts[:count])
        if (key, "cls") in sides:
            return sides[key, "cls"].strip(), ""
        if (key, "json") in sides:
            try:
                content = json.loads(sides[key, "json"])
            except (ValueError, RecursionError) as error:
                return None, f"{key}.json is not JSON ({error}): mend it, and ingest into a new store"
            found = content if isinstance(content, dict) else {}
            if (label := next((found[column] for column in LABEL_COLUMNS if found.get(column) is not None), None)) is not None:
                return label, ""
    last = folder.rpartition("/")[2]
    return ("" if last in (".", "..") else last), ""


def _tar_members(root: str, file: str) -> list[_Member]:
    """Every file of a tar, from headers only: pictures are not read."""
    found: list[_Member] = []
    with opened(root, file) as stream:
        size = stream.size()
        # Headers are small and next to each other's labels: 8 KiB at a time, so that a remote tar costs few requests.
        buffered: Any = io.BufferedReader(_Raw(stream), 8192)
        try:
            with tarfile.open(fileobj=buffered, mode="r:") as tar:
                for member in tar:
                    if member.size < 0:
                        message = "a member of negative size"
                        raise tarfile.ReadError(message)
                    if member.issym() or member.islnk():
                        found.append((member.name, -1, 0, b""))
                    if not member.isreg() or member.issparse():
                        continue
                    if member.offset_data + member.size > size:
                        message = f"it ends inside {member.name!r}"
                        raise tarfile.ReadError(message)
                    side = member.name.lower().endswith((".cls", ".json")) and member.size < 2**16
                    content = tar.extractfile(member) if side else None
                    found.append((member.name, member.offset_data, member.size, content.read() if content else b""))
                # Python takes a damaged header, or a zero one, for the end of the tar, and what follows would be lost without
                # a word. The end is two blocks of zeros, with nothing but zeros after them.
                buffered.seek(tar.offset)
                end = buffered.read(2 * tarfile.BLOCKSIZE)
                if len(end) < 2 * tarfile.BLOCKSIZE and not any(end):
                    message = f"its end, from byte {tar.offset} on, is missing"
                    raise tarfile.ReadError(message)
                while end:
                    if any(end):
                        message = f"damaged at byte {tar.offset}, or another tar follows there"
                        raise tarfile.ReadError(message)
                    end = buffered.read(2**20)
        except (tarfile.TarError, EOFError, ValueError, TypeError, LookupError, ArithmeticError) as error:
            message = (
                f"{file}: cannot be read as a tar ({error}); it must be whole, and not compressed (pictures are read in place)."
            )
            raise SettingsError(escaped(message)) from None
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


def _list_parquet(config: SourceConfig) -> Listing:
    root, files = _named(config.images, ".parquet")
    with ThreadPoolExecutor(READERS) as pool:
        tables = list(pool.map(lambda file: _parquet_rows(root, file), files))
    splits = dict.fromkeys(files, "") if any(table.has_splits for table in tables) else _splits_of(files)
    entries = []
    for file, table in zip(files, tables, strict=True):
        split = splits[file] or _split_in(file)
        entries += [replace(entry, split=entry.split or split) for entry in table.entries]
    if not any(table.has_labels for table in tables):
        message = f"images={config.images}: no column of labels ({', '.join(LABEL_COLUMNS)}) in any file."
        raise SettingsError(message)
    notes = []
    if (largest := max(table.largest for table in tables)) > LARGE_GROUP:
        notes.append(
            f"row groups of up to {largest / 2**30:.1f} GiB, each read whole for each shard: ingest goes many times faster "
            "from files written with a row_group_size of some 500 rows"
        )
    known = sorted({table.names for table in tables if table.names})
    if len(known) > 1:
        message = f"images={config.images}: the files name different classes, so their numbers cannot be told apart."
        raise SettingsError(message)
    if not known:
        return _with_labels(config, entries, 0, notes)
    # Hugging Face's ClassLabel: the file itself says what the numbers are.
    keys = [str(number) for number in range(len(known[0]))]
    numbered = set(keys)
    entries = [entry if entry.label in numbered else _without_class(entry, len(keys)) for entry in entries]
    found = _with_labels(config, entries, 0, notes)
    return replace(found, keys=keys, names=tuple(escaped(name) for name in known[0]))


def _without_class(entry: Entry, classes: int) -> Entry:
    if entry.error or entry.label in ("", "-1"):
        return replace(entry, label="")
    error = f"label {entry.label[:80]!r}: the file names classes 0 to {classes - 1}: mend it, and ingest into a new store"
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
            image = image_column(parquet, file)
            label = next((name for name in LABEL_COLUMNS if name in columns), "")
            wanted = [name for name in (label, "split") if name in columns]
            entries = []
            start = largest = 0
            for group in range(parquet.metadata.num_row_groups):
                meta = parquet.metadata.row_group(group)
                size = max(meta.total_byte_size // max(meta.num_rows, 1), 1)  # of one row, about: the cut needs no more
                rows = parquet.read_row_group(group, columns=wanted).to_pylist() if wanted else [{}] * meta.num_rows
                for row, record in enumerate(rows):
                    entries.append(
                        _entry(
                            id=f"{file}#{start + row}", label=record.get(label), split=record.get("split"), size=size,
                            place=f"{escaped(file)}#g{group}-{row}", group=f"{escaped(file)}#g{group}",
                        )
                    )  # fmt: skip
                start += meta.num_rows
                largest = max(largest, picture_bytes(parquet, group, image))
        except (pa.ArrowException, OSError) as error:
            message = f"{file}: cannot be read as Parquet ({error})."
            raise SettingsError(escaped(message)) from None
        names = _hugging_face_names(parquet.schema_arrow.metadata, label)
        return _Table(
            entries=entries, names=names, has_labels=bool(label), has_splits="split" in columns, largest=largest
        )  # fmt: skip


def picture_bytes(parquet: pq.ParquetFile, group: int, image: str) -> int:
    """What the pictures of a row group take in memory, about."""
    meta = parquet.metadata.row_group(group)
    columns = (meta.column(number) for number in range(meta.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema.split(".")[0] == image)


def image_column(parquet: pq.ParquetFile, file: str) -> str:
    columns = parquet.schema_arrow.names
    found = next((name for name in IMAGE_COLUMNS if name in columns), None)
    if found is None:
        message = f"{file}: no column of pictures ({', '.join(IMAGE_COLUMNS)}); it has {', '.join(columns)}."
        raise SettingsError(message)
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
        raise SettingsError(message)
    with filesystem.open_input_stream(path, compression=None) as stream:
        content = bytes(stream.read()).removeprefix(b"\xef\xbb\xbf")
    root = parent(config.images)
    # Not splitlines: names may hold the other characters that it takes for the end of a line.
    lines = ((number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip())
    entries = [_listed(root, number, line) for number, line in lines]
    return _with_labels(config, _sized(root, entries), 0)


def _listed(root: str, number: int, line: bytes) -> Entry:
    """The entry of one line; size -1 where it does not tell one."""
    try:
        record = json.loads(line.decode(errors="surrogateescape"))
    except (ValueError, RecursionError):
        record = None
    path = record.get("path") if isinstance(record, dict) else None
    if not isinstance(record, dict) or not isinstance(path, str) or not path:
        error = f'line {number}: expected a JSON object like {{"path": "dog/1.jpg", "label": "dog"}}'
        return _entry(id=f"line-{number}", place="", size=0, label=None, error=error)
    key, size, error = record.get("id"), record.get("bytes"), ""
    if (place := _below(root, path)) is None:
        error = (
            f"line {number}: {path[:200]!r} lies outside the folder of the list, which alone is read: put the list into the "
            "folder that holds the pictures, and ingest into a new store"
        )
    return _entry(
        id=str(key) if isinstance(key, (str, int)) and key != "" else path, label=record.get("label"), split=record.get("split"),
        size=size if isinstance(size, int) and size >= 0 else -1, place=place_of(place or ""), error=error,
    )  # fmt: skip


def _below(root: str, path: str) -> str | None:
    """A path of a list relative to the list's folder; None where it leads out of it.

    A list from elsewhere must not say what is read on this machine, nor which server is asked.
    """
    base = locations.split_options(root)[0].rstrip("/") if "://" in root else root
    path = path.removeprefix("file://" if "://" not in root else "").removeprefix(f"{base}/")
    outside = not path or "://" in path or path.startswith("/") or ".." in path.split("/")
    return None if outside else path


def _sized(root: str, entries: list[Entry]) -> list[Entry]:
    """Sizes where the list tells none, since shards are cut by them; 0 for what is not there."""
    places = [entry.place for entry in entries if entry.size < 0 and entry.place]
    filesystem, base = locations.resolve(root)
    names = [f"{base}/{locations.unescaped(place)}" for place in places]
    if isinstance(filesystem, fs.LocalFileSystem) or len(names) <= HEADS:
        parts = [names[start : start + 100] for start in range(0, len(names), 100)]
        with ThreadPoolExecutor(READERS) as pool:
            found = [size for sizes in pool.map(lambda part: _sizes(filesystem, part), parts) for size in sizes]
    else:
        # A thousand files an answer, where asking for each by name takes a request each.
        selector = fs.FileSelector(os.path.commonpath([os.path.dirname(name) for name in names]), recursive=True)
        listed = {info.path: int(info.size or 0) for info in filesystem.get_file_info(selector)}
        found = [listed.get(name, 0) for name in names]
    sizes = dict(zip(places, found, strict=True))
    return [replace(entry, size=sizes.get(entry.place, 0)) if entry.size < 0 else entry for entry in entries]


def _sizes(filesystem: fs.FileSystem, paths: list[str]) -> list[int]:
    if not isinstance(filesystem, fs.LocalFileSystem):
        return [int(info.size or 0) for info in filesystem.get_file_info(paths)]
    return [_size(path) for path in paths]


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):  # ValueError: no file can be called that
        return 0


LISTINGS: dict[str, Callable[[SourceConfig], Listing]] = {
    "folder": _list_folder, "webdataset": _list_tars, "parquet": _list_parquet, "jsonl": _list_jsonl,
}  # fmt: skip


def _with_labels(config: SourceConfig, entries: list[Entry], skipped: int, notes: Iterable[str] = ()) -> Listing:
    """Classes from the labels themselves: whole numbers in their order, from 0; names in theirs."""
    if not entries:
        message = f"images={config.images}: no pictures found."
        raise SettingsError(message)
    entries = [replace(entry, label="") if entry.label == "-1" else entry for entry in entries]
    counts = Counter(entry.label for entry in entries if entry.label)
    numbers = {label: int(label) for label in counts if re.fullmatch("[0-9]{1,18}", label)}
    odd = counts.total() - sum(counts[label] for label in numbers)
    # Where nearly all labels are numbers, classes are numbered, and a stray other label is its row's error: by name, all rows
    # would be numbered anew (0, 1, 10, 2), and none the wiser.
    if numbers and odd <= STRAY * counts.total():
        most = max(MOST_CLASSES, 10 * len(numbers))
        entries = [_numbered(entry, numbers, most) if entry.label else entry for entry in entries]
        labels = {entry.label for entry in entries} - {""}
        keys = [str(number) for number in range(max(map(int, labels), default=-1) + 1)]
        if len(keys) > 2 * len(labels) + 1:
            notes = [*notes, f"labels up to {len(keys) - 1} make {len(keys)} classes, of which {len(labels)} have a picture"]
    else:
        labels = set(counts)
        keys = sorted(labels)
    if not labels:
        first = next((f"{entry.id}: {entry.error}" for entry in entries if entry.error), f"no label, such as {entries[0].id}")
        message = f"images={config.images}: none of {len(entries)} pictures can be used: {first}."
        raise SettingsError(message)
    labelled = {entry.split for entry in entries if entry.label}
    kept, left = [], Counter[str]()
    for entry in entries:
        if entry.label or entry.error:
            kept.append(entry)
        elif entry.split in labelled:
            kept.append(replace(entry, place="", error="no label: give it one, and ingest into a new store"))
        else:
            left[entry.split] += 1
    told = [f"{count} pictures of split {split or 'train'} are left out: none has a label" for split, count in left.items()]
    return Listing(entries=kept, keys=keys, skipped=skipped, notes=(*notes, *told))


def _numbered(entry: Entry, numbers: dict[str, int], most: int) -> Entry:
    number = numbers.get(entry.label)
    if number is not None and number < most:
        return replace(entry, label=str(number))
    flaw = "is no class number, as those of the other rows are" if number is None else f"would make more than {most} classes"
    error = f"label {entry.label[:80]!r} {flaw}: mend it, and ingest into a new store"
    return replace(entry, label="", place="", error=error)


# Files, names, splits.


def _named(uri: str, ending: str) -> tuple[str, list[str]]:
    """A folder and its files of an ending, relative to it; for the address of one file, the folder that it lies in."""
    if locations.split_options(uri)[0].lower().endswith(ending):
        filesystem, path = locations.resolve(uri)
        if filesystem.get_file_info(path).type != fs.FileType.File:
            message = f"images={uri}: no such file."
            raise SettingsError(message)
        return parent(uri), [path.rpartition("/")[2]]
    files = sorted(name for name, _ in _files(uri) if name.lower().endswith(ending))
    if not files:
        message = f"images={uri}: holds no {ending} files."
        raise SettingsError(message)
    return uri, files


def parent(uri: str) -> str:
    base, options = locations.split_options(uri) if "://" in uri else (os.path.abspath(os.path.expanduser(uri)), "")
    return base.rpartition("/")[0] + options


def _files(uri: str, depth: int = 0) -> list[tuple[str, int]]:
    """(path below the source, bytes) of its files, hidden ones left out; `depth` limits the folder levels (0: all)."""
    filesystem, root = locations.resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        return list(_local_files(root, depth))
    if filesystem.get_file_info(root).type == fs.FileType.NotFound:
        message = f"images={uri}: no such folder."
        raise SettingsError(message)
    found = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    listed = [(info.path[len(root) + 1 :], int(info.size or 0)) for info in found if info.type == fs.FileType.File]
    visible = [(name, size) for name, size in listed if not any(part.startswith(".") for part in name.split("/"))]
    return sorted((name, size) for name, size in visible if not depth or name.count("/") < depth)


def _local_files(root: str, depth: int, below: str = "") -> Iterable[tuple[str, int]]:
    """Links to folders are followed on the first two levels, where splits and classes often are links, and not deeper."""
    level = below.count("/") + 1 if below else 0
    for entry in sorted(os.scandir(os.path.join(root, below)), key=lambda entry: entry.name):
        name = f"{below}/{entry.name}" if below else entry.name
        if entry.name.startswith("."):
            continue
        try:
            is_folder, found = entry.is_dir(follow_symlinks=level < 2), entry.stat()
        except OSError:  # a link that leads nowhere, or in a circle: a row with an error
            yield name, 0
            continue
        if is_folder:
            if not depth or level + 1 < depth:
                yield from _local_files(root, depth, name)
        elif stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode):  # and no pipe, whose reader would wait for ever
            yield name, found.st_size if stat.S_ISREG(found.st_mode) else 0


def _folders(path: str) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if os.path.isdir(entry.path) and not entry.name.startswith("."))


def opened(root: str, file: str) -> Any:
    """A file of the source, open for reading anywhere in it. As bytes on a disk, since its name may not be UTF-8."""
    filesystem, path = locations.locate(root, file)
    if isinstance(filesystem, fs.LocalFileSystem):
        return pa.OSFile(os.fsencode(path))
    return filesystem.open_input_file(path)


def _splits_of(files: list[str]) -> dict[str, str]:
    """The split that each file's name tells; empty where no name tells one.

    Raises:
        ValueError: some names tell a split and others none, which would silently be trained on.
    """
    told = {file: _split_in(file) for file in files}
    silent = [file for file, split in told.items() if not split]
    if silent and len(silent) < len(files):
        message = (
            f"{_some(silent)}: the name tells no split, as those of the other files do; put train, val or test into it "
            "(dev and eval are val), move it elsewhere, or name one file with --images."
        )
        raise SettingsError(message)
    return told


def _split_in(file: str) -> str:
    """The split that a file's name tells, as in train-00000-of-00010.parquet or val/000.tar."""
    found = IN_A_NAME.findall(file.lower())
    return ALL_SPLIT_NAMES[found[-1]] if found else ""
