"""What a run prints of itself while it trains."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from pipeline.inspect.metrics import Watched
from training.tracking.progress import Follower, Listener, label, waits

EPOCH = {"cross_entropy": 1.0, "top1": 50.0, "top5": 90.0, "seconds": 2.0, "images_per_s": 10.0}


def write(run: Path, epochs: int) -> None:
    lines = [json.dumps({**EPOCH, "epoch": epoch}) for epoch in range(1, epochs + 1)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_a_run_that_goes_on_says_so_and_prints_only_new_epochs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 3)
    with Follower(str(tmp_path), 6, show=True):
        write(tmp_path, 5)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"train: {tmp_path} goes on after epoch 3 of 6"
    assert [line.split("/")[0].split()[-1] for line in said[1:]] == ["4", "5"], said


def test_the_accuracy_printed_is_that_of_the_average(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Follower(str(tmp_path), 2, show=True):
        (tmp_path / "metrics.jsonl").write_text(
            json.dumps({**EPOCH, "epoch": 1, "ema_top1": 61.0, "ema_top5": 91.0}) + "\n"
        )
    assert "top-1 61.0 (without averaging 50.0)  top-5 91.0" in capsys.readouterr().err


def test_a_new_run_prints_every_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Follower(str(tmp_path), 2, show=True):
        write(tmp_path, 2)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "1/2" in said[0].replace(" ", "") and "2/2" in said[1].replace(" ", "")


def test_what_a_run_waits_for_is_heard_where_its_own_process_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    runs = [str(tmp_path / name) for name in ("one", "two", "not begun")]
    with Listener(lambda: runs, pause=0.02):
        with waits(runs[0], aloud=False) as say, waits(runs[1], aloud=False):
            for text in ("waits for 2 workers", "has waited 30 s"):
                say(text)
                time.sleep(0.2)
        assert not (tmp_path / "one" / "waiting.json").exists()
        (tmp_path / "one" / "waiting.json").write_text("{half")  # of no use, and no reason to go deaf
        time.sleep(0.1)
    assert capsys.readouterr().err.splitlines() == ["waits for 2 workers", "has waited 30 s"]
    with waits(runs[1], aloud=True) as say:
        say("waits for 1 workers")
    assert capsys.readouterr().err == "waits for 1 workers\n"
    assert list((tmp_path / "two").iterdir()) == []


def test_trials_that_run_are_told_of_once_in_a_while_and_when_they_have_moved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    runs = [str(tmp_path / name) for name in ("one", "two", "not begun")]
    write(tmp_path / "one", 3)
    (tmp_path / "two" / "progress.json").write_text(
        json.dumps({"step": 5, "steps": 40, "batch": 8, "images_per_s": 10.0, "loss": 1.0})
    )
    with Listener(lambda: runs, pause=0.02, told_every=0.1):
        time.sleep(0.5)
        write(tmp_path / "one", 4)
        time.sleep(0.3)
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "under way: one epoch 3, top-1 50.00; two step 5 of 40; not begun starting",
        "under way: one epoch 4, top-1 50.00; two step 5 of 40; not begun starting",
    ]


def test_runs_of_one_name_have_two_labels_and_no_address() -> None:
    labels = {label("/runs/a/x"), label("/runs/b/x"), label("s3://runs/b/x")}
    assert len(labels) == 3 and all(re.fullmatch(r"x-[0-9a-f]{6}", each) for each in labels)


def test_a_run_that_is_watched_and_not_shown_is_told_and_prints_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[tuple[str, ...], float] = {}

    def show(self: Watched, name: str, value: float, **labels: str) -> None:
        told[name, *labels.values()] = value

    monkeypatch.setattr(Watched, "show", show)
    epoch = {"epoch": 1, "step": 3, "seconds": 2.0, "images_per_s": 9.0, "loss": 2.5, "cross_entropy": 2.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(epoch | {"top1": 40.0, "ema_top1": 50.0}) + "\n")
    with Follower(str(tmp_path), 2, show=False, watch=True):
        now = {"step": 4, "steps": 6, "batch": 8, "images_per_s": 7.0, "loss": 2.2}
        (tmp_path / "progress.json").write_text(json.dumps(now))
        assert told == {("training_epochs",): 2, ("training_epoch",): 1}, "an earlier start's epoch"
        with (tmp_path / "metrics.jsonl").open("a") as lines:
            lines.write(json.dumps(epoch | {"epoch": 2, "step": 6, "top1": 45.0, "ema_top1": 60.0}) + "\n")
        time.sleep(1.2)  # two looks: what was said of a step before the epoch's end is old by now
    assert told == {
        ("training_epochs",): 2,
        ("training_epoch",): 2,
        ("training_step",): 6,
        ("training_images_per_second",): 9.0,
        ("training_score", "top1"): 60.0,
        ("training_loss", "loss"): 2.5,
        ("training_loss", "cross_entropy"): 2.0,
    }
    assert capsys.readouterr().err == ""
