"""The captioner itself: a CLIP-style tower, a projector and a small Llama, its tokenizer and its folder on
disk.

Nothing to run here; `train_captioner.py` builds and exports it.
About 2.5 million parameters, 5 MB in bfloat16; building it takes a second.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from captioner_data import ASSISTANT, END, IMAGE, LABELLED_PROMPTS, PAD, PATCH, PROMPTS, SIDE, SPECIAL, USER
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|assistant|>' if message.role == 'assistant' else '<|user|>' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}"
    "{% endfor %}{% endif %}"
    "{{ '<|end|>' if message.role == 'assistant' else '' }}"
    "{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt else '' }}"
)


def build_tokenizer(captions: Iterable[str], labels: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every byte has a token, so any text encodes; every word of a caption becomes one
    token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    prompts = [template.format(label=label) for template in LABELLED_PROMPTS for label in labels]
    prompts += [prompt.replace("-", " ") for prompt in prompts]
    core.train_from_iterator([*captions, *prompts, *PROMPTS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[IMAGE, USER, ASSISTANT],
        model_max_length=256,
        padding_side="left",  # generation appends on the right
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": IMAGE},
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Squeeze to a square without cropping: what stands at the border is part of the caption."""
    image_processor = CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which the "default" strategy drops again
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Heads are 32 wide because vLLM's CPU attention has kernels for certain widths only."""
    vision = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=6,
        num_attention_heads=5,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=128,
        hidden_act="gelu",
    )
    end, pad = tokenizer.convert_tokens_to_ids([END, PAD])
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(SIDE // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


@torch.no_grad()
def start_well(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> None:
    """Begin with what a picture's patches always need, instead of spending the first thousand steps on it.

    Patches come in whitened by what patches look like, places begin as sines and cosines of row and column,
    and queries begin equal to keys, so that a patch first looks at patches like itself and near itself.
    """
    tower = model.model.vision_tower
    width = model.config.vision_config.hidden_size
    patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    spread, directions = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    filters = (directions / (spread + 0.02).sqrt()).T.flip(0)[:width]
    tower.embeddings.patch_embedding.weight.copy_(filters.view(width, 3, PATCH, PATCH))
    # The tower's patch layer has no bias, so the mean patch is taken off with the places.
    tower.embeddings.position_embedding.weight[1:] = 0.7 * _places(SIDE // PATCH, width) - filters @ mean
    for layer in tower.encoder.layers:
        heads = [torch.linalg.qr(torch.randn(width, 32))[0].T for _ in range(width // 32)]
        layer.self_attn.q_proj.weight.copy_(0.8 * torch.cat(heads))
        layer.self_attn.k_proj.weight.copy_(0.8 * torch.cat(heads))


def _places(side: int, width: int) -> torch.Tensor:
    """A vector for each patch in reading order: half of it speaks of the row, half of the column."""
    pitches = torch.exp(-math.log(2 * side) * torch.arange(width // 4) / (width // 4)) * math.pi / 2
    waves = torch.arange(side)[:, None] * pitches
    line = torch.cat([waves.sin(), waves.cos()], dim=1)
    rows, columns = line[:, None].expand(side, side, -1), line[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def export(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write the folder that both transformers and vLLM read, then put it in place in one move."""
    draft, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for stale in (draft, old):
        shutil.rmtree(stale, ignore_errors=True)
    draft.mkdir(parents=True)
    processor.save_pretrained(draft)
    # vLLM looks for preprocessor_config.json as well as for the processor's own file.
    processor.image_processor.save_pretrained(draft)
    model.config.architectures, model.config.dtype = ["LlavaForConditionalGeneration"], torch.bfloat16
    model.config.save_pretrained(draft)
    end, pad = model.config.text_config.eos_token_id, model.config.text_config.pad_token_id
    GenerationConfig(eos_token_id=end, pad_token_id=pad, max_new_tokens=64, do_sample=False).save_pretrained(
        draft
    )
    save_file(_vllm_names(model), draft / "model.safetensors", metadata={"format": "pt"})
    (draft / "model.safetensors").chmod(0o644)  # it is written readable by its owner only
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _vllm_names(model: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The weights under the names of the original LLaVA checkpoints, which both engines map to their own."""
    named = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" or name.endswith("position_ids"):
            continue  # tied to the embedding, or counted anew at loading
        name = name.removeprefix("model.")
        if name.startswith("language_model."):
            name = name.replace("language_model.", "language_model.model.", 1)
        if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
            name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        named[name] = value.detach().to(torch.bfloat16).contiguous()
    return named
