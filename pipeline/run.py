"""The pipeline's verbs as Ray Data chains: ingest, caption, embed, describe, retry. The only file here that
builds Ray objects.

Every chain is: shards still to do -> steps of `shards.py` -> one summary row a shard. A killed driver, worker
or node costs the shards in flight; the same command goes on from the receipts. `python -m pipeline describe
--images DIR --store STORE`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from pipeline import placement
from pipeline.config import CaptionConfig, DescribeConfig, EmbedConfig, RetryConfig, SourceConfig
from pipeline.encoders import models
from pipeline.errors import SettingsError
from pipeline.presets import ENCODER_PRESETS
from pipeline.session import spare_cores, start_ray
from pipeline.sources.plan import Plan, Row, differences, make_plan, notes
from pipeline.stages.caption import CaptionPictures, PreparePictures, WriteCaptions
from pipeline.stages.embed import EmbedCaptions
from pipeline.stages.failures import check_failures, plain_error
from pipeline.stages.ingest import IngestShard
from pipeline.stages.variants import CaptionVariant, EmbedVariant
from pipeline.store import Stage, Store, locations, lock

if TYPE_CHECKING:
    import ray.data

Chain = Callable[["ray.data.Dataset"], "ray.data.Dataset"]


def ingest(config: SourceConfig) -> None:
    """Source -> images stage."""
    if locations.is_inside(config.store, config.images):
        message = (
            f"store={config.store}: lies in images={config.images}, and would be taken for pictures; put it "
            "elsewhere."
        )
        raise SettingsError(message)
    if locations.is_inside(config.images, config.store) and locations.is_local(config.store):
        message = (
            f"store={config.store}: holds images={config.images}; put the store beside the pictures and not "
            "around them."
        )
        raise SettingsError(message)
    locations.check_writable("store", config.store)
    plan = make_plan(config)
    store = Store(config.store) if Store.exists(config.store) else Store.create(config.store, plan.dataset)
    _check_same_source(store, plan)
    for note in notes(plan.dataset):
        _say(f"ingest: {note}")
    items = [_ingest_item(plan, shard, redo=False) for shard in store.pending("images")]
    _run("ingest", store, "images", "", items, _ingest_chain(config.store), config.max_failure_rate)


def caption(config: CaptionConfig, model: models.ModelRef | None = None) -> str:
    """Images -> captions; returns the caption variant. `model`: which it is, where that is known already."""
    store = Store(config.store)
    store.require_complete("images")
    model = model or captioner_model(config)
    variant = CaptionVariant.of(config, model)
    served = variant.engine == "openai"
    packages = ("openai",) if served else ("vllm", "transformers", "torch")
    _record_variant(
        store, "captions", variant.name, variant.record(), packages, config.base_url if served else ""
    )
    items = _shard_items(store.pending("captions", variant.name), redo=False)
    _run(
        "caption",
        store,
        "captions",
        variant.name,
        items,
        _caption_chain(config, model, variant.name),
        config.max_failure_rate,
    )
    return variant.name


def embed(config: EmbedConfig, model: models.ModelRef | None = None) -> str:
    """Captions -> embeddings; returns the embedding variant. `model`: which it is, where that is known
    already."""
    store = Store(config.store)
    caption_variant = store.only_variant("captions", config.captions)
    store.require_complete("captions", caption_variant)
    model = model or encoder_model(config)
    variant = EmbedVariant.of(replace(config, captions=caption_variant), model)
    _record_variant(store, "embeddings", variant.name, variant.record(), ("transformers", "torch"))
    todo = {*store.pending("embeddings", variant.name), *store.outdated(variant.name, caption_variant)}
    items = _shard_items(sorted(todo), redo=False)
    chain = _embed_chain(config, model, caption_variant, variant.name)
    _run("embed", store, "embeddings", variant.name, items, chain, config.max_failure_rate)
    return variant.name


def describe(config: DescribeConfig) -> str:
    """ingest, caption and embed; returns the embedding variant. Both models are found before anything is paid
    for."""
    captioning, embedding = config.part(CaptionConfig), config.part(EmbedConfig)
    captioner, encoder = captioner_model(captioning), encoder_model(embedding)
    if config.images:
        ingest(config.part(SourceConfig))
    caption_variant = caption(captioning, captioner)
    return embed(replace(embedding, captions=caption_variant), encoder)


def retry(config: RetryConfig) -> None:
    """Redoes the failed rows of every stage and variant, with the settings on record; finds every model
    before it starts."""
    store = Store(config.store)
    captions = {
        name: failed
        for name in store.variants("captions")
        if (failed := _failed_shards(store, "captions", name))
    }
    captioners = {
        name: _recorded_captioner(store, name, config) for name in captions if _has_engine(store, name)
    }
    embeddings = {
        name: failed
        for name in store.variants("embeddings")
        if (failed := _failed_shards(store, "embeddings", name))
    }
    encoders = {name: _recorded_encoder(store, name, config) for name in embeddings}
    store = _with_raised_limits(store, config)
    if failed := _failed_shards(store, "images", ""):
        plan = _recorded_plan(store, failed)
        items = [_ingest_item(plan, shard, redo=True) for shard in failed]
        _run("retry images", store, "images", "", items, _ingest_chain(config.store), config.max_failure_rate)
    for variant, (caption_config, model) in captioners.items():
        caption_chain = _caption_chain(caption_config, model, variant)
        items = _shard_items(captions[variant], redo=True)
        _run("retry", store, "captions", variant, items, caption_chain, config.max_failure_rate)
    for variant, (embed_config, model) in encoders.items():
        embed_chain = _embed_chain(embed_config, model, embed_config.captions, variant)
        items = _shard_items(embeddings[variant], redo=True)
        _run("retry", store, "embeddings", variant, items, embed_chain, config.max_failure_rate)
    for variant in captions.keys() - captioners.keys():
        rows = sum(receipt.failed for receipt in store.receipts("captions", variant).values())
        _say(
            f"retry: {rows} rows of {variant} have no caption: it was imported, so import again from a file "
            "that has them"
        )
    for variant in captions.keys() - captioners.keys():
        rows = sum(receipt.failed for receipt in store.receipts("captions", variant).values())
        check_failures(store, "captions", variant, rows, config.max_failure_rate)
    if not (failed or captions or embeddings):
        _say("retry: no row has failed; nothing to do")


# Chains: where resources, batch and pool sizes stand, each with its reason.


def _ingest_chain(store: str) -> Chain:
    def build(ds: ray.data.Dataset) -> ray.data.Dataset:
        # One CPU a task: reading and decoding one shard is one thread of work.
        return ds.map_batches(
            IngestShard,
            fn_constructor_args=(store,),
            **_shard_batches(),
            num_cpus=1,
            compute=_actors(spare_cores()),
        )

    return build


def _caption_chain(config: CaptionConfig, model: models.ModelRef, variant: str) -> Chain:
    run = uuid.uuid4().hex[:12]  # tells an engine's death in this run from the death of an earlier run

    def build(ds: ray.data.Dataset) -> ray.data.Dataset:
        placed = placement.captioners(config, model, Store(config.store).dataset.rows)
        # Decoding keeps its own actors: fused with the engine's it would run in turn with it.
        ds = ds.map_batches(
            PreparePictures,
            fn_constructor_args=(config, variant, placed.crowded),
            **_shard_batches(),
            num_cpus=1,
            compute=_actors(placed.decoders),
        )
        # A whole GPU an engine: two vLLM engines on one card race for its memory at start-up. The pool is
        # fixed: a growing one reaches its size minutes late.
        ds = ds.map_batches(
            CaptionPictures,
            fn_constructor_args=(config, model, variant, run),
            **_shard_batches(),
            num_cpus=placed.cpus,
            num_gpus=placed.gpus,
            compute=_actors(placed.actors),
        )
        return ds.map_batches(
            WriteCaptions,
            fn_constructor_args=(config.store, variant),
            **_shard_batches(),
            num_cpus=0.5,
            compute=_actors(1),
        )

    return build


def _embed_chain(config: EmbedConfig, model: models.ModelRef, caption_variant: str, variant: str) -> Chain:
    def build(ds: ray.data.Dataset) -> ray.data.Dataset:
        placed = placement.encoders(config, model, Store(config.store).dataset.rows)
        return ds.map_batches(
            EmbedCaptions,
            fn_constructor_args=(config, model, caption_variant, variant),
            **_shard_batches(),
            num_cpus=placed.cpus,
            num_gpus=placed.gpus,
            compute=_actors(placed.actors),
        )

    return build


def _shard_batches() -> dict[str, Any]:
    # A row is a shard, so a batch of one is the shard; pyarrow, since numpy would strip trailing zero bytes
    # of pixels.
    return {"batch_size": 1, "batch_format": "pyarrow"}


def _actors(size: int) -> ray.data.ActorPoolStrategy:
    from ray.data import ActorPoolStrategy

    return ActorPoolStrategy(size=size)


def _run(
    verb: str,
    store: Store,
    stage: Stage,
    variant: str,
    items: list[dict[str, Any]],
    chain: Chain,
    max_rate: float,
) -> None:
    """Drives a chain over the shards to do, shows progress, and stops when too many rows have failed.

    Raises:
        SettingsError: another process is at it: both would pay for the same captions.
    """
    # Where nothing is to do nothing is written.
    with (
        lock.held(locations.join(store.uri, store.folder(stage, variant)), "store")
        if items
        else contextlib.nullcontext()
    ):
        _drive(verb, store, stage, variant, items, chain, max_rate)


def _drive(
    verb: str,
    store: Store,
    stage: Stage,
    variant: str,
    items: list[dict[str, Any]],
    chain: Chain,
    max_rate: float,
) -> None:
    from tqdm import tqdm

    store.remove_leftovers(stage, variant)
    receipts = store.receipts(stage, variant)
    done_rows = sum(r.rows for shard, r in receipts.items())
    redone = {item["shard"] for item in items}
    failed = sum(r.failed for shard, r in receipts.items() if shard not in redone)
    where = f"{store.folder(stage, variant)}"
    if not items:
        _say(f"{verb}: {where} is complete ({done_rows} rows, {failed} failed); nothing to do")
    else:
        if stage != "images":
            _say(f"{verb}: {variant}: loading models for {len(items)} shards")
        start_ray()
        import ray.data

        logging.getLogger("ray.data").setLevel(
            logging.CRITICAL
        )  # its progress, hints and tracebacks; ours stand in their place
        ray.data.DataContext.get_current().enable_progress_bars = False
        tokens = 0
        rows_before = 0 if redone & receipts.keys() else done_rows
        total = sum(receipts[s].rows for s in redone & receipts.keys()) or store.dataset.rows
        with tqdm(
            total=total, initial=rows_before, desc=f"{verb} {variant}".strip(), unit="img", file=sys.stderr
        ) as bar:
            source = ray.data.from_items(items, override_num_blocks=_blocks(len(items), stage))
            rows = iter(chain(source).iter_rows())
            while (row := _next(rows, verb, store)) is not None:
                failed += row["failed"]
                tokens += row["tokens"]
                seconds = bar.format_dict["elapsed"] or 1e-9
                bar.set_postfix_str(
                    f"failed {failed}" + (f", {tokens / seconds:.0f} tok/s" if tokens else "")
                )
                bar.update(row["rows"])
                check_failures(store, stage, variant, failed, max_rate)
        if stage == "captions" and not store.pending(stage, variant):
            store.delete_folder(f"{store.folder(stage, variant)}/underway")
        _say(
            f"{verb}: {sum(r.rows for r in store.receipts(stage, variant).values())} rows in "
            f"{store.uri}/{where}, {failed} failed"
        )
    check_failures(store, stage, variant, failed, max_rate)


def _blocks(count: int, stage: Stage) -> int:
    """Blocks for so many shards. Ray Data pays 5 to 10 ms and some 10 kB in the driver for each block
    (benchmarks/shards.py).

    That is nothing beside a shard of captions, which keeps its own block so that a dead engine costs one
    shard. Ingesting and embedding can take less than that for a shard: there 16 share a block, once there are
    enough to keep all workers busy.
    """
    return count if stage == "captions" else -(-count // max(1, min(16, count // 256)))


def _next(rows: Iterator[dict[str, Any]], verb: str, store: Store) -> dict[str, Any] | None:
    """The next finished shard; what a worker failed of is told in words."""
    try:
        return next(rows, None)
    except Exception as error:
        plain = plain_error(verb, store, error)
        raise plain from (None if plain is not error else error.__cause__)


# What is to do, and the settings on record.


def _shard_items(todo: list[int], *, redo: bool) -> list[dict[str, Any]]:
    return [{"shard": shard, "redo": redo} for shard in todo]


def _ingest_item(plan: Plan, shard: int, *, redo: bool) -> dict[str, Any]:
    return {"shard": shard, "redo": redo, "rows": [asdict(row) for row in plan.shards[shard]]}


def _failed_shards(store: Store, stage: Stage, variant: str) -> list[int]:
    return [shard for shard, receipt in store.receipts(stage, variant).items() if receipt.failed]


def _check_same_source(store: Store, plan: Plan) -> None:
    """A store is of one source, cut in one way: rows would be lost and doubled if a run went on with
    another."""
    if changed := differences(store.dataset, plan.dataset):
        message = (
            f"store={store.uri}: was begun with other pictures or settings, which decide its rows:\n  "
            + "\n  ".join(changed)
            + "\nPass what it was begun with, or ingest into a new store."
        )
        raise SettingsError(message)


def _recorded_plan(store: Store, wanted: list[int]) -> Plan:
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


def _with_raised_limits(store: Store, config: RetryConfig) -> Store:
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


def captioner_model(config: CaptionConfig) -> models.ModelRef:
    """Which model captions: the one that a server holds, or files by their hash or the hub's commit."""
    return (
        _served_model(config)
        if config.captioner == "openai"
        else models.resolve(config.model, config.model_revision)
    )


