"""Addresses, keys of every kind, and storage that fails told from files that fail."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.config import SourceConfig
from pipeline.errors import RunStoppedError
from pipeline.sources.plan import make_plan as plan
from pipeline.stages.ingest import IngestShard
from pipeline.store import Store, locations
from tests.stores import ingest

# What S3 allows in a key: anything, alone and in combinations that an address would understand. Two are
# missing: the server of these tests does not find a key with a newline, and a listing in XML cannot say a
# carriage return (see the test below).
ODD = ("50%25", "x#1-2", "q?region=x", "br[1]", "st**r", "x. .", "~", "{label}", "a.tar#512-20")
KEYS = (*(f"a{chr(n)}b" for n in range(1, 256) if chr(n) not in "/\n\r"), *ODD)


def picture() -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(sink, "PNG")
    return sink.getvalue()


@pytest.mark.slow
def test_keys_are_taken_as_they_are_written(bucket: str, tmp_path: Path) -> None:
    import boto3

    client = boto3.client("s3")
    for key in KEYS:
        client.put_object(Bucket="pictures", Key=f"odd keys%20/cat ü/{key}.png", Body=picture())
    client.put_object(Bucket="pictures", Key="odd keys%20/dog/carriage\rreturn.png", Body=picture())
    for pack in (True, False):
        config = SourceConfig(
            images=f"{bucket}/odd keys%20", store=f"{bucket}/store of odd? keys {pack}", pack=pack
        )
        from_keys = plan(config)
        store = Store.create(config.store, from_keys.dataset)
        [shard] = from_keys.shards
        rows = [dataclasses.asdict(row) for row in shard]
        import pyarrow as pa

        IngestShard(store.uri)(pa.table({"shard": [0], "redo": [False], "rows": [rows]}))
        read = Store(config.store).read_shard("images", "", 0).to_pylist()
        lost = [row for row in read if row["label"] == store.dataset.classes.index("dog")]
        assert len(lost) == 1 and "cannot be read" in lost[0]["error"], (
            "the one that cannot be listed takes no other along"
        )
        read.remove(lost[0])
        assert {row["id"] for row in read} == {f"cat ü/{key}.png" for key in KEYS}
        assert [row["error"] for row in read] == [None] * len(read)
        assert {store.picture(row["image"], row["uri"], row["content_hash"]) for row in read} == {picture()}


def test_all_pictures_of_a_bucket_share_one_client(bucket: str) -> None:
    before = locations._file_system.cache_info().currsize
    clients = {id(locations.locate(f"{bucket}/some where/{n}", f"dog/{n}.jpg")[0]) for n in range(100)}
    assert len(clients) == 1
    assert locations._file_system.cache_info().currsize <= before + 1


def test_a_small_object_is_put_in_one_request_and_read_in_two(bucket: str) -> None:
    """HEAD and GET are pyarrow's way of reading; an upload in parts would be three requests."""
    from werkzeug.serving import WSGIRequestHandler

    seen: list[str] = []
    before = WSGIRequestHandler.log_request
    WSGIRequestHandler.log_request = lambda self, *_: seen.append(self.requestline.split()[0])  # type: ignore[method-assign]
    try:
        filesystem, root = locations.resolve(f"{bucket}/requests")
        with filesystem.open_output_stream(f"{root}/key", compression=None) as stream:
            stream.write(b"small")
        assert seen == ["PUT"]
        assert locations.fetch(f"{bucket}/requests", "key") == b"small"
        assert seen == ["PUT", "HEAD", "GET"]
    finally:
        WSGIRequestHandler.log_request = before  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("uri", "base", "options"),
    [
        ("s3://bucket/key?region=eu-west-1&scheme=http", "s3://bucket/key", "?region=eu-west-1&scheme=http"),
        ("s3://bucket/what?", "s3://bucket/what?", ""),
        ("s3://bucket/what?/now?region=x", "s3://bucket/what?/now", "?region=x"),
        ("s3://bucket/is it? no", "s3://bucket/is it? no", ""),
    ],
)
def test_settings_behind_an_address_are_told_from_question_marks_in_a_key(
    uri: str, base: str, options: str
) -> None:
    assert locations.split_options(uri) == (base, options)
    assert locations.join(uri, "dog/1.jpg") == f"{base}/dog/1.jpg{options}"


def test_a_missing_file_is_told_from_a_disk_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "in" / "dog").mkdir(parents=True)
    (tmp_path / "in" / "dog" / "1.png").write_bytes(picture())
    with pytest.raises(FileNotFoundError):
        locations.fetch_picture(str(tmp_path / "in"), "dog/2.png", 10**6)
    os.rename(tmp_path / "in", tmp_path / "elsewhere")
    with pytest.raises(locations.StorageError, match="does not answer"):
        locations.fetch_picture(str(tmp_path / "in"), "dog/1.png", 10**6)
    (tmp_path / "in").mkdir()  # a mount point that nothing is mounted on
    with pytest.raises(locations.StorageError, match="is it mounted"):
        locations.fetch_picture(str(tmp_path / "in"), "dog/1.png", 10**6)


