"""What is done to one shard in each stage, as plain classes over pyarrow tables; `run.py` chains them with Ray Data.

A table between two steps has one row, the shard, with its pictures as one nested column: whatever Ray does with blocks and
batches, a shard stays whole and in order. `redo` limits a step to the rows that failed before.
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NoReturn

import pyarrow as pa

from pipeline import images, locations, prompts, sources
from pipeline.captioners.protocol import Caption, Captioner
from pipeline.config import CaptionConfig, EmbedConfig
from pipeline.encoders import TextEncoder
from pipeline.models import ModelRef
from pipeline.session import actor_name
from pipeline.store import CAPTIONS, IMAGES, Stage, Store, content_hash, embeddings_table
from pipeline.underway import EngineDeadError, Loading, Underway, is_engine_death, is_out_of_memory, smaller

SMALLEST = 4  # times that an engine's settings are halved before want of memory stops the run

_PICTURES = pa.large_list(
    pa.struct(
        [
            ("row", pa.int32()), ("id", pa.string()), ("prompt", pa.string()), ("error", pa.string()),
            ("width", pa.int32()), ("height", pa.int32()), ("pixels", pa.large_binary()),
        ]
    )
)  # fmt: skip
_CAPTIONED = pa.large_list(pa.struct([("row", pa.int32()), *[(field.name, field.type) for field in CAPTIONS]]))


def _shard_table(shard: int, redo: bool, column: str, rows: list[dict[str, Any]], kind: pa.DataType, **more: Any) -> pa.Table:
    nested = pa.array([rows], type=kind)
    return pa.table({"shard": [shard], "redo": [redo], column: nested, **{name: [value] for name, value in more.items()}})


@dataclass(frozen=True, kw_only=True)
class Done:
    """What the driver hears of a finished shard."""

    shard: int
    rows: int
    failed: int
    tokens: int


def _done_table(done: Done) -> pa.Table:
    return pa.table({name: [value] for name, value in asdict(done).items()})


class IngestShard:
    """Reads a shard's pictures, checks that each decodes, writes bytes (or their place) and size, or the reason why not."""

    def __init__(self, store: str) -> None:
        self._store = Store(store)
        self._source = self._store.dataset.source
        self._read = sources.Reader(self._source["uri"], self._source["kind"])

    def __call__(self, table: pa.Table) -> pa.Table:
        """Columns in: shard, redo, rows (those of `sources.Row`). Out: those of `Done`."""
        start = time.monotonic()
        item = table.to_pylist()[0]
        shard, old = item["shard"], None
        if (done := _already_done(self._store, "images", "", shard, item["redo"])) is not None:
            return done
        if item["redo"]:
            old = self._store.read_shard("images", "", shard).to_pylist()
        self._read.expect(row["place"] for row in item["rows"])
        rows = [self._row(row) if old is None or _to_redo(old[n]) else old[n] for n, row in enumerate(item["rows"])]
        receipt = self._store.write_shard(
            "images", "", shard, pa.Table.from_pylist(rows, schema=IMAGES), seconds=time.monotonic() - start,
            attempt=_attempt(self._store, "images", "", shard, item["redo"]),
        )  # fmt: skip
        return _done_table(Done(shard=shard, rows=receipt.rows, failed=receipt.failed, tokens=0))

    def _row(self, wanted: dict[str, Any]) -> dict[str, Any]:
        row = {"id": wanted["id"], "label": wanted["label"], "split": wanted["split"], "uri": wanted["place"]}
        if wanted["error"]:
            return row | {"error": wanted["error"]}
        try:
            return row | self._picture(wanted["place"])
        except images.ImageError as error:
            return row | {"error": str(error)}
        except locations.StorageError:
            raise  # no picture is to blame: the run stops, and goes on when the storage is back
        except OSError as error:
            reason = f"cannot be read ({error.strerror or error}): mend it, then run retry"
        except Exception as error:  # a name, a place or bytes that nobody thought of: this row's error, and no other's
            reason = f"cannot be used ({type(error).__name__}: {error}): mend it, then run retry"
        return row | {"error": locations.escaped(reason[:1000])}

    def _picture(self, place: str) -> dict[str, Any]:
        limit = self._source["max_bytes"]
        data = self._read(place, limit)
        if len(data) > limit:
            return {"error": f"file of more than {limit} bytes: shrink it or raise --max-bytes"}
        picture = images.decode(data, max_pixels=self._source["max_pixels"])
        found = {"content_hash": content_hash(data)}
        if (edge := self._source["max_edge"]) and max(picture.size) > edge:
            picture = images.fit(picture, edge)
            data = images.jpeg(picture)
        return found | {"image": data if self._source["pack"] else None, "width": picture.width, "height": picture.height}


def _to_redo(old: dict[str, Any]) -> bool:
    """Whether a retry may mend a row: what the source's listing found fault with has no place to read again."""
    return old["error"] is not None and bool(old["uri"])


