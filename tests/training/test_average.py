"""The moving average of the weights: what it forgets, and that what is exported is what is ranked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from training import run_folder
from training.config import TrainConfig
from training.engine import checkpoint, loop
from training.objectives import align
from training.run import _result
from training.settings import flat

Weights = dict[str, torch.Tensor]


def ends(config: TrainConfig) -> tuple[Weights, Weights, Weights]:
    """(weights at the beginning, at the end, their average) of a run in this process."""
    taken: list[checkpoint.Snapshot] = []
    loop.fit(config, torch.device("cpu"), 0, None, lambda metrics, take: taken.append(take()))
    start = align.build_task(config, 3, config.method.projection_dim).state_dict()
    files = taken[-1].files
    return start, files["model.safetensors"], files["ema.safetensors"]


def settings(store: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "store": str(store),
        "backbone": "vit_tiny_patch16_224",
        "image_size": 32,
        "epochs": 5,
        "batch_size": 12,
        "projection_dim": 4,
        "warmup_epochs": 0.0,
        "lr": 1e-3,
    }
    return TrainConfig.of(**values | changes)


def test_the_average_of_a_short_run_forgets_where_it_began(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    """With the decay of a run of 300 epochs of ImageNet, which by itself keeps 99.9 % of the first weights
    after ten steps."""
    start, end, average = ends(settings(make_store(tmp_path / "store"), ema=0.9999))
    names = [name for name, value in end.items() if value.is_floating_point()]
    way = sum(float((end[name] - start[name]).square().sum()) for name in names) ** 0.5
    behind = sum(float((end[name] - average[name]).square().sum()) for name in names) ** 0.5
    assert 0 < behind < 0.5 * way


def test_without_warm_up_the_average_has_its_decay_from_the_first_step(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    config = settings(make_store(tmp_path / "store"), ema=0.5, epochs=1, batch_size=24)
    start, end, average = ends(config.but(ema_warmup=False))
    for name, value in average.items():
        torch.testing.assert_close(value, (start[name] + end[name]) / 2)
    start, end, average = ends(config)
    for name, value in average.items():
        assert torch.equal(value, end[name]), "one step: the average of what was trained is that"


def test_a_run_begun_without_warm_up_goes_on_without() -> None:
    config = TrainConfig.of(store="/store", run="/run", ema=0.999)
    early = {name: value for name, value in flat(config).items() if name != "ema_warmup"}
    assert config.optim.ema_warmup and not run_folder.resumed(config, early).optim.ema_warmup


# The average is best in the second epoch, the weights themselves in the first.
HISTORY = [
    {"epoch": 1.0, "top1": 60.0, "ema_top1": 40.0, "top5": 90.0, "ema_top5": 80.0},
    {"epoch": 2.0, "top1": 50.0, "ema_top1": 55.0, "top5": 90.0, "ema_top5": 85.0},
    {"epoch": 3.0, "top1": 55.0, "ema_top1": 45.0, "top5": 90.0, "ema_top5": 83.0},
]


@pytest.mark.parametrize("averaged", [True, False])
def test_the_best_epoch_is_that_of_the_weights_that_are_exported(tmp_path: Path, averaged: bool) -> None:
    history = (
        HISTORY if averaged else [{k: v for k, v in m.items() if not k.startswith("ema_")} for m in HISTORY]
    )
    for count in (1, 2, 3):
        folder = tmp_path / f"checkpoint-{count}"
        folder.mkdir()
        (folder / "model.safetensors").touch()
        state = {"step": count, "history": history[:count], "sums": {}, "seconds": 0, "epoch": count}
        (folder / "state.json").write_text(json.dumps(state))
    config = TrainConfig.of(store="s", run=str(tmp_path), ema=0.9 if averaged else 0.0)
    assert checkpoint.find(str(tmp_path), "best").endswith("checkpoint-2" if averaged else "checkpoint-1")
    result = _result(config, "", history)
    assert (result["best_epoch"], result["best_top1"]) == ((2, 55) if averaged else (1, 60))
    assert run_folder.headline(result["last"]) == (45 if averaged else 55)
    assert run_folder.headline(result["last"], "top5") == (83 if averaged else 90)
    assert run_folder.headline_name(config) in history[0]
