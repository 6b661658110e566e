"""What an export of learned prompts holds: the prompts, and where they depend on no picture the classes'
embeddings, which any user of the same CLIP compares pictures with, without this package."""

from __future__ import annotations

import json
import os
from typing import Any

from safetensors.torch import save_file

from training.config import TrainConfig
from training.models.prompts import PromptedClip
from training.settings import flat

_USE = """```python
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, CLIPModel

clip = CLIPModel.from_pretrained(CLIP).eval()      # the one named above
images = AutoImageProcessor.from_pretrained(CLIP)(pictures, return_tensors="pt")
weights = load_file("FOLDER/model.safetensors")
with torch.no_grad():
    seen = torch.nn.functional.normalize(clip.get_image_features(**images).pooler_output, dim=-1)
    logits = clip.logit_scale.exp() * seen @ weights["class_embeddings"].T   # classes as in labels.txt
```"""
_CONDITIONED = (
    "Every picture has prompts of its own, so there are no embeddings of classes to keep: load the weights "
    "into `training.models.prompts.PromptedClip`, or evaluate the run. Learned prompts that are the same for "
    "all pictures are those of --objective coop."
)


def write(config: TrainConfig, model: PromptedClip, folder: str) -> dict[str, Any]:
    """Writes model.safetensors, labels.txt, config.json and README.md; see `Objective.export`."""
    import torch

    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if model.generator is None:
        with torch.no_grad():
            weights["class_embeddings"] = model.class_embeddings()[0].cpu().contiguous()
    save_file(weights, os.path.join(folder, "model.safetensors"))
    pictures = {name: list(v) if isinstance(v, tuple) else v for name, v in model.pretrained_cfg.items()}
    # Where the CLIP lies on this machine is nobody's business; its hash says which one it is.
    method = flat(config.method)
    method |= {"clip": _public(method["clip"])}
    told = {"objective": config.objective, "pictures": pictures, "labels": list(model.names), **method}
    card = (
        f"# {config.objective}: prompts for {method['clip']}, {len(model.names)} classes\n\nThe CLIP is "
        f"`{method['clip']}`, revision `{method['clip_revision']}`; it is not in this folder. "
        f"{sum(p.numel() for p in model.parameters()):,} parameters were learned.\n\n"
        f"{_USE if model.generator is None else _CONDITIONED}\n"
    )
    texts = {
        "labels.txt": "".join(f"{name}\n" for name in model.names),
        "README.md": card,
        "config.json": json.dumps(told, indent=2, ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as stream:
            stream.write(text)
    return {
        "architecture": f"{config.objective} for {method['clip']}",
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _public(clip: str) -> str:
    is_hub = clip.count("/") == 1 and not clip.startswith((".", "/", "~")) and not os.path.isdir(clip)
    return clip if is_hub else os.path.basename(clip.rstrip("/"))