class PreparePictures:
    """Decodes and shrinks a shard's pictures for the captioner: CPU work, beside the engine, never in turn with it.

    `yielding`: the engine computes on the same cores, with threads that wait for each other: decoding takes only what it leaves.
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
        if _already_done(self._store, "captions", self._variant, shard, redo) is not None:
            return _shard_table(shard, redo, "pictures", [], _PICTURES)  # by a second run on this store
        columns = ["id", "content_hash", "image", "uri", "label", "error"]
        source = self._store.read_shard("images", "", shard, columns)
        wanted = _rows_to_do(self._store, "captions", self._variant, shard, redo, len(source))
        rows = [self._picture(row, record) for row, record in zip(wanted, source.take(wanted).to_pylist(), strict=True)]
        return _shard_table(shard, redo, "pictures", rows, _PICTURES)

    def _picture(self, row: int, record: dict[str, Any]) -> dict[str, Any]:
        found = {"row": row, "id": record["id"], "error": record["error"] and f"no picture: {record['error']}"}
        if record["error"] is not None:
            return found
        try:
            data = self._store.picture(record["image"], record["uri"], record["content_hash"])
            limit = self._store.dataset.source["max_pixels"]
            picture = images.decode_to_fit(data, self._config.caption_edge, max_pixels=limit)
        except locations.StorageError:
            raise
        except Exception as error:  # of one picture stored by reference, whatever became of it: packed ones were decoded before
            return found | {"error": locations.escaped(f"no picture any more: {error}")[:1000]}
        found["prompt"] = prompts.fill(self._config.prompt, self._store.dataset.classes[record["label"]])
        return found | {"width": picture.width, "height": picture.height, "pixels": picture.tobytes()}


class CaptionPictures:
    """Holds the engine; one call is one shard.

    An engine that breaks is left behind with its process: Ray starts the actor again and hands it the same shard, and the notes
    of `underway` tell the new one what the old one died of.
    """

    def __init__(self, config: CaptionConfig, model: ModelRef, variant: str, run: str) -> None:
        store = Store(config.store)
        self._store, self._variant = store, variant
        self._underway = Underway(store, variant, run)
        self._loading = Loading(store, variant, f"{actor_name()}-{run}")
        self._loading.begin()
        self._config = smaller(config, self._loading.smaller)
        self._thread = one_thread()
        try:
            self._captioner = self._thread.submit(build_captioner, self._config, model).result()
        except Exception as error:
            if is_out_of_memory(error):
                self._loading.out_of_memory(SMALLEST)
            elif not is_engine_death(error):
                raise
            _leave(error)
        self._loading.loaded()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Columns in: shard, redo, pictures. Out: shard, redo, captions, seconds, note; the pixels are dropped here."""
        start = time.monotonic()
        shard, redo, rows = table["shard"][0].as_py(), table["redo"][0].as_py(), table["pictures"][0].as_py()
        if _already_done(self._store, "captions", self._variant, shard, redo) is not None:
            rows = []  # by a second run, since the pictures were prepared
        good = {row["row"]: row for row in rows if row["error"] is None}
        try:
            made, note = self._underway.caption(shard, list(good), lambda part: self._caption([good[row] for row in part]))
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
            {"row": row["row"], "id": row["id"], **_caption_columns(captions.get(row["row"], Caption(error=row["error"])))}
            for row in rows
        ]
        if times := self._loading.smaller:
            note = f"{note}; " * bool(note) + f"settings halved {times} times after running out of memory"
        return _shard_table(shard, redo, "captions", results, _CAPTIONED, seconds=time.monotonic() - start, note=note)

    def _caption(self, rows: list[dict[str, Any]]) -> list[Caption]:
        from PIL import Image

        pictures = [Image.frombytes("RGB", (row["width"], row["height"]), row["pixels"]) for row in rows]
        prompts, ids = [row["prompt"] for row in rows], [row["id"] for row in rows]
        return self._thread.submit(self._captioner, pictures, prompts, ids).result()


def one_thread() -> ThreadPoolExecutor:
    """The thread that a model is loaded and called in.

    Ray makes an actor in one thread and calls it in another. Each thread that computes has an OpenMP team of its own, and once
    teams have more threads than there are cores, OpenMP sleeps at each barrier and no longer spins.
    """
    return ThreadPoolExecutor(1, thread_name_prefix="model")


