"""A picture that kills the engine is found by halving; out of memory brings a smaller engine; deaths by
chance change nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline import run
from pipeline.captioners.protocol import Caption
from pipeline.captioners.transformers import TransformersCaptioner
from pipeline.config import CaptionConfig, RetryConfig, SourceConfig
from pipeline.encoders.models import ModelRef
from pipeline.stages.caption import SMALLEST, CaptionPictures
from pipeline.stages.engine_deaths import (
    LOADING_TRIES,
    EngineDeadError,
    Loading,
    Underway,
    is_out_of_memory,
    smaller,
)
from pipeline.store import Dataset, Split, Store

DEADLY = {"train/a/03.png"}  # each death costs the loading of an engine


class Died(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    splits = {"train": Split(rows=16, first_shard=0, num_shards=1)}
    dataset = Dataset(schema_version=1, classes=["a"], splits=splits, rows=16, shards=1, source={})
    return Store.create(str(tmp_path / "store"), dataset)


def drive(
    store: Store, rows: list[int], deadly: set[int], *, runs: str = "r"
) -> tuple[list[Caption], str, list[list[int]]]:
    """An actor that is started again after every death, until the shard is done; every call's rows are
    kept."""
    calls: list[list[int]] = []

    def captioner(part: list[int]) -> list[Caption]:
        calls.append(part)
        if deadly & set(part):
            raise Died
        return [Caption(caption=f"row {row}") for row in part]

    for _ in range(200):
        try:
            captions, note = Underway(store, "v", runs).caption(0, rows, captioner)
        except Died:
            continue
        return captions, note, calls
    pytest.fail("never done")


def test_what_a_note_holds_is_written_as_releases_before_wrote_it_and_read_again(store: Store) -> None:
    """There what a captioner wrote is called `text`."""
    folder = Path(store.uri) / "captions" / "v" / "underway"

    def notes() -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in folder.glob("part-*.json")]

    def captioner(share: list[int]) -> list[Caption]:
        if 15 in share:
            raise Died
        return [Caption(caption=f"row {row}", output_tokens=row) for row in share]

    for _ in range(200):
        with contextlib.suppress(Died):
            Underway(store, "v", "r").caption(0, list(range(16)), captioner)
        if any(note["done"] for note in notes()):
            break
    (note,) = notes()
    others = {name: value for name, value in asdict(Caption(output_tokens=0)).items() if name != "caption"}
    assert note["done"]["0"] == {"text": "row 0", **others}
    captions, _, calls = drive(store, list(range(16)), {15})
    assert captions[0] == Caption(caption="row 0", output_tokens=0), "of the note, not made again"
    assert not any(0 in share for share in calls)


@pytest.mark.parametrize("deadly", [{0}, {15}, {7}, {2, 11}, {4, 5}, set(range(16)) - {3}])
def test_halving_finds_the_pictures_that_kill_and_keeps_the_rest(store: Store, deadly: set[int]) -> None:
    captions, note, calls = drive(store, list(range(16)), deadly)
    assert {row for row, caption in enumerate(captions) if caption.error} == deadly
    assert [caption.caption for row, caption in enumerate(captions) if row not in deadly] == [
        f"row {row}" for row in range(16) if row not in deadly
    ]
    assert f"{len(deadly)} pictures put aside" in note
    done = [row for part in calls if not deadly & set(part) for row in part]
    assert len(done) == len(set(done)), "what succeeded is not done again"
    assert len([part for part in calls if deadly & set(part)]) <= 3 + len(deadly) * 5, (
        "three whole, then a halving for each"
    )


def test_without_deaths_a_shard_is_one_call_and_leaves_no_note(store: Store) -> None:
    _, note, calls = drive(store, list(range(16)), set())
    assert (note, calls) == ("", [list(range(16))])
    Underway(store, "v", "r").finished(0)
    assert store.read_file("captions/v/underway/part-00000.json") is None


def test_two_deaths_by_chance_change_nothing_nor_do_four_runs(store: Store) -> None:
    for attempt in ("first", "second", "third", "fourth"):
        for _ in range(3):  # the first try and two deaths
            note = Underway(store, "v", attempt)._begin(0, [0, 1])
            assert not note.todo
            Underway(store, "v", attempt)._write(0, note)
    assert Underway(store, "v", "fourth")._begin(0, [0, 1]).todo == [[0], [1]], (
        "but three deaths in one run do"
    )


def test_want_of_memory_does_not_count_against_the_shard(store: Store) -> None:
    for _ in range(10):
        underway = Underway(store, "v", "r")
        note = underway._begin(0, [0, 1])
        assert not note.todo
        underway._write(0, note)
        underway.innocent(0)


def test_an_engine_that_dies_on_everything_is_to_blame_itself(store: Store) -> None:
    with pytest.raises(EngineDeadError, match="20 pictures of one shard"):
        drive(store, list(range(64)), set(range(64)))


def test_an_engine_that_never_loads_stops_the_run(store: Store) -> None:
    for _ in range(LOADING_TRIES):
        Loading(store, "v", "actor").begin()
    with pytest.raises(EngineDeadError, match="died 5 times while loading"):
        Loading(store, "v", "actor").begin()
    other = Loading(store, "v", "another")
    other.begin()
    other.loaded()


def test_settings_shrink_with_each_want_of_memory_and_then_the_run_stops(store: Store) -> None:
    config = CaptionConfig(store="s", caption_preset="scenes")
    loading = Loading(store, "v", "actor")
    batches = []
    for _ in range(SMALLEST):
        loading.out_of_memory(SMALLEST)
        batches.append(smaller(config, Loading(store, "v", "actor").smaller).engine_batch)
    assert batches == [128, 64, 32, 16]
    with pytest.raises(EngineDeadError, match="out of memory even with settings halved 4 times"):
        loading.out_of_memory(SMALLEST)


def test_the_words_for_want_of_memory() -> None:
    import torch

    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")
    )
    assert not is_out_of_memory(RuntimeError("an illegal memory access was encountered"))


class DeadlyCaptioner(TransformersCaptioner):
    """The real engine, killed by pictures of one colour and short of memory above 8 pictures at a time."""

    def __call__(self, images: list[Image.Image], prompts: list[str], ids: list[str]) -> list[Caption]:
        import torch

        if any(image.getpixel((1, 1)) == (255, 0, 0) for image in images):
            os.kill(os.getpid(), signal.SIGKILL)
        if (self._config.engine_batch or 16) > 8:
            message = "CUDA out of memory. Tried to allocate 20.00 GiB."
            raise torch.OutOfMemoryError(message)
        return super().__call__(images, prompts, ids)


class DeadlyCaptionPictures(CaptionPictures):
    """The product's step around that engine."""

    def __init__(
        self, config: CaptionConfig, model: ModelRef, variant: str, run_id: str, watched: bool
    ) -> None:
        super().__init__(config, model, variant, run_id, watched)
        self._captioner = DeadlyCaptioner(self._config, model)


