"""Before paying: describes a sample for real and says what the whole will take, in hours, GPU hours, money and storage.

Each stage has a start (Ray, loading a model) that is paid once, and a steady time an image that is paid for all; the sample
tells both apart by when its shards were finished. More GPUs divide the steady time of captions and embeddings, nothing else.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline import models, placement, run, session, sources
from pipeline.config import CaptionConfig, EmbedConfig, EstimateConfig, SourceConfig
from pipeline.store import STAGES, Stage, Store


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """One stage: seconds until it runs steadily, seconds and bytes an image from then on."""

    stage: Stage
    start_s: float
    seconds_per_image: float
    bytes_per_image: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What `estimate --json` prints. `hours` is the wall clock on `gpus` GPUs (0: this machine as it is)."""

    images: int
    sampled: int
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
    """Describes `config.sample` pictures in a temporary store and scales up.

    Raises:
        ValueError: wrong settings, or there is nothing to describe.
    """
    whole = sources.plan(config.part(SourceConfig)).dataset
    begun = time.monotonic()
    session.start_ray()
    ray_s = time.monotonic() - begun
    actors = _actors(config, whole.rows)
    sample = config.sample or 3 * config.shard_rows * max(actors["captions"], actors["embeddings"])
    with tempfile.TemporaryDirectory(prefix="gpt4image-estimate-") as folder:
        part = replace(
            config, store=os.path.join(folder, "store"), limit=min(sample, whole.rows), replicas=actors["captions"],
            encoder_replicas=actors["embeddings"],
        )  # fmt: skip
        seconds = {
            "images": _timed(lambda: run.ingest(part.part(SourceConfig))),
            "captions": _timed(lambda: run.caption(part.part(CaptionConfig))),
            "embeddings": _timed(lambda: run.embed(part.part(EmbedConfig))),
        }
        store = Store(part.store)
        # No more actors have work at a time than there are shards.
        stages = [_cost(store, stage, seconds[stage], min(actors[stage], whole.shards)) for stage in STAGES]
        counts = _counts(store)
    return _scaled(config, whole.rows, ray_s, stages, actors, counts)


def _actors(config: EstimateConfig, rows: int) -> dict[Stage, int]:
    """How many actors would do each stage of the whole: the sample is done by as many, though it has fewer shards."""
    captions, embeddings = config.part(CaptionConfig), config.part(EmbedConfig)
    encoder = models.resolve(embeddings.encoder, embeddings.encoder_revision)
    return {
        "images": session.spare_cores(),
        "captions": placement.captioners(captions, run.captioner_model(captions), rows).actors,
        "embeddings": placement.encoders(embeddings, encoder, rows).actors,
    }


def _timed(work: Callable[[], object]) -> float:
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def _cost(store: Store, stage: Stage, seconds: float, actors: int) -> StageCost:
    variant = store.only_variant(stage)
    receipts = store.receipts(stage, variant)
    folder = os.path.join(store.uri, store.folder(stage, variant), "receipts")
    finished = sorted((os.path.getmtime(os.path.join(folder, f"part-{shard:05d}.json")), shard) for shard in receipts)
    rows = sum(receipt.rows for receipt in receipts.values())
    if len(finished) >= actors + 2:
        steady = seconds_per_row([(at, receipts[shard].rows) for at, shard in finished], actors)
    else:  # too few to tell a start from what follows: the workers' own time, which leaves out what runs beside it
        steady = sum(receipt.seconds for receipt in receipts.values()) / rows / actors
    size = sum(receipt.bytes for receipt in receipts.values()) / rows
    return StageCost(stage=stage, start_s=max(0.0, seconds - steady * rows), seconds_per_image=steady, bytes_per_image=size)


def seconds_per_row(finished: list[tuple[float, int]], actors: int) -> float:
    """Steady wall-clock seconds a row from when shards were finished (time, rows; in order) by so many actors.

    Each actor's first shard waited for its start and does not count, nor does the time for which an actor has nothing left to do:
    an actor works from its first shard's end to its last's.
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
    config: EstimateConfig, images: int, ray_s: float, stages: list[StageCost], actors: dict[Stage, int], counts: dict[str, int]
) -> Estimate:
    on_gpus = {"embeddings"} if config.captioner == "openai" else {"captions", "embeddings"}
    wall = ray_s
    on_gpu = 0.0
    for cost in stages:
        steady = cost.seconds_per_image * images
        if config.gpus and cost.stage in on_gpus:
            steady *= actors[cost.stage] / config.gpus
            on_gpu += cost.start_s + steady
        wall += cost.start_s + steady
    prompt, output = (counts[name] * images / counts["rows"] for name in ("prompt", "output"))
    gpus = config.gpus or session.gpus()
    gpu_hours = gpus * (on_gpu or wall) / 3600
    billed = gpu_hours if gpus else wall / 3600
    tokens_in, tokens_out = config.price_per_million_tokens
    return Estimate(
        images=images, sampled=counts["rows"], failed=counts["failed"], tokens=round(output), prompt_tokens=round(prompt),
        gpus=gpus, hours=wall / 3600, gpu_hours=gpu_hours,
        cost=billed * config.price_per_gpu_hour + (prompt * tokens_in + output * tokens_out) / 1e6,
        storage_bytes=round(sum(cost.bytes_per_image for cost in stages) * images), stages=stages,
    )  # fmt: skip


def as_json(found: Estimate) -> dict[str, Any]:
    """The estimate as plain values."""
    return asdict(found)


def as_text(found: Estimate) -> str:
    """The estimate in words and a table."""
    lines = [f"{'':12}{'start, s':>10}{'images/s':>10}{'kB/image':>10}"]
    for cost in found.stages:
        rate = 1 / cost.seconds_per_image if cost.seconds_per_image else float("inf")
        lines.append(f"{cost.stage:12}{cost.start_s:>10.1f}{rate:>10.1f}{cost.bytes_per_image / 1000:>10.2f}")
    where = f"on {found.gpus} GPUs, {found.gpu_hours:.2f} GPU hours" if found.gpus else "on this machine as it is"
    lines += [
        "",
        f"{found.images} images: {found.hours:.2f} hours {where}; {found.tokens} tokens of captions, "
        f"{found.prompt_tokens} of prompts; {found.storage_bytes / 1e9:.2f} GB of storage"
        + (f"; cost {found.cost:.2f}" if found.cost else ""),
        f"from {found.sampled} images, {found.failed} of which failed; steady rates as measured, nothing is added for breakdowns",
    ]
    return "\n".join(lines)