def encoder_model(config: EmbedConfig) -> models.ModelRef:
    """Which model encodes. A preset's package that is not installed (on a GPU machine) gives way to the same
    model on the hub."""
    preset = ENCODER_PRESETS[config.encoder_preset]
    if preset.twin and config.encoder == preset.encoder and not models.is_installed(config.encoder):
        _say(
            f"note: {config.encoder} is not installed; taking {preset.twin} from the hub, which makes a "
            "variant of its own"
        )
        return models.resolve(preset.twin, preset.twin_revision)
    return models.resolve(config.encoder, config.encoder_revision)


def _served_model(config: CaptionConfig) -> models.ModelRef:
    """The model that a server holds, asked before anything starts."""
    from pipeline.captioners.openai import models_of

    offered = models_of(config.base_url)
    if (config.model and config.model not in offered) or (not config.model and len(offered) != 1):
        message = (
            f"model={config.model!r}: {config.base_url} serves {', '.join(offered)}; pass --model with one "
            "of these."
        )
        raise SettingsError(message)
    return models.ModelRef(name=config.model or offered[0], location=config.base_url, revision="served")


def _record_variant(
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
        _say(f"note: {stage} {variant} was begun with {recorded}, this machine has {versions}")


def _version(package: str) -> str | None:
    from importlib import metadata

    for name in (package, f"{package}-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def _has_engine(store: Store, variant: str) -> bool:
    return str(store.variant("captions", variant)["engine"]) != "imported"


def _recorded_captioner(
    store: Store, variant: str, runtime: RetryConfig
) -> tuple[CaptionConfig, models.ModelRef]:
    record = store.variant("captions", variant)
    made = CaptionVariant.recorded(record)
    if made.engine == "openai":
        config = made.config(replace(runtime, base_url=runtime.base_url or record["versions"]["server"]))
        return config, _served_model(config)
    config = made.config(replace(runtime, base_url=CaptionConfig.base_url))
    return config, _recorded_model(made.model, made.revision)


def _recorded_encoder(
    store: Store, variant: str, runtime: RetryConfig
) -> tuple[EmbedConfig, models.ModelRef]:
    made = EmbedVariant.recorded(store.variant("embeddings", variant))
    return made.config(runtime), _recorded_model(made.encoder, made.revision)


def _recorded_model(name: str, revision: str) -> models.ModelRef:
    if not revision.startswith("files-"):
        return models.ModelRef(name=name, location=name, revision=revision)
    model = models.resolve(name)
    if model.revision != revision:
        message = (
            f"model={name!r}: its files have changed since the variant was made; run caption or embed for a "
            "new variant."
        )
        raise SettingsError(message)
    return model


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