@pytest.mark.alone
def test_pictures_that_kill_the_engine_are_put_aside_by_the_real_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None
) -> None:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    for key in [f"train/{label}/{number:02}.png" for label in "ab" for number in range(6)]:
        path = tmp_path / "in" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), "red" if key in DEADLY else "blue").save(path)
    where = str(tmp_path / "store")
    run.ingest(SourceConfig(images=str(tmp_path / "in"), store=where, shard_rows=6))
    monkeypatch.setattr(run, "CaptionPictures", DeadlyCaptionPictures)
    variant = run.caption(
        CaptionConfig(store=where, caption_preset="scenes", captioner="transformers", max_failure_rate=0.5)
    )
    store = Store(where)
    rows = {
        row["id"]: row
        for shard in range(2)
        for row in store.read_shard("captions", variant, shard).to_pylist()
    }
    assert {key for key, row in rows.items() if row["error"]} == DEADLY
    assert all("the engine died on this picture" in rows[key]["error"] for key in DEADLY)
    assert all(row["caption"] for key, row in rows.items() if key not in DEADLY)
    notes = [receipt.note for receipt in store.receipts("captions", variant).values()]
    assert all("settings halved 1 times after running out of memory" in note for note in notes)
    assert any("put aside" in note for note in notes)
    assert not (tmp_path / "store" / "captions" / variant / "underway").exists()
    monkeypatch.undo()
    before = {key: row for key, row in rows.items() if key not in DEADLY}
    run.retry(RetryConfig(store=where))  # an engine that bears them: only their rows are asked again
    rows = {
        row["id"]: row
        for shard in range(2)
        for row in store.read_shard("captions", variant, shard).to_pylist()
    }
    assert all(row["error"] is None and row["caption"] for row in rows.values())
    assert {key: row for key, row in rows.items() if key not in DEADLY} == before
