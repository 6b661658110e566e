"""Mixup and cutmix through timm, with class targets and text targets mixed by the same weights.

timm (`timm.data.Mixup`) pairs picture i of a batch of b with picture b - 1 - i and returns mixed one-hot
labels. Given the pictures' numbers in place of their labels, it returns the weights of the pictures
themselves, which then mix any kind of target. Sources: mixup, arXiv 1710.09412; cutmix, arXiv 1905.04899.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from pipeline.errors import SettingsError

if TYPE_CHECKING:
    from torch import Tensor

Mode = Literal["batch", "pair", "elem"]


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Settings, named as timm's; at least one of the alphas is above 0."""

    mixup: float = 0.0
    """alpha of mixup; 0: none."""
    cutmix: float = 0.0
    """alpha of cutmix; 0: none."""
    prob: float = 1.0
    """Probability that a batch, pair or picture is mixed."""
    switch_prob: float = 0.5
    """Probability of cutmix where both are set."""
    mode: Mode = "batch"
    """What shares one draw: the whole batch, a pair of pictures, or each picture has its own."""

    def __post_init__(self) -> None:
        faults = []
        if min(self.mixup, self.cutmix) < 0 or self.mixup == self.cutmix == 0:
            faults.append(
                f"mixup={self.mixup}, cutmix={self.cutmix}: need one above 0 and none below, such as "
                "mixup=0.2."
            )
        for name in ("prob", "switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                faults.append(f"{name}={getattr(self, name)}: must lie between 0 and 1.")
        if self.mode not in ("batch", "pair", "elem"):
            faults.append(f"mode={self.mode!r}: must be batch, pair or elem.")
        if faults:
            raise SettingsError("\n".join(faults))

    def __call__(self, images: Tensor, seeds: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Mixes a batch; with an odd number of pictures the last one stays as it is.

        Args:
            images: [b, 3, H, W] floating point; left unchanged.
            seeds: numbers of at least 0 that all draws depend on, and nothing else.

        Returns:
            The mixed images, the partner of each picture ([b] int64), and the weight of its own content ([b]
            float32); the partner's is the rest. A picture that was not mixed may have a partner, of weight 0.
        """
        import torch
        from timm.data import Mixup

        count = len(images) // 2 * 2
        mixed = images.clone(memory_format=torch.preserve_format)
        partner = torch.arange(len(images), device=images.device)
        weights = torch.ones(len(images), device=images.device)
        if count == 0:
            return mixed, partner, weights
        mixup = Mixup(
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            prob=self.prob,
            switch_prob=self.switch_prob,
            mode=self.mode,
            label_smoothing=0.0,
            num_classes=count,
        )
        # timm draws from numpy's global state; whatever else uses that goes on as if nothing had been drawn.
        before = np.random.get_state()
        np.random.seed(np.random.SeedSequence(seeds).generate_state(4))
        try:
            _, matrix = mixup(mixed[:count], partner[:count])  # in place
        finally:
            np.random.set_state(before)
        weights[:count] = matrix.diagonal()
        partner[:count] = partner[:count].flip(0)
        return mixed, partner, weights


def class_targets(
    labels: Tensor, partner: Tensor, weights: Tensor, classes: int, smoothing: float = 0.0
) -> Tensor:
    """[b, classes] soft targets of mixed pictures, smoothed as timm's `mixup_target` does it.

    Args:
        labels: [b] class numbers.
        partner: [b] as from `Mixing`.
        weights: [b] as from `Mixing`.
        classes: number of classes.
        smoothing: mass that is spread evenly over all classes.
    """
    from timm.data.mixup import one_hot

    off = smoothing / classes
    own: Tensor = one_hot(labels, classes, on_value=1 - smoothing + off, off_value=off)
    return weights[:, None] * own + (1 - weights[:, None]) * own[partner]


def text_targets(
    groups: Tensor, partner: Tensor | None = None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(`target_groups_bK`, `target_weights_bK`) of `alignment_loss`: K = 2 for mixed pictures, 1 without
    `partner` and `weights`.

    Args:
        groups: [b] text group of each picture, -1 for none.
        partner: [b] as from `Mixing`.
        weights: [b] as from `Mixing`.
    """
    import torch

    if partner is None or weights is None:
        return groups[:, None], torch.ones((len(groups), 1), device=groups.device)
    return torch.stack([groups, groups[partner]], 1), torch.stack([weights, 1 - weights], 1)
