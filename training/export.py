"""`export`: the backbone of a run as a plain timm folder, with class names and preprocessing; the head stays behind."""

from __future__ import annotations

from typing import Any

from pipeline.prompts import class_name
from pipeline.store import Store
from training import backbones, checkpoint
from training.config import ExportConfig
from training.evaluate import load_backbone, read_config


def export(settings: ExportConfig) -> dict[str, Any]:
    """Writes config.json and model.safetensors; returns folder, architecture and parameter count."""
    from timm.models import save_for_hf

    config = read_config(settings.run)
    classes = Store(config.store).dataset.classes
    folder = checkpoint.find(settings.run, settings.checkpoint)
    task, epoch = load_backbone(config, folder, len(classes))
    model: Any = task.backbone
    size = config.image_size
    pretrained = {**model.pretrained_cfg, "input_size": (3, size, size), "num_classes": len(classes)}
    pretrained["label_names"] = [class_name(name) for name in classes]
    # Addresses of weights that these are not.
    for name in ("url", "hf_hub_id", "file", "source", "tag", "origin_url", "paper_ids", "paper_name", "notes", "license"):
        pretrained.pop(name, None)
    model.pretrained_cfg = pretrained
    save_for_hf(
        model, settings.to, model_config=pretrained, model_args=backbones.model_args(config.backbone, size) or None,
        safe_serialization=True,
    )  # fmt: skip
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"to": settings.to, "architecture": config.backbone, "parameters": parameters, "epoch": epoch}
