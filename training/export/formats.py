"""One writer a format: the file is written, loaded again as its user would, and returned as a function to
compare."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

from training.config import TrainConfig
from training.models import backbones, weights

Batch = Any  # [b, 3, S, S] float32 tensor, normalised
Model = Callable[[Batch], Any]


def _timm(model: Any, config: TrainConfig, recipe: dict[str, Any], folder: str) -> Model:
    """timm's config.json and model.safetensors; returns the model as timm loads it."""
    import timm
    from timm.models import save_for_hf

    size = config.model.image_size
    # Of the weights that training started from, which these are not.
    foreign = (
        "url",
        "hf_hub_id",
        "hf_hub_filename",
        "file",
        "source",
        "tag",
        "origin_url",
        "paper_ids",
        "paper_name",
        "notes",
        "license",
    )
    before = model.pretrained_cfg
    kept = {name: value for name, value in before.items() if name not in foreign}
    model.pretrained_cfg = {**kept, "input_size": (3, size, size), "num_classes": len(recipe["labels"])}
    try:
        save_for_hf(
            model,
            folder,
            model_config={"label_names": recipe["labels"]} if recipe["labels"] else None,
            safe_serialization=True,
            model_args=backbones.model_args(
                config.model.backbone, size, config.model.patch_size, config.model.architecture
            )
            or None,
            data_config={
                "input_size": (3, size, size),
                "mean": recipe["mean"],
                "std": recipe["std"],
                "crop_pct": recipe["crop_pct"],
                "interpolation": recipe["interpolation"],
                "crop_mode": "center",
            },
        )
    finally:
        model.pretrained_cfg = before
    if not config.model.small_stem:
        loaded: Model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        return loaded
    from safetensors.torch import load_file

    name = weights.architecture_of(config)
    small = backbones.shrink_stem(name, timm.create_model(name, num_classes=len(recipe["labels"])))
    small.load_state_dict(load_file(os.path.join(folder, "model.safetensors")))
    return small.eval()


def _onnx(model: Any, config: TrainConfig, recipe: dict[str, Any], folder: str) -> Model:
    """model.onnx with any batch size, weights inside; returns it as ONNX Runtime runs it."""
    import onnxruntime
    import torch

    plain = copy.deepcopy(model)
    for module in plain.modules():
        # The exporter knows fused attention for 4 axes only, and Hiera's has 5.
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    path = os.path.join(folder, "model.onnx")
    size = config.model.image_size
    # A file beside the weights is needed from 2 GiB (protobuf's limit) on; below it one file is easier to
    # carry.
    outside = sum(p.numel() * p.element_size() for p in plain.parameters()) > 1.9e9
    with torch.no_grad():
        torch.onnx.export(
            plain,
            (torch.randn(2, 3, size, size),),
            path,
            dynamo=True,
            verbose=False,
            external_data=outside,
            input_names=["images"],
            output_names=[recipe["output"]["name"]],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _torch(model: Any, config: TrainConfig, recipe: dict[str, Any], folder: str) -> Model:
    """model.pt2 with any batch size; returns it as torch loads it."""
    import torch

    size, path = config.model.image_size, os.path.join(folder, "model.pt2")
    with torch.no_grad():
        program = torch.export.export(
            model, (torch.randn(2, 3, size, size),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    torch.export.save(program, path)
    loaded: Model = torch.export.load(path).module()
    return loaded


WRITERS: dict[str, Callable[[Any, TrainConfig, dict[str, Any], str], Model]] = {
    "timm": _timm,
    "onnx": _onnx,
    "torch": _torch,
}
