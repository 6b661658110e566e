"""Whole trainings by several processes against one process: the same weights, not merely similar losses.

What depends on a worker's own pictures is made equal by construction: models without BatchNorm need nothing,
and BatchNorm's statistics of W workers with P parts each are those of one process with W P parts, since a
batch is cut in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor

from pipeline.store import Store
from tests.stores import several_captions
from training.config import TrainConfig
from training.engine import checkpoint, loop
from training.objectives.protocol import objective_of

pytestmark = pytest.mark.slow

SHARED: dict[str, Any] = {
    "image_size": 32,
    "epochs": 2,
    "projection_dim": 4,
    "optimizer": "momentum",
    "lr": 0.05,
    "warmup_epochs": 0,
    "threads": 1,
    "alignment_weight": 1.0,
    "checkpoint_steps": 1,
    "loader_workers": 1,
    "embeddings": "test",
}
VIT: dict[str, Any] = {
    "backbone": "test_vit",
    "batch_size": 19,
    "learn_temperature": True,
    "text_projection": "learned",
}
MAE: dict[str, Any] = {
    "objective": "mae",
    "backbone": "hiera_nano_64",
    "batch_size": 19,
    "decoder_depth": 1,
    "decoder_width": 32,
    "decoder_heads": 4,
    "mask_ratio": 0.5,
}
# BatchNorm over few pictures magnifies the last bit, so that steps are small.
RESNET: dict[str, Any] = {"backbone": "test_resnet", "batch_size": 48, "lr": 0.01}
BALANCED: dict[str, Any] = {
    "balance": "gradients",
    "alignment_weight": 0.5,
    "alignment_schedule": "cosine",
    "alignment_until": 0.8,
}


@dataclass(frozen=True)
class Part:
    """So many processes train, from a checkpoint's step or the beginning, until a step or the end."""

    settings: dict[str, Any]
    world: int
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class Case:
    """A training, in parts where it is elastic, and how the single process that it must equal differs from
    it."""

    parts: list[Part]
    alone: dict[str, Any] = field(default_factory=dict)


CASES = {
    "without BatchNorm": Case([Part(VIT, 2)]),
    "without BatchNorm, three workers": Case([Part(VIT | {"store_negatives": 5, "repeats": 2}, 3)]),
    "accumulated": Case([Part(VIT | {"accumulate": 3}, 2)], {"accumulate": 1}),
    "every variant of the loss: sigmoid": Case(
        [Part(VIT | {"alignment": "sigmoid", "text_projection": "pca"}, 2)]
    ),
    "graded positives, two passes an epoch": Case(
        [
            Part(
                VIT | {"positives": "similar", "text_projection": "pca", "epochs": 1} | {"epoch_repeats": 2},
                2,
            )
        ]
    ),
    "one of several captions, some dropped": Case(
        [
            Part(
                VIT
                | {"embeddings": "several", "several_captions": "draw", "caption_dropout": 0.3}
                | {"text_projection": "pca", "repeats": 2, "head": "narrow"},
                3,
            )
        ]
    ),
    "bce": Case([Part(VIT | {"loss": "bce", "label_smoothing": 0.1, "clip_grad": 0.5}, 2)]),
    "balanced": Case([Part(VIT | BALANCED | {"accumulate": 3}, 2)], {"accumulate": 1}),
    "balanced, BatchNorm, accumulated": Case(
        [Part(RESNET | BALANCED | {"accumulate": 2, "lr": 0.02}, 2)], {"accumulate": 4}
    ),
    "masked autoencoding": Case([Part(MAE | {"accumulate": 2}, 2)], {"accumulate": 1}),
    "BatchNorm": Case([Part(RESNET, 2)], {"accumulate": 2}),
    "BatchNorm, accumulated": Case([Part(RESNET | {"accumulate": 2}, 2)], {"accumulate": 4}),
    "BatchNorm, three workers": Case([Part(RESNET, 3)], {"accumulate": 3}),
    "elastic, 2 then 1 then 3": Case([Part(VIT, 2, 0, 2), Part(VIT, 1, 2, 4), Part(VIT, 3, 4)]),
    "elastic with BatchNorm, 2 then 3": Case(
        [Part(RESNET | {"accumulate": 3}, 2, 0, 2), Part(RESNET | {"accumulate": 2}, 3, 2)], {"accumulate": 6}
    ),
}


