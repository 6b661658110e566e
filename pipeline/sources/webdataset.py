"""WebDataset tars: key.jpg with key.cls or key.json; only headers and small side files are read."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.config import SourceConfig
from pipeline.errors import SettingsError
from pipeline.sources.entries import LABEL_COLUMNS, Entry, Listing, make_entry, with_labels
from pipeline.sources.files import READERS, named_files, opened, splits_of
from pipeline.sources.images import EXTENSIONS
from pipeline.store.locations import escaped, place_of

BESIDE = "pictures are left out: they belong to another of the same key, as key.depth.png does to key.jpg"


def list_tars(config: SourceConfig) -> Listing:
    root, files = named_files(config.images, ".tar")
    splits = splits_of(files)
    skipped, out = 0, Counter[str]()
    entries: list[Entry] = []
    with ThreadPoolExecutor(READERS) as pool:
        for file, members in zip(files, pool.map(lambda file: _tar_members(root, file), files), strict=True):
            samples, without = _samples(file, splits[file], members, out)
            entries += samples
            skipped += without
    return with_labels(config, entries, skipped, [f"{count} {what}" for what, count in out.items() if count])


# Name, offset, size, content if it is a small side file; offset -1: a link.
_Member = tuple[str, int, int, bytes]


def _samples(file: str, split: str, members: list[_Member], out: Counter[str]) -> tuple[list[Entry], int]:
    """The pictures of a tar, and how many samples have none.

    WebDataset's key is a name up to its first dot. Where one picture has the key, the row is named by it. Of
    several, the one that is called key.jpg (or .png and so on) is the sample's, and the others belong to it,
    as key.depth.png does, unless they have a label of their own; where no one is, names have dots in them,
    and each picture is a row named without its ending.
    """
    # As when a tar is unpacked.
    latest = {name: (offset, size, content) for name, offset, size, content in members}
    pictures_of: dict[str, list[str]] = {}
    sides: dict[tuple[str, str], bytes] = {}
    for name, (offset, _, content) in latest.items():
        folder, _, base = name.rpartition("/")
        is_picture = base.lower().endswith(EXTENSIONS)
        if base.startswith(".") or offset < 0:
            out["pictures are left out: hidden files, or links, in tars"] += is_picture
            continue
        pictures = pictures_of.setdefault(
            f"{folder}/{base.partition('.')[0]}" if folder else base.partition(".")[0], []
        )
        if is_picture:
            pictures.append(name)
        else:
            stem, _, ending = name.rpartition(".")
            sides[stem, ending.lower()] = content
    twice = Counter(name for name, *_ in members if name.lower().endswith(EXTENSIONS))
    out["pictures are left out: a later member of their tar has the same name"] += twice.total() - len(twice)
    entries = []
    for key, pictures in pictures_of.items():
        named = [name for name in pictures if name.rpartition("/")[2].count(".") == 1]
        rows = pictures
        if len(named) == 1:
            rows = [
                name
                for name in pictures
                if name in named or sides.keys() & {(_stem(name), end) for end in ("cls", "json")}
            ]
            out[BESIDE] += len(pictures) - len(rows)
        stems = Counter(map(_stem, rows))
        for name in rows:
            own = key if len(rows) == 1 else _stem(name) if stems[_stem(name)] == 1 else name
            offset, size, _ = latest[name]
            label, error = _tar_label(name, sides)
            place = f"{place_of(file)}#{offset}-{size}"
            entries.append(
                make_entry(id=f"{file}#{own}", label=label, split=split, size=size, place=place, error=error)
            )
    return entries, sum(not pictures for pictures in pictures_of.values())


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _tar_label(name: str, sides: dict[tuple[str, str], bytes]) -> tuple[object, str]:
    """(label, error): key.cls, else `label` or `cls` of key.json, else the folder that the picture lies in;
    else none.

    The key is the longest beginning of the name, up to a dot, that has such a file.
    """
    folder, _, base = name.rpartition("/")
    pieces = base.split(".")[:-1]
    for count in range(len(pieces), 0, -1):
        key = name[: len(name) - len(base)] + ".".join(pieces[:count])
        if (key, "cls") in sides:
            return sides[key, "cls"].strip(), ""
        if (key, "json") in sides:
            try:
                content = json.loads(sides[key, "json"])
            except (ValueError, RecursionError) as error:
                return None, f"{key}.json is not JSON ({error}): mend it, and ingest into a new store"
            record = content if isinstance(content, dict) else {}
            if (
                label := next(
                    (record[column] for column in LABEL_COLUMNS if record.get(column) is not None), None
                )
            ) is not None:
                return label, ""
    last = folder.rpartition("/")[2]
    return ("" if last in (".", "..") else last), ""


def _tar_members(root: str, file: str) -> list[_Member]:
    """Every file of a tar, from headers only: pictures are not read."""
    members: list[_Member] = []
    with opened(root, file) as stream:
        size = stream.size()
        # Headers are small and next to each other's labels: 8 KiB at a time, so that a remote tar costs few
        # requests.
        buffered: Any = io.BufferedReader(_Raw(stream), 8192)
        try:
            with tarfile.open(fileobj=buffered, mode="r:") as tar:
                for member in tar:
                    if member.size < 0:
                        message = "a member of negative size"
                        raise tarfile.ReadError(message)
                    if member.issym() or member.islnk():
                        members.append((member.name, -1, 0, b""))
                    if not member.isreg() or member.issparse():
                        continue
                    if member.offset_data + member.size > size:
                        message = f"it ends inside {member.name!r}"
                        raise tarfile.ReadError(message)
                    side = member.name.lower().endswith((".cls", ".json")) and member.size < 2**16
                    content = tar.extractfile(member) if side else None
                    members.append(
                        (member.name, member.offset_data, member.size, content.read() if content else b"")
                    )
                # Python takes a damaged header, or a zero one, for the end of the tar, and what follows would
                # be lost without a word. The end is two blocks of zeros, with nothing but zeros after them.
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
                f"{file}: cannot be read as a tar ({error}); it must be whole, and not compressed (pictures "
                "are read in place)."
            )
            raise SettingsError(escaped(message)) from None
    return members


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
