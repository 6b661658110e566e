"""What the losses weigh, and where what they learn begins and ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from training.config import TrainConfig
from training.data.mixing import text_targets
from training.engine import loop
from training.losses.alignment import TextGather
from training.objectives import align
from training.objectives.align import AlignTask, Goal


def task_of(**changes: Any) -> AlignTask:
    settings: dict[str, Any] = {"backbone": "test_resnet", "image_size": 32, "batch_size": 64}
    return align.build_task(TrainConfig.of(store="s", **settings | changes), 100, 16)


def goal(count: int, matched: bool, images: Tensor) -> Goal:
    """Texts that are the images' own features, or each the next one's."""
    groups = torch.arange(count)
    texts = images if matched else images.roll(1, 0)
    return Goal(TextGather(texts.detach(), groups), *text_targets(groups))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_pulls_at_the_true_class_as_cross_entropy_does(smoothing: float) -> None:
    """At logits that say what a model says that knows nothing, one in a hundred, both have the very same
    gradient."""
    classes = torch.arange(8)
    gradients = {}
    for loss in ("cross-entropy", "bce"):
        logits = torch.full((8, 100), -math.log(99.0), requires_grad=True)
        task_of(loss=loss, label_smoothing=smoothing, alignment_weight=0).criterion(
            logits, classes
        ).backward()
        assert logits.grad is not None
        gradients[loss] = logits.grad
    torch.testing.assert_close(gradients["bce"], gradients["cross-entropy"])


def test_a_learned_temperature_comes_back_from_its_bound() -> None:
    """However far a step went below it, the next one that leads up does so."""
    task = task_of(learn_temperature=True, temperature=0.011, alignment_weight=1.0)
    assert task.log_temperature is not None
    with torch.no_grad():
        task.log_temperature.sub_(3.0)
    task.after_step()
    assert float(task.log_temperature.detach().exp()) == pytest.approx(0.01)
    optimizer = torch.optim.SGD([task.log_temperature], lr=0.01)  # type: ignore[list-item]
    images = torch.nn.functional.normalize(
        torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), dim=1
    )
    task.align(images, goal(8, False, images)).backward()
    optimizer.step()
    task.after_step()
    assert float(task.log_temperature.detach().exp()) > 0.0105


@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_step_of_a_run_leaves_a_learned_temperature_below_its_bound(
    tmp_path: Path, make_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    """A gradient that only ever leads down, for it and for its moving average."""
    original, tasks = align.build_task, []

    def build_task(*arguments: Any, **more: Any) -> AlignTask:
        tasks.append(original(*arguments, **more))
        assert tasks[-1].log_temperature is not None
        tasks[-1].log_temperature.register_hook(torch.ones_like)
        return tasks[-1]

    monkeypatch.setattr(align, "build_task", build_task)
    config = TrainConfig.of(
        store=str(make_store(tmp_path / "s", train=24, val=9)),
        backbone="test_resnet",
        image_size=32,
        epochs=2,
        batch_size=12,
        projection_dim=4,
        learn_temperature=True,
        optimizer="sgd",
        lr=10.0,
        alignment_weight=0.1,
        accumulate=accumulate,
        warmup_epochs=0,
        clip_grad=1.0,
    )
    loop.fit(config, torch.device("cpu"), 0, None, lambda metrics, take: None)
    assert tasks[0].log_temperature is not None and float(
        tasks[0].log_temperature.detach().exp()
    ) == pytest.approx(0.01)


def test_a_fixed_temperature_is_the_one_given() -> None:
    task = task_of(temperature=0.004)
    task.after_step()
    assert task.log_temperature is not None and float(task.log_temperature.exp()) == pytest.approx(0.004)


@pytest.mark.parametrize(("batch", "negatives"), [(64, 0), (16, 48), (32768, 0)])
def test_the_sigmoids_bias_starts_at_the_share_of_matches(batch: int, negatives: int) -> None:
    """Then no image is pulled or pushed on the whole; with -10 for small batches it would be pulled with its
    full weight."""
    task = task_of(alignment="sigmoid", batch_size=batch, store_negatives=negatives)
    assert task.bias is not None
    texts = batch + negatives
    assert float(torch.sigmoid(task.bias.detach())) == pytest.approx(1 / texts, rel=1e-4)
    if batch == 32768:
        assert float(task.bias.detach()) == pytest.approx(-10, abs=0.5), "SigLIP's own"
    if not negatives and batch < 100:
        z = torch.nn.functional.normalize(torch.randn(batch, 4096), dim=1)
        task.align(
            z, goal(batch, False, torch.nn.functional.normalize(torch.randn(batch, 4096), dim=1))
        ).backward()
        assert task.bias.grad is not None and abs(float(task.bias.grad)) < 0.1


@pytest.mark.parametrize("form", ["symmetric", "cosine"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_balanced_gradients_are_equally_long_at_the_feature(form: str, compiled: bool) -> None:
    """Whatever the form's own scale: what classes and texts each do to the features, by autograd."""
    task = task_of(balance="gradients", alignment_weight=0.25, alignment=form, head="linear")
    torch.manual_seed(0)
    images, classes = torch.randn(8, 3, 32, 32), torch.randint(100, (8,))
    targets = torch.nn.functional.normalize(torch.randn(8, 16), dim=1)
    inputs = align.Inputs(images, classes, goal(8, True, targets), weight=0.25)
    kept: list[Tensor] = []
    plain = task.features_and_logits

    def keep(model: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = plain(model, batch)
        kept.append(features)
        return features, logits

    task.features_and_logits = keep
    losses = task(inputs)
    if compiled:
        task.compile()
        torch.testing.assert_close(task(inputs)["balance"], losses["balance"], rtol=1e-4, atol=0)
    (both,) = torch.autograd.grad(losses["loss"], kept[0], retain_graph=True)
    assert task.head is not None
    features = kept[0].detach().requires_grad_()
    entropy = task.criterion(align.backbones.classified(task.backbone, features), classes)
    (of_classes,) = torch.autograd.grad(entropy, features)
    of_texts = both - 0.75 * of_classes
    torch.testing.assert_close((of_texts / 0.25).norm(), of_classes.norm(), rtol=1e-4, atol=0)
    assert float(losses["loss"].detach()) == pytest.approx(
        float(0.75 * losses["cross_entropy"] + 0.25 * losses["balance"] * losses["alignment"]), rel=1e-5
    )


def test_gradients_are_balanced_before_a_frozen_backbone() -> None:
    """Which no gradient reaches: the heads learn."""
    task = task_of(balance="gradients", alignment_weight=0.25)
    own = {id(each) for each in task.backbone.get_classifier().parameters()}
    for each in task.backbone.parameters():
        each.requires_grad_(id(each) in own)
    targets = torch.nn.functional.normalize(torch.randn(8, 16), dim=1)
    inputs = align.Inputs(torch.randn(8, 3, 32, 32), torch.arange(8), goal(8, True, targets), weight=0.25)
    losses = task(inputs)
    losses["loss"].backward()
    assert task.head is not None and losses["balance"] > 0
    learned = [*task.head.parameters(), *task.backbone.get_classifier().parameters()]
    assert all(each.grad is not None and each.grad.any() for each in learned)


def test_a_batch_without_texts_is_balanced_by_nothing() -> None:
    task = task_of(balance="gradients", alignment_weight=0.25)
    groups = torch.full((8,), -1)
    none = Goal(TextGather(torch.zeros(8, 16), groups), *text_targets(groups))
    inputs = align.Inputs(torch.randn(8, 3, 32, 32), torch.arange(8), none, weight=0.25)
    losses = task(inputs)
    losses["loss"].backward()
    assert losses["balance"] == 1 and torch.isfinite(losses["loss"])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.4, 0.4, 0.4, 0.4, 0.0]),
        ("linear", [0.4, 0.3, 0.2, 0.1, 0.0]),
        ("cosine", [0.4, 0.3414, 0.2, 0.0586, 0.0]),
    ],
)
def test_the_weight_goes_as_its_schedule_says(schedule: str, expected: list[float]) -> None:
    """Until four fifths of the training."""
    task = task_of(alignment_schedule=schedule, alignment_until=0.8, alignment_weight=0.4)
    weights = [task.alignment.weight_at(progress) for progress in (0.0, 0.2, 0.4, 0.6, 0.8)]
    assert weights == pytest.approx(expected, abs=1e-4)
    assert task.alignment.weight_at(1.0) == 0
