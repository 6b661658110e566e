"""Which pictures, in which order, and what is done to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from training.settings import Deciding, below, no_share


@dataclass(frozen=True, kw_only=True)
class DataSettings(Deciding):
    """Splits, order, augmentation."""

    train_split: str = "train"
    """Split to train on."""
    eval_split: str = "val"
    """Split that the model is judged on after every epoch."""
    shots: int = 0
    """Pictures of each class to train on, drawn by --seed: every run of the same seed has the very same,
    which RUN/few_shot.json names; 0: all."""
    class_half: Literal["all", "base", "new"] = "all"
    """Classes that take part, in training and evaluation: all, the first half of them in order (rounded up,
    base), or the rest (new)."""
    shuffle_shards: int = 16
    """Shards whose rows are mixed at a time; all workers together keep about twice as many in memory, of
    Parquet sources (where a shard may hold few classes) each worker does, with BatchNorm, --mixup or
    --cutmix."""
    crop_scale: float = 0.35
    """Smallest share of the picture's area that a random resized crop keeps."""
    flip: float = 0.5
    """Probability of a horizontal flip; 0 where left and right carry meaning."""
    auto_augment: str = ""
    """timm's policy, such as rand-m9-mstd0.5-inc1 (RandAugment), 3a, augmix-m5-w4-d2."""
    color_jitter: float = 0.0
    """Brightness, contrast and saturation; timm leaves it out beside RandAugment."""
    erase: float = 0.0
    """Probability of random erasing."""
    mixup: float = 0.0
    """alpha of mixup; text targets are mixed as the labels are."""
    cutmix: float = 0.0
    """alpha of cutmix; likewise."""
    mix_prob: float = 1.0
    """Probability that a batch is mixed, where --mixup or --cutmix is set."""
    mix_switch_prob: float = 0.5
    """Probability of cutmix where both are set."""
    repeats: int = 1
    """Views of a picture in a batch (repeated augmentation); an epoch keeps its number of images."""
    epoch_repeats: int = 1
    """Passes over the train split that count as one epoch; more than 1 where the split is so small that
    evaluating and saving after every pass takes longer than training."""
    min_epoch_steps: int = 0
    """Steps that an epoch has at least: over a small train split it makes as many passes as that takes, the
    last perhaps in part. A network that starts from nothing needs some thousand steps, however few the
    pictures."""

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def needs_processes(self) -> bool:
        """Whether augmentation draws from generators that threads would share."""
        return bool(self.auto_augment or self.color_jitter)

    def faults(self) -> list[str]:
        """See `Settings.faults`."""
        return [
            *below(1, self, "shuffle_shards", "repeats", "epoch_repeats"),
            *below(0, self, "shots", "min_epoch_steps", "color_jitter", "mixup", "cutmix"),
            *no_share(self, "flip", "crop_scale", "erase", "mix_prob", "mix_switch_prob"),
        ]
