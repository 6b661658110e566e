"""Settings and recipes of masked autoencoding with Hiera (`objectives/mae.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from training.objectives.metric import Metric
from training.settings import Grid, MethodSettings, below

METRIC = Metric(
    name="reconstruction",
    title="reconstruction loss",
    digits=4,
    unit="",
    difference="of reconstruction loss",
    higher_is_better=False,
)


@dataclass(frozen=True, kw_only=True)
class MaeGrid(Grid):
    """Mask ratios."""

    mask_ratios: tuple[float, ...] = (0.6,)
    """Shares of removed mask units to try."""

    def cells(self) -> list[dict[str, Any]]:
        """See `Grid.cells`."""
        return [{"mask_ratio": ratio} for ratio in self.mask_ratios]


@dataclass(frozen=True, kw_only=True)
class MaeSettings(MethodSettings):
    """The training method: Hiera's masked autoencoding, from pictures alone."""

    axes: ClassVar = {"mask_ratio": "masked"}
    legend: ClassVar = {"mask_ratio": "share of a picture's mask units that the encoder does not see"}
    grid = MaeGrid

    mask_ratio: float = 0.6
    """Share of a picture's mask units (8 x 8 tokens; of the published sizes 32 x 32 pixels) that the encoder
    does not see; of what is left the number of units is rounded down. 0 hides nothing: to compare with."""
    norm_pix_loss: bool = True
    """Predict each patch's pixels with mean 0 and deviation 1, as published; without it the pixels as they
    are."""
    decoder_depth: int = 8
    """Blocks of the decoder, which is left behind after training."""
    decoder_width: int = 512
    """Width of the decoder."""
    decoder_heads: int = 16
    """Attention heads of the decoder, a divisor of its width."""

    def told(self) -> dict[str, str]:
        """The mask ratio."""
        return {"masked": f"{self.mask_ratio:g}"}

    def title(self) -> str:
        """See `told`."""
        return f"mae-m{self.mask_ratio:g}"

    def faults(self) -> list[str]:
        """See `Settings.faults`."""
        faults = below(1, self, "decoder_depth", "decoder_width", "decoder_heads")
        if not 0 <= self.mask_ratio < 1:
            faults.append(f"mask_ratio={self.mask_ratio}: must be 0 or more and below 1, such as 0.6.")
        if not faults and self.decoder_width % self.decoder_heads:
            faults.append(
                f"decoder_heads={self.decoder_heads}: must divide --decoder-width {self.decoder_width}."
            )
        return faults


# Pre-training as the authors give it for ImageNet-1K (arXiv 2306.00989; github.com/facebookresearch/hiera,
# issue 28: 1600 epochs, "not fully validated"). What it says no more of is MAE's (arXiv 2111.06377): a cosine
# to 0.
_PAPER: dict[str, Any] = {
    "image_size": 224,
    "epochs": 1600,
    "batch_size": 4096,
    "optimizer": "adamw",
    "betas": (0.9, 0.95),
    "lr": 8e-4,
    "min_lr": 0.0,
    "warmup_epochs": 40.0,
    "weight_decay": 0.05,
    "crop_scale": 0.2,
    "flip": 0.5,
    "loader_workers": 12,
}

PRESETS: dict[str, dict[str, Any]] = {
    "hiera-t-mae": {**_PAPER, "backbone": "hiera_tiny_224"},
    "hiera-s-mae": {**_PAPER, "backbone": "hiera_small_224"},
    "hiera-b-mae": {**_PAPER, "backbone": "hiera_base_224", "drop_path": 0.2},
    "hiera-b-plus-mae": {**_PAPER, "backbone": "hiera_base_plus_224", "drop_path": 0.2},
    "hiera-l-mae": {**_PAPER, "backbone": "hiera_large_224", "drop_path": 0.2},
    "hiera-h-mae": {**_PAPER, "backbone": "hiera_huge_224", "drop_path": 0.3},
    # The embedded default, for minutes on two cores: small pictures, a Hiera and a decoder in their size. No
    # flips: what is fine-tuned on top must know left from right.
    "hiera-scenes-mae": {
        "backbone": "hiera_nano_64",
        "image_size": 64,
        "epochs": 40,
        "epoch_repeats": 8,
        "batch_size": 32,
        "betas": (0.9, 0.95),
        "lr": 1e-3,
        "warmup_epochs": 2.0,
        "crop_scale": 0.5,
        "flip": 0.0,
        "decoder_depth": 2,
        "decoder_width": 128,
        "decoder_heads": 4,
        "workers": 1,
    },
}
