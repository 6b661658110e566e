"""Before paying: describes a sample for real and says what the whole will take, in hours, GPU hours, money
and storage.

Each stage has a start (Ray, loading a model) that is paid once, and a steady time an image that is paid for
all; the sample tells both apart by when its shards were finished. More GPUs divide the steady time of
captions and embeddings, nothing else.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from pyarrow import fs

from pipeline import placement, run, session, waiting
from pipeline.config import CaptionConfig, EmbedConfig, EstimateConfig, FeatureConfig, SourceConfig
from pipeline.errors import SettingsError
from pipeline.sources import plan
from pipeline.stages import which_model
from pipeline.store import Stage, Store, locations

SHARE = 0.05  # of all rows: most that is described unless asked for
SHARDS_EACH = 3  # of each engine: the first waits for its start, two more tell a rate
SMALLEST_SHARD = 32  # rows; with fewer an engine is mostly filling and draining its batch


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """One stage: seconds until it runs steadily, seconds and bytes an image from then on."""

    stage: Stage
    start_s: float
    seconds_per_image: float
    bytes_per_image: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What `estimate --json` prints. `hours` is the wall clock on `gpus` GPUs (0: this machine as it is).

    `engines`: captioning engines that the sample was described by; each further one is taken to add as much
    again.
    """

    images: int
    sampled: int
    engines: int
    failed: int
    tokens: int
    prompt_tokens: int
    gpus: int
    hours: float
    gpu_hours: float
    cost: float
    storage_bytes: int
    stages: list[StageCost]


