"""Settings of the pipeline's verbs: frozen dataclasses that become the command line, the checks and the JSON
beside the data.

`python -m pipeline caption --help` shows them; nothing heavy is imported here, so `--help` answers at once.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

import tyro

from pipeline.errors import SettingsError
from pipeline.presets import CAPTION_PRESETS, ENCODER_PRESETS, UNNAMED_MODEL

MIB = 2**20
_Settings = TypeVar("_Settings", bound=Any)


def _raise_faults(faults: list[str]) -> None:
    if faults:
        raise SettingsError("\n".join(faults))


def _failure_rate_faults(rate: float) -> list[str]:
    if 0 <= rate <= 1:
        return []
    return [f"max_failure_rate={rate}: a share of the rows; pass --max-failure-rate between 0 and 1."]


@dataclass(frozen=True, kw_only=True)
class ClusterRuntime:
    """How long a cluster is waited for."""

    wait_minutes: float = 60.0
    """Longest wait until a cluster has room, where it grows or others work on it; said while it lasts."""


def _wait_faults(config: ClusterRuntime) -> list[str]:
    if config.wait_minutes < 0:
        return [f"wait_minutes={config.wait_minutes}: must be 0 or more."]
    return []


@dataclass(frozen=True, kw_only=True)
class ModelRuntime(ClusterRuntime):
    """What models compute on."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """What models compute on. auto: GPUs, and the CPUs of a machine without any; a cluster that has no GPU
    computes on CPUs only when told to. On a cluster that grows, auto and cuda ask for nodes with GPUs."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig(ClusterRuntime):
    """What `ingest` reads and how it is cut into shards."""

    images: str
    """Pictures, on a disk or at s3:// or gs://. Folder: DIR/<split>/<class>/*.jpg or DIR/<class>/*.jpg;
    WebDataset: a .tar or a folder of them (key.jpg with key.cls or key.json); Parquet files with a column
    `image`; a .jsonl of {path, label}, paths relative to its own folder and below it."""
    store: str
    """Folder of the store; made if missing, resumed if there."""
    source_kind: Literal["auto", "folder", "webdataset", "parquet", "jsonl"] = "auto"
    """What `images` is; auto: by its ending, or by what the folder holds."""
    class_names: str = ""
    """File of class names, as {label} says them: line k names class k, or `key<TAB>name` lines, or a JSON
    object."""
    pack: bool = True
    """Pictures' bytes go into the store; --no-pack stores where they are and fetches them at each use
    (folder, tar, JSONL)."""
    max_edge: int = 0
    """Shrink pictures whose longer edge is above this many pixels before they are packed (JPEG, quality 95);
    0: as they are."""
    limit: int = 0
    """A dry run: only this many pictures, a random sample by name (each split keeps its share); 0: all."""
    val_fraction: float = 0.0
    """Share of the train images that becomes the val split where the source has none, chosen by a hash of the
    id."""
    shard_rows: int = 512
    """Most rows in a shard, the unit of work, of failure and of resume."""
    shard_bytes: int = 64 * MIB
    """Most bytes of pictures in a shard; whichever of the two limits comes first ends it."""
    max_pixels: int = 178_956_970
    """Pictures of more pixels become rows with an error before a pixel is decoded (default: Pillow's own
    limit)."""
    max_bytes: int = 64 * MIB
    """Files of more bytes become rows with an error and are not read."""
    max_failure_rate: float = 0.01
    """Stop (exit code 3) when more than this share of all rows has failed."""

    def __post_init__(self) -> None:
        faults = _failure_rate_faults(self.max_failure_rate) + _wait_faults(self)
        if not 0 <= self.val_fraction < 1:
            faults.append(
                f"val_fraction={self.val_fraction}: pass --val-fraction from 0 to below 1, such as 0.1."
            )
        for name in ("shard_rows", "shard_bytes", "max_pixels", "max_bytes"):
            if getattr(self, name) < 1:
                faults.append(f"{name}={getattr(self, name)}: must be at least 1.")
        for name in ("max_edge", "limit"):
            if getattr(self, name) < 0:
                faults.append(f"{name}={getattr(self, name)}: must be 0 (off) or more.")
        if self.max_edge and not self.pack:
            faults.append(
                "max_edge and no-pack: a picture that is not packed cannot be shrunk; leave one of the two "
                "out."
            )
        _raise_faults(faults)


@dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    """What decides the captions: all of it makes the caption variant (`variants.CaptionVariant`)."""

    captioner: Literal["vllm", "transformers", "openai"] = "vllm"
    """Engine. vllm and transformers take the same model, prompt and processor; openai asks any
    OpenAI-compatible HTTP server."""
    caption_preset: str = ""
    """Model, picture size and lengths in one word, for what the flags leave open. With a GPU and a network:
    smolvlm2-2.2b, qwen2.5-vl-3b, qwen3-vl-4b, internvl3-2b (24 GB), qwen2.5-vl-7b, internvl3-8b, llava-1.5-7b
    (40 GB). scenes: the shipped toy, for drawn shapes only. Not needed with --model or --captioner openai."""
    model: str = ""
    """Hub name or folder of a vision-language model in safetensors; empty: the preset's. openai: the server's
    name for it; empty: the only one that it serves."""
    model_revision: str = ""
    """Commit, tag or branch on the hub; resolved to a commit and recorded. Empty: main. A folder's is the
    hash of its files."""
    prompt: str = "Describe this image in detail."
    """The question asked of each picture; {label} stands for its class name (class-conditioned captions)."""
    caption_edge: int = 0
    """Longer edge of the picture handed to the model, in pixels (shrunk, never enlarged); 0: the preset's,
    without one 448."""
    captions_per_image: int = 1
    """Captions of each picture; above 1 they are sampled (--temperature), and `embed` averages their
    vectors."""
    max_tokens: int = 0
    """Most tokens of a caption; longer ones are cut and recorded with finish_reason=length; 0: the preset's,
    without one 128."""
    temperature: float = 0.0
    """0: greedy and repeatable; above 0: sampling, seeded by seed and row id."""
    top_p: float = 1.0
    """Nucleus sampling: smallest set of tokens with this probability mass; only with a temperature."""
    seed: int = 0
    """Seed of sampling."""
    context_length: int = 0
    """Most tokens of prompt, picture and caption together; 0: the preset's, without one the model's own,
    whose cache of keys and values may be larger than a card."""


@dataclass(frozen=True, kw_only=True)
class CaptionRuntime(ModelRuntime):
    """How and where captions are made: nothing of it changes what is stored, and nothing of it is in the
    variant's name."""

    store: str
    """Folder of a store that `ingest` filled."""
    replicas: int = 0
    """Engines; 0: one for each GPU (a cluster that grows from none must be told). Without GPUs: one for each
    core if the model is small (and the store is not), else one with all cores."""
    min_replicas: int = 0
    """Begin with as few engines, grow to --replicas as nodes come, shrink as the queue empties (for spot
    machines). 0: --replicas from the start; on a cluster that grows, 1."""
    engine_cores: int = 0
    """CPU cores of an engine without a GPU; 0: the cores shared out. A number and no --replicas: one engine,
    and the other cores are left to decoding and to you."""
    engine_batch: int = 0
    """Most pictures that an engine works on at a time; 0: vllm's own choice, 16 for transformers."""
    gpu_memory_utilization: float = 0.85
    """Share of a GPU's memory that a vLLM engine may take."""
    base_url: str = "http://127.0.0.1:8000/v1"
    """openai: address of the server; the key comes from OPENAI_API_KEY, never from a flag or an address."""
    http_concurrency: int = 32
    """openai: requests under way at a time, for each actor."""
    http_timeout: float = 120.0
    """openai: seconds that one request may take."""
    http_retries: int = 6
    """openai: further tries after a refused connection, a time-out, 408, 409, 429 or 5xx, with growing
    pauses."""
    budget_tokens: int = 0
    """openai: tokens (of prompts and captions) that each actor may spend in this run; the rest is left
    undone. 0: no limit."""
    max_failure_rate: float = 0.01
    """Stop (exit code 3) when more than this share of all rows has failed."""


