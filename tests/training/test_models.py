"""Backbones, head, checkpoints, export."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import timm
import torch

from training import backbones, checkpoint, loop
from training.config import TrainConfig
from training.objectives.align import AlignTask

BACKBONES = [
    ("resnet18", 64), ("resnet50", 64), ("vit_tiny_patch16_224", 64), ("convnext_atto", 64), ("hiera_tiny_224", 224),
]  # fmt: skip


@pytest.mark.parametrize(("name", "size"), BACKBONES)
def test_a_backbone_is_built_and_takes_one_step(name: str, size: int) -> None:
    torch.manual_seed(0)
    model = backbones.build(name, num_classes=7, image_size=size)
    task = AlignTask(model, weight=0.3, dim=16, head="mlp", temperature=0.2, learn_temperature=True, label_smoothing=0.1)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    before = {key: value.clone() for key, value in task.named_parameters()}
    images, labels = torch.randn(4, 3, size, size), torch.tensor([0, 1, 2, 3])
    texts = torch.nn.functional.normalize(torch.randn(4, 16), dim=-1)
    parts = task(images, labels, texts, torch.arange(4))
    parts["loss"].backward()
    optimizer.step()
    still = [key for key, value in task.named_parameters() if torch.equal(value, before[key]) and value.grad is None]
    assert still == [], "every parameter trains, or DDP would wait for it"
    assert torch.isfinite(parts["loss"]) and parts["alignment"] > 0
    torch.testing.assert_close(parts["loss"].detach(), parts["cross_entropy"] + 0.3 * parts["alignment"])


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_features_and_logits_are_timms_own(name: str) -> None:
    model = backbones.build(name, num_classes=7, image_size=64).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features, logits = backbones.features_and_logits(model, images)
        torch.testing.assert_close(logits, model(images))
    assert features.shape == (2, backbones.num_features(model))


def test_a_misspelt_backbone_names_what_was_meant() -> None:
    with pytest.raises(ValueError, match=r"no such model; did you mean .*resnet18"):
        backbones.build("resnet81", num_classes=2, image_size=64)


def test_a_size_that_a_backbone_cannot_take_names_its_own() -> None:
    with pytest.raises(ValueError, match="pass --image-size 224"):
        backbones.probe("hiera_tiny_224", 50)
    for name, size in BACKBONES:
        backbones.probe(name, size)


def test_the_baseline_has_no_head_and_starts_from_the_same_weights() -> None:
    common = {"store": "s", "backbone": "resnet18", "seed": 3}
    plain = loop.build_task(TrainConfig(**common, alignment_weight=0), 5, 0)  # type: ignore[arg-type]
    aligned = loop.build_task(TrainConfig(**common, alignment_weight=1), 5, 16)  # type: ignore[arg-type]
    assert plain.head is None
    for (name, mine), (_, other) in zip(plain.backbone.named_parameters(), aligned.backbone.named_parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_the_papers_head() -> None:
    """Linear, BatchNorm, ReLU, Linear for ResNets (6,296,576 parameters for 2048 to 1024); without BatchNorm for ViTs."""
    from training.heads import ProjectionHead

    head = ProjectionHead(2048, 1024, "mlp", batch_norm=True)
    assert sum(p.numel() for p in head.parameters()) == 2048 * 2048 + 2 * 2048 + 2048 * 1024 + 1024 == 6_296_576
    vit = ProjectionHead(768, 1024, "mlp", batch_norm=False)
    assert sum(p.numel() for p in vit.parameters()) == 768 * 2048 + 2048 + 2048 * 1024 + 1024 == 3_673_088
    out = head(torch.randn(3, 2048))
    torch.testing.assert_close(out.norm(dim=1), torch.ones(3))


def test_a_checkpoint_brings_everything_back(tmp_path: Path) -> None:
    config = TrainConfig(store="s", backbone="test_resnet", optimizer="adamw", seed=0)
    task = loop.build_task(config, 5, 16)
    optimizer = torch.optim.AdamW(task.parameters())
    parts = task(
        torch.randn(4, 3, 64, 64), torch.arange(4), torch.nn.functional.normalize(torch.randn(4, 16), dim=-1), torch.arange(4)
    )
    parts["loss"].backward()
    optimizer.step()
    history = [{"epoch": 1.0, "top1": 10.0}]
    checkpoint.save(str(tmp_path), task, optimizer, checkpoint.State(epoch=1, history=history))
    draw = torch.rand(3)
    other = loop.build_task(TrainConfig(**(asdict(config) | {"seed": 9})), 5, 16)
    other_optimizer = torch.optim.AdamW(other.parameters())
    state = checkpoint.load(str(tmp_path), other, other_optimizer)
    assert (state.epoch, state.history) == (1, history)
    assert torch.equal(torch.rand(3), draw)
    for name, value in task.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    mine, found = optimizer.state_dict(), other_optimizer.state_dict()
    assert mine["param_groups"] == found["param_groups"]
    for key, values in mine["state"].items():
        for name, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(found["state"][key][name])), (key, name)


def run_alone(config: TrainConfig, folder: Path, resume: str | None = None, stop_after: int | None = None) -> Path:
    """The per-worker loop in this process; returns the last checkpoint's folder."""
    last: list[Path] = []

    class StopError(Exception):
        pass

    def report(metrics: dict[str, float], save: Callable[[str], None]) -> None:
        target = folder / f"epoch-{metrics['epoch']}"
        target.mkdir(parents=True)
        save(str(target))
        last.append(target)
        if metrics["epoch"] == stop_after:
            raise StopError

    with contextlib.suppress(StopError):
        loop.fit(config, torch.device("cpu"), 0, resume, report)
    return last[-1]


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path, make_store: Callable[..., Path]) -> None:
    store = make_store(tmp_path / "s", train=48)
    config = TrainConfig(
        store=str(store), backbone="test_resnet", image_size=32, epochs=3, batch_size=16, projection_dim=4, warmup_epochs=1.0
    )
    straight = run_alone(config, tmp_path / "straight")
    stopped = run_alone(config, tmp_path / "stopped", stop_after=2)
    resumed = run_alone(config, tmp_path / "resumed", resume=str(stopped))
    from safetensors.torch import load_file

    expected, found = load_file(straight / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    assert [m["epoch"] for m in checkpoint.read_state(str(resumed))["history"]] == [1, 2, 3]


def test_training_learns_what_there_is_to_learn(tmp_path: Path, make_store: Callable[..., Path]) -> None:
    """The colour is the class: both the baseline and the aligned run must find it."""
    store = make_store(tmp_path / "s", train=120, val=60)
    for weight in (0.0, 0.5):
        config = TrainConfig(
            store=str(store),
            backbone="test_resnet",
            image_size=32,
            epochs=6,
            batch_size=20,
            projection_dim=0,
            alignment_weight=weight,
        )
        last = run_alone(config, tmp_path / f"run-{weight}")
        history = checkpoint.read_state(str(last))["history"]
        assert history[-1]["top1"] > 90, (weight, history[-1])
        assert history[-1]["eval_images"] == 60
        assert history[-1]["top5"] == 100


def test_learning_rate_warms_up_and_ends_at_its_minimum() -> None:
    config = TrainConfig(store="s", epochs=10, warmup_epochs=2, lr=1.0, min_lr=0.1)
    rates = [loop.learning_rate(config, step, 5) for step in range(50)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1) and rates[10:] == sorted(rates[10:], reverse=True)


def test_all_faults_of_the_settings_are_told_together() -> None:
    with pytest.raises(ValueError) as error:
        TrainConfig(store="s", alignment_weight=-1, temperature=0, batch_size=5, workers=2, lr=-1)
    told = str(error.value)
    assert len(told.splitlines()) == 4 and "pass --batch-size 4" in told
    with pytest.raises(ValueError, match="batch_size=1: the contrastive loss needs negatives"):
        TrainConfig(store="s", batch_size=1)


def test_every_preset_is_valid_and_builds() -> None:
    from training.presets import PRESETS, preset

    for name in PRESETS:
        config = TrainConfig(store="s", **preset(name))
        assert timm.is_model(config.backbone), name
        backbones.probe(config.backbone, config.image_size)
    with pytest.raises(ValueError, match="choose one of small-64"):
        preset("nope")