def estimate(config: EstimateConfig) -> Estimate:
    """Describes a sample in a store that is deleted again, and scales up.

    Raises:
        ValueError: wrong settings, there is nothing to describe, or no place for the sample that all nodes
            see.
    """
    captioning, embedding = config.part(CaptionConfig), config.part(EmbedConfig)
    captioner, encoder = which_model.captioner_model(captioning), which_model.encoder_model(embedding)
    looking = config.part(FeatureConfig) if config.tower else None
    tower = which_model.tower_model(looking) if looking else None
    whole = plan.make_plan(config.part(SourceConfig)).dataset
    begun = time.monotonic()
    session.start_ray()
    ray_s = time.monotonic() - begun
    grows = session.grows()
    if (grows or session.several_nodes()) and not config.work_dir:
        several = "grows" if grows else "has several nodes"
        message = (
            f"work_dir: the cluster {several}, and this machine's temporary folder is seen by one node; "
            "pass --work-dir with a folder or address that every node can write to, such as the one that "
            "--store will have."
        )
        raise SettingsError(message)
    placed: dict[Stage, placement.Placement] = {
        "captions": placement.captioners(captioning, captioner, whole.rows),
        "embeddings": placement.encoders(embedding, encoder, whole.rows),
    }
    if looking and tower:
        placed["features"] = placement.towers(looking, tower, whole.rows)
    made: tuple[Stage, ...] = ("images", *placed)
    actors: dict[Stage, int] = {
        "images": session.spare_cores(),
        **{stage: each.actors for stage, each in placed.items()},
    }
    gpus = round(max(each.actors * each.gpus for each in placed.values())) if grows else session.gpus()
    # Where it grows each actor has room of its own, and captioning engines alone are asked for by number.
    engines = actors["captions"] if grows else max(actors["captions"], actors["embeddings"])
    sample = plan_sample(config, whole.rows, engines, alike=gpus > 0 or grows)
    used = actors | {stage: min(actors[stage], sample.engines) for stage in placed}

    def ready(stage: Stage, name: str) -> None:
        """Waits for all of a stage's actors, before its clock runs: a rate is that of so many."""
        each = placed.get(stage, placement.Placement(actors=1, gpus=0, cpus=1))
        room = waiting.Wanted(
            name=name, count=used[stage] if stage in placed else 1, cpus=each.cpus, gpus=each.gpus
        )
        waiting.wait("estimate", room, config.wait_minutes)

    with _place(config.work_dir) as folder:
        settings = replace(
            config,
            store=locations.join(folder, "store"),
            limit=sample.rows,
            shard_rows=sample.shard_rows,
            replicas=used["captions"],
            min_replicas=0,
            encoder_replicas=used["embeddings"],
            tower_replicas=used.get("features", 0),
        )
        ready("images", "readers")
        seconds = {"images": _timed(lambda: run.ingest(settings.part(SourceConfig)))}
        ready("captions", "engines")
        seconds["captions"] = _timed(lambda: run.caption(settings.part(CaptionConfig), captioner))
        ready("embeddings", "encoders")
        seconds["embeddings"] = _timed(lambda: run.embed(settings.part(EmbedConfig), encoder))
        if tower:
            ready("features", "towers")
            seconds["features"] = _timed(lambda: run.features(settings.part(FeatureConfig), tower))
        store = Store(settings.store)
        # No more actors have work at a time than there are shards.
        working = {stage: min(actors[stage], whole.shards) for stage in made}
        stages = [
            _cost(store, stage, seconds[stage], min(used[stage], store.dataset.shards), working[stage])
            for stage in made
        ]
        counts = _counts(store)
    counts |= {"engines": used["captions"]}
    return _scaled(config, whole.rows, ray_s, stages, actors, counts, gpus)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What is described for an estimate: how many rows, in shards of how many, by how many engines."""

    rows: int
    shard_rows: int
    engines: int


def plan_sample(config: EstimateConfig, rows: int, engines: int, *, alike: bool) -> Sample:
    """The least that tells the steady rate: three shards for each engine, since an engine's first one waits
    for its start.

    It is kept to SHARE of all rows: first by fewer engines, where those are `alike` (each on a GPU of its
    own, and n of them are taken to be n times as fast), then by smaller shards. Engines that share cores slow
    each other down, so all of them are tried.
    """
    share = config.sample or round(SHARE * rows)
    if alike and not config.sample:
        engines = max(1, min(engines, share // (SHARDS_EACH * config.shard_rows)))
    each = min(config.shard_rows, max(SMALLEST_SHARD, share // (SHARDS_EACH * engines)))
    wanted = config.sample or SHARDS_EACH * each * engines
    return Sample(
        rows=min(wanted, rows), shard_rows=config.shard_rows if config.sample else each, engines=engines
    )


@contextlib.contextmanager
def _place(work_dir: str) -> Iterator[str]:
    """A folder of its own, in `work_dir` or in this machine's temporary one; it is gone afterwards."""
    if not work_dir:
        with tempfile.TemporaryDirectory(prefix="gpt4image-estimate-") as folder:
            yield folder
        return
    root = work_dir if "://" in work_dir else os.path.abspath(os.path.expanduser(work_dir))
    folder = locations.join(root, f"estimate-{uuid.uuid4().hex[:8]}")
    filesystem, path = locations.resolve(folder)
    try:
        yield folder
    finally:
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_dir(path)


def _timed(work: Callable[[], object]) -> float:
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def _cost(store: Store, stage: Stage, seconds: float, actors: int, whole: int) -> StageCost:
    """The cost on `whole` actors of a stage that `actors` have done of the sample."""
    variant = store.only_variant(stage)
    receipts = store.receipts(stage, variant)
    finished = _finished_at(store, stage, variant)
    rows = sum(receipt.rows for receipt in receipts.values())
    if len(finished) >= actors + 2:
        steady = seconds_per_row([(at, receipts[shard].rows) for at, shard in finished], actors)
    else:  # too few to tell a start from what follows: the workers' own time, without what runs beside it
        steady = sum(receipt.seconds for receipt in receipts.values()) / rows / actors
    size = sum(receipt.bytes for receipt in receipts.values()) / rows
    return StageCost(
        stage=stage,
        start_s=max(0.0, seconds - steady * rows),
        seconds_per_image=steady * actors / whole,
        bytes_per_image=size,
    )


def _finished_at(store: Store, stage: Stage, variant: str) -> list[tuple[float, int]]:
    """(time, shard) of a stage's receipts, in order; of an object store to the second."""
    filesystem, path = locations.resolve(
        locations.join(store.uri, f"{store.folder(stage, variant)}/receipts")
    )
    infos = [
        info for info in filesystem.get_file_info(fs.FileSelector(path)) if info.base_name.startswith("part-")
    ]
    return sorted(
        (info.mtime_ns / 1e9, int(info.base_name.removeprefix("part-").removesuffix(".json")))
        for info in infos
    )