def _caption_runtime_faults(config: CaptionRuntime) -> list[str]:
    faults = _failure_rate_faults(config.max_failure_rate) + _wait_faults(config)
    if (
        config.http_concurrency < 1
        or config.http_timeout <= 0
        or config.http_retries < 0
        or config.budget_tokens < 0
    ):
        faults.append(
            "http_concurrency must be at least 1, http_timeout above 0, http_retries and budget_tokens at "
            "least 0."
        )
    if not 0 < config.gpu_memory_utilization <= 1:
        faults.append(f"gpu_memory_utilization={config.gpu_memory_utilization}: a share between 0 and 1.")
    if config.engine_batch < 0:
        faults.append(f"engine_batch={config.engine_batch}: must be 0 (the engine's choice) or more.")
    if config.replicas < 0:
        faults.append(f"replicas={config.replicas}: must be 0 (the machine's share) or more.")
    if config.min_replicas < 0 or config.min_replicas > config.replicas > 0:
        faults.append(
            f"min_replicas={config.min_replicas}: must be 0 or more, and at most --replicas (now "
            f"{config.replicas})."
        )
    if config.engine_cores < 0:
        faults.append(f"engine_cores={config.engine_cores}: must be 0 (shared out) or more.")
    return faults


def address_faults(base_url: str) -> list[str]:
    """What is wrong with a server's address. One that may hold a secret is not repeated: it would be printed
    and recorded."""
    if any(sign in base_url for sign in "@?#"):
        return [
            "base_url: holds a user name, a password or a query such as ?api-key=..., which would be "
            "recorded with the captions; pass the bare address, such as http://127.0.0.1:8000/v1, and the "
            "key in OPENAI_API_KEY."
        ]
    if not base_url.startswith(("http://", "https://")):
        return [f"base_url={base_url!r}: an http:// or https:// address, such as http://127.0.0.1:8000/v1."]
    return []


def _no_captioner() -> str:
    presets = "\n".join(f"  {name:15}{preset.use}" for name, preset in CAPTION_PRESETS.items())
    return (
        f"caption_preset: no captioner is named. Pass --caption-preset with one of\n{presets}\n"
        "or --model with a hub name or folder, or --captioner openai for the model that a server holds."
    )


