"""A list in JSON lines: {"path", "label", "split", "id", "bytes"}, paths below the folder of the list."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from pyarrow import fs

from pipeline.config import SourceConfig
from pipeline.errors import SettingsError
from pipeline.sources.entries import Entry, Listing, make_entry, with_labels
from pipeline.sources.files import READERS, parent
from pipeline.store import locations
from pipeline.store.locations import place_of

HEADS = 1000  # files of a list that are asked for their sizes one by one; of more, their folder is listed


def list_jsonl(config: SourceConfig) -> Listing:
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
    return with_labels(config, _sized(root, entries), 0)


def _listed(root: str, number: int, line: bytes) -> Entry:
    """The entry of one line; size -1 where it does not tell one."""
    try:
        record = json.loads(line.decode(errors="surrogateescape"))
    except (ValueError, RecursionError):
        record = None
    path = record.get("path") if isinstance(record, dict) else None
    if not isinstance(record, dict) or not isinstance(path, str) or not path:
        error = f'line {number}: expected a JSON object like {{"path": "dog/1.jpg", "label": "dog"}}'
        return make_entry(id=f"line-{number}", place="", size=0, label=None, error=error)
    key, size, error = record.get("id"), record.get("bytes"), ""
    if (below := _below(root, path)) is None:
        error = (
            f"line {number}: {path[:200]!r} lies outside the folder of the list, which alone is read: put "
            "the list into the folder that holds the pictures, and ingest into a new store"
        )
    return make_entry(
        id=str(key) if isinstance(key, (str, int)) and key != "" else path,
        label=record.get("label"),
        split=record.get("split"),
        size=size if isinstance(size, int) and size >= 0 else -1,
        place=place_of(below or ""),
        error=error,
    )


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
        chunks = [names[start : start + 100] for start in range(0, len(names), 100)]
        with ThreadPoolExecutor(READERS) as pool:
            sizes = [
                size for some in pool.map(lambda chunk: _sizes(filesystem, chunk), chunks) for size in some
            ]
    else:
        # A thousand files an answer, where asking for each by name takes a request each.
        selector = fs.FileSelector(
            os.path.commonpath([os.path.dirname(name) for name in names]), recursive=True
        )
        listed = {info.path: int(info.size or 0) for info in filesystem.get_file_info(selector)}
        sizes = [listed.get(name, 0) for name in names]
    size_of = dict(zip(places, sizes, strict=True))
    return [
        replace(entry, size=size_of.get(entry.place, 0)) if entry.size < 0 else entry for entry in entries
    ]


def _sizes(filesystem: fs.FileSystem, paths: list[str]) -> list[int]:
    if not isinstance(filesystem, fs.LocalFileSystem):
        return [int(info.size or 0) for info in filesystem.get_file_info(paths)]
    return [_size(path) for path in paths]


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):  # ValueError: no file can be called that
        return 0
