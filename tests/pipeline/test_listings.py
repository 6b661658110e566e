"""What a source holds is a row each, or is counted and told: odd names, missing labels, unknown splits, large
row groups."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config import SourceConfig
from pipeline.sources import jsonl, parquet
from pipeline.sources.plan import Plan, Row, differences, notes
from pipeline.sources.plan import make_plan as plan
from pipeline.sources.readers import Reader
from pipeline.stages.caption import PreparePictures
from pipeline.stages.ingest import IngestShard
from pipeline.store import Store, locations

Folder = Callable[..., Path]


def config(images: Path | str, **settings: Any) -> SourceConfig:
    return SourceConfig(images=str(images), **{"store": "unused", **settings})


def rows_of(found: Plan) -> dict[str, Row]:
    rows = [row for shard in found.shards for row in shard]
    assert len({row.id for row in rows}) == len(rows) == found.dataset.rows
    return {row.id: row for row in rows}


def picture(shade: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (8, 6), (shade, shade, shade)).save(sink, "PNG")
    return sink.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_list(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(
    path: Path, labels: list[Any], names: list[str] | None = None, **columns: list[Any]
) -> Path:
    """As Hugging Face's data sets write them; with names, `label` is a ClassLabel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": picture(number % 256), "path": f"{number}.png"} for number in range(len(labels))]
    features = {"label": {"_type": "ClassLabel", "names": names}} if names else {}
    table = pa.table({"image": images, "label": labels, **columns})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=4)
    return path


def ingested(settings: SourceConfig) -> list[dict[str, Any]]:
    """The rows that ingest writes, without Ray."""
    found = plan(settings)
    store = Store.create(settings.store, found.dataset)
    ingest = IngestShard(settings.store)
    for shard, rows in enumerate(found.shards):
        ingest(pa.table({"shard": [shard], "redo": [False], "rows": [[asdict(row) for row in rows]]}))
    return [
        row for shard in range(len(found.shards)) for row in store.read_shard("images", "", shard).to_pylist()
    ]


# Names.


@pytest.mark.parametrize("pack", [True, False])
def test_names_that_are_not_utf8_become_rows_that_can_be_read_again(pack: bool, tmp_path: Path) -> None:
    folders = {b"caf\xe9": 10, "café".encode(): 20, b"caf<e9>": 30}
    for folder, shade in folders.items():
        path = os.path.join(os.fsencode(tmp_path / "in"), b"train", folder)
        os.makedirs(path)
        with open(os.path.join(path, b"\xff 1.png"), "wb") as stream:
            stream.write(picture(shade))
    rows = ingested(config(tmp_path / "in", store=str(tmp_path / "store"), pack=pack))
    store = Store(str(tmp_path / "store"))
    assert store.dataset.classes == ["caf<3c>e9>", "caf<e9>", "café"]
    assert sorted(row["id"] for row in rows) == [
        f"train/{name}/<ff> 1.png" for name in ("caf<3c>e9>", "caf<e9>", "café")
    ]
    shades = {
        store.dataset.classes[row["label"]]: store.picture(row["image"], row["uri"], row["content_hash"])
        for row in rows
    }
    assert shades == {"caf<e9>": picture(10), "café": picture(20), "caf<3c>e9>": picture(30)}
    again = IngestShard(str(tmp_path / "store"))._read
    assert all(
        again(row["uri"], 10**6) == store.picture(row["image"], row["uri"], row["content_hash"])
        for row in rows
    )


def test_an_address_of_a_source_that_is_not_utf8_is_refused_plainly(tmp_path: Path) -> None:
    folder = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"\xff"))
    os.makedirs(os.path.join(folder, "a"))
    with pytest.raises(ValueError, match="address must be UTF-8; rename or link the folder"):
        plan(config(folder))


