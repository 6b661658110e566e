"""A second ingest, a second run, settings that changed in between: refused with the reason, or right; no row
lost or doubled."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline import run
from pipeline.__main__ import main
from pipeline.config import SourceConfig
from pipeline.sources.plan import Plan, differences, make_plan
from pipeline.stages.caption import WriteCaptions
from pipeline.stages.ingest import IngestShard
from pipeline.store import CAPTIONS, Dataset, Store, lock

Folder = Callable[..., Path]


def ingest_shard(store: Store, plan: Plan, shard: int) -> None:
    items = [dataclasses.asdict(row) for row in plan.shards[shard]]
    IngestShard(store.uri)(pa.table({"shard": [shard], "redo": [False], "rows": [items]}))


# Another value of each setting that decides what rows a store holds.
CHANGES: dict[str, Any] = {
    "shard_rows": 8,
    "shard_bytes": 4000,
    "max_edge": 16,
    "max_pixels": 10**6,
    "max_bytes": 10**6,
    "pack": False,
    "limit": 40,
    "val_fraction": 0.5,
    "class_names": "names",
    "source_kind": "jsonl",
    "images": "elsewhere",
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_ingest_does_not_go_on_with_settings_that_make_other_rows(
    name: str, picture_folder: Folder, tmp_path: Path
) -> None:
    images = picture_folder({"dog": 30, "cat": 16})
    (tmp_path / "names").write_text("Katze\nHund\n")
    picture_folder({"dog": 30, "cat": 16}, "elsewhere")
    lines = [
        {"path": str(p.relative_to(images)), "label": p.parent.name} for p in sorted(images.rglob("*.jpg"))
    ]
    (images / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = SourceConfig(images=str(images), store=str(tmp_path / "store"), shard_rows=10)
    plan = make_plan(config)
    store = Store.create(config.store, plan.dataset)
    ingest_shard(store, plan, 0)  # interrupted after one shard
    value = CHANGES[name]
    changed = {name: str(tmp_path / value) if name in ("class_names", "images") else value}
    if name == "source_kind":
        changed["images"] = str(images / "list.jsonl")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        ValueError, match=re.escape(f"store={config.store}: was begun with other pictures or settings")
    ):
        run.ingest(dataclasses.replace(config, **changed))
    assert sorted(tmp_path.rglob("*")) == before, "nothing was written"


def test_a_store_among_its_own_pictures_is_refused(picture_folder: Folder, tmp_path: Path) -> None:
    images = picture_folder({"dog": 3})
    for store in (images, images / "store"):
        with pytest.raises(ValueError, match="would be taken for pictures"):
            run.ingest(SourceConfig(images=str(images), store=str(store)))
    assert sorted(path.name for path in images.iterdir()) == ["dog"]


def test_settings_that_make_the_same_rows_may_change(picture_folder: Folder, tmp_path: Path) -> None:
    """One shard holds all: how many rows it might have held decides nothing."""
    images = picture_folder({"train/dog": 5, "val/dog": 5})
    config = SourceConfig(images=str(images), store=str(tmp_path / "store"))
    plan = make_plan(config)
    free = dataclasses.replace(
        config, shard_rows=400, shard_bytes=10**6, val_fraction=0.3, max_failure_rate=0.5
    )
    assert differences(plan.dataset, make_plan(free).dataset) == []


def test_a_store_that_an_earlier_release_began_goes_on(picture_folder: Folder, tmp_path: Path) -> None:
    config = SourceConfig(
        images=str(picture_folder({"dog": 30})), store=str(tmp_path / "store"), shard_rows=10
    )
    now = make_plan(config).dataset
    source = {name: value for name, value in now.source.items() if name != "cut"}
    assert differences(dataclasses.replace(now, source=source), now) == []
    other = make_plan(dataclasses.replace(config, shard_rows=8)).dataset
    [line] = differences(dataclasses.replace(now, source=source), other)
    assert line.startswith("cut into shards: 3 then (shard_rows=10")


def begin(uri: str, rows: int, barrier: Any, results: Any) -> None:
    dataset = Dataset(schema_version=1, classes=["a"], splits={}, rows=rows, shards=0, source={"uri": "x"})
    barrier.wait()
    try:
        results.put(Store.create(uri, dataset).dataset.rows)
    except ValueError as error:
        assert "begins it at this moment" in str(error)
        results.put(-1)


@pytest.mark.parametrize("where", ["disk", pytest.param("s3", marks=pytest.mark.slow)])
def test_of_ingests_that_begin_one_store_at_the_same_time_at_most_one_wins(
    where: str, tmp_path: Path, bucket: str
) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results, barrier = manager.Queue(), manager.Barrier(6)
        with context.Pool(6) as pool:
            for attempt in range(8):
                uri = f"{tmp_path if where == 'disk' else bucket}/store-{attempt}"
                pool.starmap(begin, [(uri, 1 + n % 3, barrier, results) for n in range(6)])
                seen = {results.get() for _ in range(6)} - {-1}
                assert len(seen) <= 1, f"{seen}: two of different content believed that the store was theirs"
                if seen:
                    assert Store(uri).dataset.rows in seen
                begin_alone = manager.Barrier(1)
                begin(uri, 1, begin_alone, results)
                assert results.get() in seen or not seen, "nothing of a refused one is left in the way"


def caption_rows(texts: list[str]) -> pa.Table:
    rows = [
        {"row": n, "id": f"k{n}", **dict.fromkeys(CAPTIONS.names[1:]), "caption": text}
        for n, text in enumerate(texts)
    ]
    return pa.table({"shard": [0], "redo": [False], "captions": [rows], "seconds": [1.0], "note": [""]})


def test_captions_of_the_first_run_to_finish_a_shard_stay(tmp_path: Path, make_store: Folder) -> None:
    store = Store(str(make_store(tmp_path / "store")))
    store.write_variant("captions", "two", {"engine": "imported", "versions": {}})
    write = WriteCaptions(store.uri, "two")
    write(caption_rows(["first"] * 10))
    receipt = store.receipt("captions", "two", 0)
    write(caption_rows(["second"] * 10))
    assert store.receipt("captions", "two", 0) == receipt
    assert set(store.read_shard("captions", "two", 0)["caption"].to_pylist()) == {"first"}


def test_vectors_of_captions_that_were_written_anew_are_made_again(
    tmp_path: Path, make_store: Folder
) -> None:
    from pipeline.config import EmbedConfig
    from pipeline.encoders import models
    from pipeline.stages.embed import EmbedCaptions

    store = Store(str(make_store(tmp_path / "store")))
    config = EmbedConfig(store=store.uri, captions="test")
    embed = EmbedCaptions(config, models.resolve(config.encoder), "test", "vectors")
    store.write_variant(
        "embeddings", "vectors", {"captions": "test", "encoder": config.encoder, "versions": {}}
    )
    for shard in range(store.dataset.shards):
        embed(pa.table({"shard": [shard], "redo": [False]}))
    assert store.outdated("vectors", "test") == []
    before = store.read_shard("embeddings", "vectors", 1)
    table = store.read_shard("captions", "test", 1)
    other = table.set_column(1, CAPTIONS.field("caption"), pa.array(["something else"] * len(table)))
    store.write_shard("captions", "test", 1, other, seconds=0)
    assert store.outdated("vectors", "test") == [1]
    embed(pa.table({"shard": [1], "redo": [False]}))
    assert store.outdated("vectors", "test") == []
    after = store.read_shard("embeddings", "vectors", 1)
    assert not np.array_equal(before["embedding"].to_pylist(), after["embedding"].to_pylist())
    # A retry of failed rows speaks for the others only if they are of the same captions.
    store.write_shard("captions", "test", 1, table, seconds=0)
    embed(pa.table({"shard": [1], "redo": [True]}))
    assert store.outdated("vectors", "test") == []
    assert np.array_equal(
        store.read_shard("embeddings", "vectors", 1)["embedding"].to_pylist(), before["embedding"].to_pylist()
    )


def test_a_damaged_file_is_found_by_its_receipt(
    tmp_path: Path, make_store: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.__main__ import main

    folder = make_store(tmp_path / "store")
    store = Store(str(folder))
    assert main(["status", "--store", str(folder), "--verify"]) == 0
    assert "every file is the one on its receipt" in capsys.readouterr().out
    path = folder / "captions" / "test" / "part-00001.parquet"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    (folder / "captions" / "test" / "part-00002.parquet").unlink()
    found = dict(store.damaged("captions", "test"))
    assert found.keys() == {1, 2} and found[2] == "the file is gone"
    assert main(["status", "--store", str(folder), "--verify"]) == 1
    said = capsys.readouterr().out
    assert (
        "captions/test/part-00001.parquet" in said and "delete captions/test/receipts/part-00002.json" in said
    )


def test_a_second_driver_of_a_stage_is_refused_while_the_first_is_at_work(
    tmp_path: Path, picture_folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both would pay for the same captions; whoever finds nothing to do is let in."""
    images, store = picture_folder({"train/a": 3, "val/a": 2}), tmp_path / "store"
    Store.create(str(store), make_plan(SourceConfig(images=str(images), store=str(store))).dataset)
    with lock.held(str(store / "images"), "store"):
        assert main(["ingest", "--images", str(images), "--store", str(store)]) == 2
    assert f"store={store}/images: process {os.getpid()}" in capsys.readouterr().err
