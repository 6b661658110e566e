"""What the store holds: columns of each stage, what dataset.json and receipts say, and how variants are
named."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

SCHEMA_VERSION = 1
Stage = Literal["images", "captions", "embeddings", "features"]
STAGES: tuple[Stage, ...] = ("images", "captions", "embeddings", "features")
VERBS: dict[Stage, str] = {
    "images": "ingest",
    "captions": "caption",
    "embeddings": "embed",
    "features": "features",
}
"""What makes a stage."""
LISTED = ("folder", "webdataset", "parquet")
"""Kinds of sources whose files were found by listing folders."""

IMAGES = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("content_hash", pa.string()),
        pa.field("image", pa.binary()),
        pa.field("uri", pa.string()),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("error", pa.string()),
    ]
)
CAPTIONS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("output_tokens", pa.int32()),
        pa.field("finish_reason", pa.string()),
        pa.field("flag", pa.string()),
        pa.field("others", pa.list_(pa.string())),
        pa.field("error", pa.string()),
    ]
)


EACH = pa.field("each", pa.list_(pa.float16()), nullable=False)
"""Of a picture with several captions: the vectors of all, one behind the other; empty for failed rows."""


def embeddings_schema(dim: int, *, each: bool = False) -> pa.Schema:
    """Schema of an embedding shard whose vectors have `dim` components of unit length, in float16; with
    `each` the vector of every caption stands beside their mean."""
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            # Never null: Parquet has no children for a null list, and pyarrow cannot read such rows back.
            # Failed rows are zero.
            pa.field("embedding", pa.list_(pa.float16(), dim), nullable=False),
            pa.field("tokens", pa.int32()),
            pa.field("truncated", pa.bool_()),
            pa.field("error", pa.string()),
            *([EACH] if each else []),
        ]
    )


def embeddings_table(rows: list[dict[str, Any]], dim: int, *, each: bool = False) -> pa.Table:
    """An embedding shard from rows with `id` and `error`; without one also `embedding`, `tokens`,
    `truncated`, and with `each` that: [captions * dim]."""
    embeddings = np.zeros((len(rows), dim), dtype=np.float16)
    for index, row in enumerate(rows):
        if row["error"] is None:
            embeddings[index] = row["embedding"]
    columns = [pa.array([row.get(name) for row in rows], type=kind) for name, kind in _EMBEDDING_SCALARS]
    nested = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), dim)
    columns = [columns[0], nested, *columns[1:]]
    if each:
        vectors = [np.empty(0) if row["error"] is not None else row["each"] for row in rows]
        columns.append(pa.array([np.asarray(of, np.float16) for of in vectors], type=EACH.type))
    return pa.table(columns, schema=embeddings_schema(dim, each=each))


def features_schema(dim: int, tokens: int = 0) -> pa.Schema:
    """Schema of a shard of vision features: pooled ones of `dim` components, and where they are kept those of
    all patches in `tokens` components, row by row; failed rows are zero, see `embeddings_schema`."""
    pooled = pa.field("pooled", pa.list_(pa.float16(), dim), nullable=False)
    patches = pa.field("tokens", pa.list_(pa.float16(), tokens), nullable=False)
    own = [pooled, patches] if tokens else [pooled]
    return pa.schema([pa.field("id", pa.string(), nullable=False), *own, pa.field("error", pa.string())])


def features_table(
    ids: list[str], errors: list[str | None], pooled: np.ndarray, tokens: np.ndarray | None = None
) -> pa.Table:
    """A shard of vision features from [n, D] and [n, N, D'] float16."""
    arrays = [pooled] if tokens is None else [pooled, tokens.reshape(len(tokens), -1)]
    nested = [pa.FixedSizeListArray.from_arrays(pa.array(each.ravel()), each.shape[1]) for each in arrays]
    schema = features_schema(*(each.shape[1] for each in arrays))
    columns = [pa.array(ids, pa.string()), *nested, pa.array(errors, pa.string())]
    return pa.Table.from_arrays(columns, schema=schema)


_EMBEDDING_SCALARS = (
    ("id", pa.string()),
    ("tokens", pa.int32()),
    ("truncated", pa.bool_()),
    ("error", pa.string()),
)


@dataclass(frozen=True, kw_only=True)
class Split:
    """A contiguous range of shards whose rows all belong to one split."""

    rows: int
    first_shard: int
    num_shards: int


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The content of dataset.json."""

    schema_version: int
    classes: list[str]
    splits: dict[str, Split]
    rows: int
    shards: int
    source: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """Proof that a shard is whole: rows, checksum of the Parquet file, seconds of work, attempt, and what was
    not as usual.

    `flagged` counts doubtful captions, or captions that the encoder did not read to their end. `source` is
    the checksum of the captions that vectors were made of, as the captions' own receipt has it.
    """

    shard: int
    rows: int
    failed: int
    bytes: int
    checksum: str
    seconds: float
    attempt: int
    flagged: int = 0
    note: str = ""
    source: str = ""

    def belongs_to(self, captions: Receipt) -> bool:
        """Whether vectors were made of these captions; receipts of earlier releases do not say, and are
        believed."""
        return self.source in ("", captions.checksum)


def variant_name(prefix: str, settings: dict[str, Any]) -> str:
    """A readable prefix and the hash of every setting: other settings, other folder."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in prefix).strip("-.")[:40]
    return f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def content_hash(image_bytes: bytes) -> str:
    """What tells an encoded picture from any other."""
    return hashlib.sha256(image_bytes).hexdigest()


def part_name(shard: int) -> str:
    return f"part-{shard:05d}"


def check_table(stage: Stage, table: pa.Table, columns: list[str] | None = None) -> None:
    if stage == "embeddings":
        expected = embeddings_schema(_width(table, "embedding"), each=EACH.name in table.column_names)
    elif stage == "features":
        tokens = _width(table, "tokens") if "tokens" in table.column_names else 0
        expected = features_schema(_width(table, "pooled"), tokens)
    else:
        expected = IMAGES if stage == "images" else CAPTIONS
    if columns is not None:
        expected = pa.schema([expected.field(name) for name in columns])
    if not table.schema.equals(expected, check_metadata=False):
        message = (
            f"{stage} shard does not have the columns of the schema.\nfound: {table.schema}\nexpected: "
            f"{expected}"
        )
        raise ValueError(message)


def _width(table: pa.Table, name: str) -> int:
    """Of a column of vectors; 1 where there is none."""
    kind = table.schema.field(name).type if name in table.column_names else None
    return int(kind.list_size) if kind is not None and pa.types.is_fixed_size_list(kind) else 1
