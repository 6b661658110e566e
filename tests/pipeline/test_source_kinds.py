"""Tars, Parquet files, lists and image folders give the same rows, from a disk, from S3 and from Google's
storage."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import run
from pipeline.config import RetryConfig, SourceConfig
from pipeline.sources.plan import make_plan as plan
from pipeline.sources.readers import Reader
from pipeline.store import Store, locations
from tests.stores import ingest

Pictures = dict[str, bytes]  # "train/dog/0.jpg" -> JPEG
KINDS = ("folder", "webdataset", "parquet", "jsonl")


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    rng = np.random.default_rng(7)
    found = {}
    for split, count in (("train", 12), ("val", 5)):
        for number in range(count):
            sink = io.BytesIO()
            size = (int(rng.integers(20, 90)), int(rng.integers(20, 90)), 3)
            Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(sink, "JPEG")
            found[f"{split}/{('cat', 'dog', 'hen')[number % 3]}/{number:03}.jpg"] = sink.getvalue()
    found["train/cat/broken.jpg"] = found["train/cat/000.jpg"][:200]
    return found


def as_folder(pictures: Pictures, root: Path) -> str:
    for name, data in pictures.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return str(root)


def as_tars(pictures: Pictures, root: Path) -> str:
    """Two tars a split as the WebDataset convention has them, labels once in .cls and once in .json files."""
    root.mkdir(parents=True, exist_ok=True)
    for place, (name, data) in enumerate(pictures.items()):
        split, label, base = name.split("/")
        kind = "cls" if place % 2 else "json"
        side = label.encode() if kind == "cls" else json.dumps({"label": label}).encode()
        with tarfile.open(root / f"{split}-{place % 2:06}.tar", "a") as tar:
            for ending, content in (("jpg", data), (kind, side)):
                member = tarfile.TarInfo(f"{split}-{base.removesuffix('.jpg')}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(root)


def as_parquet(pictures: Pictures, root: Path) -> str:
    """As Hugging Face's data sets write them: a struct of bytes and path, ClassLabel names in the
    metadata."""
    root.mkdir(parents=True, exist_ok=True)
    labels = ["cat", "dog", "hen"]
    info = {
        "info": {"features": {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": labels}}}
    }
    for split in ("train", "val"):
        names = [name for name in pictures if name.startswith(split)]
        images = [{"bytes": pictures[name], "path": name.rsplit("/", 1)[1]} for name in names]
        schema = pa.schema(
            [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
            metadata={"huggingface": json.dumps(info)},
        )
        table = pa.table([images, [labels.index(name.split("/")[1]) for name in names]], schema=schema)
        pq.write_table(table, root / f"{split}-00000-of-00001.parquet", row_group_size=4)
    return str(root)


def as_jsonl(pictures: Pictures, root: Path) -> str:
    as_folder(pictures, root)
    rows = [
        {"path": n, "label": n.split("/")[1], "split": n.split("/")[0], "bytes": len(d)}
        for n, d in pictures.items()
    ]
    (root / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(root / "list.jsonl")


WRITERS: dict[str, Callable[[Pictures, Path], str]] = {
    "folder": as_folder,
    "webdataset": as_tars,
    "parquet": as_parquet,
    "jsonl": as_jsonl,
}


def upload(folder: str, uri: str) -> str:
    filesystem, root = locations.resolve(uri)
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            with filesystem.open_output_stream(
                f"{root}/{path.relative_to(folder)}", compression=None
            ) as stream:
                stream.write(path.read_bytes())
    return uri


def rows_of(store: Store) -> list[dict[str, Any]]:
    return [
        row
        for shard in range(store.dataset.shards)
        for row in store.read_shard("images", "", shard).to_pylist()
    ]


def check(store: Store, pictures: Pictures) -> None:
    """Every picture is one row with its bytes, label and split; the broken one has an error."""
    rows = rows_of(store)
    assert len(rows) == len(pictures)
    assert store.dataset.classes == ["cat", "dog", "hen"]
    expected = {(d, n.split("/")[0], n.split("/")[1]) for n, d in pictures.items() if "broken" not in n}
    good = [row for row in rows if row["error"] is None]
    found = {
        (
            store.picture(r["image"], r["uri"], r["content_hash"]),
            r["split"],
            store.dataset.classes[r["label"]],
        )
        for r in good
    }
    assert found == expected
    assert [("damaged" in row["error"], row["split"]) for row in rows if row["error"] is not None] == [
        (True, "train")
    ]
    for name, split in store.dataset.splits.items():
        shards = range(split.first_shard, split.first_shard + split.num_shards)
        assert sum(len(store.read_shard("images", "", shard)) for shard in shards) == split.rows
        assert {
            row["split"] for shard in shards for row in store.read_shard("images", "", shard).to_pylist()
        } == {name}


# Each kind once and each place once by Ray's workers; the others by the same steps in this process.
BY_RAY = {("folder", "disk"), ("webdataset", "s3"), ("parquet", "gs"), ("jsonl", "disk")}


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        pytest.param(kind, where, marks=pytest.mark.slow) if (kind, where) in BY_RAY else (kind, where)
        for where in ("disk", "s3", "gs")
        for kind in KINDS
    ],
)
def test_every_kind_of_source_gives_the_same_rows(
    kind: str,
    where: str,
    pictures: Pictures,
    tmp_path: Path,
    bucket: str,
    gs_bucket: str,
    request: pytest.FixtureRequest,
) -> None:
    images = WRITERS[kind](pictures, tmp_path / kind)
    store = str(tmp_path / "store")
    if where != "disk":
        folder, there = str(tmp_path / kind), {"s3": bucket, "gs": gs_bucket}[where]
        uri = upload(folder, f"{there}/{kind}")
        images = images.replace(folder, uri)
        store = f"{there}/{kind}-store"
    config = SourceConfig(images=images, store=store, shard_rows=5, max_failure_rate=0.1)
    if (kind, where) in BY_RAY:
        request.getfixturevalue("ray_session")
        run.ingest(config)
    else:
        ingest(config)
    opened = Store(store)
    assert opened.dataset.source["kind"] == kind
    check(opened, pictures)
    run.ingest(config)  # nothing is left to do, and the plan is the same
    assert plan(config).dataset == opened.dataset


@pytest.mark.alone
@pytest.mark.parametrize("kind", ["folder", "webdataset", "jsonl"])
def test_pictures_by_reference_are_fetched_where_they_are(
    kind: str, pictures: Pictures, tmp_path: Path, bucket: str, ray_session: None
) -> None:
    folder = str(tmp_path / kind)
    images = WRITERS[kind](pictures, tmp_path / kind).replace(folder, f"{bucket}/reference-{kind}")
    upload(folder, f"{bucket}/reference-{kind}")
    store = str(tmp_path / "store")
    run.ingest(SourceConfig(images=images, store=store, shard_rows=5, max_failure_rate=0.1, pack=False))
    opened = Store(store)
    assert all(row["image"] is None for row in rows_of(opened))
    check(opened, pictures)


def test_parquet_pictures_cannot_be_stored_by_reference(pictures: Pictures, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pictures inside Parquet files cannot be fetched one by one"):
        plan(SourceConfig(images=as_parquet(pictures, tmp_path), store="unused", pack=False))


@pytest.mark.alone
def test_large_pictures_are_shrunk_before_they_are_packed(tmp_path: Path, ray_session: None) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    Image.new("RGB", (600, 300), "red").save(tmp_path / "in" / "a" / "large.png")
    Image.new("RGB", (60, 30), "blue").save(tmp_path / "in" / "a" / "small.png")
    store = str(tmp_path / "store")
    run.ingest(SourceConfig(images=str(tmp_path / "in"), store=store, max_edge=100))
    rows = {row["id"]: row for row in rows_of(Store(store))}
    assert (rows["a/large.png"]["width"], rows["a/large.png"]["height"]) == (100, 50)
    stored = Image.open(io.BytesIO(rows["a/large.png"]["image"]))
    assert (stored.format, stored.size) == ("JPEG", (100, 50))
    assert rows["a/small.png"]["image"] == (tmp_path / "in" / "a" / "small.png").read_bytes(), (
        "small ones stay as they are"
    )


@pytest.mark.alone
def test_retry_reads_a_mended_picture_at_its_place(
    pictures: Pictures, tmp_path: Path, ray_session: None
) -> None:
    images = as_folder(pictures, tmp_path / "in")
    store = str(tmp_path / "store")
    run.ingest(SourceConfig(images=images, store=store, shard_rows=5, max_failure_rate=0.1))
    (tmp_path / "in" / "train/cat/broken.jpg").write_bytes(pictures["train/cat/000.jpg"])
    run.retry(RetryConfig(store=store))
    assert all(row["error"] is None for row in rows_of(Store(store)))


def test_a_dry_run_takes_a_share_of_each_split(pictures: Pictures, tmp_path: Path) -> None:
    images = as_folder(pictures, tmp_path)
    few = plan(SourceConfig(images=images, store="unused", limit=9))
    whole = plan(SourceConfig(images=images, store="unused"))
    assert {name: split.rows for name, split in few.dataset.splits.items()} == {"train": 6, "val": 2}
    assert {row.id for shard in few.shards for row in shard} <= {
        row.id for shard in whole.shards for row in shard
    }
    assert few.dataset.classes == whole.dataset.classes


@pytest.mark.parametrize(
    "text",
    [
        "Katze\nHund\nHenne\n",
        "dog\tHund\ncat\tKatze\nhen\tHenne\n",
        '{"cat": "Katze", "dog": "Hund", "hen": "Henne"}',
    ],
)
def test_class_names_come_from_a_file(text: str, pictures: Pictures, tmp_path: Path) -> None:
    (tmp_path / "names").write_text(text)
    images = as_folder(pictures, tmp_path / "in")
    found = plan(SourceConfig(images=images, store="unused", class_names=str(tmp_path / "names")))
    assert found.dataset.classes == ["Katze", "Hund", "Henne"]


def test_class_names_of_other_classes_are_refused(pictures: Pictures, tmp_path: Path) -> None:
    (tmp_path / "names").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"2 lines for 3 classes \(cat, dog, hen"):
        plan(
            SourceConfig(
                images=as_folder(pictures, tmp_path / "in"),
                store="unused",
                class_names=str(tmp_path / "names"),
            )
        )


def test_numbered_labels_are_classes_in_the_order_of_numbers(tmp_path: Path) -> None:
    rows = [{"path": f"{n}.jpg", "label": n} for n in (10, 2, 2000, 0)]
    rows += [{"path": "again.jpg", "label": 2}]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = plan(SourceConfig(images=str(tmp_path / "list.jsonl"), store="unused"))
    assert len(found.dataset.classes) == 2001
    assert {row.id: row.label for shard in found.shards for row in shard}["10.jpg"] == 10


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: expected a JSON object"),
        ('{"label": "x"}', "line 2: expected a JSON object"),
        ('{"path": "a.jpg", "label": "x"}', "a.jpg is there twice"),
        ('{"path": "b.jpg"}', "no label: give it one"),
        ('{"path": "b.jpg", "label": ""}', "no label: give it one"),
        ('{"path": "b.jpg", "label": ["x"]}', "a label must be a text or a number, not list"),
        (
            '{"path": "b.jpg", "label": "x", "split": "holdout"}',
            "split 'holdout' is none of train, val and test",
        ),
    ],
)
def test_a_bad_line_is_a_row_with_an_error_and_too_many_are_refused_before_anything_starts(
    line: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "list.jsonl").write_text('{"path": "a.jpg", "label": "x"}\n' + line + "\n")
    with pytest.raises(ValueError, match="1 of 2 rows cannot be used") as error:
        plan(SourceConfig(images=str(tmp_path / "list.jsonl"), store="unused"))
    assert message in str(error.value)
    found = plan(SourceConfig(images=str(tmp_path / "list.jsonl"), store="unused", max_failure_rate=0.5))
    good, bad = sorted((row for shard in found.shards for row in shard), key=lambda row: bool(row.error))
    assert (good.id, good.label, good.error) == ("a.jpg", 0, "")
    assert message in bad.error and (bad.label, bad.place) == (-1, "")


def test_a_broken_or_compressed_tar_is_named(pictures: Pictures, tmp_path: Path) -> None:
    as_tars(pictures, tmp_path)
    tar = tmp_path / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:1500])
    with pytest.raises(ValueError, match=r"train-000000\.tar: cannot be read as a tar"):
        plan(SourceConfig(images=str(tmp_path), store="unused"))
    with tarfile.open(tmp_path / "train-000000.tar", "w:gz") as packed:
        packed.add(__file__, "a.jpg")
    with pytest.raises(ValueError, match="must be whole, and not compressed"):
        plan(SourceConfig(images=str(tmp_path), store="unused"))


def test_a_member_of_a_tar_never_becomes_a_path(tmp_path: Path) -> None:
    """Names in a tar are keys; only offsets are used for reading."""
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name, content in (("../../evil.jpg", b"x" * 10), ("../../evil.cls", b"0")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    found = plan(SourceConfig(images=str(tmp_path), store="unused"))
    [[row]] = found.shards
    assert row.place == f"train.tar#512-{10}"


@pytest.mark.parametrize(
    "path", ["/etc/hostname", "../outside.jpg", "s3://bucket/key.jpg", "http://127.0.0.1/x.jpg"]
)
def test_a_parquet_row_cannot_name_a_file_outside_the_source(path: str, tmp_path: Path) -> None:
    (tmp_path / "outside.jpg").write_bytes(b"x")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "beside.jpg").write_bytes(b"beside")
    images = pa.array([{"bytes": None, "path": path}, {"bytes": None, "path": "beside.jpg"}])
    pq.write_table(pa.table({"image": images, "label": [0, 0]}), tmp_path / "in" / "train.parquet")
    read = Reader(str(tmp_path / "in"), "parquet")
    with pytest.raises(OSError, match="which is not beside its file"):
        read("train.parquet#g0-0", 100)
    assert read("train.parquet#g0-1", 100) == b"beside"


def test_links_to_class_folders_are_followed(pictures: Pictures, tmp_path: Path) -> None:
    as_folder(pictures, tmp_path / "real")
    (tmp_path / "in" / "train").mkdir(parents=True)
    (tmp_path / "in" / "train" / "cat").symlink_to(tmp_path / "real" / "train" / "cat")
    assert plan(SourceConfig(images=str(tmp_path / "in"), store="unused")).dataset.rows == 5


def test_credentials_in_an_address_are_refused_and_not_shown() -> None:
    with pytest.raises(ValueError, match="set them in the environment") as error:
        locations.resolve("s3://key:very-secret@bucket/images")
    assert "very-secret" not in str(error.value)


def test_an_upload_that_is_refused_stops_with_a_clear_error(bucket: str) -> None:
    store = Store.__new__(Store)
    store.uri = "s3://no-such-bucket/store"
    store._fs, store._root = locations.resolve(store.uri)
    with pytest.raises(OSError, match="NO_SUCH_BUCKET"):
        store.write_file("x", b"data")
