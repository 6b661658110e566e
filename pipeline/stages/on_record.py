"""What a store has on record: its source and plan, and what made its variants; `retry` goes by it, and every
verb checks it."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict, replace
from typing import Any

from pipeline.config import CaptionConfig, EmbedConfig, FeatureConfig, RetryConfig
from pipeline.encoders import models
from pipeline.errors import SettingsError
from pipeline.sources.plan import Plan, Row, differences
from pipeline.stages import which_model
from pipeline.stages.variants import CaptionVariant, EmbedVariant, FeatureVariant
from pipeline.store import Stage, Store


def check_same_source(store: Store, plan: Plan) -> None:
    """A store is of one source, cut in one way: rows would be lost and doubled if a run went on with
    another."""
    if changed := differences(store.dataset, plan.dataset):
        message = (
            f"store={store.uri}: was begun with other pictures or settings, which decide its rows:\n  "
            + "\n  ".join(changed)
            + "\nPass what it was begun with, or ingest into a new store."
        )
        raise SettingsError(message)


def recorded_plan(store: Store, wanted: list[int]) -> Plan:
    """The shards as they were cut, from the ids on record, since a mended file may have another size."""
    columns = ["id", "label", "split", "uri", "error"]
    stored = {shard: store.read_shard("images", "", shard, columns).to_pylist() for shard in wanted}
    shards = [stored.get(shard, []) for shard in range(store.dataset.shards)]
    return Plan(dataset=store.dataset, shards=[[_recorded_row(row) for row in shard] for shard in shards])


def _recorded_row(row: dict[str, Any]) -> Row:
    """What its source got wrong, so that it has no place to be read at, stays wrong: a label, a line of a
    list."""
    error = "" if row["uri"] else row["error"]
    return Row(id=row["id"], label=row["label"], split=row["split"], place=row["uri"], error=error)


def with_raised_limits(store: Store, config: RetryConfig) -> Store:
    """The store with the limits that `retry` was given, which are recorded before a row is read under them.

    All that the old limits kept out has failed and is redone, so the store becomes what an ingest under the
    new ones makes; every later reader goes by the record. A lower limit would leave rows that it does not
    allow. What stood there first is kept beside.
    """
    source = dict(store.dataset.source)
    for name in ("max_pixels", "max_bytes"):
        value, recorded = getattr(config, name), source.get(name, 0)
        if 0 < value < recorded:
            flag = name.replace("_", "-")
            message = (
                f"{name}={value}: the store was made with {recorded}, and can only be given more; leave "
                f"--{flag} out."
            )
            raise SettingsError(message)
        if value > recorded:
            source[name] = value
            source.setdefault("ingested_with", {}).setdefault(name, recorded)
    if source == store.dataset.source:
        return store
    dataset = asdict(replace(store.dataset, source=source))
    store.write_file("dataset.json", (json.dumps(dataset, indent=2, ensure_ascii=False) + "\n").encode())
    return Store(store.uri)


def record_variant(
    store: Store,
    stage: Stage,
    variant: str,
    settings: dict[str, Any],
    packages: tuple[str, ...],
    server: str = "",
) -> None:
    """Versions are recorded but not hashed: an upgrade must not orphan what was paid for; it is told
    instead."""
    versions = {name: version for name in packages if (version := _version(name))} | (
        {"server": server} if server else {}
    )
    store.write_variant(stage, variant, {**settings, "versions": versions})
    recorded = store.variant(stage, variant)["versions"]
    if recorded != versions and store.pending(stage, variant):
        print(
            f"note: {stage} {variant} was begun with {recorded}, this machine has {versions}", file=sys.stderr
        )


def _version(package: str) -> str | None:
    from importlib import metadata

    for name in (package, f"{package}-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def has_engine(store: Store, variant: str) -> bool:
    return str(store.variant("captions", variant)["engine"]) != "imported"


def recorded_captioner(
    store: Store, variant: str, runtime: RetryConfig
) -> tuple[CaptionConfig, models.ModelRef]:
    record = store.variant("captions", variant)
    made = CaptionVariant.recorded(record)
    if made.engine == "openai":
        config = made.config(replace(runtime, base_url=runtime.base_url or record["versions"]["server"]))
        return config, which_model.served_model(config)
    config = made.config(replace(runtime, base_url=CaptionConfig.base_url))
    return config, models.recorded(made.model, made.revision)


def recorded_encoder(store: Store, variant: str, runtime: RetryConfig) -> tuple[EmbedConfig, models.ModelRef]:
    made = EmbedVariant.recorded(store.variant("embeddings", variant))
    return made.config(runtime), models.recorded(made.encoder, made.revision)


def recorded_tower(store: Store, variant: str, runtime: RetryConfig) -> tuple[FeatureConfig, models.ModelRef]:
    made = FeatureVariant.recorded(store.variant("features", variant))
    return made.config(runtime), models.recorded(made.tower, made.revision)
