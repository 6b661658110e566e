"""`import-captions`: captions made elsewhere become a caption variant, shard by shard, matched by path. No
Ray, no model."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from typing import Any

import pyarrow as pa

from pipeline.captioners import imported
from pipeline.captioners.imported import Captions
from pipeline.config import ImportConfig
from pipeline.errors import SettingsError
from pipeline.sources.entries import ALL_SPLIT_NAMES
from pipeline.stages.failures import check_failures
from pipeline.store import CAPTIONS, Store, variant_name


def import_captions(config: ImportConfig) -> str:
    """Writes a caption variant from a file; returns its name.

    Raises:
        ValueError: the file is malformed, names images that the store lacks, or has the wrong length.
        TooManyFailuresError: more rows lack a caption than `max_failure_rate` allows; the rows are written
            all the same.
    """
    store = Store(config.store)
    store.require_complete("images")
    captions = _read(config, store)
    if not captions:
        message = f"file={config.file}: holds no caption, so there is nothing to import."
        raise SettingsError(message)
    with open(config.file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    name = os.path.basename(config.file)
    settings: dict[str, str | int] = {"engine": "imported", "file": name, "sha256": digest}
    if _positional(config.file) and config.split != "train":
        # The same list matched to other pictures; train's came first and has no such entry.
        settings["split"] = config.split
    several = max(len(_trimmed(found)) for found in captions.values())
    if several > 1:  # of one there is no word, for the names of earlier variants
        settings["captions_per_image"] = several
    variant = variant_name(f"imported-{os.path.basename(config.file).split('.')[0]}", settings)
    store.write_variant("captions", variant, {**settings, "versions": {}})
    done = store.receipts("captions", variant)
    for shard in range(store.dataset.shards):
        if shard in done and not done[shard].failed:
            continue
        start = time.monotonic()
        keys = store.read_shard("images", "", shard, ["id", "error"]).to_pylist()
        rows = [_row(key["id"], key["error"], captions.get(key["id"], ()), name) for key in keys]
        table = pa.Table.from_pylist(rows, schema=CAPTIONS)
        # A picture that was mended since then has its caption now.
        if shard not in done or not store.read_shard("captions", variant, shard).equals(table):
            attempt = done[shard].attempt + 1 if shard in done else 1
            store.write_shard(
                "captions", variant, shard, table, seconds=time.monotonic() - start, attempt=attempt
            )
    receipts = store.receipts("captions", variant).values()
    failed = sum(receipt.failed for receipt in receipts)
    print(
        f"import-captions: captions of {store.dataset.rows - failed} pictures into {variant}"
        + (f", up to {several} each" if several > 1 else "")
        + f"; {failed} rows without",
        file=sys.stderr,
    )
    check_failures(store, "captions", variant, failed, config.max_failure_rate)
    return variant


def _row(key: str, image_error: str | None, captions: Captions, file: str) -> dict[str, Any]:
    if image_error is not None:
        return {"id": key, "error": f"no picture: {image_error}"}
    trimmed = _trimmed(captions)
    if not trimmed:
        return {"id": key, "error": f"no caption for it in {file}: add one and import again"}
    return {"id": key, "caption": trimmed[0], "others": trimmed[1:] or None}


def _trimmed(captions: Captions) -> list[str]:
    """Without line breaks, without empty ones."""
    return [text for text in (" ".join(caption.split()) for caption in captions) if text]


def _read(config: ImportConfig, store: Store) -> dict[str, Captions]:
    if not os.path.isfile(config.file):
        message = f"file={config.file}: no such file."
        raise SettingsError(message)
    if _positional(config.file):
        if (kind := store.dataset.source.get("kind")) not in ("folder", "test"):
            message = (
                f"file={config.file}: a list without paths goes by the order of an image folder, and the "
                f"store was made of {kind}: give captions as JSONL of path and caption."
            )
            raise SettingsError(message)
        ids = [key for shard in store.split_shards(config.split) for key in _ids(store, shard)]
        has_splits = all(key.split("/")[0].lower() in ALL_SPLIT_NAMES and key.count("/") > 1 for key in ids)
        return imported.read_positional(config.file, ids, label_depth=2 if has_splits else 1)
    known = {key for shard in range(store.dataset.shards) for key in _ids(store, shard)}
    captions = imported.matched(imported.read_jsonl(config.file), known)
    unknown = sorted(captions.keys() - known)
    if unknown and not config.ignore_unknown:
        message = (
            f"{config.file}: {len(unknown)} of {len(captions)} paths are not in the store, such as "
            f"{', '.join(unknown[:3])}; the store's look like {min(known)}. Mend the paths, or pass "
            "--ignore-unknown."
        )
        raise SettingsError(message)
    return captions


def _positional(file: str) -> bool:
    return file.endswith((".pth", ".pt"))


def _ids(store: Store, shard: int) -> list[str]:
    ids: list[str] = store.read_shard("images", "", shard, ["id"])["id"].to_pylist()
    return ids
