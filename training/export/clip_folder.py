"""A trained CLIP as transformers reads it: `CLIPModel.from_pretrained(FOLDER)`, its tokenizer and its image
processor."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import RunStoppedError
from pipeline.sources import images
from pipeline.store import Store
from training.config import TrainConfig
from training.data.order import ROW, SHARD, Rows
from training.data.texts import tokens as caption_tokens
from training.data.texts.tokens import END
from training.engine import build
from training.models.clip_towers import ClipTowers

if TYPE_CHECKING:
    from torch import Tensor

REAL = 32
"""Pictures of the eval split that are compared."""
SAME, NEAR = 1e-5, 0.03
"""Largest difference of components for equal inputs, and of pixels that went through transformers' own
resizing, on average (two of 255 steps)."""

_USE = """```python
import torch
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

clip = CLIPModel.from_pretrained(FOLDER).eval()
texts = AutoTokenizer.from_pretrained(FOLDER)(["a caption"], padding=True, return_tensors="pt")
images = AutoImageProcessor.from_pretrained(FOLDER)(pictures, return_tensors="pt")
with torch.no_grad():
    logits = clip(**texts, **images).logits_per_image
```"""


def write(
    config: TrainConfig, towers: ClipTowers, tokenizer: Any, folder: str, captions: str
) -> dict[str, Any]:
    """Writes config.json, model.safetensors, the tokenizer, preprocessor_config.json and README.md; see
    `Objective.export`. `captions` is the variant whose captions are compared.

    Raises:
        RunStoppedError: what was written gives other vectors than the run's model.
    """
    import torch
    from transformers import CLIPImageProcessor

    towers = towers.cpu().eval()
    size = config.model.image_size
    towers.model.save_pretrained(folder)
    bpe = json.loads(tokenizer.to_str())["model"]
    longest = towers.model.config.text_config.max_position_embeddings
    merges = [(pair[0], pair[1]) for pair in bpe["merges"]]
    words = caption_tokens.as_transformers(bpe["vocab"], merges, model_max_length=longest)
    words.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    ).save_pretrained(folder)
    with torch.no_grad():
        told = _compared(config, towers, tokenizer, folder, captions)
    count = sum(each.numel() for each in towers.model.parameters())
    name = f"CLIP {size} x {size}, patches of {config.model.patch_size}"
    card = (
        f"# {name}\n\n{count:,} parameters, trained from nothing with CLIP's contrast of pictures and "
        f"captions by gpt4image-ray.\n\n{_USE}\n\nLoaded again and compared with the run's model: {told}\n"
    )
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as stream:
        stream.write(card)
    return {"architecture": name, "parameters": count}


def _compared(config: TrainConfig, towers: ClipTowers, tokenizer: Any, folder: str, captions: str) -> str:
    """What was found, in words."""
    import torch
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    loaded: Any = CLIPModel.from_pretrained(folder, use_safetensors=True).eval()
    processor: Any = AutoImageProcessor.from_pretrained(folder)
    words: Any = AutoTokenizer.from_pretrained(folder)
    store = Store(config.store)
    samples = Rows(store, config.data.eval_split).in_order()
    samples = samples[np.linspace(0, len(samples) - 1, min(REAL, len(samples))).astype(int)]
    loader = build.make_loader(config, (), towers)
    norm = build.make_norm(towers, torch.device("cpu"))
    views = torch.cat([norm(batch.images) for batch in loader.evaluate(samples, 16, 0, 1)])
    ours = towers.forward_features(views)
    theirs = _unit(loaded.get_image_features(pixel_values=views))
    inputs = processor([_picture(store, *sample) for sample in samples], return_tensors="pt")
    alike = float((_unit(loaded.get_image_features(**inputs)) * ours).sum(1).min())
    apart = max(map(_apart, views, inputs["pixel_values"]))
    texts = _texts(store, captions, samples)
    ids = torch.from_numpy(caption_tokens.encode(tokenizer, texts, words.model_max_length))
    made = words(texts, padding=True, truncation=True, return_tensors="pt")
    told = _unit(loaded.get_text_features(**made))
    difference = float(torch.cat([theirs - ours, told - towers.texts(ids)]).abs().max())
    if not (difference < SAME and apart < NEAR):
        message = (
            f"export: transformers gives other vectors than the run's model (difference {difference:.1e}, "
            f"limit {SAME:.0e}; of pixels by its own resizing {apart:.4f}, limit {NEAR})."
        )
        raise RunStoppedError(message)
    return (
        f"{len(samples)} pictures of the split {config.data.eval_split} and {len(texts)} captions, largest "
        f"difference of a vector's components {difference:.1e}. transformers cuts the middle out up to a "
        "pixel beside where training did; by its own resizing the least cosine to the run's vectors is "
        f"{alike:.3f}."
    )


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """Mean difference of two [3, S, S] pictures where they fit best: an odd margin has no middle, and the
    libraries round it otherwise."""
    places = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    moved = [ours.roll(place, (1, 2)) - theirs for place in places]
    return min(float(each[:, 1:-1, 1:-1].abs().mean()) for each in moved)


def _unit(output: Any) -> Tensor:
    import torch

    return torch.nn.functional.normalize(output.pooler_output, dim=-1)


def _picture(store: Store, *sample: int) -> Any:
    row = store.read_shard("images", "", int(sample[SHARD]), ["image", "uri", "content_hash"])
    values = (row[name][int(sample[ROW])].as_py() for name in ("image", "uri", "content_hash"))
    return images.decode(store.picture(*values), max_pixels=2**62)


def _texts(store: Store, variant: str, samples: Any) -> list[str]:
    found = [
        store.read_shard("captions", variant, int(each[SHARD]), ["caption"])["caption"][
            int(each[ROW])
        ].as_py()
        for each in samples
    ]
    return [text for text in found if text is not None] or [END]
