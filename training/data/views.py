"""What happens to a batch on the device, for any method: normalising, erasing, mixing; and a step's random
draws."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.config import TrainConfig
from training.data.mixing import Mixing, class_targets


@dataclass(frozen=True)
class Norm:
    """Normalises uint8 images on the device: (x / 255 - mean) / std, in place after the conversion."""

    mean: Tensor
    std: Tensor
    channels_last: bool = True

    def __call__(self, images: Tensor) -> Tensor:
        """[b, 3, S, S] uint8 to float32."""
        scaled = images.float().mul_(1 / (255 * self.std)).sub_(self.mean / self.std)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return scaled.contiguous(memory_format=layout)


@dataclass(frozen=True)
class Draw:
    """Whose turn it is: all random draws of a step depend on (seed, step, part, worker), so no generator's
    state is kept."""

    seed: int
    step: int
    rank: int
    world: int
    batch_size: int
    """Of all workers together."""
    progress: float = 0.0
    """Share of the run's steps that are done."""

    @property
    def largest_share(self) -> int:
        """Rows of the worker that has most."""
        return -(-self.batch_size // self.world)

    def begin(self, part: int) -> None:
        """Seeds Python's and torch's generators; part 0 is the preparation, and n + 1 the n-th forward
        pass."""
        draw = int(np.random.SeedSequence([self.seed, self.step, part, self.rank]).generate_state(1)[0])
        random.seed(draw)
        torch.manual_seed(draw)


@dataclass(frozen=True)
class Viewed:
    """A batch as it is trained on."""

    images: Tensor
    """[b, 3, S, S] float32."""
    classes: Tensor
    """[b] class numbers, or [b, C] probabilities where pictures are mixed."""
    partner: Tensor | None = None
    """[b] whose content is mixed in; see `Mixing`."""
    weights: Tensor | None = None
    """[b] of a picture's own content."""


class Views:
    """Erases and mixes as a run's settings say."""

    def __init__(self, config: TrainConfig, norm: Norm, classes: int) -> None:
        from timm.data.random_erasing import RandomErasing

        self.norm, self._classes = norm, classes
        self._mixing: Mixing | None = None
        if config.data.mixes:
            self._mixing = Mixing(
                mixup=config.data.mixup,
                cutmix=config.data.cutmix,
                prob=config.data.mix_prob,
                switch_prob=config.data.mix_switch_prob,
            )
        device = norm.mean.device.type
        self._erase: Any = (
            RandomErasing(probability=config.data.erase, mode="pixel", device=device)
            if config.data.erase
            else None
        )
        # Cross entropy smooths what it is given; timm's binary one does so only with class numbers.
        self._smoothing = config.optim.label_smoothing if config.optim.loss == "bce" else 0.0

    def __call__(self, images: Tensor, labels: Tensor, draw: Draw) -> Viewed:
        """[b, 3, S, S] uint8 and [b] labels; draws from the generators that `draw.begin(0)` has seeded."""
        images = self.norm(images)
        if self._erase is not None:
            images = self._erase(images)
        if self._mixing is None:
            return Viewed(images, labels)
        images, partner, weights = self._mixing(images, (draw.seed, draw.step, draw.rank))
        return Viewed(
            images, class_targets(labels, partner, weights, self._classes, self._smoothing), partner, weights
        )
