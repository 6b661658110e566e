"""Vision features of a shard in two steps: decode and cut for the tower beside it, then look and write."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import FeatureConfig
from pipeline.encoders.models import ModelRef
from pipeline.inspect.metrics import Watched
from pipeline.sources import images
from pipeline.stages.shard import (
    Done,
    already_done,
    attempt,
    done_table,
    one_thread,
    rows_to_do,
    shard_table,
)
from pipeline.store import Store, features_table, locations

_VIEWS = pa.large_list(
    pa.struct(
        [("row", pa.int32()), ("id", pa.string()), ("error", pa.string()), ("pixels", pa.large_binary())]
    )
)


class PrepareViews:
    """Decodes a shard's pictures, and resizes and cuts them as the tower wants them: CPU work, beside the
    tower, never in turn with it."""

    def __init__(self, config: FeatureConfig, model: ModelRef, variant: str) -> None:
        from pipeline.encoders import vision

        self._store, self._variant = Store(config.store), variant
        self._facts = vision.describe(model, config.feature_size)
        self._view = self._facts.cut

    def __call__(self, table: pa.Table) -> pa.Table:
        """Columns in: shard, redo. Out: shard, redo, views ([S, S, 3] bytes each)."""
        shard, redo = table["shard"][0].as_py(), table["redo"][0].as_py()
        if already_done(self._store, "features", self._variant, shard, redo) is not None:
            return shard_table(shard, redo, "views", [], _VIEWS)  # by a second run on this store
        columns = ["id", "content_hash", "image", "uri", "error"]
        source = self._store.read_shard("images", "", shard, columns)
        wanted = rows_to_do(self._store, "features", self._variant, shard, redo, len(source))
        rows = [
            {"row": row, "id": record["id"], **self._row(record)}
            for row, record in zip(wanted, source.take(wanted).to_pylist(), strict=True)
        ]
        return shard_table(shard, redo, "views", rows, _VIEWS)

    def _row(self, record: dict[str, Any]) -> dict[str, Any]:
        if record["error"] is not None:
            return {"error": f"no picture: {record['error']}"}
        # A large JPEG is decoded at a fraction of its size that leaves twice what is asked for.
        edge = 2 * max(self._facts.resize, self._facts.size)
        try:
            image_bytes = self._store.picture(record["image"], record["uri"], record["content_hash"])
            limit = self._store.dataset.source["max_pixels"]
            picture = images.decode(image_bytes, max_pixels=limit, shrink_to=edge)
            return {"error": None, "pixels": self._view(picture).tobytes()}
        except locations.StorageError:
            raise
        except Exception as error:  # of one picture stored by reference; packed ones were decoded before
            return {"error": locations.escaped(f"no picture any more: {error}")[:1000]}


class LookAtPictures:
    """Holds the tower; one call looks at one shard and writes it: features of patches are larger than the
    pictures, and need not travel."""

    def __init__(self, config: FeatureConfig, model: ModelRef, variant: str, watched: bool = False) -> None:
        from pipeline.encoders.vision import VisionTower

        # By pictures: one thread for all that computes, see `one_thread`.
        self._thread = one_thread()
        load = partial(VisionTower, model, size=config.feature_size, device=config.device)
        self._tower = self._thread.submit(load).result()
        self._store, self._variant = Store(config.store), variant
        self._batch, self._keeps_tokens = config.tower_batch, config.tokens
        Watched(watched, stage="features", variant=variant).show("engines_up", 1)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Columns in: shard, redo, views. Out: those of `Done`."""
        start = time.monotonic()
        shard, redo, views = table["shard"][0].as_py(), table["redo"][0].as_py(), table["views"][0].as_py()
        if (done := already_done(self._store, "features", self._variant, shard, redo)) is not None:
            return done  # by a second run, since the pictures were prepared
        ids, errors, pooled, tokens = self._begun(shard, redo, views)
        for view in views:
            errors[view["row"]] = view["error"]
        good = [view for view in views if view["error"] is None]
        for first in range(0, len(good), self._batch):
            part = good[first : first + self._batch]
            rows = [view["row"] for view in part]
            seen = self._thread.submit(self._look, [view["pixels"] for view in part]).result()
            pooled[rows] = seen[0]
            if tokens is not None:
                tokens[rows] = seen[1]
        receipt = self._store.write_shard(
            "features",
            self._variant,
            shard,
            features_table(ids, errors, pooled, tokens),
            seconds=time.monotonic() - start,
            attempt=attempt(self._store, "features", self._variant, shard, redo),
        )
        return done_table(Done(shard=shard, rows=receipt.rows, failed=receipt.failed, tokens=0))

    def _begun(
        self, shard: int, redo: bool, views: list[dict[str, Any]]
    ) -> tuple[list[str], list[str | None], np.ndarray, np.ndarray | None]:
        """Ids, errors, [n, D] and [n, N, D'] features of a shard: those on record where rows are redone, else
        zero."""
        facts = self._tower.facts
        shapes = [(facts.dim,)] + [(facts.num_tokens, facts.token_dim)] * self._keeps_tokens
        if redo:
            old = self._store.read_shard("features", self._variant, shard)
            ids, errors = old["id"].to_pylist(), old["error"].to_pylist()
            names = ("pooled", "tokens")
            made = [
                old[name].combine_chunks().flatten().to_numpy().reshape(len(old), *shape).copy()
                for name, shape in zip(names, shapes, strict=False)
            ]
        else:
            ids, errors = [view["id"] for view in views], [None] * len(views)
            made = [np.zeros((len(views), *shape), np.float16) for shape in shapes]
        return ids, errors, made[0], made[1] if self._keeps_tokens else None

    def _look(self, pixels: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        import torch

        size = self._tower.facts.size
        images_BHWC = np.frombuffer(b"".join(pixels), np.uint8).reshape(-1, size, size, 3)
        seen = self._tower(torch.from_numpy(images_BHWC.copy()).permute(0, 3, 1, 2))
        kept = (seen.pooled, seen.tokens) if self._keeps_tokens else (seen.pooled, seen.pooled[:, :0])
        pooled, tokens = (each.cpu().numpy().astype(np.float16) for each in kept)
        return pooled, tokens
