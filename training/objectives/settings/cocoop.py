"""Settings and recipes of CoCoOp (`objectives/cocoop.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from training.objectives.settings.coop import OPTIMISER, PAPERS_CLIP, SCENES, PromptLearning


@dataclass(frozen=True, kw_only=True)
class CoCoOpSettings(PromptLearning):
    """The training method: CoCoOp, context vectors that each picture shifts."""

    context_length: int = 4
    """Learned context vectors; 0: as many as --context-words have tokens."""


PRESETS: dict[str, dict[str, Any]] = {
    # The paper's: 16 shots, 10 epochs, "a photo of a", lr 0.002 at batch 1. At 8 pictures a step the rate is
    # larger in proportion.
    "cocoop": {
        **OPTIMISER,
        "clip": PAPERS_CLIP,
        "image_size": 224,
        "shots": 16,
        "epochs": 10,
        "batch_size": 8,
        "lr": 0.016,
        "context_length": 0,
        "context_words": "a photo of a",
    },
    "cocoop-scenes": {**SCENES, "batch_size": 16, "epochs": 30, "lr": 0.02, "context_length": 4},
}
