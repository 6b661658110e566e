"""Recipes: a name, what it is for, and the settings that differ from the defaults of `TrainConfig`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Small pictures from nothing; the defaults.
    "small-64": {},
    "small-32": {"image_size": 32, "crop_scale": 0.5},
    # One epoch of a tiny network: does everything fit together?
    "smoke": {"backbone": "test_resnet", "image_size": 32, "epochs": 1, "batch_size": 32, "warmup_epochs": 0.0},
    # The embedded default. No flips and mild crops: "left of" must stay true.
    "scenes": {
        "backbone": "test_resnet",
        "image_size": 64,
        "epochs": 12,
        "batch_size": 64,
        "lr": 2e-3,
        "weight_decay": 0.05,
        "flip": 0.0,
        "crop_scale": 0.8,
        "temperature": 0.1,
        "workers": 2,
    },
    # GPT4Image's released recipes (papers: batch 1024 over 4 or 8 GPUs, lr scaled to it).
    "paper-resnet50": {
        "backbone": "resnet50",
        "image_size": 224,
        "epochs": 120,
        "batch_size": 1024,
        "optimizer": "sgd",
        "lr": 0.4,
        "min_lr": 1e-5,
        "weight_decay": 1e-4,
        "warmup_epochs": 0.0,
        "crop_scale": 0.08,
        "temperature": 0.2,
        "projection_dim": 0,
        "loader_threads": 12,
    },
    "paper-deit-b": {
        "backbone": "deit_base_patch16_224",
        "image_size": 224,
        "epochs": 300,
        "batch_size": 1024,
        "lr": 1e-3,
        "min_lr": 1e-5,
        "weight_decay": 0.05,
        "warmup_epochs": 5.0,
        "crop_scale": 0.08,
        "temperature": 0.05,
        "label_smoothing": 0.1,
        "drop_path": 0.1,
        "projection_dim": 0,
        "loader_threads": 12,
    },
}


def preset(name: str) -> dict[str, Any]:
    """The settings of a recipe.

    Raises:
        ValueError: unknown name.
    """
    if name not in PRESETS:
        message = f"preset={name!r}: unknown; choose one of {', '.join(PRESETS)}."
        raise ValueError(message)
    return {"preset": name, **PRESETS[name]}


def preset_name(arguments: Sequence[str]) -> str:
    """The value of --preset on a command line (the last one counts), which must be known before the other flags are read."""
    name = "small-64"
    for place, argument in enumerate(arguments):
        if argument == "--preset" and place + 1 < len(arguments):
            name = arguments[place + 1]
        elif argument.startswith("--preset="):
            name = argument.split("=", 1)[1]
    return name
