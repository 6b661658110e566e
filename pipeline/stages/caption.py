"""Captioning a shard in three steps: decode beside the engine, caption in it, write."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from concurrent.futures import wait
from dataclasses import asdict
from typing import Any, NoReturn

import psutil
import pyarrow as pa

from pipeline.captioners import prompts
from pipeline.captioners.protocol import Caption, Captioner, HasProcess
from pipeline.config import CaptionConfig
from pipeline.encoders.models import ModelRef
from pipeline.inspect.metrics import Watched
from pipeline.session import actor_name
from pipeline.sources import images
from pipeline.stages.engine_deaths import (
    EngineDeadError,
    Loading,
    Underway,
    is_engine_death,
    is_out_of_memory,
    smaller,
)
from pipeline.stages.shard import (
    Done,
    already_done,
    attempt,
    done_table,
    merged,
    one_thread,
    rows_to_do,
    shard_table,
)
from pipeline.store import CAPTIONS, Store, locations

WATCH_S = 2.0  # between two looks at an engine that works in a process of its own
_PR_SET_CHILD_SUBREAPER = 36  # of prctl(2)
SMALLEST = 4  # times that an engine's settings are halved before want of memory stops the run

_PICTURES = pa.large_list(
    pa.struct(
        [
            ("row", pa.int32()),
            ("id", pa.string()),
            ("prompt", pa.string()),
            ("error", pa.string()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("pixels", pa.large_binary()),
        ]
    )
)
_CAPTIONED = pa.large_list(
    pa.struct([("row", pa.int32()), *[(field.name, field.type) for field in CAPTIONS]])
)


class PreparePictures:
    """Decodes and shrinks a shard's pictures for the captioner: CPU work, beside the engine, never in turn
    with it.

    `yielding`: the engine computes on the same cores, with threads that wait for each other: decoding takes
    only what it leaves.
    """

    def __init__(self, config: CaptionConfig, variant: str, yielding: bool = False) -> None:
        if yielding and hasattr(os, "SCHED_IDLE"):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        self._config = config
        self._variant = variant
        self._store = Store(config.store)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Columns in: shard, redo. Out: shard, redo, pictures (raw RGB)."""
        shard, redo = table["shard"][0].as_py(), table["redo"][0].as_py()
        if already_done(self._store, "captions", self._variant, shard, redo) is not None:
            return shard_table(shard, redo, "pictures", [], _PICTURES)  # by a second run on this store
        columns = ["id", "content_hash", "image", "uri", "label", "error"]
        source = self._store.read_shard("images", "", shard, columns)
        wanted = rows_to_do(self._store, "captions", self._variant, shard, redo, len(source))
        rows = [
            self._picture(row, record)
            for row, record in zip(wanted, source.take(wanted).to_pylist(), strict=True)
        ]
        return shard_table(shard, redo, "pictures", rows, _PICTURES)

    def _picture(self, row: int, record: dict[str, Any]) -> dict[str, Any]:
        prepared = {
            "row": row,
            "id": record["id"],
            "error": record["error"] and f"no picture: {record['error']}",
        }
        if record["error"] is not None:
            return prepared
        try:
            image_bytes = self._store.picture(record["image"], record["uri"], record["content_hash"])
            limit = self._store.dataset.source["max_pixels"]
            picture = images.decode_to_fit(image_bytes, self._config.caption_edge, max_pixels=limit)
        except locations.StorageError:
            raise
        except Exception as error:  # of one picture stored by reference; packed ones were decoded before
            return prepared | {"error": locations.escaped(f"no picture any more: {error}")[:1000]}
        prepared["prompt"] = prompts.fill(self._config.prompt, self._store.dataset.classes[record["label"]])
        return prepared | {"width": picture.width, "height": picture.height, "pixels": picture.tobytes()}


