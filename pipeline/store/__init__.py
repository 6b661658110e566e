"""The store on a disk or at s3://: schema, receipts, where bytes are. All that training knows of the
pipeline, but encoders."""

from pipeline.store.schema import (
    CAPTIONS,
    IMAGES,
    LISTED,
    SCHEMA_VERSION,
    STAGES,
    Dataset,
    Receipt,
    Split,
    Stage,
    content_hash,
    embeddings_schema,
    embeddings_table,
    features_table,
    variant_name,
)
from pipeline.store.store import Store

__all__ = [
    "CAPTIONS",
    "IMAGES",
    "LISTED",
    "SCHEMA_VERSION",
    "STAGES",
    "Dataset",
    "Receipt",
    "Split",
    "Stage",
    "Store",
    "content_hash",
    "embeddings_schema",
    "embeddings_table",
    "features_table",
    "variant_name",
]
