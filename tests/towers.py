"""Small random vision towers, saved as their libraries save them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, SiglipConfig, SiglipModel
from transformers import SiglipImageProcessor as Squashing

_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT = {**_SMALL, "vocab_size": 50, "max_position_embeddings": 16}


def clip(folder: Path, *, size: int = 32, patch: int = 8, seed: int = 0, pad: int = 0) -> CLIPModel:
    """A CLIP of `transformers.CLIPModel`, 16-d, which cuts `size` out of `size + pad` pixels."""
    torch.manual_seed(seed)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    vision = {**_SMALL, "image_size": size, "patch_size": patch}
    model = CLIPModel(
        CLIPConfig(text_config={**_TEXT, **special}, vision_config=vision, projection_dim=16)
    ).eval()
    model.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": size + pad}, crop_size={"height": size, "width": size}
    ).save_pretrained(folder)
    return model


def siglip(folder: Path) -> SiglipModel:
    """A SigLIP, which squashes pictures to 32 pixels."""
    torch.manual_seed(0)
    vision = {**_SMALL, "image_size": 32, "patch_size": 8}
    text = {**_TEXT, "projection_size": 32}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    model.save_pretrained(folder)
    Squashing(size={"height": 32, "width": 32}).save_pretrained(folder)
    return model


def of_timm(folder: Path, name: str = "test_vit", classes: int = 5, **arguments: Any) -> torch.nn.Module:
    """A model of timm in the layout of its `save_for_hf` and of our exports."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=classes, **arguments).eval()
    folder.mkdir(parents=True, exist_ok=True)
    known = {key: model.pretrained_cfg[key] for key in ("mean", "std", "crop_pct", "interpolation")}
    size = arguments.get("img_size", model.pretrained_cfg["input_size"][-1])
    known |= {key: model.pretrained_cfg.get(key) for key in ("classifier", "first_conv", "fixed_input_size")}
    config = {
        "architecture": name,
        "num_classes": classes,
        "model_args": arguments,
        "pretrained_cfg": {**known, "input_size": (3, size, size), "num_classes": classes},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors"
    )
    return model


WORDS = "a photo of picture the class drawn ball red blue green box big small old in . , 0 1 2 3 4 5 6 7 8 9"


def tokenizer(folder: Path) -> None:
    """The words that the text tower of `clip` knows, between its start (1) and its end (2)."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        word: number for number, word in enumerate(["<unknown>", "<start>", "<end>", *WORDS.split()])
    }
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("<start>", 1), ("<end>", 2)]
    made.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<start>",
        eos_token="<end>",
        pad_token="<end>",
        unk_token="<unknown>",
        model_max_length=16,
    ).save_pretrained(folder)