@pytest.mark.slow  # not for what it starts: it waits for a client to give up
def test_a_missing_object_is_told_from_a_server_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        aws_access_key_id="x",
        aws_secret_access_key="y",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="fleeting")
    client.put_object(Bucket="fleeting", Key="in/dog/1.png", Body=picture())
    root = f"s3://fleeting/in?scheme=http&endpoint_override={host}:{port}&region=us-east-1"
    for name, value in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}.items():
        monkeypatch.setenv(name, value)
    try:
        assert locations.fetch_picture(root, "dog/1.png", 10**6) == picture()
        with pytest.raises(FileNotFoundError):
            locations.fetch_picture(root, "dog/2.png", 10**6)
    finally:
        server.stop()
    with pytest.raises(locations.StorageError, match="does not answer"):
        locations.fetch_picture(root, "dog/1.png", 10**6)


def test_a_picture_that_is_replaced_after_it_was_ingested_is_not_described(tmp_path: Path) -> None:
    from pipeline.config import CaptionConfig
    from pipeline.stages.caption import PreparePictures

    (tmp_path / "in" / "dog").mkdir(parents=True)
    for name in ("1", "2"):
        (tmp_path / "in" / "dog" / f"{name}.png").write_bytes(picture())
    store = ingest(SourceConfig(images=str(tmp_path / "in"), store=str(tmp_path / "store"), pack=False))
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "in" / "dog" / "2.png")
    import pyarrow as pa

    prepare = PreparePictures(CaptionConfig(store=store.uri, model="x/y"), "variant")
    [rows] = prepare(pa.table({"shard": [0], "redo": [False]}))["pictures"].to_pylist()
    errors = {row["id"]: row["error"] for row in rows}
    assert errors["dog/1.png"] is None
    assert "is another picture than when it was ingested" in errors["dog/2.png"]
    from training.data.augment import Augment
    from training.data.decoder import Decoder

    augment = Augment(
        size=8,
        crop_scale=1.0,
        flip=0.0,
        seed=0,
        crop_pct=1.0,
        interpolation="bilinear",
        mean=(0, 0, 0),
        auto_augment="",
        color_jitter=0.0,
    )
    import numpy as np

    row = [r["id"] for r in store.read_shard("images", "", 0).to_pylist()].index("dog/2.png")
    with pytest.raises(RunStoppedError, match=r"dog/2\.png cannot be read any more .*is another picture"):
        Decoder(store, (), augment, 1)(np.array([[0, 0, row, 0]]), False)


def test_storage_that_goes_away_marks_no_picture_as_failed(tmp_path: Path) -> None:
    from pipeline.config import CaptionConfig
    from pipeline.stages.caption import PreparePictures

    (tmp_path / "in" / "dog").mkdir(parents=True)
    (tmp_path / "in" / "dog" / "1.png").write_bytes(picture())
    config = SourceConfig(images=str(tmp_path / "in"), store=str(tmp_path / "store"), pack=False)
    cut = plan(config)
    os.rename(tmp_path / "in", tmp_path / "away")
    import pyarrow as pa

    store = Store.create(config.store, cut.dataset)
    items = [dataclasses.asdict(row) for row in cut.shards[0]]
    with pytest.raises(locations.StorageError):
        IngestShard(store.uri)(pa.table({"shard": [0], "redo": [False], "rows": [items]}))
    assert store.pending("images") == [0]
    os.rename(tmp_path / "away", tmp_path / "in")
    IngestShard(store.uri)(pa.table({"shard": [0], "redo": [False], "rows": [items]}))
    os.rename(tmp_path / "in", tmp_path / "away")
    with pytest.raises(locations.StorageError):
        PreparePictures(CaptionConfig(store=store.uri, model="x/y"), "variant")(
            pa.table({"shard": [0], "redo": [False]})
        )


