"""Captions made elsewhere: by path, by position, and files that do not fit."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchvision.datasets import ImageFolder

from pipeline.__main__ import main
from pipeline.captioners import imported
from pipeline.config import SourceConfig
from pipeline.store import Store, locations
from tests.stores import ingest

Folder = Callable[..., Path]


@pytest.fixture
def ingested(picture_folder: Folder, tmp_path: Path) -> tuple[Path, Path]:
    images = picture_folder({"train/b": 3, "train/a": 2, "train/a/deep": 2, "val/a": 1})
    store = tmp_path / "store"
    ingest(SourceConfig(images=str(images), store=str(store)))
    return images, store


def write_jsonl(path: Path, captions: dict[str, str]) -> str:
    path.write_text(
        "".join(json.dumps({"path": key, "caption": text}) + "\n" for key, text in captions.items())
    )
    return str(path)


def ids(store: Path) -> list[str]:
    opened = Store(str(store))
    return [
        key
        for shard in range(opened.dataset.shards)
        for key in opened.read_shard("images", "", shard)["id"].to_pylist()
    ]


def test_captions_are_matched_by_path(ingested: tuple[Path, Path], tmp_path: Path) -> None:
    _, store = ingested
    file = write_jsonl(tmp_path / "captions.jsonl", {key: f"a picture of {key}" for key in ids(store)})
    assert main(["import-captions", file, "--store", str(store)]) == 0
    opened = Store(str(store))
    variant = opened.only_variant("captions")
    for shard in range(opened.dataset.shards):
        for row in opened.read_shard("captions", variant, shard).to_pylist():
            assert row["caption"] == f"a picture of {row['id']}"

    # Lacking captions are rows with an error, and too many of them are exit code 3; the rows that have one
    # are kept.
    some = write_jsonl(tmp_path / "some.jsonl", {key: "short" for key in ids(store)[:-2]})
    assert main(["import-captions", some, "--store", str(store)]) == 3
    assert main(["import-captions", some, "--store", str(store), "--max-failure-rate", "0.5"]) == 0
    variant = next(name for name in opened.variants("captions") if "some" in name)
    errors = dict(opened.errors("captions", variant))
    assert set(errors) == set(ids(store)[-2:])
    assert all("no caption for it in some.jsonl" in error for error in errors.values())


def test_unknown_paths_stop_the_import_before_anything_is_written(
    ingested: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, store = ingested
    file = write_jsonl(
        tmp_path / "captions.jsonl", {"train/a/nowhere.jpg": "x"} | {key: "y" for key in ids(store)}
    )
    assert main(["import-captions", file, "--store", str(store)]) == 2
    assert "1 of 9 paths are not in the store, such as train/a/nowhere.jpg" in capsys.readouterr().err
    assert Store(str(store)).variants("captions") == []
    assert main(["import-captions", file, "--store", str(store), "--ignore-unknown"]) == 0


def test_the_papers_list_is_matched_in_the_order_of_torchvisions_image_folder(
    ingested: tuple[Path, Path], tmp_path: Path
) -> None:
    images, store = ingested
    order = [
        Path(path).relative_to(images).as_posix() for path, _ in ImageFolder(str(images / "train")).samples
    ]
    file = tmp_path / "list.pth"
    torch.save([f"caption of {key}" for key in order], file)
    assert main(["import-captions", str(file), "--store", str(store), "--max-failure-rate", "0.2"]) == 0
    opened = Store(str(store))
    variant = opened.only_variant("captions")
    for shard in opened.split_shards("train"):
        for row in opened.read_shard("captions", variant, shard).to_pylist():
            assert row["caption"] == f"caption of {row['id']}"
    torch.save(["one too few"] * (len(order) - 1), file)
    assert main(["import-captions", str(file), "--store", str(store)]) == 2


def test_a_list_of_the_wrong_length_is_refused(tmp_path: Path) -> None:
    torch.save(["a", "b"], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="2 captions for 3 images"):
        imported.read_positional(str(tmp_path / "list.pth"), ["train/a/1", "train/a/2", "train/b/1"], 2)


def test_a_pickle_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (eval, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps([Evil()]))
    torch.save([Evil()], tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(ValueError, match="weights_only=True"):
            imported.read_positional(str(tmp_path / name), ["train/a/1"], 2)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("not json", "JSONDecodeError"),
        ('{"path": "a"}', "KeyError"),
        ("[1]", "TypeError"),
        ('{"path": "a", "caption": 3}', "strings"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    (tmp_path / "c.jsonl").write_text('{"path": "ok", "caption": "ok"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"c\.jsonl:2: .*{complaint}"):
        imported.read_jsonl(str(tmp_path / "c.jsonl"))


def test_two_captions_for_one_picture_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"path": "./a", "caption": "x"}\n{"path": "a", "caption": "y"}\n')
    with pytest.raises(ValueError, match="second, different caption for 'a'"):
        imported.matched(imported.read_jsonl(str(tmp_path / "c.jsonl")), {"a"})


def test_a_mended_picture_gets_its_caption_when_the_import_is_repeated(
    tmp_path: Path, make_store: Folder
) -> None:
    import pyarrow as pa

    from pipeline.store import IMAGES

    store = Store(str(make_store(tmp_path / "store")))
    good = store.read_shard("images", "", 1).to_pylist()
    broken = [
        {**row, "error": "damaged", "image": None} if place == 0 else row for place, row in enumerate(good)
    ]
    store.write_shard("images", "", 1, pa.Table.from_pylist(broken, schema=IMAGES), seconds=0)
    file = write_jsonl(tmp_path / "captions.jsonl", {key: f"of {key}" for key in ids(tmp_path / "store")})
    command = ["import-captions", file, "--store", store.uri, "--max-failure-rate", "0.5"]
    assert main(command) == 0
    [variant] = [name for name in store.variants("captions") if name != "test"]
    before = store.receipts("captions", variant)
    assert sum(receipt.failed for receipt in before.values()) == 1
    assert main(command) == 0
    assert store.receipts("captions", variant) == before, "nothing has changed, so nothing is written"
    store.write_shard("images", "", 1, pa.Table.from_pylist(good, schema=IMAGES), seconds=0)
    assert main(command) == 0
    after = store.receipts("captions", variant)
    assert sum(receipt.failed for receipt in after.values()) == 0 and after[1].attempt == 2
    assert store.read_shard("captions", variant, 1)["caption"][0].as_py() == f"of {good[0]['id']}"


def test_one_list_for_two_splits_is_two_variants(tmp_path: Path, make_store: Folder) -> None:
    store = Store(str(make_store(tmp_path / "store", train=12, val=12)))
    torch.save([f"caption {n}" for n in range(12)], tmp_path / "list.pth")
    for split in ("train", "val"):
        command = ["import-captions", str(tmp_path / "list.pth"), "--store", store.uri, "--split", split]
        assert main([*command, "--max-failure-rate", "0.5"]) == 0
    made = [store.variant("captions", name) for name in store.variants("captions") if name != "test"]
    assert sorted(settings.get("split", "train") for settings in made) == ["train", "val"]


def test_a_list_by_position_goes_with_image_folders_only(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    """Rows of other sources have an order of their own, and every caption would be another picture's."""
    store = make_store(tmp_path / "store", train=12)
    dataset = json.loads((store / "dataset.json").read_text())
    dataset["source"]["kind"] = "parquet"
    (store / "dataset.json").write_text(json.dumps(dataset))
    torch.save([f"caption {n}" for n in range(12)], tmp_path / "list.pth")
    assert main(["import-captions", str(tmp_path / "list.pth"), "--store", str(store)]) == 2
    assert Store(str(store)).variants("captions") == ["test"]


