"""Columns of the store's vision features (`gpt4image features`), for methods that learn from what a frozen
tower says of pictures as they are evaluated: without crops and flips of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.encoders.cut import Cut
from pipeline.encoders.vision import TIMM_FAMILY
from pipeline.errors import SettingsError
from pipeline.store import Store
from training.data.columns import Array


@dataclass(frozen=True, kw_only=True)
class FeatureColumns:
    """Columns `pooled` ([n, D] float16, unit length) and, if asked for, `tokens` ([n, N, D'] float16), zero
    where there is no picture (see `columns.Columns`)."""

    variant: str
    names: tuple[str, ...] = ("pooled",)
    token_dim: int = 0
    """D', to take a row of tokens apart."""

    def read(self, store: Store, shard: int, ids: pa.ChunkedArray) -> dict[str, Array]:
        """See the class.

        Raises:
            SettingsError: the features are of other pictures.
        """
        table = store.read_shard("features", self.variant, shard, ["id", *self.names])
        if not ids.equals(table["id"]):
            message = f"shard {shard}: images and features hold different rows; was the store copied in part?"
            raise SettingsError(message)
        found: dict[str, Array] = {}
        for name in self.names:
            flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            shape = (len(table), -1, self.token_dim) if name == "tokens" else (len(table), -1)
            found[name] = flat.astype(np.float16, copy=False).reshape(shape)
        return found


def found(store: Store, variant: str = "", *, tokens: bool = False) -> tuple[str, dict[str, Any]]:
    """(name, record) of a finished variant of vision features; the record has `tower`, `dim`, `grid`,
    `token_dim`, `feature_size` and more (`encoders.vision.TowerFacts`).

    Raises:
        SettingsError: none, several and none named, an unfinished one, or one without tokens that are needed.
    """
    name = store.only_variant("features", variant)
    store.require_complete("features", name)
    record = store.variant("features", name)
    if tokens and not record["tokens"]:
        message = (
            f"feature_variant={name}: holds pooled features only; make others with: gpt4image features "
            f"--tokens --tower {record['tower']} --store {store.uri}"
        )
        raise SettingsError(message)
    return name, record


def cut_of(record: dict[str, Any]) -> Cut:
    """How the pictures were cut that a record's features are of."""
    return Cut(
        size=record["feature_size"],
        resize=record["resize"],
        interpolation=record["interpolation"],
        rounds=record["family"] == TIMM_FAMILY,
    )


def made_by(store: Store, revision: str, size: int, named: str = "") -> str:
    """The finished variant that a tower of this revision made at its size; empty: there is none, and none was
    named.

    Raises:
        SettingsError: the named one is not there, not whole, or another tower's.
    """
    for name in [found(store, named)[0]] if named else store.variants("features"):
        made = store.variant("features", name)
        if made.get("revision") == revision and made.get("feature_size") == size:
            if named or not store.pending("features", name):
                return name
        elif named:
            message = (
                f"image_features={named}: was made by {made.get('tower')} ({made.get('revision')}) at "
                f"{made.get('feature_size')} pixels, and the run's is {revision} at {size}; make others with "
                "`gpt4image features`, or leave the flag out."
            )
            raise SettingsError(message)
    return ""