class CaptionPictures:
    """Holds the engine; one call is one shard.

    An engine that breaks is left behind with its process: Ray starts the actor again and hands it the same
    shard, and the notes of `engine_deaths` tell the new one what the old one died of.
    """

    def __init__(
        self, config: CaptionConfig, model: ModelRef, variant: str, run: str, watched: bool = False
    ) -> None:
        store = Store(config.store)
        self._store, self._variant = store, variant
        self._underway = Underway(store, variant, run)
        self._loading = Loading(store, variant, f"{actor_name()}-{run}")
        self._loading.begin()
        self._config = smaller(config, self._loading.smaller)
        self._thread = one_thread()
        _adopt_orphans()
        try:
            self._captioner = self._thread.submit(build_captioner, self._config, model).result()
        except Exception as error:
            if is_out_of_memory(error):
                self._loading.out_of_memory(SMALLEST)
            elif not is_engine_death(error):
                raise
            _leave(error)
        self._loading.loaded()
        Watched(watched, stage="captions", variant=variant).show("engines_up", 1)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Columns in: shard, redo, pictures. Out: shard, redo, captions, seconds, note; the pixels are
        dropped here."""
        start = time.monotonic()
        shard, redo, rows = table["shard"][0].as_py(), table["redo"][0].as_py(), table["pictures"][0].as_py()
        if already_done(self._store, "captions", self._variant, shard, redo) is not None:
            rows = []  # by a second run, since the pictures were prepared
        good = {row["row"]: row for row in rows if row["error"] is None}
        try:
            made, note = self._underway.caption(
                shard, list(good), lambda share: self._caption([good[row] for row in share])
            )
        except EngineDeadError:
            raise
        except Exception as error:
            if self._config.captioner == "openai":
                raise  # no engine here that could be broken: the server refuses, or is gone
            if is_out_of_memory(error):
                self._underway.innocent(shard)
                self._loading.out_of_memory(SMALLEST)
            else:
                self._underway.said(shard, f"{type(error).__name__}: {error}")
            _leave(error)
        captions = dict(zip(good, made, strict=True))
        results = [
            {
                "row": row["row"],
                "id": row["id"],
                **asdict(captions.get(row["row"], Caption(error=row["error"]))),
            }
            for row in rows
        ]
        if times := self._loading.smaller:
            note = f"{note}; " * bool(note) + f"settings halved {times} times after running out of memory"
        return shard_table(
            shard, redo, "captions", results, _CAPTIONED, seconds=time.monotonic() - start, note=note
        )

    def _caption(self, rows: list[dict[str, Any]]) -> list[Caption]:
        from PIL import Image

        pictures = [Image.frombytes("RGB", (row["width"], row["height"]), row["pixels"]) for row in rows]
        prompts, ids = [row["prompt"] for row in rows], [row["id"] for row in rows]
        call = self._thread.submit(self._captioner, pictures, prompts, ids)
        while not wait([call], timeout=WATCH_S).done:
            if isinstance(self._captioner, HasProcess) and self._captioner.is_dead():
                message = "the engine core's process has ended"
                raise RuntimeError(message)
        return call.result()


def _leave(error: BaseException) -> NoReturn:
    """Ends this process, which alone gives back what a broken engine holds (memory of a GPU above all), and
    what the engine started: a worker whose engine died while it loaded does not end by itself (vLLM 0.29)."""
    print(f"the engine is started again after: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(70)


def _adopt_orphans() -> None:
    """Makes processes whose parents die children of this one, where the system can (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def build_captioner(config: CaptionConfig, model: ModelRef) -> Captioner:
    """The engine that `--captioner` names."""
    if config.captioner == "vllm":
        from pipeline.captioners.vllm import VLLMCaptioner

        return VLLMCaptioner(config, model)
    if config.captioner == "openai":
        from pipeline.captioners.openai import OpenAICaptioner

        return OpenAICaptioner(config, model.name)
    from pipeline.captioners.transformers import TransformersCaptioner

    return TransformersCaptioner(config, model)


class WriteCaptions:
    """Writes a shard of captions; rows that were not redone are taken over from the file that is there."""

    def __init__(self, store: str, variant: str) -> None:
        self._store = Store(store)
        self._variant = variant

    def __call__(self, table: pa.Table) -> pa.Table:
        """Columns in: shard, redo, captions, seconds, note. Out: those of `Done`."""
        item = table.to_pylist()[0]
        if (
            done := already_done(self._store, "captions", self._variant, item["shard"], item["redo"])
        ) is not None:
            Underway(self._store, self._variant, "").finished(item["shard"])
            return done  # the first to finish a shard has it: vectors may have been made of it already
        rows = merged(self._store, "captions", self._variant, item["shard"], item["redo"], item["captions"])
        receipt = self._store.write_shard(
            "captions",
            self._variant,
            item["shard"],
            pa.Table.from_pylist(rows, schema=CAPTIONS),
            seconds=item["seconds"],
            attempt=attempt(self._store, "captions", self._variant, item["shard"], item["redo"]),
            note=item["note"],
        )
        Underway(self._store, self._variant, "").finished(item["shard"])
        tokens = sum(row["output_tokens"] or 0 for row in item["captions"])
        return done_table(Done(shard=item["shard"], rows=receipt.rows, failed=receipt.failed, tokens=tokens))
