"""The pipeline's verbs as Ray Data chains: ingest, caption, embed, describe, retry. The only file here that builds Ray objects.

Every chain is: shards still to do -> steps of `shards.py` -> one summary row a shard. A killed driver, worker or node costs
the shards in flight; the same command goes on from the receipts. `python -m pipeline describe --images DIR --store STORE`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipeline import models, placement, shards, sources
from pipeline.config import CaptionConfig, DescribeConfig, EmbedConfig, RetryConfig, SourceConfig
from pipeline.failures import check_failures, plain_error
from pipeline.session import spare_cores, start_ray
from pipeline.store import Stage, Store, variant_name

if TYPE_CHECKING:
    import ray.data

Chain = Callable[["ray.data.Dataset"], "ray.data.Dataset"]


def ingest(config: SourceConfig) -> None:
    """Source -> images stage."""
    plan = sources.plan(config)
    if Store.exists(config.store):
        store = Store(config.store)
        _check_same_source(store, plan)
    else:
        store = Store.create(config.store, plan.dataset)
    if skipped := plan.dataset.source["skipped_files"]:
        _say(f"ingest: {skipped} files without a picture's ending are left out")
    items = [_ingest_item(plan, shard, redo=False) for shard in store.pending("images")]
    _run("ingest", store, "images", "", items, _ingest_chain(config.store), config.max_failure_rate)


def caption(config: CaptionConfig) -> str:
    """Images -> captions; returns the caption variant."""
    store = Store(config.store)
    store.require_complete("images")
    model = captioner_model(config)
    settings = _caption_settings(config, model)
    variant = variant_name(f"{config.captioner}-{model.name.rstrip('/').rsplit('/', 1)[-1]}", settings)
    packages = ("openai",) if config.captioner == "openai" else ("vllm", "transformers", "torch")
    _record_variant(store, "captions", variant, settings, packages, config.base_url if config.captioner == "openai" else "")
    items = _shard_items(store.pending("captions", variant), redo=False)
    _run("caption", store, "captions", variant, items, _caption_chain(config, model, variant), config.max_failure_rate)
    return variant


def embed(config: EmbedConfig) -> str:
    """Captions -> embeddings; returns the embedding variant."""
    store = Store(config.store)
    captions = store.only_variant("captions", config.captions)
    store.require_complete("captions", captions)
    model = models.resolve(config.encoder, config.encoder_revision)
    settings = {"captions": captions, "encoder": config.encoder, "revision": model.revision, "pooling": config.pooling}
    settings["long_captions"] = config.long_captions
    variant = variant_name(config.encoder.rsplit("/", 1)[-1].removeprefix("package:"), settings)
    _record_variant(store, "embeddings", variant, settings, ("transformers", "torch"))
    items = _shard_items(store.pending("embeddings", variant), redo=False)
    chain = _embed_chain(config, model, captions, variant)
    _run("embed", store, "embeddings", variant, items, chain, config.max_failure_rate)
    return variant


def describe(config: DescribeConfig) -> str:
    """ingest, caption and embed; returns the embedding variant."""
    from dataclasses import replace

    if config.images:
        ingest(config.part(SourceConfig))
    captions = caption(config.part(CaptionConfig))
    return embed(replace(config.part(EmbedConfig), captions=captions))


def retry(config: RetryConfig) -> None:
    """Redoes the failed rows of every stage and variant, with the settings on record."""
    store = Store(config.store)
    if failed := _failed_shards(store, "images", ""):
        plan = _recorded_plan(store)
        items = [_ingest_item(plan, shard, redo=True) for shard in failed]
        _run("retry images", store, "images", "", items, _ingest_chain(config.store), config.max_failure_rate)
    for variant in store.variants("captions"):
        if (failed := _failed_shards(store, "captions", variant)) and _has_engine(store, variant):
            caption_config, model = _recorded_captioner(store, variant)
            caption_chain = _caption_chain(caption_config, model, variant)
            items = _shard_items(failed, redo=True)
            _run(f"retry {variant}", store, "captions", variant, items, caption_chain, config.max_failure_rate)
    for variant in store.variants("embeddings"):
        if failed := _failed_shards(store, "embeddings", variant):
            embed_config, model = _recorded_encoder(store, variant)
            embed_chain = _embed_chain(embed_config, model, embed_config.captions, variant)
            items = _shard_items(failed, redo=True)
            _run(f"retry {variant}", store, "embeddings", variant, items, embed_chain, config.max_failure_rate)


# Chains: where resources, batch and pool sizes stand, each with its reason.


def _ingest_chain(store: str) -> Chain:
    def build(ds: ray.data.Dataset) -> ray.data.Dataset:
        # One CPU a task: reading and decoding one shard is one thread of work.
        return ds.map_batches(
            shards.IngestShard,
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
            shards.PreparePictures, fn_constructor_args=(config, variant, placed.crowded), **_shard_batches(),
            num_cpus=1, compute=_actors(placed.decoders),
        )  # fmt: skip
        # A whole GPU an engine: two vLLM engines on one card race for its memory at start-up. The pool is fixed: a
        # growing one reaches its size minutes late.
        ds = ds.map_batches(
            shards.CaptionPictures, fn_constructor_args=(config, model, variant, run), **_shard_batches(),
            num_cpus=placed.cpus, num_gpus=placed.gpus, compute=_actors(placed.actors),
        )  # fmt: skip
        return ds.map_batches(
            shards.WriteCaptions, fn_constructor_args=(config.store, variant), **_shard_batches(), num_cpus=0.5,
            compute=_actors(1),
        )  # fmt: skip

    return build


def _embed_chain(config: EmbedConfig, model: models.ModelRef, captions: str, variant: str) -> Chain:
    def build(ds: ray.data.Dataset) -> ray.data.Dataset:
        placed = placement.encoders(config, model, Store(config.store).dataset.rows)
        return ds.map_batches(
            shards.EmbedCaptions, fn_constructor_args=(config, model, captions, variant), **_shard_batches(),
            num_cpus=placed.cpus, num_gpus=placed.gpus, compute=_actors(placed.actors),
        )  # fmt: skip

    return build


def _shard_batches() -> dict[str, Any]:
    # A row is a shard, so a batch of one is the shard; pyarrow, since numpy would strip trailing zero bytes of pixels.
    return {"batch_size": 1, "batch_format": "pyarrow"}


def _actors(size: int) -> ray.data.ActorPoolStrategy:
    from ray.data import ActorPoolStrategy

    return ActorPoolStrategy(size=size)


def _run(verb: str, store: Store, stage: Stage, variant: str, items: list[dict[str, Any]], chain: Chain, max_rate: float) -> None:
    """Drives a chain over the shards to do, shows progress, and stops when too many rows have failed."""
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
        start_ray()
        import ray.data

        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its progress, hints and tracebacks; ours stand in their place
        ray.data.DataContext.get_current().enable_progress_bars = False
        tokens = 0
        rows_before = 0 if redone & receipts.keys() else done_rows
        total = sum(receipts[s].rows for s in redone & receipts.keys()) or store.dataset.rows
        with tqdm(total=total, initial=rows_before, desc=f"{verb} {variant}".strip(), unit="img", file=sys.stderr) as bar:
            source = ray.data.from_items(items, override_num_blocks=_blocks(len(items), stage))
            rows = iter(chain(source).iter_rows())
            while (row := _next(rows, verb, store)) is not None:
                failed += row["failed"]
                tokens += row["tokens"]
                seconds = bar.format_dict["elapsed"] or 1e-9
                bar.set_postfix_str(f"failed {failed}" + (f", {tokens / seconds:.0f} tok/s" if tokens else ""))
                bar.update(row["rows"])
                check_failures(store, stage, variant, failed, max_rate)
        if stage == "captions" and not store.pending(stage, variant):
            store.delete_folder(f"{store.folder(stage, variant)}/underway")
    check_failures(store, stage, variant, failed, max_rate)


def _blocks(count: int, stage: Stage) -> int:
    """Blocks for so many shards. Ray Data pays 5 to 10 ms and some 10 kB in the driver for each block (benchmarks/shards.py).

    That is nothing beside a shard of captions, which keeps its own block so that a dead engine costs one shard. Ingesting and
    embedding can take less than that for a shard: there 16 share a block, once there are enough to keep all workers busy.
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