def test_links_in_circles_and_to_nowhere_are_rows_with_an_error_and_pipes_are_left_alone(
    picture_folder: Folder, tmp_path: Path
) -> None:
    images = picture_folder({"a": 2})
    (images / "a" / "circle.jpg").symlink_to("circle.jpg")
    (images / "a" / "nowhere.jpg").symlink_to("nothing.jpg")
    (images / "circle").symlink_to("circle")
    os.mkfifo(images / "a" / "pipe.jpg")
    rows = {row["id"]: row["error"] for row in ingested(config(images, store=str(tmp_path / "store")))}
    assert rows.keys() == {"a/000.jpg", "a/001.jpg", "a/circle.jpg", "a/nowhere.jpg"}
    assert "symbolic links" in rows["a/circle.jpg"] and "No such file" in rows["a/nowhere.jpg"]


# Tars.


def test_dotted_names_in_a_tar_are_a_row_each(tmp_path: Path) -> None:
    members = {f"cat/2024.05.{day:02}.png": picture(day) for day in range(1, 6)}
    members |= {
        "dog/a.b.png": picture(9),
        "dog/a.b.cls": b"hound",
        "dog/a.png": picture(10),
        "dog/a.cls": b"dog",
    }
    found = plan(config(write_tar(tmp_path / "x.tar", members)))
    rows = rows_of(found)
    assert rows.keys() == {f"x.tar#cat/2024.05.{day:02}" for day in range(1, 6)} | {
        "x.tar#dog/a",
        "x.tar#dog/a.b",
    }
    labels = {key: found.dataset.classes[row.label] for key, row in rows.items()}
    assert (labels["x.tar#dog/a"], labels["x.tar#dog/a.b"], labels["x.tar#cat/2024.05.01"]) == (
        "dog",
        "hound",
        "cat",
    )
    read = Reader(str(tmp_path), "webdataset")
    assert {read(row.place, 10**4) for row in rows.values()} == {picture(n) for n in (1, 2, 3, 4, 5, 9, 10)}


def test_of_a_sample_with_several_pictures_the_plainly_named_is_taken_and_the_others_are_told(
    tmp_path: Path,
) -> None:
    members = {
        "k.depth.png": picture(1),
        "k.jpg": picture(2),
        "k.cls": b"0",
        "m.mask.png": picture(3),
        "m.png": picture(4),
    }
    found = plan(config(write_tar(tmp_path / "x.tar", members | {"m.cls": b"1"})))
    rows = rows_of(found)
    assert {key: Reader(str(tmp_path), "webdataset")(row.place, 10**4) for key, row in rows.items()} == {
        "x.tar#k": picture(2),
        "x.tar#m": picture(4),
    }
    assert any(
        note.startswith("2 pictures are left out: they belong to another of the same key")
        for note in notes(found.dataset)
    )


def test_a_sample_whose_pictures_are_named_alike_keeps_them_all(tmp_path: Path) -> None:
    members = {"k.jpg": picture(1), "k.png": picture(2), "k.JPG": picture(3), "k.cls": b"x"}
    rows = rows_of(plan(config(write_tar(tmp_path / "x.tar", members))))
    assert rows.keys() == {"x.tar#k.jpg", "x.tar#k.png", "x.tar#k.JPG"}


def test_odd_members_of_a_tar_are_told_and_bad_side_files_cost_their_own_row(tmp_path: Path) -> None:
    members = {f"{n}.png": picture(n) for n in range(4)} | {
        "0.cls": b"a",
        "1.json": b"{",
        "2.json": b'{"label": null}',
    }
    members |= {"3.cls": b"caf\xe9", "._3.png": b"a Mac's", "alone.cls": b"b"}
    found = plan(config(write_tar(tmp_path / "x.tar", members), max_failure_rate=1))
    rows = rows_of(found)
    assert {key: row.error.partition(":")[0].partition(" (")[0] for key, row in rows.items()} == {
        "x.tar#0": "",
        "x.tar#1": "1.json is not JSON",
        "x.tar#2": "no label",
        "x.tar#3": "",
    }
    assert found.dataset.classes == ["a", "caf<e9>"]
    assert [rows[f"x.tar#{n}"].label for n in range(4)] == [0, -1, -1, 1]
    told = "\n".join(notes(found.dataset))
    assert (
        "1 pictures are left out: hidden files, or links, in tars" in told
        and found.dataset.source["skipped_files"] == 1
    )


