"""Runs made in this process, without Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from training.config import TrainConfig
from training.engine import checkpoint, loop
from training.settings import flat


def fitted(config: TrainConfig, folder: Path, resume: Path | None = None) -> Path:
    """The folder of a run after training in this process, with the checkpoint of each epoch."""

    def report(metrics: Any, take: Callable[[], checkpoint.Snapshot]) -> None:
        snapshot = take()
        snapshot.write(str(folder / f"epoch-{snapshot.content['epoch']}"))

    (folder).mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(flat(config)))
    loop.fit(config, torch.device("cpu"), 0, str(resume) if resume else None, report)
    return folder