def _ingest_item(plan: sources.Plan, shard: int, *, redo: bool) -> dict[str, Any]:
    return {"shard": shard, "redo": redo, "rows": [asdict(row) for row in plan.shards[shard]]}


def _failed_shards(store: Store, stage: Stage, variant: str) -> list[int]:
    return [shard for shard, receipt in store.receipts(stage, variant).items() if receipt.failed]


def _check_same_source(store: Store, plan: sources.Plan) -> None:
    if store.dataset.source["fingerprint"] == plan.dataset.source["fingerprint"]:
        return
    message = (
        f"store={store.uri}: was made from {store.dataset.rows} files of {store.dataset.source['uri']}; the folder given now has "
        f"{plan.dataset.rows}, or other names, sizes or splits. Ingest into a new store, or delete this one."
    )
    raise ValueError(message)


def _recorded_plan(store: Store) -> sources.Plan:
    """The shards as they were cut, from the ids on record, since a mended file may have another size."""
    columns = ["id", "label", "split", "uri"]
    shards = [store.read_shard("images", "", shard, columns).to_pylist() for shard in range(store.dataset.shards)]
    rows = [[sources.Row(id=r["id"], label=r["label"], split=r["split"], place=r["uri"]) for r in shard] for shard in shards]
    return sources.Plan(dataset=store.dataset, shards=rows)