def test_a_tar_with_a_damaged_header_in_its_middle_is_refused_and_not_read_in_part(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {f"a/{n}.png": picture(n) for n in range(4)})
    data = bytearray(path.read_bytes())
    data[2 * 1024 + 30] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"x\.tar: cannot be read as a tar \(damaged at byte 2048, or another"
    ):
        plan(config(path))


# Labels.


def test_a_split_whose_labels_are_secret_is_left_out_and_told(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", [0, 1, 2, 1], ["x", "y", "z"])
    write_parquet(tmp_path / "val-0.parquet", [0, 2], ["x", "y", "z"])
    write_parquet(tmp_path / "test-0.parquet", [-1] * 6, ["x", "y", "z"])
    found = plan(config(tmp_path))
    assert (found.dataset.rows, list(found.dataset.splits), found.dataset.classes) == (
        6,
        ["train", "val"],
        ["x", "y", "z"],
    )
    assert notes(found.dataset) == ["6 pictures of split test are left out: none has a label"]


@pytest.mark.parametrize("names", [None, ["zero", "one"]])
@pytest.mark.parametrize("none", [None, -1, float("nan")])
def test_single_rows_without_a_label_are_rows_with_an_error_and_no_class(
    none: Any, names: Any, tmp_path: Path
) -> None:
    path = write_parquet(
        tmp_path / "x.parquet", [0, 1, none, 1] if none == -1 else [0.0, 1.0, none, 1.0], names
    )
    with pytest.raises(ValueError, match="1 of 4 rows cannot be used"):
        plan(config(path))
    found = plan(config(path, max_failure_rate=0.25))
    assert found.dataset.classes == (names or ["0", "1"])
    assert [rows_of(found)[f"x.parquet#{n}"].label for n in range(4)] == [0, 1, -1, 1]
    assert rows_of(found)["x.parquet#2"].error.startswith("no label")


def test_null_is_no_class_in_a_list_either(tmp_path: Path) -> None:
    rows = [{"path": f"{n}.jpg", "label": label} for n, label in enumerate(["dog", None, "cat", "None"])]
    found = plan(config(write_list(tmp_path / "list.jsonl", rows), max_failure_rate=0.25))
    assert found.dataset.classes == ["None", "cat", "dog"], "a class may be called None; a null is none"
    assert rows_of(found)["1.jpg"].error.startswith("no label")


def test_a_label_beyond_the_named_classes_is_its_row_s_error(tmp_path: Path) -> None:
    found = plan(config(write_parquet(tmp_path / "x.parquet", [0, 7, 1], ["a", "b"]), max_failure_rate=0.5))
    assert "label '7': the file names classes 0 to 1" in rows_of(found)["x.parquet#1"].error


def test_files_that_name_different_classes_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", [0], ["a", "b"])
    write_parquet(tmp_path / "val-0.parquet", [0], ["b", "a"])
    with pytest.raises(ValueError, match="the files name different classes"):
        plan(config(tmp_path))


def test_a_file_without_the_column_of_labels_is_a_split_without_labels(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", [0, 1], ["a", "b"])
    pq.write_table(pa.table({"image": [{"bytes": picture(1), "path": "x"}]}), tmp_path / "test-0.parquet")
    found = plan(config(tmp_path))
    assert found.dataset.rows == 2
    assert "1 pictures of split test are left out: none has a label" in notes(found.dataset)


def test_the_errors_of_a_listing_outlive_a_retry_and_the_captioner_passes_them_by(tmp_path: Path) -> None:
    from pipeline.config import CaptionConfig

    path = write_parquet(tmp_path / "in" / "x.parquet", [0, None, 1], ["a", "b"])
    settings = config(path, store=str(tmp_path / "store"), max_failure_rate=1)
    before = ingested(settings)
    # As `retry` does it: rows from what is on record, which knows of no error.
    rows = [asdict(Row(id=r["id"], label=r["label"], split=r["split"], place=r["uri"])) for r in before]
    IngestShard(settings.store)(pa.table({"shard": [0], "redo": [True], "rows": [rows]}))
    assert Store(settings.store).read_shard("images", "", 0).to_pylist() == before
    prepared = PreparePictures(
        CaptionConfig(store=settings.store, caption_preset="scenes", prompt="a {label}"), "unused"
    )
    made = prepared(pa.table({"shard": [0], "redo": [False]}))["pictures"][0].as_py()
    assert sorted((one["prompt"] or "", one["error"] or "") for one in made) == [
        ("", "no picture: no label: give it one, and ingest into a new store"),
        ("a a", ""),
        ("a b", ""),
    ]


# Splits.


def test_dev_and_eval_are_val(tmp_path: Path) -> None:
    rows = [
        {"path": f"{n}.jpg", "label": "x", "split": name}
        for n, name in enumerate(("train", "Dev", "eval", "validation"))
    ]
    found = plan(config(write_list(tmp_path / "list.jsonl", rows)))
    assert {name: split.rows for name, split in found.dataset.splits.items()} == {"train": 1, "val": 3}
    write_tar(tmp_path / "tars" / "train-0.tar", {"a/1.png": b"1"})
    write_tar(tmp_path / "tars" / "dev-0.tar", {"a/2.png": b"2"})
    assert list(plan(config(tmp_path / "tars")).dataset.splits) == ["train", "val"]


def test_files_that_tell_no_split_beside_others_that_do_are_refused(tmp_path: Path) -> None:
    for name in ("train-0.tar", "holdout-0.tar"):
        write_tar(tmp_path / name, {"a/1.png": b"1"})
    with pytest.raises(
        ValueError, match=r"holdout-0\.tar: the name tells no split, as those of the other files do"
    ):
        plan(config(tmp_path))


def test_a_column_of_splits_is_believed_or_refused_and_never_hashed(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [0, 1, 0], split=["train", "dev", "test"])
    assert {name: split.rows for name, split in plan(config(path)).dataset.splits.items()} == {
        "train": 1,
        "val": 1,
        "test": 1,
    }
    path = write_parquet(tmp_path / "x.parquet", [0, 1, 0], split=["train", "holdout", None])
    with pytest.raises(ValueError, match="split 'holdout' is none of train, val and test"):
        plan(config(path))


def test_folders_beside_the_splits_are_counted_and_named(picture_folder: Folder) -> None:
    images = picture_folder({"train/a": 2, "dev/a": 1, "extra/a": 3, "raw": 2, "train": 1})
    found = plan(config(images))
    assert {name: split.rows for name, split in found.dataset.splits.items()} == {"train": 2, "val": 1}
    assert notes(found.dataset) == [
        "5 pictures are left out: they lie beside the splits, in extra, raw (splits are train, val and test)",
        "1 pictures are left out: they lie in no class folder",
    ]


def test_a_source_without_a_val_split_says_so_and_the_mend_it_names_works(picture_folder: Folder) -> None:
    images = picture_folder({"train/a": 40, "test/a": 3})
    [told] = notes(plan(config(images)).dataset)
    assert told == (
        "there is no val split, by which training is judged: train with --eval-split test, or to train on "
        "this source, ingest into a new store with --val-fraction 0.1"
    )
    mended = plan(config(images, val_fraction=0.2)).dataset
    assert mended.splits["test"].rows == 3 and 2 <= mended.splits["val"].rows <= 16
    assert mended.splits["val"].rows + mended.splits["train"].rows == 40
    assert notes(mended) == []


def test_a_fraction_for_a_val_split_that_is_there_is_said_to_be_idle(picture_folder: Folder) -> None:
    found = plan(config(picture_folder({"train/a": 9, "val/a": 3}), val_fraction=0.5)).dataset
    assert {name: split.rows for name, split in found.splits.items()} == {"train": 9, "val": 3}
    assert notes(found) == ["--val-fraction is not used: the source has a val split of its own"]


# Lists.


@pytest.mark.parametrize(
    "path",
    [
        "/etc/hostname",
        "../outside.png",
        "a/../../outside.png",
        "file:///etc/hostname",
        "s3://bucket/key.png",
        "//etc/x",
    ],
)
def test_a_list_cannot_name_a_file_outside_its_folder(path: str, tmp_path: Path) -> None:
    (tmp_path / "outside.png").write_bytes(picture(1))
    rows = [{"path": "in.png", "label": "x"}, {"path": path, "label": "x"}]
    settings = config(
        write_list(tmp_path / "in" / "list.jsonl", rows), store=str(tmp_path / "store"), max_failure_rate=1
    )
    (tmp_path / "in" / "in.png").write_bytes(picture(2))
    found = {row["id"]: row["error"] for row in ingested(settings)}
    assert found["in.png"] is None
    assert found[path].startswith(f"line 2: {path!r} lies outside the folder of the list")


@pytest.mark.parametrize("start", ["", "{root}/", "file://{root}/"])
def test_a_list_may_name_its_own_folder_in_full(start: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(picture(1))
    path = start.format(root=tmp_path) + "a/1.png"
    [row] = ingested(
        config(
            write_list(tmp_path / "list.jsonl", [{"path": path, "label": "x"}]), store=str(tmp_path / "store")
        )
    )
    assert (row["id"], row["uri"], row["image"]) == (path, "a/1.png", picture(1))


def test_lines_end_where_json_lines_end(tmp_path: Path) -> None:
    names = ["a\u2028b.png", "a\x85b.png", "a\x0cb.png", "c#512-20", "d#g0-1"]
    lines = [json.dumps({"path": name, "label": "x"}, ensure_ascii=False).encode() for name in names]
    lines.append(b'{"path": "caf\xe9.png", "label": "x"}')
    (tmp_path / "list.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    for name in [*names, "caf\udce9.png"]:
        (tmp_path / name).write_bytes(picture(7))
    rows = ingested(config(tmp_path / "list.jsonl", store=str(tmp_path / "store")))
    assert [row["error"] for row in rows] == [None] * 6
    assert {row["id"] for row in rows} == {*names, "caf<e9>.png"}


def test_a_list_without_sizes_is_cut_by_the_files_sizes(picture_folder: Folder) -> None:
    images = picture_folder({"a": 6})
    names = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.jpg"))
    path = write_list(
        images / "list.jsonl", [{"path": name, "label": "a"} for name in [*names, "a/missing.jpg", "a\0b"]]
    )
    most = 2 * max((images / name).stat().st_size for name in names)
    found = plan(config(path, shard_bytes=most))
    assert len(found.shards) >= 3
    for shard in found.shards:
        assert sum((images / row.id).stat().st_size for row in shard if row.id in names) <= most


@pytest.mark.parametrize("heads", [1000, 2])
def test_a_remote_list_without_sizes_is_cut_by_the_files_sizes(
    heads: int, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(jsonl, "HEADS", heads)
    filesystem, root = locations.resolve(f"{bucket}/sizes-{heads}")
    names = [f"deep/a/{n}.png" for n in range(6)]
    lines = "".join(json.dumps({"path": name, "label": "a"}) + "\n" for name in [*names, "deep/missing.png"])
    for name, data in {"list.jsonl": lines.encode(), **{name: bytes(100) for name in names}}.items():
        with filesystem.open_output_stream(f"{root}/{name}", compression=None) as stream:
            stream.write(data)
    found = plan(config(f"{bucket}/sizes-{heads}/list.jsonl", shard_bytes=200))
    assert sorted(len(set(names) & {row.id for row in shard}) for shard in found.shards) == [2, 2, 2]


# Parquet.


def test_of_a_large_row_group_only_the_rows_wanted_are_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, size = 400, 100_000
    images = pa.array([{"bytes": os.urandom(size), "path": None} for _ in range(count)])
    pq.write_table(
        pa.table({"image": images, "label": [0] * count}), tmp_path / "x.parquet", compression="none"
    )
    expected = images.field("bytes").to_pylist()
    del images
    monkeypatch.setattr(parquet, "LARGE_GROUP", 2**20)
    read = Reader(str(tmp_path), "webdataset")
    wanted = [7, 3, 250, 399]
    places = [f"x.parquet#g0-{row}" for row in wanted]
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    read.expect(places)
    assert [read(place, 10**6) for place in places] == [expected[row] for row in wanted]
    held = pool.bytes_allocated() - before
    assert held < 10 * size, f"{held} bytes held of {count * size}"
    assert read("x.parquet#g0-8", 10**6) == expected[8], "also one that nobody expected"
    monkeypatch.setattr(parquet, "LARGE_GROUP", 2**30)
    whole = Reader(str(tmp_path), "webdataset")
    assert [whole(place, 10**6) for place in places] == [expected[row] for row in wanted]
    told = [note for note in notes(plan(config(tmp_path)).dataset) if "row groups" in note]
    assert told == []
    monkeypatch.setattr(parquet, "LARGE_GROUP", 2**20)
    [told] = [note for note in notes(plan(config(tmp_path)).dataset) if "row groups" in note]
    assert "row_group_size of some 500 rows" in told


def test_the_gallery_shows_rows_that_have_no_class(tmp_path: Path) -> None:
    from pipeline.config import InspectConfig
    from pipeline.inspect import gallery

    path = write_parquet(tmp_path / "in" / "x.parquet", [0, None, 1, 1], ["cats", "dogs"])
    ingested(config(path, store=str(tmp_path / "store"), max_failure_rate=1))
    page = Path(
        gallery.write(InspectConfig(store=str(tmp_path / "store"), to=str(tmp_path / "page.html")))
    ).read_text()
    assert "no label: give it one" in page and '"label":-1' not in page and "dogs" in page


# One odd thing among many.


@pytest.mark.parametrize("odd", ["unknown", -100, 1.5, True, "9999999", "-1"])
def test_one_odd_label_does_not_number_the_others_anew(odd: Any, tmp_path: Path) -> None:
    labels = [number % 12 for number in range(240)]
    rows = [{"path": f"{n}.png", "label": label, "split": "train"} for n, label in enumerate([*labels, odd])]
    found = plan(config(write_list(tmp_path / "list.jsonl", rows), limit=0))
    assert found.dataset.classes == [str(number) for number in range(12)]
    by_id = rows_of(found)
    assert [by_id[f"{n}.png"].label for n in range(240)] == labels
    assert by_id["240.png"].label == -1 and by_id["240.png"].error


def test_digits_beside_letters_are_names(tmp_path: Path) -> None:
    rows = [{"path": f"{n}.png", "label": label} for n, label in enumerate([*range(10), "A", "B", -1] * 3)]
    found = plan(config(write_list(tmp_path / "list.jsonl", rows), max_failure_rate=0.1))
    assert found.dataset.classes == [*map(str, range(10)), "A", "B"]
    assert sum(bool(row.error) for row in rows_of(found).values()) == 3


def test_classes_without_a_picture_are_told(tmp_path: Path) -> None:
    rows = [{"path": f"{n}.png", "label": n * 100} for n in range(5)]
    found = plan(config(write_list(tmp_path / "list.jsonl", rows)))
    assert "labels up to 400 make 401 classes, of which 5 have a picture" in found.dataset.source["notes"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("tabby cat\tCAT\ngolden retriever\tDOG\nafrican elephant\tELEPHANT\n", ""),
        ("\ufefftabby cat\tCAT\ngolden retriever\tDOG\nafrican elephant\tELEPHANT\n", ""),
        ("tabby cat CAT\ngolden retriever DOG\nafrican elephant ELEPHANT\n", ""),
        ("ELEPHANT\r\nDOG\r\nCAT\r\n", ""),
        ("tabby cat\tCAT\ngolden retreiver\tDOG\nafrican elephant\tELEPHANT\n", "golden retreiver"),
        ("tabby cat\tCAT\ngolden retriever\nafrican elephant\tELEPHANT\n", "golden retriever"),
        ("tabby cat\tCAT\ngolden retriever\tDOG\n", "no name for 1 classes"),
    ],
)
def test_names_of_classes_go_by_their_keys_or_are_refused(text: str, complaint: str, tmp_path: Path) -> None:
    for name in ("african elephant", "golden retriever", "tabby cat"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "1.png").write_bytes(picture(1))
    (tmp_path / "names.txt").write_text(text, newline="")
    settings = config(tmp_path / "in", class_names=str(tmp_path / "names.txt"))
    if complaint:
        with pytest.raises(ValueError, match=complaint):
            plan(settings)
    else:
        assert plan(settings).dataset.classes == ["ELEPHANT", "DOG", "CAT"]


def test_a_tar_that_does_not_end_as_tars_end_is_refused(tmp_path: Path) -> None:
    members = {
        f"{n:02}.{end}": content for n in range(20) for end, content in (("png", picture(n)), ("cls", b"1"))
    }
    whole = write_tar(tmp_path / "whole" / "x.tar", members).read_bytes()
    with tarfile.open(tmp_path / "whole" / "x.tar") as tar:
        headers = [member.offset for member in tar.getmembers()]
    zeroed = bytearray(whole)
    zeroed[headers[10] : headers[10] + 512] = bytes(512)
    damaged = {
        "zeroed": bytes(zeroed),
        "joined": whole + whole,
        "cut between": whole[: headers[10]],
        "cut inside": whole[: headers[10] + 600],
        "cut in a header": whole[: headers[10] + 100],
        "cut after the last": whole[: headers[-1] + 1024],
    }
    assert plan(config(tmp_path / "whole")).dataset.rows == 20
    for name, content in damaged.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.tar").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.tar: cannot be read as a tar"):
            plan(config(tmp_path / name))


def test_a_class_may_be_called_train(picture_folder: Folder) -> None:
    assert plan(config(picture_folder({"car": 2, "train": 2, "bus": 2}))).dataset.classes == [
        "bus",
        "car",
        "train",
    ]
    split = plan(config(picture_folder({"train/car": 2, "train/train": 2, "val/car": 1}, "split")))
    assert split.dataset.classes == ["car", "train"] and set(split.dataset.splits) == {"train", "val"}


def test_a_source_of_two_kinds_is_refused_until_one_is_named(picture_folder: Folder) -> None:
    images = picture_folder({"a": 2, "b": 2})
    write_parquet(images / "extra.parquet", ["a", "b"])
    with pytest.raises(
        ValueError, match=r"several kinds \(1 of parquet, 4 of folder\): say which with --source-kind"
    ):
        plan(config(images))
    assert plan(config(images, source_kind="folder")).dataset.rows == 4


def test_an_id_that_stands_for_another_file_is_another_source(tmp_path: Path) -> None:
    rows = [{"path": f"{n}.png", "label": "a", "id": f"row {n}", "bytes": 1} for n in range(4)]
    before = plan(config(write_list(tmp_path / "list.jsonl", rows))).dataset
    rows[0]["path"] = "9.png"
    now = plan(config(write_list(tmp_path / "list.jsonl", rows))).dataset
    assert differences(before, now) and not differences(before, before)