def _leave(error: BaseException) -> NoReturn:
    """Ends this process, which alone gives back what a broken engine holds (memory of a GPU above all)."""
    print(f"the engine is started again after: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(70)


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
        if (done := _already_done(self._store, "captions", self._variant, item["shard"], item["redo"])) is not None:
            Underway(self._store, self._variant, "").finished(item["shard"])
            return done  # the first to finish a shard has it: vectors may have been made of it already
        rows = _merged(self._store, "captions", self._variant, item["shard"], item["redo"], item["captions"])
        receipt = self._store.write_shard(
            "captions", self._variant, item["shard"], pa.Table.from_pylist(rows, schema=CAPTIONS), seconds=item["seconds"],
            attempt=_attempt(self._store, "captions", self._variant, item["shard"], item["redo"]), note=item["note"],
        )  # fmt: skip
        Underway(self._store, self._variant, "").finished(item["shard"])
        tokens = sum(row["output_tokens"] or 0 for row in item["captions"])
        return _done_table(Done(shard=item["shard"], rows=receipt.rows, failed=receipt.failed, tokens=tokens))


class EmbedCaptions:
    """Holds the encoder; one call reads, encodes and writes one shard: captions and vectors are small and need not travel."""

    def __init__(self, config: EmbedConfig, model: ModelRef, captions: str, variant: str) -> None:
        self._thread = one_thread()
        load = partial(TextEncoder, model, config.pooling or "mean", batch=config.encoder_batch, long_texts=config.long_captions)
        self._encoder = self._thread.submit(load).result()
        self._store = Store(config.store)
        self._captions, self._variant = captions, variant

    def __call__(self, table: pa.Table) -> pa.Table:
        """Columns in: shard, redo. Out: those of `Done`."""
        start = time.monotonic()
        shard, redo = table["shard"][0].as_py(), table["redo"][0].as_py()
        of = self._store.receipt("captions", self._captions, shard)
        made_before = self._store.is_finished("embeddings", self._variant, shard)
        before = self._store.receipt("embeddings", self._variant, shard) if made_before else None
        if before is not None and not redo and before.belongs_to(of):
            return _done_table(Done(shard=shard, rows=before.rows, failed=before.failed, tokens=0))
        # Failed rows alone are redone where the others are known to be of these captions: the receipt speaks for all.
        redo = redo and before is not None and before.source == of.checksum
        source = self._store.read_shard("captions", self._captions, shard, ["id", "caption", "others", "error"])
        wanted = _rows_to_do(self._store, "embeddings", self._variant, shard, redo, len(source))
        texts = list(zip(wanted, source.take(wanted).to_pylist(), strict=True))
        good = [(row, text) for row, text in texts if text["error"] is None]
        groups = [[text["caption"], *(text["others"] or [])] for _, text in good]
        encoded = self._thread.submit(self._encoder.averaged, groups).result()
        made = {
            row: {"embedding": encoded.vectors[n], "tokens": encoded.tokens[n], "truncated": encoded.truncated[n]}
            for n, (row, _) in enumerate(good)
        }
        fresh = [
            {"row": row, "id": text["id"], "error": text["error"] and f"no caption: {text['error']}", **made.get(row, {})}
            for row, text in texts
        ]
        rows = _merged(self._store, "embeddings", self._variant, shard, redo, fresh)
        receipt = self._store.write_shard(
            "embeddings", self._variant, shard, embeddings_table(rows, self._encoder.dim), seconds=time.monotonic() - start,
            attempt=before.attempt + 1 if before else 1, source=of.checksum,
        )  # fmt: skip
        return _done_table(Done(shard=shard, rows=receipt.rows, failed=receipt.failed, tokens=sum(encoded.tokens)))


def _already_done(store: Store, stage: Stage, variant: str, shard: int, redo: bool) -> pa.Table | None:
    """The result of a shard that another run, or a worker that died afterwards, has finished meanwhile.

    Several shards share a block where a shard is quick, and Ray repeats the whole block of a worker that died.
    """
    if redo or not store.is_finished(stage, variant, shard):
        return None
    receipt = store.receipt(stage, variant, shard)
    return _done_table(Done(shard=shard, rows=receipt.rows, failed=receipt.failed, tokens=0))


def _caption_columns(caption: Caption) -> dict[str, Any]:
    columns = asdict(caption)
    columns["caption"] = columns.pop("text")
    return columns


def _rows_to_do(store: Store, stage: Stage, variant: str, shard: int, redo: bool, count: int) -> list[int]:
    if not redo:
        return list(range(count))
    errors = store.read_shard(stage, variant, shard, ["error"])["error"]
    return [row for row, error in enumerate(errors.to_pylist()) if error is not None]


def _merged(
    store: Store, stage: Stage, variant: str, shard: int, redo: bool, fresh: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The shard's rows with the fresh ones in their places."""
    rows = store.read_shard(stage, variant, shard).to_pylist() if redo else [{}] * len(fresh)
    for new in fresh:
        rows[new["row"]] = {name: value for name, value in new.items() if name != "row"}
    return rows


def _attempt(store: Store, stage: Stage, variant: str, shard: int, redo: bool) -> int:
    return store.receipt(stage, variant, shard).attempt + 1 if redo else 1