def _caption_settings(config: CaptionConfig, model: models.ModelRef) -> dict[str, Any]:
    return {
        "engine": config.captioner, "model": model.name, "revision": model.revision, "prompt": config.prompt,
        "caption_edge": config.caption_edge, "max_tokens": config.max_tokens, "temperature": config.temperature,
        "top_p": config.top_p, "seed": config.seed, "context_length": config.context_length,
        "captions_per_image": config.captions_per_image,
    }  # fmt: skip


def captioner_model(config: CaptionConfig) -> models.ModelRef:
    """Which model captions: the one that a server holds, or files by their hash or the hub's commit."""
    return _served_model(config) if config.captioner == "openai" else models.resolve(config.model, config.model_revision)


def _served_model(config: CaptionConfig) -> models.ModelRef:
    """The model that a server holds, asked before anything starts."""
    from pipeline.captioners.openai import models_of

    offered = models_of(config.base_url)
    if (config.model and config.model not in offered) or (not config.model and len(offered) != 1):
        message = f"model={config.model!r}: {config.base_url} serves {', '.join(offered)}; pass --model with one of these."
        raise ValueError(message)
    return models.ModelRef(name=config.model or offered[0], location=config.base_url, revision="served")


def _record_variant(
    store: Store, stage: Stage, variant: str, settings: dict[str, Any], packages: tuple[str, ...], server: str = ""
) -> None:
    """Versions are recorded but not hashed: an upgrade must not orphan what was paid for; it is told instead."""
    versions = {name: version for name in packages if (version := _version(name))} | ({"server": server} if server else {})
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


def _recorded_captioner(store: Store, variant: str) -> tuple[CaptionConfig, models.ModelRef]:
    settings = store.variant("captions", variant)
    names = (
        "model",
        "prompt",
        "caption_edge",
        "captions_per_image",
        "max_tokens",
        "temperature",
        "top_p",
        "seed",
        "context_length",
    )
    server = {"base_url": settings["versions"]["server"]} if settings["engine"] == "openai" else {}
    config = CaptionConfig(store=store.uri, captioner=settings["engine"], **server, **{name: settings[name] for name in names})
    return config, _served_model(config) if server else _recorded_model(settings["model"], settings["revision"])


def _recorded_encoder(store: Store, variant: str) -> tuple[EmbedConfig, models.ModelRef]:
    settings = store.variant("embeddings", variant)
    config = EmbedConfig(store=store.uri, captions=settings["captions"], encoder=settings["encoder"], pooling=settings["pooling"])
    return config, _recorded_model(settings["encoder"], settings["revision"])


def _recorded_model(name: str, revision: str) -> models.ModelRef:
    if not revision.startswith("files-"):
        return models.ModelRef(name=name, location=name, revision=revision)
    model = models.resolve(name)
    if model.revision != revision:
        message = f"model={name!r}: its files have changed since the variant was made; run caption or embed for a new variant."
        raise ValueError(message)
    return model


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
