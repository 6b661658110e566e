"""Image folders: DIR/<class>/*.jpg or DIR/<split>/<class>/*.jpg."""

from __future__ import annotations

import os
from collections import Counter

from pipeline.config import SourceConfig
from pipeline.errors import SettingsError
from pipeline.sources.entries import ALL_SPLIT_NAMES, SPLIT_NAMES, Entry, Listing, make_entry, some_of
from pipeline.sources.files import list_files, list_folders
from pipeline.sources.images import EXTENSIONS
from pipeline.store import locations
from pipeline.store.locations import escaped, place_of


def list_folder(config: SourceConfig) -> Listing:
    files = list_files(config.images)
    folders = _class_folders(config.images, files)
    # Where the first level holds splits, only they count; otherwise the first level is the classes. A folder
    # called `train` whose pictures lie in itself is a class beside others.
    named = {top for top, _ in folders if top.lower() in SPLIT_NAMES}
    pictures = [key.split("/") for key, _ in files if key.lower().endswith(EXTENSIONS)]
    deep, flat = ({parts[0] for parts in pictures if (len(parts) > 2) == below} for below in (True, False))
    has_splits = bool(named) and (
        bool(named & deep) or not named & flat or {top for top, _ in folders} <= named
    )
    splits = ALL_SPLIT_NAMES if has_splits else {}
    entries: list[Entry] = []
    skipped = loose = 0
    beside: Counter[str] = Counter()
    for key, size in files:
        parts = key.split("/")
        is_picture = key.lower().endswith(EXTENSIONS)
        if has_splits and len(parts) > 1 and parts[0].lower() not in splits:
            beside[parts[0]] += is_picture
        elif len(parts) < (3 if has_splits else 2):
            loose += is_picture
        elif not is_picture:
            skipped += 1
        else:
            label, split = (parts[1], splits[parts[0].lower()]) if has_splits else (parts[0], "")
            entries.append(make_entry(id=key, label=label, split=split, size=size, place=place_of(key)))
    if not entries:
        message = (
            f"images={config.images}: no pictures found; expected DIR/<class>/*.jpg or "
            f"DIR/<split>/<class>/*.jpg with splits train, val or test and endings {' '.join(EXTENSIONS)}; "
            "or tars, Parquet files or a .jsonl."
        )
        raise SettingsError(message)
    keys = {below if has_splits else top for top, below in folders if not has_splits or top.lower() in splits}
    notes = []
    if lost := sum(beside.values()):
        where = some_of(name for name, count in beside.items() if count)
        notes.append(
            f"{lost} pictures are left out: they lie beside the splits, in {where} (splits are train, val "
            "and test)"
        )
    if loose:
        notes.append(f"{loose} pictures are left out: they lie in no class folder")
    return Listing(
        entries=entries, keys=sorted(map(escaped, keys - {""})), skipped=skipped, notes=tuple(notes)
    )


def _class_folders(uri: str, files: list[tuple[str, int]]) -> set[tuple[str, str]]:
    """The first two folder levels; on a disk also those without a file, since an empty class is a class."""
    folders = {
        (parts[0], parts[1] if len(parts) > 2 else "") for key, _ in files if len(parts := key.split("/")) > 1
    }
    if locations.is_local(uri):
        _, root = locations.resolve(uri)
        for top in list_folders(root):
            folders |= {(top, below) for below in ["", *list_folders(os.path.join(root, top))]}
    return folders
