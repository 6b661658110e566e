"""Settings and recipes of CLIP from nothing (`objectives/clip.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import tyro

from training.objectives.metric import Metric
from training.settings import Grid, MethodSettings, below, template_fault

METRIC = Metric(name="retrieval_recall1", title="R@1", unit="%", difference="points of R@1")


@dataclass(frozen=True, kw_only=True)
class ClipGrid(Grid):
    """How wide the shared space is."""

    shared_widths: tuple[int, ...] = (64, 128)
    """Widths of the shared space to try."""

    def cells(self) -> list[dict[str, Any]]:
        """See `Grid.cells`."""
        return [{"shared_width": width} for width in self.shared_widths]


@dataclass(frozen=True, kw_only=True)
class ClipSettings(MethodSettings):
    """The training method: CLIP, a tower for pictures and one for captions, both from nothing. Patches are
    --patch-size, pictures --image-size."""

    own_model = "clip"
    left_open = ("caption_variant", "tokenizer_digest")
    axes: ClassVar = {"shared_width": "width"}
    legend: ClassVar = {"shared_width": "width of the space that pictures and texts are compared in"}
    grid = ClipGrid

    vision_width: int = 768
    """Width of the tower of pictures, a multiple of --head-width."""
    vision_layers: int = 12
    """Its layers."""
    text_width: int = 512
    """Width of the tower of texts, a multiple of --head-width."""
    text_layers: int = 12
    """Its layers."""
    head_width: int = 64
    """Width of an attention head, in both."""
    shared_width: int = 512
    """Width of the space that pictures and texts are compared in."""
    context_tokens: int = 77
    """Tokens that the tower of texts reads, start and end among them; what is longer is cut."""
    vocabulary: int = 8192
    """Tokens that there are at most: 512 of single bytes, start, end, and the commonest pieces of the train
    split's captions."""
    initial_temperature: float = 0.07
    """tau of the loss at first; it is learned, and stays at 0.01 or above."""
    caption_variant: str = ""
    """Caption variant; empty: the only one of the store, or the one that a resumed run was begun with. Of
    several captions a picture, each step draws one."""
    tokenizer_digest: tyro.conf.Suppress[str] = ""
    """Which tokenizer of the variant; found when a run begins."""
    zero_shot_templates: tuple[str, ...] = ("a photo of a {label}.",)
    """Prompts of classes that `evaluate` tells pictures apart by, averaged; {label} becomes the class's
    name."""

    def faults(self) -> list[str]:
        """See `Settings.faults`."""
        faults = below(1, self, "vision_layers", "text_layers", "shared_width", "head_width")
        faults += below(3, self, "context_tokens") + below(515, self, "vocabulary")
        faults += [
            f"{name}={width}: must be a multiple of --head-width {self.head_width}."
            for name in ("vision_width", "text_width")
            if (width := getattr(self, name)) < 1 or width % max(1, self.head_width)
        ]
        if self.initial_temperature < 0.01:
            faults.append(f"initial_temperature={self.initial_temperature}: must be 0.01 or more.")
        wrong = [template_fault("zero_shot_templates", each) for each in self.zero_shot_templates or ("",)]
        faults += [fault for fault in wrong if fault]
        return faults


PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2103.00020, section 2.4 and table 18, ViT-B/32; there batches of 32,768 for 32 epochs of 400 M
    # pairs.
    "clip-vit-b32": {
        "image_size": 224,
        "patch_size": 32,
        "batch_size": 4096,
        "epochs": 32,
        "betas": (0.9, 0.98),
        "lr": 5e-4,
        "min_lr": 0.0,
        "weight_decay": 0.2,
        "warmup_epochs": 1.0,
        "crop_scale": 0.9,
        "flip": 0.0,
        "loader_workers": 12,
    },
    # Drawn scenes on a CPU: no flips ("left of" must stay true), hardly any crop ("at the top").
    "clip-scenes": {
        "image_size": 64,
        "patch_size": 8,
        "vision_width": 128,
        "vision_layers": 4,
        "text_width": 96,
        "text_layers": 2,
        "head_width": 32,
        "shared_width": 128,
        "context_tokens": 48,
        "vocabulary": 1000,
        "optimizer": "muon",
        "batch_size": 128,
        "epochs": 10,
        "lr": 2e-3,
        "min_lr": 0.0,
        "weight_decay": 0.05,
        "warmup_epochs": 0.4,
        "crop_scale": 0.8,
        "flip": 0.0,
        "workers": 1,
    },
}
