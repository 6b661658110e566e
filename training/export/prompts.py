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
_CONDITIONED = """```python
import torch
from safetensors.torch import load_file
from torch.nn.functional import linear, normalize
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

clip = CLIPModel.from_pretrained(CLIP).eval()      # the one named above
images = AutoImageProcessor.from_pretrained(CLIP)(pictures, return_tensors="pt")
weights = load_file("FOLDER/model.safetensors")
labels = open("FOLDER/labels.txt", encoding="utf-8").read().splitlines()
first, second = ([weights[f"generator.{n}.{kind}"] for kind in ("weight", "bias")] for n in (0, 2))
places = torch.arange(1, len(weights["context"]) + 1)           # behind the start token
texts = [f"{'a ' * len(places)}{label}." for label in labels]   # "a" keeps the context's places
words = AutoTokenizer.from_pretrained(CLIP)
texts = words(texts, padding=True, return_tensors="pt")
ends = (texts.input_ids == words.eos_token_id).int().argmax(1)   # where CLIP reads a text's feature
logits = []
with torch.no_grad():
    seen = normalize(clip.get_image_features(**images).pooler_output, dim=-1)
    for picture in seen:                                         # each has prompts of its own
        context = weights["context"] + linear(torch.relu(linear(picture, *first)), *second)

        def place(module, given, embedded):
            return embedded.index_copy(1, places, context.expand(len(labels), -1, -1))

        hook = clip.text_model.embeddings.token_embedding.register_forward_hook(place)
        hidden = clip.text_model(input_ids=texts.input_ids).last_hidden_state
        hook.remove()
        prompts = normalize(clip.text_projection(hidden[torch.arange(len(labels)), ends]), dim=-1)
        logits.append(clip.logit_scale.exp() * prompts @ picture)
logits = torch.stack(logits)                                     # classes as in labels.txt
```"""
_ELSEWHERE = (
    "Every picture has prompts of its own, and the class's name stands among the context: load the weights "
    "into `training.models.prompts.PromptedClip`, or evaluate the run."
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
    at_end = method["class_position"] == "end"
    told = {"objective": config.objective, "pictures": pictures, "labels": list(model.names), **method}
    card = (
        f"# {config.objective}: prompts for {method['clip']}, {len(model.names)} classes\n\nThe CLIP is "
        f"`{method['clip']}`, revision `{method['clip_revision']}`; it is not in this folder. "
        f"{sum(p.numel() for p in model.parameters()):,} parameters were learned.\n\n"
        f"{_USE if model.generator is None else _CONDITIONED if at_end else _ELSEWHERE}\n"
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
    is_elsewhere = clip.startswith((".", "~")) or os.path.isabs(clip)
    return os.path.basename(clip.rstrip("/")) if is_elsewhere else clip
