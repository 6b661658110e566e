"""The pipeline's verbs as Ray Data chains: ingest, caption, embed, describe, features, retry.

Every chain is: shards still to do -> steps of `stages` -> one summary row a shard. A killed driver, worker
or node costs the shards in flight; the same command goes on from the receipts. `python -m pipeline describe
--images DIR --store STORE`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from pipeline import placement, session, waiting
from pipeline.config import (
    CaptionConfig,
    DescribeConfig,
    EmbedConfig,
    FeatureConfig,
    RetryConfig,
    SourceConfig,
)
from pipeline.encoders import models
from pipeline.errors import SettingsError
from pipeline.inspect import metrics
from pipeline.session import ClusterRuntime, start_ray
from pipeline.sources.plan import Plan, make_plan, notes
from pipeline.stages import on_record, which_model
from pipeline.stages.caption import CaptionPictures, PreparePictures, WriteCaptions
from pipeline.stages.embed import EmbedCaptions
from pipeline.stages.failures import check_failures, plain_error
from pipeline.stages.features import LookAtPictures, PrepareViews
from pipeline.stages.ingest import IngestShard
from pipeline.stages.variants import CaptionVariant, EmbedVariant, FeatureVariant
from pipeline.store import Stage, Store, locations, lock

if TYPE_CHECKING:
    import ray.data

Chain = Callable[["ray.data.Dataset", metrics.Watched], "ray.data.Dataset"]


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
    on_record.check_same_source(store, plan)
    for note in notes(plan.dataset):
        _say(f"ingest: {note}")
    items = [_ingest_item(plan, shard, redo=False) for shard in store.pending("images")]
    _run("ingest", store, "images", "", items, _ingest_chain(config), config.max_failure_rate)


def caption(config: CaptionConfig, model: models.ModelRef | None = None) -> str:
    """Images -> captions; returns the caption variant. `model`: which it is, where that is known already."""
    store = Store(config.store)
    store.require_complete("images")
    model = model or which_model.captioner_model(config)
    variant = CaptionVariant.of(config, model)
    served = variant.engine == "openai"
    packages = ("openai",) if served else ("vllm", "transformers", "torch")
    on_record.record_variant(
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
    model = model or which_model.encoder_model(config)
    variant = EmbedVariant.of(replace(config, captions=caption_variant), model)
    on_record.record_variant(store, "embeddings", variant.name, variant.record(), ("transformers", "torch"))
    todo = {*store.pending("embeddings", variant.name), *store.outdated(variant.name, caption_variant)}
    items = _shard_items(sorted(todo), redo=False)
    chain = _embed_chain(config, model, caption_variant, variant.name)
    _run("embed", store, "embeddings", variant.name, items, chain, config.max_failure_rate)
    return variant.name


def describe(config: DescribeConfig) -> str:
    """ingest, caption and embed; returns the embedding variant. Both models are found before anything is paid
    for."""
    captioning, embedding = config.part(CaptionConfig), config.part(EmbedConfig)
    captioner, encoder = which_model.captioner_model(captioning), which_model.encoder_model(embedding)
    if not session.is_local():
        start_ray()
        placement.check(captioning, embedding)
    if config.images:
        ingest(config.part(SourceConfig))
    caption_variant = caption(captioning, captioner)
    return embed(replace(embedding, captions=caption_variant), encoder)


def features(config: FeatureConfig, model: models.ModelRef | None = None) -> str:
    """Images -> what a vision tower says of them; returns the variant. `model`: which it is, where that is
    known already."""
    from pipeline.encoders import vision

    store = Store(config.store)
    store.require_complete("images")
    model = model or which_model.tower_model(config)
    facts = vision.describe(model, config.feature_size)
    variant = FeatureVariant.of(config, model, facts.size)
    packages = ("timm" if facts.family == "timm" else "transformers", "torch")
    on_record.record_variant(store, "features", variant.name, {**variant.record(), **asdict(facts)}, packages)
    items = _shard_items(store.pending("features", variant.name), redo=False)
    chain = _feature_chain(config, model, variant.name)
    _run("features", store, "features", variant.name, items, chain, config.max_failure_rate)
    return variant.name


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
        name: on_record.recorded_captioner(store, name, config)
        for name in captions
        if on_record.has_engine(store, name)
    }
    embeddings = {
        name: failed
        for name in store.variants("embeddings")
        if (failed := _failed_shards(store, "embeddings", name))
    }
    encoders = {name: on_record.recorded_encoder(store, name, config) for name in embeddings}
    seen = {
        name: failed
        for name in store.variants("features")
        if (failed := _failed_shards(store, "features", name))
    }
    towers = {name: on_record.recorded_tower(store, name, config) for name in seen}
    store = on_record.with_raised_limits(store, config)
    if failed := _failed_shards(store, "images", ""):
        plan = on_record.recorded_plan(store, failed)
        items = [_ingest_item(plan, shard, redo=True) for shard in failed]
        _run("retry images", store, "images", "", items, _ingest_chain(config), config.max_failure_rate)
    for variant, (caption_config, model) in captioners.items():
        caption_chain = _caption_chain(caption_config, model, variant)
        items = _shard_items(captions[variant], redo=True)
        _run("retry", store, "captions", variant, items, caption_chain, config.max_failure_rate)
    for variant, (embed_config, model) in encoders.items():
        embed_chain = _embed_chain(embed_config, model, embed_config.captions, variant)
        items = _shard_items(embeddings[variant], redo=True)
        _run("retry", store, "embeddings", variant, items, embed_chain, config.max_failure_rate)
    for variant, (feature_config, model) in towers.items():
        items = _shard_items(seen[variant], redo=True)
        chain = _feature_chain(feature_config, model, variant)
        _run("retry", store, "features", variant, items, chain, config.max_failure_rate)
    for variant in captions.keys() - captioners.keys():
        rows = sum(receipt.failed for receipt in store.receipts("captions", variant).values())
        _say(
            f"retry: {rows} rows of {variant} have no caption: it was imported, so import again from a file "
            "that has them"
        )
    for variant in captions.keys() - captioners.keys():
        rows = sum(receipt.failed for receipt in store.receipts("captions", variant).values())
        check_failures(store, "captions", variant, rows, config.max_failure_rate)
    if not (failed or captions or embeddings or seen):
        _say("retry: no row has failed; nothing to do")


# Chains: where resources, batch and pool sizes stand, each with its reason.


def _ingest_chain(config: SourceConfig | RetryConfig) -> Chain:
    def build(ds: ray.data.Dataset, _: metrics.Watched) -> ray.data.Dataset:
        pool = placement.ingesters(ds.count())
        # One is enough to begin with: others at work on the cluster will end.
        _wait("ingest", waiting.Wanted(name="readers", count=pool.first, cpus=1, least=1), config)
        # One CPU a task: reading and decoding one shard is one thread of work.
        return ds.map_batches(
            IngestShard,
            fn_constructor_args=(config.store,),
            **_shard_batches(),
            num_cpus=1,
            compute=_actors(pool),
        )

    return build


def _caption_chain(config: CaptionConfig, model: models.ModelRef, variant: str) -> Chain:
    run = uuid.uuid4().hex[:12]  # tells an engine's death in this run from the death of an earlier run

    def build(ds: ray.data.Dataset, watched: metrics.Watched) -> ray.data.Dataset:
        placed = placement.captioners(config, model, Store(config.store).dataset.rows).no_more_than(
            ds.count()
        )
        watched.show("engines_wanted", placed.actors)
        _wait("caption", _models("engines", placed), config)
        # Decoding keeps its own actors: fused with the engine's it would run in turn with it.
        ds = ds.map_batches(
            PreparePictures,
            fn_constructor_args=(config, variant, placed.crowded),
            **_shard_batches(),
            num_cpus=1,
            compute=_actors(placed.decoder_pool),
        )
        # A whole GPU an engine: two vLLM engines on one card race for its memory at start-up.
        ds = ds.map_batches(
            CaptionPictures,
            fn_constructor_args=(config, model, variant, run, watched.on),
            **_shard_batches(),
            num_cpus=placed.cpus,
            num_gpus=placed.gpus,
            compute=_actors(placed.pool),
        )
        return ds.map_batches(
            WriteCaptions,
            fn_constructor_args=(config.store, variant),
            **_shard_batches(),
            num_cpus=0.5,
            compute=_actors(placement.Pool(1)),
        )

    return build


def _embed_chain(config: EmbedConfig, model: models.ModelRef, caption_variant: str, variant: str) -> Chain:
    def build(ds: ray.data.Dataset, watched: metrics.Watched) -> ray.data.Dataset:
        placed = placement.encoders(config, model, Store(config.store).dataset.rows).no_more_than(ds.count())
        watched.show("engines_wanted", placed.actors)
        _wait("embed", _models("encoders", placed), config)
        return ds.map_batches(
            EmbedCaptions,
            fn_constructor_args=(config, model, caption_variant, variant, watched.on),
            **_shard_batches(),
            num_cpus=placed.cpus,
            num_gpus=placed.gpus,
            compute=_actors(placed.pool),
        )

    return build


def _feature_chain(config: FeatureConfig, model: models.ModelRef, variant: str) -> Chain:
    def build(ds: ray.data.Dataset, watched: metrics.Watched) -> ray.data.Dataset:
        placed = placement.towers(config, model, Store(config.store).dataset.rows).no_more_than(ds.count())
        watched.show("engines_wanted", placed.actors)
        _wait("features", _models("towers", placed), config)
        # Decoding beside the tower, as for captions.
        ds = ds.map_batches(
            PrepareViews,
            fn_constructor_args=(config, model, variant),
            **_shard_batches(),
            num_cpus=1,
            compute=_actors(placed.decoder_pool),
        )
        return ds.map_batches(
            LookAtPictures,
            fn_constructor_args=(config, model, variant, watched.on),
            **_shard_batches(),
            num_cpus=placed.cpus,
            num_gpus=placed.gpus,
            compute=_actors(placed.pool),
        )

    return build


def _shard_batches() -> dict[str, Any]:
    # A row is a shard, so a batch of one is the shard; pyarrow, since numpy would strip trailing zero bytes
    # of pixels.
    return {"batch_size": 1, "batch_format": "pyarrow"}


def _actors(pool: placement.Pool) -> ray.data.ActorPoolStrategy:
    from ray.data import ActorPoolStrategy

    return ActorPoolStrategy(min_size=pool.least, max_size=pool.most, initial_size=pool.first)


def _wait(verb: str, wanted: waiting.Wanted, config: ClusterRuntime) -> None:
    waiting.wait(verb, wanted, config.wait_minutes)


def _models(name: str, placed: placement.Placement) -> waiting.Wanted:
    return waiting.Wanted(
        name=name, count=placed.actors, cpus=placed.cpus, gpus=placed.gpus, least=placed.least
    )


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

        # Its progress, hints and tracebacks; ours stand in their place.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        ray.data.DataContext.get_current().enable_progress_bars = False
        tokens = 0
        rows_before = 0 if redone & receipts.keys() else done_rows
        total = sum(receipts[s].rows for s in redone & receipts.keys()) or store.dataset.rows
        source = ray.data.from_items(items, override_num_blocks=_blocks(len(items), stage))
        with metrics.Watched(metrics.on(), stage=stage, variant=variant) as watched:
            ready = chain(source, watched)  # waits for the cluster, and says so
            with tqdm(
                total=total,
                initial=rows_before,
                desc=f"{verb} {variant}".strip(),
                unit="img",
                file=sys.stderr,
            ) as bar:
                rows = iter(ready.iter_rows())
                while (row := _next(rows, verb, store)) is not None:
                    failed += row["failed"]
                    tokens += row["tokens"]
                    _count(watched, row)
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


def _count(watched: metrics.Watched, done: dict[str, Any]) -> None:
    """Here and not in the actors, which Ray ends with a kill: what they had not exported yet would be
    lost."""
    watched.count("images", done["rows"])
    watched.count("failures", done["failed"])
    watched.count("tokens", done["tokens"])


def _blocks(count: int, stage: Stage) -> int:
    """Blocks for so many shards. Ray Data pays 5 to 10 ms and some 10 kB in the driver for each block
    (benchmarks/shards.py).

    That is nothing beside a shard of captions, which keeps its own block so that a dead engine costs one
    shard, or of features, whose pictures fill it. Ingesting and embedding can take less than that for a
    shard: there 16 share a block, once there are enough to keep all workers busy.
    """
    return count if stage in ("captions", "features") else -(-count // max(1, min(16, count // 256)))


def _next(rows: Iterator[dict[str, Any]], verb: str, store: Store) -> dict[str, Any] | None:
    """The next finished shard; what a worker failed of is told in words."""
    try:
        return next(rows, None)
    except Exception as error:
        plain = plain_error(verb, store, error)
        raise plain from (None if plain is not error else error.__cause__)


# What is to do.


def _shard_items(todo: list[int], *, redo: bool) -> list[dict[str, Any]]:
    return [{"shard": shard, "redo": redo} for shard in todo]


def _ingest_item(plan: Plan, shard: int, *, redo: bool) -> dict[str, Any]:
    return {"shard": shard, "redo": redo, "rows": [asdict(row) for row in plan.shards[shard]]}


def _failed_shards(store: Store, stage: Stage, variant: str) -> list[int]:
    return [shard for shard, receipt in store.receipts(stage, variant).items() if receipt.failed]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
