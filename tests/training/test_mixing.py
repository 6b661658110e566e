"""Mixup and cutmix: the weights are those of the pictures' content, and the ones that timm gives labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor

from training.data.mixing import Mixing, class_targets, text_targets

MODES = ("batch", "pair", "elem")
SEEDS = (3, 141, 0)


def flat_pictures(count: int, size: int = 16) -> Tensor:
    """Picture i has the value i + 1 everywhere."""
    return torch.arange(1.0, count + 1).view(-1, 1, 1, 1).expand(-1, 3, size, size).contiguous()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [8, 7])
def test_mixups_weights_are_those_of_the_pixels(mode: Any, count: int) -> None:
    images = flat_pictures(count)
    mixed, partner, weights = Mixing(mixup=0.8, mode=mode)(images, SEEDS)
    expected = weights.view(-1, 1, 1, 1) * images + (1 - weights.view(-1, 1, 1, 1)) * images[partner]
    torch.testing.assert_close(mixed, expected)
    assert 0 < weights[0] < 1
    assert len(set(weights[: count // 2].tolist())) == (1 if mode == "batch" else count // 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [8, 7])
def test_cutmixs_weights_are_the_areas(mode: Any, count: int) -> None:
    images = flat_pictures(count)
    cut = 0
    for seed in range(5):
        mixed, partner, weights = Mixing(cutmix=1.0, mode=mode)(images, (seed,))
        assert ((mixed == images) | (mixed == images[partner])).all(), (
            "every pixel is of one of the two pictures"
        )
        own = (mixed == images).float().mean(dim=(1, 2, 3))
        torch.testing.assert_close(own, weights)
        cut += int((weights < 1).sum())
    assert cut > 10


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_targets_are_timms_own_for_the_same_draws(mode: Any, smoothing: float) -> None:
    torch.manual_seed(0)
    images, labels = torch.rand(6, 3, 16, 16), torch.tensor([0, 4, 4, 2, 1, 0])
    settings: dict[str, Any] = {"prob": 0.8, "switch_prob": 0.5, "mode": mode}
    for seed in range(6):
        mixed, partner, weights = Mixing(mixup=0.8, cutmix=1.0, **settings)(images, (seed, 5))
        np.random.seed(np.random.SeedSequence((seed, 5)).generate_state(4))
        timms = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=smoothing, num_classes=5, **settings)
        their_images, their_targets = timms(images.clone(), labels)
        assert torch.equal(mixed, their_images)
        torch.testing.assert_close(class_targets(labels, partner, weights, 5, smoothing), their_targets)


def test_without_mixing_class_targets_are_smoothed_labels() -> None:
    labels = torch.tensor([2, 0, 1])
    found = class_targets(labels, torch.arange(3), torch.ones(3), 4, 0.2)
    torch.testing.assert_close(found, mixup_target(labels, 4, 1.0, 0.2))


def test_text_targets_have_the_labels_weights() -> None:
    """With every picture in a class and a group of its own, the two kinds of target are the same matrix."""
    _, partner, weights = Mixing(mixup=0.5, mode="elem")(flat_pictures(7), SEEDS)
    groups = torch.tensor([40, 11, 12, 35, 90, 2, 7])
    classes = class_targets(torch.arange(7), partner, weights, 7)
    target_groups, target_weights = text_targets(groups, partner, weights)
    assert target_groups.shape == target_weights.shape == (7, 2)
    dense = sum(target_weights[:, [k]] * (target_groups[:, [k]] == groups[None]) for k in range(2))
    torch.testing.assert_close(dense, classes)
    plain_groups, plain_weights = text_targets(groups)
    assert plain_groups.tolist() == groups[:, None].tolist() and plain_weights.tolist() == [[1.0]] * 7


def test_draws_depend_on_the_seeds_alone_and_disturb_nobody() -> None:
    mixing, images = Mixing(mixup=0.8, cutmix=1.0, mode="elem"), torch.rand(8, 3, 16, 16)
    kept = images.clone()
    np.random.seed(1)
    plain = [np.random.rand() for _ in range(3)]
    np.random.seed(1)
    disturbed = [np.random.rand()]
    first = mixing(images, SEEDS)
    disturbed.append(np.random.rand())
    second = mixing(images, SEEDS)
    disturbed.append(np.random.rand())
    assert disturbed == plain
    assert all(torch.equal(mine, other) for mine, other in zip(first, second, strict=True))
    assert not torch.equal(first[2], mixing(images, (3, 141, 1))[2])
    assert torch.equal(images, kept), "the input is left as it was"


def test_the_last_of_an_odd_batch_and_a_single_picture_stay_as_they_are() -> None:
    images = flat_pictures(5)
    mixed, partner, weights = Mixing(mixup=1.0)(images, SEEDS)
    assert torch.equal(mixed[4], images[4]) and partner.tolist() == [3, 2, 1, 0, 4] and weights[4] == 1
    assert (weights[:4] < 1).all()
    for count in (0, 1):
        alone, partner, weights = Mixing(mixup=1.0)(images[:count], SEEDS)
        assert (
            torch.equal(alone, images[:count])
            and partner.tolist() == [0] * count
            and weights.tolist() == [1.0] * count
        )


def test_batches_are_mixed_with_the_given_probability_and_keep_their_memory_format() -> None:
    images = flat_pictures(2).to(memory_format=torch.channels_last)
    mixing = Mixing(mixup=1.0, cutmix=1.0, prob=0.25)
    results = [mixing(images, (7, step)) for step in range(200)]
    assert 30 <= sum(bool((weights < 1).all()) for _, _, weights in results) <= 70
    assert all(mixed.is_contiguous(memory_format=torch.channels_last) for mixed, _, _ in results)


def test_wrong_settings_are_named_together() -> None:
    with pytest.raises(
        ValueError, match=r"need one above 0[\s\S]*prob=2: must lie[\s\S]*mode='half': must be"
    ):
        Mixing(prob=2, mode="half")  # type: ignore[arg-type]
