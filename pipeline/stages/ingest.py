"""Ingesting a shard: pictures are read, checked and stored, or the reason why not."""

from __future__ import annotations

import time
from typing import Any

import pyarrow as pa

from pipeline.sources import images, readers
from pipeline.stages.shard import Done, already_done, attempt, done_table
from pipeline.store import IMAGES, Store, content_hash, locations


class IngestShard:
    """Reads a shard's pictures, checks that each decodes, writes bytes (or their place) and size, or the
    reason why not."""

    def __init__(self, store: str) -> None:
        self._store = Store(store)
        self._source = self._store.dataset.source
        self._read = readers.Reader(self._source["uri"], self._source["kind"])

    def __call__(self, table: pa.Table) -> pa.Table:
        """Columns in: shard, redo, rows (those of `plan.Row`). Out: those of `Done`."""
        start = time.monotonic()
        item = table.to_pylist()[0]
        shard, old = item["shard"], None
        if (done := already_done(self._store, "images", "", shard, item["redo"])) is not None:
            return done
        if item["redo"]:
            old = self._store.read_shard("images", "", shard).to_pylist()
        self._read.expect(row["place"] for row in item["rows"])
        rows = [
            self._row(row) if old is None or _to_redo(old[n]) else old[n]
            for n, row in enumerate(item["rows"])
        ]
        receipt = self._store.write_shard(
            "images",
            "",
            shard,
            pa.Table.from_pylist(rows, schema=IMAGES),
            seconds=time.monotonic() - start,
            attempt=attempt(self._store, "images", "", shard, item["redo"]),
        )
        return done_table(Done(shard=shard, rows=receipt.rows, failed=receipt.failed, tokens=0))

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
        except (
            Exception
        ) as error:  # a name, a place or bytes that nobody thought of: this row's error, and no other's
            reason = f"cannot be used ({type(error).__name__}: {error}): mend it, then run retry"
        return row | {"error": locations.escaped(reason[:1000])}

    def _picture(self, place: str) -> dict[str, Any]:
        limit = self._source["max_bytes"]
        image_bytes = self._read(place, limit)
        if len(image_bytes) > limit:
            return {"error": f"file of more than {limit} bytes: shrink it or raise --max-bytes"}
        picture = images.decode(image_bytes, max_pixels=self._source["max_pixels"])
        columns = {"content_hash": content_hash(image_bytes)}
        if (edge := self._source["max_edge"]) and max(picture.size) > edge:
            picture = images.fit(picture, edge)
            image_bytes = images.jpeg(picture)
        return columns | {
            "image": image_bytes if self._source["pack"] else None,
            "width": picture.width,
            "height": picture.height,
        }


def _to_redo(old: dict[str, Any]) -> bool:
    """Whether a retry may mend a row: what the source's listing found fault with has no place to read
    again."""
    return old["error"] is not None and bool(old["uri"])
