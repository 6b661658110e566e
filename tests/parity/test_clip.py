"""CLIP by several processes against one: the loss with both sides' gradients, and whole trainings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.store import Store
from tests.stores import several_captions
from tests.training.test_clip import TINY, reference
from training.config import TrainConfig
from training.engine import checkpoint, loop
from training.losses.contrast import contrastive_loss

pytestmark = pytest.mark.slow

SHARES = (4, 1, 4)
"""Pairs of each process; that of the second has no caption."""
WORLD = len(SHARES)
CASES: dict[str, dict[str, Any]] = {
    "whole": {"caption_variant": "test"},
    "in parts": {"caption_variant": "test", "accumulate": 2},
    "one of several captions": {"caption_variant": "several"},
}


def pairs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(pictures, captions, groups, scale) in float64."""
    torch.manual_seed(0)
    images, texts = (torch.randn(sum(SHARES), 5, dtype=torch.float64) for _ in range(2))
    return images, texts, torch.tensor([4, 2, 4, -1, -1, 2, 1, 4, 9]), torch.tensor(7.0, dtype=torch.float64)


def loss_of(rank: int, root: str) -> None:
    images, texts, groups, scale = pairs()
    own = slice(sum(SHARES[:rank]), sum(SHARES[: rank + 1]))
    mine = [images[own].requires_grad_(), texts[own].requires_grad_(), scale.requires_grad_()]
    loss = contrastive_loss(
        normalize(mine[0], dim=-1), normalize(mine[1], dim=-1), groups[own], scale, max(SHARES)
    )
    torch.save([loss.detach(), *torch.autograd.grad(loss, mine)], f"{root}/loss-{rank}.pt")


def config_of(store: str, changes: dict[str, Any]) -> TrainConfig:
    from training.objectives.clip import OBJECTIVE

    # Plain SGD: Adam would divide a last bit by itself.
    values = {**TINY, "optimizer": "momentum", "lr": 0.1, "batch_size": 19, "epochs": 2}
    config = TrainConfig.of(store=store, loader_workers=1, **values | changes)
    return config.but(**OBJECTIVE.check(config, Store(store)).found)


def fit(config: TrainConfig, folder: Path, rank: int) -> list[dict[str, float]]:
    def report(metrics: Any, take: Callable[[], checkpoint.Snapshot]) -> None:
        snapshot = take()
        if rank == 0:
            snapshot.write(str(folder))

    return loop.fit(config, torch.device("cpu"), rank, None, report)


def _rank(rank: int, root: str, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/meeting", rank=rank, world_size=WORLD)
    loss_of(rank, root)
    for name, changes in CASES.items():
        history = fit(config_of(store, changes), Path(root) / name, rank)
        torch.save(history, f"{root}/{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, make_store: Callable[..., Path]) -> str:
    """Shares are uneven, some pictures have no caption, and epochs end inside a batch."""
    folder = make_store(
        tmp_path_factory.mktemp("clip") / "store", train=57, val=140, shard_rows=40, missing_captions=4
    )
    several_captions(Store(str(folder)))
    config_of(str(folder), {"caption_variant": "test"})
    config_of(str(folder), {"caption_variant": "several"})
    return str(folder)


@pytest.fixture(scope="module")
def several(store: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("several")
    mp.spawn(_rank, args=(str(root), store), nprocs=WORLD, join=True)
    return root


def test_the_loss_of_several_processes_has_the_gradients_of_one(several: Path) -> None:
    found = [torch.load(several / f"loss-{rank}.pt", weights_only=True) for rank in range(WORLD)]
    images, texts, groups, scale = pairs()
    inputs = [each.requires_grad_() for each in (images, texts, scale)]
    loss = reference(normalize(images, dim=-1), normalize(texts, dim=-1), groups, scale)
    of_images, of_texts, of_scale = torch.autograd.grad(loss, inputs)
    # DDP takes the mean.
    exact: dict[str, float] = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(sum(each[0] for each in found) / WORLD, loss.detach(), **exact)
    torch.testing.assert_close(torch.cat([each[1] for each in found]) / WORLD, of_images, **exact)
    torch.testing.assert_close(torch.cat([each[2] for each in found]) / WORLD, of_texts, **exact)
    torch.testing.assert_close(sum(each[3] for each in found) / WORLD, of_scale, **exact)


@pytest.mark.parametrize("name", CASES)
def test_several_workers_end_with_the_weights_and_metrics_of_one(
    name: str, store: str, several: Path, tmp_path: Path
) -> None:
    changes = CASES[name]
    torch.set_num_threads(1)
    alone = fit(config_of(store, changes | {"accumulate": 1}), tmp_path, 0)
    expected, found = (load_file(each / "model.safetensors") for each in (tmp_path, several / name))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5, msg=f"{key} differs")
    start = loop.Run.of(config_of(store, changes), torch.device("cpu"), 0, None, None).task.state_dict()
    assert max(float((value - start[key]).abs().max()) for key, value in expected.items()) > 0.02, "it went"
    for rank in range(WORLD):
        history = torch.load(several / f"{name}-{rank}.pt", weights_only=True)
        for ours, theirs in zip(alone, history, strict=True):
            # Of 140 pictures two may change places by the last bit.
            for metric in ("retrieval_recall1", "retrieval_rank", "ema_retrieval_rank", "eval_images"):
                assert theirs[metric] == pytest.approx(ours[metric], abs=0.03), metric
