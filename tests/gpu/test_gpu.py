"""What only a GPU can show: `pytest -m gpu tests/gpu` on a machine with CUDA; skipped elsewhere."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests import towers
from tests.parity.test_alignment_loss import CASES, Batch, Case, Model, batch_of, compare, expected, gradients
from tests.runs import fitted
from tests.training.test_coop import settings as prompt_settings
from training.config import EvaluateConfig, TrainConfig
from training.data.mixing import text_targets
from training.engine import build, checkpoint, loop
from training.evaluation.evaluate import evaluate
from training.losses.alignment import TextGather, Texts
from training.objectives import align
from training.objectives.align import AlignTask, Goal, Inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]


def on_gpu(batch: Batch, dtype: torch.dtype) -> Batch:
    def texts(found: Texts | None) -> Any:
        return None if found is None else Texts(found.targets_Bd.to("cuda", dtype), found.groups_B.cuda())

    return replace(
        batch,
        features=batch.features.to("cuda", dtype),
        texts=texts(batch.texts),
        targets=batch.targets.cuda(),
        weights=batch.weights.to("cuda", dtype),
        negatives=texts(batch.negatives),
    )


def loss_on_gpu(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    batch = on_gpu(batch_of(case), dtype)
    features = batch.features.requires_grad_()
    model = Model(case, batch.texts.targets_Bd.shape[1]).to("cuda", dtype)
    loss = model(features, batch.texts, batch.targets, batch.weights, batch.negatives)
    return {name: value.cpu() for name, value in gradients(model, loss, features).items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_alignment_loss_on_a_gpu_is_the_explicit_sums_in_float64(case: Case) -> None:
    compare(loss_on_gpu(case, torch.float64), case)
    single = loss_on_gpu(case, torch.float32)
    for name, value in expected(case).items():
        torch.testing.assert_close(
            single[name].double(), value, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def history(store: Path, device: str, **settings: Any) -> tuple[list[dict[str, float]], checkpoint.Snapshot]:
    """The losses of four steps, each an epoch, and the last state."""
    values: dict[str, Any] = {
        "image_size": 32,
        "epochs": 4,
        "batch_size": 16,
        "projection_dim": 4,
        "warmup_epochs": 0,
        "optimizer": "momentum",
        "lr": 0.004,
        "loader_workers": 1,
    }
    config = TrainConfig.of(store=str(store), **values | settings)
    snapshots: list[checkpoint.Snapshot] = []
    found = loop.fit(config, torch.device(device, 0), 0, None, lambda metrics, take: snapshots.append(take()))
    return found, snapshots[-1]


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_steps_in_bfloat16_are_finite_and_close_to_those_in_float32(
    tmp_path: Path, make_store: Callable[..., Path], backbone: str
) -> None:
    store = make_store(tmp_path / "s", train=16, val=6)
    exact, kept = history(store, "cuda", backbone=backbone, precision="float32")
    half, last = history(store, "cuda", backbone=backbone, precision="auto", ema=0.9)
    for mine, theirs in zip(half, exact, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.05)
    assert half[0]["loss"] != exact[0]["loss"], "auto is bfloat16 on a GPU"
    for name, value in last.files["model.safetensors"].items():
        assert value.isfinite().all() and value.dtype == kept.files["model.safetensors"][name].dtype, name


def test_steps_in_float32_are_those_of_a_cpu(tmp_path: Path, make_store: Callable[..., Path]) -> None:
    store = make_store(tmp_path / "s", train=16, val=6)
    settings = {
        "backbone": "test_vit",
        "precision": "float32",
        "learn_temperature": True,
        "store_negatives": 4,
    }
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        gpu, cpu = history(store, "cuda", **settings)[0], history(store, "cpu", **settings)[0]
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    for mine, theirs in zip(gpu, cpu, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.fixture
def nccl() -> Iterator[None]:
    """A group of one process: DDP's hooks and NCCL's calls, as they run on each GPU of many."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before = {name: os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("nccl", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def test_ddp_on_one_gpu_has_the_gradients_of_the_bare_model(nccl: None) -> None:
    """Channels last and under autocast, as training runs; every parameter takes part."""
    config = TrainConfig.of(store="s", backbone="test_resnet", image_size=32, learn_temperature=True)
    generator = torch.Generator().manual_seed(0)
    images = (
        torch.randn(8, 3, 32, 32, generator=generator).cuda().contiguous(memory_format=torch.channels_last)
    )
    texts = nn.functional.normalize(torch.randn(8, 16, generator=generator), dim=-1).cuda()
    groups, classes = torch.arange(8).cuda(), torch.arange(8).cuda()

    def found(wrapped: bool) -> dict[str, Tensor]:
        task: AlignTask = build.to_device(align.build_task(config, 8, 16), torch.device("cuda", 0))
        model: nn.Module = DistributedDataParallel(task, device_ids=[0]) if wrapped else task
        with torch.autocast("cuda", torch.bfloat16):
            parts = model(Inputs(images, classes, Goal(TextGather(texts, groups), *text_targets(groups))))
        parts["loss"].backward()
        assert all(parameter.grad is not None for parameter in task.parameters())
        return {
            name: parameter.grad for name, parameter in task.named_parameters() if parameter.grad is not None
        }

    bare, wrapped = found(False), found(True)
    for name, value in bare.items():
        torch.testing.assert_close(
            wrapped[name], value, rtol=1e-2, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("objective", ["coop", "cocoop"])
def test_prompts_are_judged_run_after_run_with_one_clip_on_the_gpu(
    tmp_path: Path, make_store: Callable[..., Path], objective: str
) -> None:
    """The CLIP is loaded once and stays on the device, where what is made of it later must look for it."""
    clip, store = tmp_path / "clip", make_store(tmp_path / "store", classes=5, train=60, val=30)
    towers.clip(clip)
    towers.tokenizer(clip)
    runs = [
        fitted(prompt_settings(store, clip, objective, seed=seed), tmp_path / f"run-{seed}")
        for seed in (0, 1)
    ]
    for run in runs:
        told = {
            each["name"]: each["value"] for each in evaluate(EvaluateConfig(run=str(run))).summary["findings"]
        }
        assert 0 <= told["new top-1"] <= 100 and told["zero-shot top-1"] is not None
