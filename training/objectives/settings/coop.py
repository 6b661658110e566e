"""Settings and recipes of CoOp (`objectives/coop.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import tyro

from training.settings import Grid, MethodSettings, below, template_fault

TEMPLATES = ("a photo of a {label}.",)
PAPERS_CLIP = "openai/clip-vit-base-patch16"
SCENES_CLIP = "examples/scenes/clip"
"""Knows drawn scenes alone, so that only their recipes name it."""


@dataclass(frozen=True, kw_only=True)
class ContextGrid(Grid):
    """How many context vectors."""

    context_lengths: tuple[int, ...] = (4, 16)
    """Numbers of context vectors to try."""

    def cells(self) -> list[dict[str, Any]]:
        """See `Grid.cells`."""
        return [{"context_length": length} for length in self.context_lengths]


@dataclass(frozen=True, kw_only=True)
class PromptLearning(MethodSettings):
    """What CoOp and CoCoOp have in common: a frozen CLIP and learned context."""

    own_model = "clip"
    left_open = ("clip_revision", "image_features")
    axes: ClassVar = {"context_length": "context"}
    legend: ClassVar = {"context_length": "how many vectors are learned in place of a prompt's words"}
    grid = ContextGrid

    clip: str = ""
    """The frozen CLIP, which must be named: folder or hub name (ORG/NAME or ORG/NAME@REVISION, pinned to its
    commit) of a transformers CLIPModel in safetensors."""
    clip_revision: tyro.conf.Suppress[str] = ""
    """Commit, or hash of the folder's files; found when a run begins."""
    context_length: int = 16
    """Learned context vectors; 0: as many as --context-words have tokens."""
    context_words: str = ""
    """Words that the context starts from, such as "a photo of a"; empty: at random (deviation 0.02)."""
    class_position: Literal["end", "middle", "front"] = "end"
    """Where the class name stands among the context vectors."""
    prompts_at_once: int = 1024
    """Prompts that go through the text tower together; where a step has more (pictures x classes with
    cocoop), they go in chunks whose activations are computed again in the backward pass."""
    image_features: str = ""
    """Where pictures' embeddings come from: a feature variant of the store, made by this very CLIP (no crop
    and no flip then); none: each step anew. Empty: of the store where it has them, else none."""
    zero_shot_templates: tuple[str, ...] = TEMPLATES
    """Prompts of plain CLIP, averaged for each class, that every epoch is compared with; {label} becomes the
    class's name."""

    def faults(self) -> list[str]:
        """See `Settings.faults`."""
        faults = below(0, self, "context_length") + below(1, self, "prompts_at_once")
        if not self.clip:
            faults.append(f"clip: name the frozen CLIP, such as --clip {PAPERS_CLIP}.")
        if not self.context_length and not self.context_words:
            faults.append("context_length=0: needs --context-words to take the number from.")
        wrong = [template_fault("zero_shot_templates", each) for each in self.zero_shot_templates or ("",)]
        faults += [fault for fault in wrong if fault]
        return faults


@dataclass(frozen=True, kw_only=True)
class CoOpSettings(PromptLearning):
    """The training method: CoOp, context vectors for a frozen CLIP's prompts."""

    context_per_class: bool = False
    """Context vectors of each class's own (CSC) instead of common ones; they serve no other classes."""


# github.com/KaiyangZhou/CoOp: SGD, crop and flip, one epoch of warm-up; epochs by shots. There the warm-up's
# rate is 1e-5 throughout, here it rises from it.
OPTIMISER: dict[str, Any] = {
    "optimizer": "momentum",
    "lr": 0.002,
    "min_lr": 0.0,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "warmup_lr": 1e-5,
    "warmup_epochs": 1.0,
    "crop_scale": 0.08,
    "flip": 0.5,
}
_COOP: dict[str, Any] = {
    **OPTIMISER,
    "clip": PAPERS_CLIP,
    "image_size": 224,
    "batch_size": 32,
    "context_length": 16,
}
# The small CLIP that comes along, on drawn scenes: no flips ("left of" must stay true), no harsh crops.
SCENES: dict[str, Any] = {
    **OPTIMISER,
    "clip": SCENES_CLIP,
    "image_size": 64,
    "crop_scale": 0.8,
    "flip": 0.0,
    "workers": 1,
}

PRESETS: dict[str, dict[str, Any]] = {
    "coop": {**_COOP, "shots": 16, "epochs": 200},
    "coop-4-shots": {**_COOP, "shots": 4, "epochs": 100},
    "coop-1-shot": {**_COOP, "shots": 1, "epochs": 50},
    "coop-scenes": {**SCENES, "batch_size": 32, "epochs": 50, "context_length": 4},
}