class StopError(Exception):
    """Stands for the loss of a node: all processes stop after the same step."""


def fit(config: TrainConfig, folder: Path, rank: int, part: Part) -> None:
    """Trains in this process; rank 0 writes every checkpoint."""

    def report(metrics: Any, take: Callable[[], checkpoint.Snapshot]) -> None:
        snapshot = take()
        if rank == 0:
            snapshot.write(str(folder / f"step-{snapshot.content['step']}"))
            (folder / "last").write_text(str(snapshot.content["step"]))
        if snapshot.content["step"] == part.stop:
            raise StopError

    with contextlib.suppress(StopError):
        resume = str(folder / f"step-{part.start}") if part.start else None
        loop.fit(config, torch.device("cpu"), rank, resume, report)


def _rank(rank: int, world: int, root: str, store: str, names: list[str], number: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{root}/rendezvous-{world}-{number}", rank=rank, world_size=world
    )
    for name in names:
        part = CASES[name].parts[number]
        fit(config_of(store, part.settings), folder_of(Path(root), name), rank, part)
    dist.destroy_process_group()


def config_of(store: str, settings: dict[str, Any]) -> TrainConfig:
    """Of what the cases share that which the method knows."""
    known = TrainConfig.defaults(settings.get("objective", "align"))
    shared = {name: value for name, value in SHARED.items() if name in known}
    return TrainConfig.of(store=store, **shared | settings)


def folder_of(root: Path, name: str) -> Path:
    return root / name.replace(" ", "-").replace(",", "").replace(":", "")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, make_store: Callable[..., Path]) -> str:
    """57 rows, so that shares are uneven and epochs end inside a batch."""
    folder = make_store(tmp_path_factory.mktemp("parity") / "store", train=57, val=6)
    several_captions(Store(str(folder)))
    return str(folder)


@pytest.fixture(scope="module")
def several(store: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, so that a group of processes starts once for each number of them."""
    root = tmp_path_factory.mktemp("several")
    for name in CASES:
        folder_of(root, name).mkdir()
    for number in range(max(len(case.parts) for case in CASES.values())):
        for world in (1, 2, 3):
            names = [
                name
                for name, case in CASES.items()
                if len(case.parts) > number and case.parts[number].world == world
            ]
            if names:
                mp.spawn(_rank, args=(world, str(root), store, names, number), nprocs=world, join=True)
    return root


def parameters(folder: Path, config: TrainConfig) -> dict[str, Tensor]:
    """Of the last checkpoint; running statistics are those of rank 0's pictures, and no part of the
    gradient."""
    found = load_file(folder / f"step-{(folder / 'last').read_text()}" / "model.safetensors")
    return {
        name: value
        for name, value in found.items()
        if not name.endswith(("running_mean", "running_var", "_tracked"))
    }


@pytest.mark.parametrize("name", CASES)
def test_several_workers_end_with_the_weights_of_one(
    name: str, store: str, several: Path, tmp_path: Path
) -> None:
    case = CASES[name]
    config = config_of(store, case.parts[-1].settings)
    alone = config.but(**case.alone)
    torch.set_num_threads(1)
    fit(alone, tmp_path, 0, Part({}, 1))
    expected, found = parameters(tmp_path, alone), parameters(folder_of(several, name), config)
    assert (tmp_path / "last").read_text() == (folder_of(several, name) / "last").read_text()
    method = objective_of(config)
    start = method.build(config, method.check(config, Store(store)), 3).state_dict()
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
    moved = max(float((value - start[key]).abs().max()) for key, value in expected.items())
    assert moved > 0.02, "it went a way"
