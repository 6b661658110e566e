"""`evaluate`: top-1 and top-5 of a run's model on a split, in this process, on a GPU if there is one."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

from pipeline.store import Store
from training import checkpoint, loop
from training.config import EvaluateConfig, TrainConfig
from training.data import Rows
from training.objectives.align import AlignTask


def read_config(run: str) -> TrainConfig:
    """The settings that a run was made with.

    Raises:
        FileNotFoundError: `run` is no folder of a run.
    """
    path = os.path.join(run, "config.json")
    if not os.path.isfile(path):
        message = f"run={run}: holds no config.json, so it is no run; `gpt4image train` makes one."
        raise FileNotFoundError(message)
    with open(path, encoding="utf-8") as stream:
        return TrainConfig(**json.load(stream))


def load_backbone(config: TrainConfig, folder: str, num_classes: int) -> tuple[AlignTask, int]:
    """The baseline task (backbone alone) with a checkpoint's weights, and the checkpoint's epoch."""
    from safetensors.torch import load_file

    task = loop.build_task(replace(config, alignment_weight=0.0, pretrained=False), num_classes, 0)
    weights = load_file(os.path.join(folder, "model.safetensors"))
    task.load_state_dict({name: value for name, value in weights.items() if name.startswith("backbone.")})
    return task.eval(), int(checkpoint.read_state(folder)["epoch"])


def evaluate(settings: EvaluateConfig) -> dict[str, Any]:
    """Measures a run's checkpoint; returns run, split, epoch, images, top1 and top5 (percent)."""
    import torch

    config = read_config(settings.run)
    store = Store(config.store)
    split = settings.split or config.eval_split
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task, epoch = load_backbone(config, checkpoint.find(settings.run, settings.checkpoint), len(store.dataset.classes))
    task = loop.to_device(task, device)
    loader = loop.make_loader(config, store, None, task.backbone)
    amp = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
    norm = loop.make_norm(task.backbone, device)
    found = loop.evaluate(task, loader, Rows(store, split), norm, config.batch_size, device, amp, 0)
    return {
        "run": settings.run, "split": split, "checkpoint": settings.checkpoint, "epoch": epoch,
        "images": int(found["eval_images"]), "top1": round(found["top1"], 3), "top5": round(found["top5"], 3),
    }  # fmt: skip
