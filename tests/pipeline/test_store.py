"""The store: layout, schemas, receipts, resume, variants."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import dataset

from pipeline.inspect.status import summary
from pipeline.store import CAPTIONS, Store, embeddings_schema, variant_name


def test_layout_is_the_contract_and_plain_pyarrow_reads_it(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    folder = make_store(tmp_path / "store", dim=8)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    for shard in range(4):
        for stage in ("images", "captions/test", "embeddings/test"):
            assert f"{stage}/part-0000{shard}.parquet" in found
            assert f"{stage}/receipts/part-0000{shard}.json" in found
    assert {"dataset.json", "captions/test/variant.json", "embeddings/test/variant.json"} <= found
    images = dataset.dataset(
        folder / "images", exclude_invalid_files=True
    ).to_table()  # what is no Parquet are the receipts
    assert images.column_names == [
        "id",
        "content_hash",
        "image",
        "uri",
        "label",
        "split",
        "width",
        "height",
        "error",
    ]
    embeddings = pq.read_table(folder / "embeddings/test/part-00000.parquet")
    assert embeddings.schema.field("embedding").type == pa.list_(pa.float16(), 8)
    assert len(images) == json.loads((folder / "dataset.json").read_text())["rows"] == 33


def test_shards_of_all_stages_hold_the_same_rows_in_order(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    store = Store(str(make_store(tmp_path / "store")))
    for shard in range(store.dataset.shards):
        ids = store.read_shard("images", "", shard, ["id"])["id"]
        assert ids.equals(store.read_shard("captions", "test", shard, ["id"])["id"])
        assert ids.equals(store.read_shard("embeddings", "test", shard, ["id"])["id"])


def test_a_receipt_holds_counts_and_the_checksum_of_the_file(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    folder = make_store(tmp_path / "store", missing_captions=2)
    receipt = Store(str(folder)).receipts("captions", "test")[0]
    data = (folder / "captions/test/part-00000.parquet").read_bytes()
    assert (receipt.rows, receipt.failed, receipt.bytes) == (10, 2, len(data))
    assert receipt.checksum == hashlib.sha256(data).hexdigest()


def test_a_shard_without_a_receipt_is_still_to_do(tmp_path: Path, make_store: Callable[..., Path]) -> None:
    folder = make_store(tmp_path / "store")
    (folder / "captions/test/receipts/part-00002.json").unlink()
    store = Store(str(folder))
    assert store.pending("captions", "test") == [2]
    assert summary(store)["stages"][1] == {
        "stage": "captions",
        "variant": "test",
        "done_shards": 3,
        "rows": 24 + 9 - 4,
        "failed": 0,
        "remaining_shards": 1,
    }
    with pytest.raises(ValueError, match="lacks 1 of 4 shards"):
        store.require_complete("captions", "test")


def test_a_store_of_a_newer_schema_is_refused_and_left_alone(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    folder = make_store(tmp_path / "store")
    content = json.loads((folder / "dataset.json").read_text()) | {"schema_version": 2}
    (folder / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"schema version 2, this release reads up to 1; install a newer"):
        Store(str(folder))
    assert (folder / "images/part-00000.parquet").exists()


def test_a_folder_that_is_no_store_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gpt4image ingest"):
        Store(str(tmp_path))


def test_a_table_of_another_schema_is_refused_on_write_and_on_read(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    folder = make_store(tmp_path / "store")
    store = Store(str(folder))
    with pytest.raises(ValueError, match="columns of the schema"):
        store.write_shard(
            "captions", "test", 0, pa.table({"id": ["a"], "error": pa.array([None], pa.string())}), seconds=0
        )
    pq.write_table(pa.table({"id": ["a"], "caption": [3]}), folder / "captions/test/part-00000.parquet")
    with pytest.raises(ValueError, match="columns of the schema"):
        store.read_shard("captions", "test", 0, ["id", "caption"])


def test_a_variant_changes_with_any_setting_and_only_then() -> None:
    settings = {"engine": "vllm", "prompt": "Describe."}
    assert variant_name("x", settings) == variant_name("x", dict(reversed(settings.items())))
    assert variant_name("x", settings) != variant_name("x", settings | {"prompt": "Describe"})
    assert variant_name("../a b/c", settings).startswith("a-b-c-"), "a name must not become a path"


def test_an_ambiguous_or_unknown_variant_names_the_choices(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    store = Store(str(make_store(tmp_path / "store")))
    assert store.only_variant("captions") == "test"
    store.write_variant("captions", "other", {})
    with pytest.raises(ValueError, match="pass --captions with one of: other, test"):
        store.only_variant("captions")
    with pytest.raises(ValueError, match="no embeddings variant 'nope'"):
        store.only_variant("embeddings", "nope")


def test_leftovers_of_dead_writers_are_removed_and_those_of_living_ones_kept(
    tmp_path: Path, make_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_store(tmp_path / "store")
    host = platform.node()
    dead = folder / f"captions/test/.part-00000.parquet.{host}.4194999.0123abcd.tmp"
    alive = folder / f"captions/test/.part-00000.parquet.{host}.1.0123abcd.tmp"
    dead.write_bytes(b"half")
    alive.write_bytes(b"half")
    Store(str(folder)).remove_leftovers("captions", "test")
    assert not dead.exists()
    assert alive.exists()


def test_a_failed_write_leaves_no_file(
    tmp_path: Path, make_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_store(tmp_path / "store")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        Store(str(folder)).write_file("captions/test/part-00009.parquet", b"data")
    assert {path for path in folder.rglob("*") if path.is_file()} == {
        path for path in before if path.is_file()
    }


def test_embedding_width_is_part_of_the_type() -> None:
    assert embeddings_schema(384).field("embedding").type.list_size == 384
    names = ["id", "caption", "prompt_tokens", "output_tokens", "finish_reason", "flag", "others", "error"]
    assert [field.name for field in CAPTIONS] == names


def test_status_tells_what_captions_are_marked_with(
    tmp_path: Path, make_store: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.__main__ import main

    folder = make_store(tmp_path / "store")
    store = Store(str(folder))
    rows = store.read_shard("captions", "test", 1).to_pylist()
    rows[3]["flag"], rows[4]["flag"], rows[5]["flag"] = "cut", "repetition", "cut"
    receipt = store.write_shard("captions", "test", 1, pa.Table.from_pylist(rows, schema=CAPTIONS), seconds=1)
    assert receipt.flagged == 3
    assert main(["status", "--store", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert f"2 x marked: cut (such as {rows[3]['id']})" in shown and "1 x marked: repetition" in shown
    assert main(["status", "--store", str(folder), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"rows", "shards", "stages"}
