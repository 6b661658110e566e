"""Names and sizes of the files of a source, on a disk or at an object store, and the splits that names
tell."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
from pyarrow import fs

from pipeline.errors import SettingsError
from pipeline.sources.entries import ALL_SPLIT_NAMES, some_of
from pipeline.store import locations

IN_A_NAME = re.compile(
    rf"(?:^|[^a-z])({'|'.join(sorted(ALL_SPLIT_NAMES, key=len, reverse=True))})(?:[^a-z]|$)"
)
READERS = 16  # listing waits for answers and not for a processor


# Files, names, splits.


def named_files(uri: str, ending: str) -> tuple[str, list[str]]:
    """A folder and its files of an ending, relative to it; for the address of one file, the folder that it
    lies in."""
    if locations.split_options(uri)[0].lower().endswith(ending):
        filesystem, path = locations.resolve(uri)
        if filesystem.get_file_info(path).type != fs.FileType.File:
            message = f"images={uri}: no such file."
            raise SettingsError(message)
        return parent(uri), [path.rpartition("/")[2]]
    files = sorted(name for name, _ in list_files(uri) if name.lower().endswith(ending))
    if not files:
        message = f"images={uri}: holds no {ending} files."
        raise SettingsError(message)
    return uri, files


def parent(uri: str) -> str:
    base, options = (
        locations.split_options(uri) if "://" in uri else (os.path.abspath(os.path.expanduser(uri)), "")
    )
    return base.rpartition("/")[0] + options


def list_files(uri: str, depth: int = 0) -> list[tuple[str, int]]:
    """(path below the source, bytes) of its files, hidden ones left out; `depth` limits the folder levels (0:
    all)."""
    filesystem, root = locations.resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        return list(_local_files(root, depth))
    if filesystem.get_file_info(root).type == fs.FileType.NotFound:
        message = f"images={uri}: no such folder."
        raise SettingsError(message)
    infos = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    listed = [
        (info.path[len(root) + 1 :], int(info.size or 0)) for info in infos if info.type == fs.FileType.File
    ]
    visible = [
        (name, size) for name, size in listed if not any(part.startswith(".") for part in name.split("/"))
    ]
    return sorted((name, size) for name, size in visible if not depth or name.count("/") < depth)


def _local_files(root: str, depth: int, below: str = "") -> Iterable[tuple[str, int]]:
    """Links to folders are followed on the first two levels, where splits and classes often are links, and
    not deeper."""
    level = below.count("/") + 1 if below else 0
    for entry in sorted(os.scandir(os.path.join(root, below)), key=lambda entry: entry.name):
        name = f"{below}/{entry.name}" if below else entry.name
        if entry.name.startswith("."):
            continue
        try:
            is_folder, status = entry.is_dir(follow_symlinks=level < 2), entry.stat()
        except OSError:  # a link that leads nowhere, or in a circle: a row with an error
            yield name, 0
            continue
        if is_folder:
            if not depth or level + 1 < depth:
                yield from _local_files(root, depth, name)
        elif stat.S_ISREG(status.st_mode) or stat.S_ISDIR(
            status.st_mode
        ):  # and no pipe, whose reader would wait for ever
            yield name, status.st_size if stat.S_ISREG(status.st_mode) else 0


def list_folders(path: str) -> list[str]:
    return sorted(
        entry.name
        for entry in os.scandir(path)
        if os.path.isdir(entry.path) and not entry.name.startswith(".")
    )


def opened(root: str, file: str) -> Any:
    """A file of the source, open for reading anywhere in it. As bytes on a disk, since its name may not be
    UTF-8."""
    filesystem, path = locations.locate(root, file)
    if isinstance(filesystem, fs.LocalFileSystem):
        return pa.OSFile(os.fsencode(path))
    return filesystem.open_input_file(path)


def splits_of(files: list[str]) -> dict[str, str]:
    """The split that each file's name tells; empty where no name tells one.

    Raises:
        ValueError: some names tell a split and others none, which would silently be trained on.
    """
    split_of = {file: split_in(file) for file in files}
    silent = [file for file, split in split_of.items() if not split]
    if silent and len(silent) < len(files):
        message = (
            f"{some_of(silent)}: the name tells no split, as those of the other files do; put train, val or "
            "test into it (dev and eval are val), move it elsewhere, or name one file with --images."
        )
        raise SettingsError(message)
    return split_of


def split_in(file: str) -> str:
    """The split that a file's name tells, as in train-00000-of-00010.parquet or val/000.tar."""
    words = IN_A_NAME.findall(file.lower())
    return ALL_SPLIT_NAMES[words[-1]] if words else ""