def test_names_that_are_not_utf8_are_sorted_as_torchvision_sees_them(tmp_path: Path) -> None:
    for name in (b"caf\xe9.png", b"cafx.png", "caf\u00e9.png".encode(), b"plain.png", b"caf<e9>.png"):
        path = os.path.join(os.fsencode(tmp_path), b"c", name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as stream:
            stream.write(b"x")
    order = [os.path.relpath(path, tmp_path) for path, _ in ImageFolder(str(tmp_path)).samples]
    keys = sorted(map(locations.escaped, order), key=lambda key: imported.image_folder_key(key, 1))
    assert [locations.unescaped(key) for key in keys] == order


def test_a_path_is_taken_as_it_is_written_before_it_is_made_plain() -> None:
    known = {"./a.jpg", "b\\c.jpg", "d/e.jpg"}
    found = imported.matched({"./a.jpg": "1", "b\\c.jpg": "2", "./d\\e.jpg": "3", "./x.jpg": "4"}, known)
    assert found == {"./a.jpg": "1", "b\\c.jpg": "2", "d/e.jpg": "3", "./x.jpg": "4"}
    with pytest.raises(ValueError, match=r"a second, different caption for 'd/e\.jpg'"):
        imported.matched({"d/e.jpg": "1", "./d/e.jpg": "2"}, known)