@dataclass(frozen=True, kw_only=True)
class CaptionConfig(CaptionRuntime, CaptionSettings):
    """How `caption` describes pictures."""

    def __post_init__(self) -> None:
        faults = _caption_runtime_faults(self) + address_faults(self.base_url)
        preset = CAPTION_PRESETS.get(self.caption_preset, UNNAMED_MODEL)
        if self.caption_preset and preset is UNNAMED_MODEL:
            faults.append(
                f"caption_preset={self.caption_preset!r}: unknown; choose one of "
                f"{', '.join(CAPTION_PRESETS)}."
            )
        for name in ("model", "caption_edge", "max_tokens", "context_length"):
            # The server's name for its model is not the hub's.
            served = self.captioner == "openai" and name == "model"
            if not getattr(self, name) and not served:
                # The preset fills what the flags left open.
                object.__setattr__(self, name, getattr(preset, name))
        if not (self.model or self.caption_preset or self.captioner == "openai"):
            faults.append(_no_captioner())
        fields = {field for _, field, _, _ in string.Formatter().parse(self.prompt) if field is not None}
        if fields - {"label"}:
            faults.append(
                f"prompt={self.prompt!r}: knows only {{label}}; write {{{{ and }}}} for literal braces."
            )
        for name in ("caption_edge", "max_tokens"):
            if getattr(self, name) < 1:
                faults.append(f"{name}={getattr(self, name)}: must be at least 1.")
        if self.context_length < 0:
            faults.append(
                f"context_length={self.context_length}: must be 0 (the preset's or the model's own) or more."
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            faults.append(
                f"temperature={self.temperature}, top_p={self.top_p}: need temperature >= 0 and 0 < top_p <= "
                "1."
            )
        if self.captions_per_image < 1 or (self.captions_per_image > 1 and not self.temperature):
            faults.append(
                f"captions_per_image={self.captions_per_image}: at least 1, and several need sampling, such "
                "as --temperature 0.7."
            )
        _raise_faults(faults)


@dataclass(frozen=True, kw_only=True)
class EmbedSettings:
    """What decides the vectors: all of it makes the embedding variant (`variants.EmbedVariant`)."""

    captions: str = ""
    """Caption variant to embed; empty: the only one of the store."""
    encoder_preset: str = "minilm"
    """Encoder and pooling in one word: minilm (in the CPU environment, elsewhere from the hub), or from the
    hub clip-vit-l14, siglip-b16, siglip2-b16, gte-modernbert."""
    encoder: str = ""
    """Hub name or folder of a text encoder in safetensors; empty: the preset's."""
    encoder_revision: str = ""
    """Commit, tag or branch on the hub; resolved to a commit and recorded. Empty: main."""
    pooling: Literal["", "mean", "cls", "clip", "siglip"] = ""
    """mean or cls (first token) of the last layer, or the text tower's own feature (clip, siglip); empty: the
    preset's."""
    long_captions: Literal["cut", "split"] = "cut"
    """Captions beyond the encoder's limit: cut at it, or split at sentences into parts whose vectors are
    averaged."""
    each_caption: bool = False
    """Of several captions a picture, keep the vector of each beside their mean, so that training can draw one
    (`train --several-captions draw`)."""


@dataclass(frozen=True, kw_only=True)
class EmbedRuntime(ModelRuntime):
    """How and where vectors are made: nothing of it is in the variant's name. Batches change vectors by
    rounding only."""

    store: str
    """Folder of a store that holds captions."""
    encoder_batch: int = 256
    """Most captions in a forward pass; taken in order of length, and fewer where they are long, so that
    little is padding."""
    encoder_replicas: int = 0
    """Encoders; 0: one for each GPU. Without GPUs: one for each core if the model is small (and the store is
    not), else one with all cores."""
    max_failure_rate: float = 0.01
    """Stop (exit code 3) when more than this share of all rows has failed."""


def _embed_runtime_faults(config: EmbedRuntime) -> list[str]:
    faults = _failure_rate_faults(config.max_failure_rate) + _wait_faults(config)
    if config.encoder_batch < 1:
        faults.append(f"encoder_batch={config.encoder_batch}: must be at least 1.")
    if config.encoder_replicas < 0:
        faults.append(f"encoder_replicas={config.encoder_replicas}: must be 0 (one a GPU) or more.")
    return faults


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(EmbedRuntime, EmbedSettings):
    """How `embed` turns captions into unit-length vectors."""

    def __post_init__(self) -> None:
        faults = _embed_runtime_faults(self)
        preset = ENCODER_PRESETS.get(self.encoder_preset)
        if preset is None:
            faults.append(
                f"encoder_preset={self.encoder_preset!r}: unknown; choose one of "
                f"{', '.join(ENCODER_PRESETS)}."
            )
        for name in ("encoder", "pooling") if preset else ():
            if not getattr(self, name):
                object.__setattr__(self, name, getattr(preset, name))
        _raise_faults(faults)


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Captions that were made elsewhere."""

    file: tyro.conf.Positional[str]
    """JSONL of {"path", "caption"}, or "captions", a list of several, for each picture; or a .pth list of
    strings in torchvision's ImageFolder order of one split."""
    store: str
    """Folder of a store that `ingest` filled."""
    split: str = "train"
    """The split that a .pth list belongs to; its length must equal the number of that split's images."""
    ignore_unknown: bool = False
    """Go on when the JSONL names images that the store does not have."""
    max_failure_rate: float = 0.01
    """Stop (exit code 3) when more than this share of all rows lacks a caption; raise it for a partial
    import."""

    def __post_init__(self) -> None:
        _raise_faults(_failure_rate_faults(self.max_failure_rate))


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """What is in the store and what is still to do."""

    store: str
    """Folder of the store."""
    verify: bool = False
    """Read every finished shard and compare it with the checksum on its receipt; damaged ones are named (exit
    code 1)."""
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
    """Most pictures in the gallery; a larger store is sampled, and the page says so. Failed rows are shown
    first."""
    seed: int = 0
    """Which sample."""

    def __post_init__(self) -> None:
        _raise_faults([f"sample={self.sample}: must be at least 1."] if self.sample < 1 else [])


@dataclass(frozen=True, kw_only=True)
class DescribeConfig(SourceConfig, CaptionConfig, EmbedConfig):
    """ingest, caption and embed in one go; each stage resumes where it stopped."""

    images: str = ""
    """Pictures, as for `ingest`; may be left out when the store is already ingested."""
    captions: tyro.conf.Suppress[str] = ""

    def __post_init__(self) -> None:
        faults: list[str] = []
        for kind in (SourceConfig, CaptionConfig, EmbedConfig):
            try:
                kind.__post_init__(self)
            except ValueError as error:
                faults += [line for line in str(error).splitlines() if line not in faults]
        _raise_faults(faults)

    def part(self, kind: type[_Settings]) -> _Settings:
        """The settings of one stage."""
        settings: _Settings = kind(**{field.name: getattr(self, field.name) for field in fields(kind)})
        return settings


@dataclass(frozen=True, kw_only=True)
class EstimateConfig(DescribeConfig):
    """Describes a sample for real, in a folder that is deleted again, and says what the whole will take."""

    store: tyro.conf.Suppress[str] = "-"
    limit: tyro.conf.Suppress[int] = 0
    sample: int = 0
    """Pictures to describe; 0: the least that tells the steady rate from the start, three shards for each
    engine in use, on as few engines and in as small shards as keep it to a twentieth of all. Fewer are less
    sure."""
    work_dir: str = ""
    """Folder or address in which the sample is stored while it is described; must be seen by every node.
    Empty: this machine's temporary folder, which will not do for a cluster of several nodes."""
    gpus: int = 0
    """GPUs of the real run; 0: as many as this cluster has."""
    price_per_gpu_hour: float = 0.0
    """Price of one GPU for an hour (without GPUs: of this machine), in any currency; 0: no cost is shown for
    time."""
    price_per_million_tokens: tuple[float, float] = (0.0, 0.0)
    """Price of a million tokens of prompts and of captions, for a paid server."""
    json: bool = False
    """One JSON object on standard output, and nothing else."""

    def __post_init__(self) -> None:
        super().__post_init__()
        faults = [] if self.images else ["images: name what is to be described, with --images."]
        if (
            self.sample < 0
            or self.gpus < 0
            or min(self.price_per_gpu_hour, *self.price_per_million_tokens) < 0
        ):
            faults.append("sample, gpus and prices must be at least 0.")
        _raise_faults(faults)


@dataclass(frozen=True, kw_only=True)
class RetryConfig(EmbedRuntime, CaptionRuntime):
    """Redo only the rows that have an error, in every stage: what decides captions and vectors is on record
    in the store, how and where they are made is said here. Captions that were imported are imported again
    instead."""

    store: str
    """Folder of the store."""
    max_pixels: int = 0
    """Raise the limit on record, for pictures that it kept out; recorded as the store's from now on. 0: as it
    is."""
    max_bytes: int = 0
    """Likewise the limit of a file's bytes. 0: as it is."""
    base_url: str = ""
    """openai: address of the server; empty: that on record."""
    max_failure_rate: float = 0.01
    """Stop (exit code 3) when more than this share of all rows still fails."""

    def __post_init__(self) -> None:
        faults = _caption_runtime_faults(self)
        faults += [fault for fault in _embed_runtime_faults(self) if fault not in faults]
        faults += address_faults(self.base_url) if self.base_url else []
        if self.max_pixels < 0 or self.max_bytes < 0:
            faults.append(
                f"max_pixels={self.max_pixels}, max_bytes={self.max_bytes}: must be 0 (as recorded) or more."
            )
        _raise_faults(faults)
