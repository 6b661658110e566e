"""The verbs end to end with the real engine and encoder: twice, killed half way, with bad pictures,
retried."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.__main__ import main
from pipeline.store import Store, lock

Folder = Callable[..., Path]
pytestmark = pytest.mark.alone
ONE_ENGINE = ["--replicas", "1", "--engine-cores", "1"]  # is up sooner than two, and computes the same
DESCRIBE, CAPTION = ([verb, "--caption-preset", "scenes"] for verb in ("describe", "caption"))


def files(store: Path, *, receipts: bool = False) -> dict[str, bytes]:
    """Every file of a store by name; receipts hold seconds, so they are left out unless asked for."""
    found = {
        str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()
    }
    # Which says who was there last.
    found = {name: data for name, data in found.items() if not name.endswith(lock.FILE)}
    return {name: data for name, data in found.items() if receipts or "/receipts/" not in name}


def test_describe_fills_every_row_of_every_stage(described: Path) -> None:
    store = Store(str(described))
    captions = store.only_variant("captions")
    embeddings = store.only_variant("embeddings")
    assert store.dataset.rows == 12 * 24 and store.dataset.shards == 5
    for shard in range(store.dataset.shards):
        table = store.read_shard("captions", captions, shard)
        assert table["error"].null_count == len(table)
        assert min(len(text.split()) for text in table["caption"].to_pylist()) >= 5
        assert min(table["prompt_tokens"].to_pylist()) > 64, (
            "the picture's patches are among the prompt's tokens"
        )
        vectors = np.array(
            store.read_shard("embeddings", embeddings, shard)["embedding"].to_pylist(), dtype=np.float32
        )
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=2e-3)
    assert store.variant("captions", captions)["engine"] == "vllm"
    assert store.variant("embeddings", embeddings)["captions"] == captions


def test_describe_again_does_no_work(
    described: Path, scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in described.rglob("*") if path.is_file()}
    start = time.monotonic()
    assert main([*DESCRIBE, "--images", str(scenes), "--store", str(described), "--shard-rows", "64"]) == 0
    assert capsys.readouterr().err.count("nothing to do") == 3
    assert {path: path.stat().st_mtime_ns for path in described.rglob("*") if path.is_file()} == before
    assert time.monotonic() - start < 20, "no engine was started"


def test_another_prompt_is_another_variant_and_leaves_the_first_alone(described: Path, scenes: Path) -> None:
    before = files(described, receipts=True)
    prompt = ["--prompt", "Describe this image of {label} in detail."]
    assert main([*CAPTION, "--store", str(described), *prompt, *ONE_ENGINE]) == 0
    store = Store(str(described))
    names = store.variants("captions")
    assert len(names) == 2
    after = files(described, receipts=True)
    assert {name: after[name] for name in before} == before
    new = next(name for name in names if f"captions/{name}/variant.json" not in before)
    assert store.variant("captions", new)["prompt"] == "Describe this image of {label} in detail."
    assert main(["embed", "--store", str(described)]) == 2, "two caption variants and none named"
    for path in sorted((described / "captions" / new).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (described / "captions" / new).rmdir()


def test_killed_half_way_and_started_again_gives_the_files_of_an_uninterrupted_run(
    described: Path, scenes: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    command = [
        sys.executable,
        "-m",
        "pipeline",
        *DESCRIBE,
        "--images",
        str(scenes),
        "--store",
        str(store),
        "--shard-rows",
        "64",
        *ONE_ENGINE,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 240
    while child.poll() is None and time.monotonic() < deadline:
        if any(store.glob("captions/*/receipts/part-*.json")):
            break
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)  # the driver and what it started in its session
    child.wait()
    opened = Store(str(store))
    done = opened.finished("captions", opened.only_variant("captions"))
    assert 0 < len(done) < opened.dataset.shards, "killed between the first caption shard and the last"
    assert main(command[3:]) == 0
    assert files(store) == files(described)


def test_bad_pictures_are_rows_with_errors_and_retry_redoes_only_those(
    ray_session: None, picture_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = picture_folder({"train/a": 6, "train/b": 6})
    good = (images / "train/a/000.jpg").read_bytes()
    (images / "train/a/001.jpg").write_bytes(b"")
    (images / "train/b/002.jpg").write_bytes(good[: len(good) // 2])
    store = tmp_path / "store"
    describe = [
        *DESCRIBE,
        "--images",
        str(images),
        "--store",
        str(store),
        "--shard-rows",
        "5",
        "--captioner",
        "transformers",
    ]

    assert main(describe) == 3, "two of twelve failed, one percent allowed"
    told = capsys.readouterr().err
    assert "2 of 12 rows failed" in told and "empty file (0 bytes)" in told and "gpt4image retry" in told

    assert main([*describe, "--max-failure-rate", "0.2"]) == 0
    opened = Store(str(store))
    variant = opened.only_variant("embeddings")
    assert {key for key, _ in opened.errors("embeddings", variant)} == {"train/a/001.jpg", "train/b/002.jpg"}
    reasons = dict(opened.errors("embeddings", variant))
    assert reasons["train/a/001.jpg"].startswith("no caption: no picture: empty file (0 bytes)")
    capsys.readouterr()
    assert main(["status", "--store", str(store), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert [stage["failed"] for stage in status["stages"]] == [2, 2, 2]
    assert set(status) == {"rows", "shards", "stages"} and status["rows"] == 12

    before = files(store)
    (images / "train/a/001.jpg").write_bytes(good)
    assert main(["retry", "--store", str(store), "--max-failure-rate", "0.1"]) == 0
    assert [key for key, _ in opened.errors("embeddings", variant)] == ["train/b/002.jpg"]
    after = files(store)
    mended = next(
        s
        for s in range(opened.dataset.shards)
        if "train/a/001.jpg" in opened.read_shard("images", "", s)["id"].to_pylist()
    )
    still = next(
        s
        for s in range(opened.dataset.shards)
        if "train/b/002.jpg" in opened.read_shard("images", "", s)["id"].to_pylist()
    )
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {name for name in before if name.endswith(f"part-{mended:05}.parquet")}
    old, new = (pq.read_table(io).to_pylist() for io in _captions(before, after, mended))
    assert [row for row in new if row["id"] != "train/a/001.jpg"] == [
        row for row in old if row["id"] != "train/a/001.jpg"
    ]
    captions = opened.only_variant("captions")
    assert opened.receipt("captions", captions, mended).attempt == 2
    assert opened.receipt("captions", captions, still).attempt == 2, "tried again, in vain"


def _captions(before: dict[str, bytes], after: dict[str, bytes], shard: int) -> list[object]:
    import pyarrow as pa

    name = next(
        name for name in before if name.startswith("captions/") and name.endswith(f"part-{shard:05}.parquet")
    )
    return [pa.BufferReader(content[name]) for content in (before, after)]


def test_a_source_that_changed_is_refused(ray_session: None, picture_folder: Folder, tmp_path: Path) -> None:
    images = picture_folder({"a": 3})
    store = tmp_path / "store"
    ingest = ["ingest", "--images", str(images), "--store", str(store)]
    assert main(ingest) == 0
    before = files(store, receipts=True)
    (images / "a/new.jpg").write_bytes((images / "a/000.jpg").read_bytes())
    assert main(ingest) == 2
    assert files(store, receipts=True) == before


def test_a_missing_model_starts_nothing_and_keeps_the_store(
    described: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(described, receipts=True)
    assert main(["caption", "--store", str(described), "--model", "nowhere/at-all"]) == 2
    assert "nowhere/at-all" in capsys.readouterr().err
    assert main(["embed", "--store", str(described), "--encoder", "./nowhere"]) == 2
    assert files(described, receipts=True) == before
