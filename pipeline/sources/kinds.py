"""Which kind of source an address is, and who lists it."""

from __future__ import annotations

from collections.abc import Callable

from pyarrow import fs

from pipeline.config import SourceConfig
from pipeline.errors import SettingsError
from pipeline.sources.entries import Listing
from pipeline.sources.files import list_files
from pipeline.sources.folder import list_folder
from pipeline.sources.images import EXTENSIONS
from pipeline.sources.jsonl import list_jsonl
from pipeline.sources.parquet import list_parquet
from pipeline.sources.webdataset import list_tars
from pipeline.store import locations


def kind_of(uri: str) -> str:
    ending = locations.split_options(uri)[0].rsplit(".", 1)[-1].lower()
    by_ending = {"tar": "webdataset", "parquet": "parquet", "jsonl": "jsonl", "ndjson": "jsonl"}
    if ending in by_ending:
        return by_ending[ending]
    filesystem, root = locations.resolve(uri)
    if filesystem.get_file_info(root).type == fs.FileType.NotFound:
        message = (
            f"images={uri}: no such folder or file; pass --images with a folder of class folders, tars, "
            "Parquet files or a list."
        )
        raise SettingsError(message)
    # Tars and Parquet files lie at the top or one folder down; pictures of an image folder lie below class
    # folders.
    names = [name for name, _ in list_files(uri, depth=2)]
    counts = {kind: sum(name.lower().endswith(f".{kind}") for name in names) for kind in ("tar", "parquet")}
    pictures = sum(name.lower().endswith(EXTENSIONS) for name in names)
    kinds = {by_ending[kind]: count for kind, count in counts.items() if count} | (
        {"folder": pictures} if pictures else {}
    )
    if len(kinds) > 1:
        what = ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
        message = (
            f"images={uri}: holds files of several kinds ({what}): say which with --source-kind, or move the "
            "others away."
        )
        raise SettingsError(message)
    return next(iter(kinds), "folder")


LISTINGS: dict[str, Callable[[SourceConfig], Listing]] = {
    "folder": list_folder,
    "webdataset": list_tars,
    "parquet": list_parquet,
    "jsonl": list_jsonl,
}