def test_a_split_on_another_disk_that_goes_away_marks_no_picture_as_failed(tmp_path: Path) -> None:
    """Splits and classes are often links; a list may name folders that never were, and there a missing one is
    a row's error."""
    import pyarrow as pa

    for split, where in (("train", tmp_path / "disk"), ("val", tmp_path / "in")):
        (where / split / "dog").mkdir(parents=True)
        (where / split / "dog" / "1.png").write_bytes(picture())
    (tmp_path / "in" / "train").symlink_to(tmp_path / "disk" / "train")
    (tmp_path / "in" / "list.jsonl").write_text(
        '{"path": "gone/1.png", "label": "a"}\n{"path": "val/dog/1.png", "label": "a"}\n'
    )
    found = []
    for images in (tmp_path / "in", tmp_path / "in" / "list.jsonl"):
        config = SourceConfig(
            images=str(images), store=str(tmp_path / f"store-{images.suffix}"), max_failure_rate=1
        )
        cut = plan(config)
        items = [dataclasses.asdict(row) for row in cut.shards[0]]
        found.append((Store.create(config.store, cut.dataset), items))
    os.rename(tmp_path / "disk", tmp_path / "away")
    (folder, rows), (listed, lines) = found
    with pytest.raises(locations.StorageError, match="train"):
        IngestShard(folder.uri)(pa.table({"shard": [0], "redo": [False], "rows": [rows]}))
    assert 0 in folder.pending("images")
    IngestShard(listed.uri)(pa.table({"shard": [0], "redo": [False], "rows": [lines]}))
    assert [row["error"] is None for row in listed.read_shard("images", "", 0).sort_by("id").to_pylist()] == [
        False,
        True,
    ]


def test_a_parquet_source_that_goes_away_marks_no_row_as_failed(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "in").mkdir()
    pq.write_table(
        pa.table({"image": [picture()] * 4, "label": ["a", "b"] * 2}), tmp_path / "in" / "train.parquet"
    )
    config = SourceConfig(images=str(tmp_path / "in"), store=str(tmp_path / "store"))
    cut = plan(config)
    store = Store.create(config.store, cut.dataset)
    os.rename(tmp_path / "in", tmp_path / "away")
    items = [dataclasses.asdict(row) for row in cut.shards[0]]
    with pytest.raises(locations.StorageError):
        IngestShard(store.uri)(pa.table({"shard": [0], "redo": [False], "rows": [items]}))
    assert store.pending("images") == [0]


@pytest.mark.slow
def test_an_outage_stops_an_ingest_that_goes_on_later_with_nothing_marked_failed(
    tmp_path: Path, scenes: Path
) -> None:
    """A real server on loopback, ended in the middle of a run and started again with what it held."""
    import subprocess
    import sys
    import time

    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "RAY_ADDRESS": "",
    }
    client = boto3.client(
        "s3",
        endpoint_url=settings["AWS_ENDPOINT_URL"],
        aws_access_key_id="x",
        aws_secret_access_key="y",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="outage")
    for path in scenes.glob("*/*/*.*"):
        client.put_object(Bucket="outage", Key=f"in/{path.relative_to(scenes)}", Body=path.read_bytes())
    store = tmp_path / "store"
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "ingest",
        "--images",
        "s3://outage/in",
        "--store",
        str(store),
        "--shard-rows",
        "4",
    ]
    driver = subprocess.Popen(command, env=os.environ | settings, stderr=subprocess.PIPE, text=True)
    while driver.poll() is None and not list(store.glob("images/receipts/*.json")):
        time.sleep(0.02)
    server.stop()
    said = driver.communicate(timeout=300)[1]
    assert driver.returncode == 1, said[-3000:]
    assert "does not answer" in said and "What is done is kept" in said and "Traceback" not in said, said[
        -3000:
    ]
    half = Store(str(store))
    assert 0 < len(half.finished("images")) < half.dataset.shards
    assert sum(receipt.failed for receipt in half.receipts("images").values()) == 0
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    try:
        subprocess.run(command, env=os.environ | settings, check=True, capture_output=True)
    finally:
        server.stop()
    assert half.pending("images") == []
    assert sum(receipt.failed for receipt in half.receipts("images").values()) == 0


def test_a_place_that_cannot_be_written_is_found_before_any_work(
    tmp_path: Path,
    picture_folder: Callable[..., Path],
    make_store: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As root, too, who may write wherever something can be written."""
    from cluster import cli

    images, store = str(picture_folder({"train/a": 4, "val/a": 2})), str(make_store(tmp_path / "described"))
    (tmp_path / "file").write_text("x")
    commands = {
        "store": ["ingest", "--images", images, "--store"],
        "run": [
            "train",
            "--store",
            store,
            "--preset",
            "smoke",
            "--batch-size",
            "12",
            "--projection-dim",
            "4",
            "--run",
        ],
        "sweep": ["tune", "--store", store, "--preset", "smoke", "--batch-size", "12", "--sweep"],
        "to": ["inspect", store, "--to"],
    }
    for setting, command in commands.items():
        for place in ("/proc/nobody/x", str(tmp_path / "file" / "below" / "x")):
            assert cli.main([*command, place]) == 2
            assert (
                f"{setting}=" in (said := capsys.readouterr().err) and "nothing can be written there" in said
            ), said
    locations.check_writable("store", str(tmp_path / "new" / "folder"))
    assert not (tmp_path / "new").exists()
