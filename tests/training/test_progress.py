"""What a run prints of itself while it trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.run_folder import Follower

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
