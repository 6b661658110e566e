"""Embedding a shard: read its captions, encode, write."""

from __future__ import annotations

import time
from functools import partial

import pyarrow as pa

from pipeline.config import EmbedConfig
from pipeline.encoders.models import ModelRef
from pipeline.encoders.text import TextEncoder
from pipeline.inspect.metrics import Watched
from pipeline.stages.shard import Done, done_table, merged, one_thread, rows_to_do
from pipeline.store import Store, embeddings_table


class EmbedCaptions:
    """Holds the encoder; one call reads, encodes and writes one shard: captions and vectors are small and
    need not travel."""

    def __init__(
        self,
        config: EmbedConfig,
        model: ModelRef,
        caption_variant: str,
        variant: str,
        watched: bool = False,
    ) -> None:
        self._thread = one_thread()
        load = partial(
            TextEncoder,
            model,
            config.pooling or "mean",
            batch=config.encoder_batch,
            long_texts=config.long_captions,
            device=config.device,
        )
        self._encoder = self._thread.submit(load).result()
        self._store = Store(config.store)
        self._caption_variant, self._variant = caption_variant, variant
        self._each = config.each_caption
        Watched(watched, stage="embeddings", variant=variant).show("engines_up", 1)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Columns in: shard, redo. Out: those of `Done`."""
        start = time.monotonic()
        shard, redo = table["shard"][0].as_py(), table["redo"][0].as_py()
        of = self._store.receipt("captions", self._caption_variant, shard)
        made_before = self._store.is_finished("embeddings", self._variant, shard)
        before = self._store.receipt("embeddings", self._variant, shard) if made_before else None
        if before is not None and not redo and before.belongs_to(of):
            return done_table(Done(shard=shard, rows=before.rows, failed=before.failed, tokens=0))
        # Failed rows alone are redone where the others are known to be of these captions: the receipt speaks
        # for all.
        redo = redo and before is not None and before.source == of.checksum
        source = self._store.read_shard(
            "captions", self._caption_variant, shard, ["id", "caption", "others", "error"]
        )
        wanted = rows_to_do(self._store, "embeddings", self._variant, shard, redo, len(source))
        records = list(zip(wanted, source.take(wanted).to_pylist(), strict=True))
        good = [(row, record) for row, record in records if record["error"] is None]
        caption_lists = [[record["caption"], *(record["others"] or [])] for _, record in good]
        encoded = self._thread.submit(self._encoder.averaged, caption_lists).result()
        made = {
            row: {
                "embedding": encoded.embeddings[n],
                "tokens": encoded.tokens[n],
                "truncated": encoded.truncated[n],
                **({"each": encoded.each[n].ravel()} if self._each else {}),
            }
            for n, (row, _) in enumerate(good)
        }
        fresh = [
            {
                "row": row,
                "id": record["id"],
                "error": record["error"] and f"no caption: {record['error']}",
                **made.get(row, {}),
            }
            for row, record in records
        ]
        rows = merged(self._store, "embeddings", self._variant, shard, redo, fresh)
        receipt = self._store.write_shard(
            "embeddings",
            self._variant,
            shard,
            embeddings_table(rows, self._encoder.dim, each=self._each),
            seconds=time.monotonic() - start,
            attempt=before.attempt + 1 if before else 1,
            source=of.checksum,
        )
        return done_table(
            Done(shard=shard, rows=receipt.rows, failed=receipt.failed, tokens=sum(encoded.tokens))
        )
