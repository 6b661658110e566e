"""Image folders: splits, order, shards, and folders that hold nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import SourceConfig
from pipeline.sources.plan import make_plan as plan

Folder = Callable[..., Path]


def config(images: Path, **settings: object) -> SourceConfig:
    return SourceConfig(images=str(images), store="unused", **settings)  # type: ignore[arg-type]


def test_an_empty_folder_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no pictures found; expected DIR/<class>/\*.jpg"):
        plan(config(tmp_path))


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        plan(config(tmp_path / "nowhere"))


def test_a_class_folder_without_pictures_is_a_class_without_rows(picture_folder: Folder) -> None:
    images = picture_folder({"train/a": 2, "train/empty": 0})
    found = plan(config(images)).dataset
    assert found.classes == ["a", "empty"]
    assert found.rows == 2


def test_splits_come_from_folders_and_shards_never_cross_them(picture_folder: Folder) -> None:
    images = picture_folder({"train/a": 5, "train/b": 4, "validation/a": 3, "test/b": 2})
    found = plan(config(images, shard_rows=4))
    assert {name: (s.rows, s.first_shard, s.num_shards) for name, s in found.dataset.splits.items()} == {
        "train": (9, 0, 3),
        "val": (3, 3, 1),
        "test": (2, 4, 1),
    }
    assert all(len({entry.split for entry in shard}) == 1 for shard in found.shards)
    assert sorted(entry.id for shard in found.shards for entry in shard)[0] == "test/b/000.jpg"


def test_a_hashed_val_fraction_depends_on_names_alone(picture_folder: Folder) -> None:
    images = picture_folder({"a": 100, "b": 100})
    first, second = (
        plan(config(images, val_fraction=0.25)),
        plan(config(images, val_fraction=0.25, shard_rows=7)),
    )
    assert 30 <= first.dataset.splits["val"].rows <= 70

    def val(found: object) -> set[str]:
        return {e.id for shard in found.shards for e in shard if e.split == "val"}  # type: ignore[attr-defined]

    assert val(first) == val(second)


def test_bytes_limit_a_shard_too(picture_folder: Folder) -> None:
    images = picture_folder({"a": 6})
    sizes = [path.stat().st_size for path in images.rglob("*.jpg")]
    found = plan(config(images, shard_bytes=2 * max(sizes)))
    assert len(found.shards) >= 3
    assert all(
        sum((images / row.id).stat().st_size for row in shard) <= 2 * max(sizes) for shard in found.shards
    )


def test_unicode_names_and_nested_folders_keep_their_names(picture_folder: Folder) -> None:
    images = picture_folder({"train/größe ✓/innen": 1, "train/日本": 1})
    found = plan(config(images))
    assert {entry.id for shard in found.shards for entry in shard} == {
        "train/größe ✓/innen/000.jpg",
        "train/日本/000.jpg",
    }
    assert found.dataset.classes == ["größe ✓", "日本"]


def test_other_files_are_left_out_and_counted(picture_folder: Folder) -> None:
    images = picture_folder({"a": 1})
    (images / "a" / "notes.txt").write_text("hello")
    (images / "a" / ".hidden.jpg").write_text("hello")
    found = plan(config(images)).dataset
    assert (found.rows, found.source["skipped_files"]) == (1, 1)


def test_all_faults_of_the_settings_are_told_together() -> None:
    with pytest.raises(ValueError) as error:
        SourceConfig(images="x", store="y", val_fraction=2, shard_rows=0, max_failure_rate=-1)
    assert len(str(error.value).splitlines()) == 3