def seconds_per_row(finished: list[tuple[float, int]], actors: int) -> float:
    """Steady wall-clock seconds a row from when shards were finished (time, rows; in order) by so many
    actors.

    Each actor's first shard waited for its start and does not count, nor does the time for which an actor has
    nothing left to do: an actor works from its first shard's end to its last's.
    """
    times = [at for at, _ in finished]
    worked = sum(times[-actors:]) - sum(times[:actors])
    return worked / actors / sum(rows for _, rows in finished[actors:])


def _counts(store: Store) -> dict[str, int]:
    variant = store.only_variant("captions")
    rows = failed = prompt = output = 0
    for shard in range(store.dataset.shards):
        table = store.read_shard("captions", variant, shard, ["prompt_tokens", "output_tokens", "error"])
        rows += len(table)
        failed += len(table) - table["error"].null_count
        prompt += sum(table["prompt_tokens"].drop_null().to_pylist())
        output += sum(table["output_tokens"].drop_null().to_pylist())
    return {"rows": rows, "failed": failed, "prompt": prompt, "output": output}


def _scaled(
    config: EstimateConfig,
    images: int,
    ray_s: float,
    stages: list[StageCost],
    actors: dict[Stage, int],
    counts: dict[str, int],
    present: int,
) -> Estimate:
    """`present`: GPUs that the sample's rates are scaled to, unless the settings name another number."""
    on_gpus = {"embeddings", "features"} | ({"captions"} if config.captioner != "openai" else set())
    wall = ray_s
    on_gpu = 0.0
    for cost in stages:
        steady = cost.seconds_per_image * images
        if config.gpus and cost.stage in on_gpus:
            steady *= actors[cost.stage] / config.gpus
            on_gpu += cost.start_s + steady
        wall += cost.start_s + steady
    prompt, output = (counts[name] * images / counts["rows"] for name in ("prompt", "output"))
    gpus = config.gpus or present
    gpu_hours = gpus * (on_gpu or wall) / 3600
    billed = gpu_hours if gpus else wall / 3600
    tokens_in, tokens_out = config.price_per_million_tokens
    return Estimate(
        images=images,
        sampled=counts["rows"],
        engines=counts["engines"],
        failed=counts["failed"],
        tokens=round(output),
        prompt_tokens=round(prompt),
        gpus=gpus,
        hours=wall / 3600,
        gpu_hours=gpu_hours,
        cost=billed * config.price_per_gpu_hour + (prompt * tokens_in + output * tokens_out) / 1e6,
        storage_bytes=round(sum(cost.bytes_per_image for cost in stages) * images),
        stages=stages,
    )


def as_json(estimated: Estimate) -> dict[str, Any]:
    """The estimate as plain values."""
    return asdict(estimated)


def as_text(estimated: Estimate) -> str:
    """The estimate in words and a table."""
    lines = [f"{'':12}{'start, s':>10}{'images/s':>10}{'kB/image':>10}"]
    for cost in estimated.stages:
        rate = 1 / cost.seconds_per_image if cost.seconds_per_image else float("inf")
        lines.append(f"{cost.stage:12}{cost.start_s:>10.1f}{rate:>10.1f}{cost.bytes_per_image / 1000:>10.2f}")
    where = (
        f"on {estimated.gpus} GPUs, {estimated.gpu_hours:.2f} GPU hours"
        if estimated.gpus
        else "on this machine as it is"
    )
    lines += [
        "",
        f"{estimated.images} images: {estimated.hours:.2f} hours {where}; {estimated.tokens} tokens of "
        f"captions, {estimated.prompt_tokens} of prompts; {estimated.storage_bytes / 1e9:.2f} GB of storage"
        + (f"; cost {estimated.cost:.2f}" if estimated.cost else ""),
        f"from {estimated.sampled} images by {estimated.engines} engines, {estimated.failed} failed; steady "
        "rates as measured, scaled by the number of engines, nothing added for breakdowns, or "
        "for nodes that are still to come",
    ]
    return "\n".join(lines)
