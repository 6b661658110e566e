"""Checkpoints of runs that are not on this machine."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from pipeline.store import locations
from training.engine import checkpoint


def test_what_a_remote_run_says_is_read_without_its_weights(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = torch.nn.Linear(3, 2)
    history = [{"epoch": 1.0, "top1": 50.0}]
    run = f"{bucket}/runs/remote"
    filesystem, path = locations.resolve(run)
    for step in (1, 2):
        state = checkpoint.State(step=step, history=history)
        optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
        checkpoint.Snapshot.take(task, optimizer, None, state).upload(filesystem, f"{path}/checkpoint-{step}")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = checkpoint.find(run)
    assert found == f"{run}/checkpoint-2"
    assert checkpoint.read_state(found)["history"] == history
    assert not list(tmp_path.iterdir()), "nothing was fetched"
    other = torch.nn.Linear(3, 2)
    with checkpoint.opened(run, "best") as folder:
        assert checkpoint.load(folder, other).step == 2
    assert torch.equal(task.weight, other.weight)
    assert not list(tmp_path.iterdir()), "no copy stays behind"
