"""Settings of the pipeline's verbs: frozen dataclasses that become the command line, the checks and the JSON
beside the data. Those of captions, of vectors and of the cluster stand beside what reads them.

`python -m pipeline caption --help` shows them; nothing heavy is imported here, so `--help` answers at once.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

import tyro

from pipeline.captioners import settings as captioning
from pipeline.captioners.settings import CaptionRuntime, CaptionSettings
from pipeline.encoders import settings as embedding
from pipeline.encoders.settings import EmbedRuntime, EmbedSettings, FeatureRuntime, FeatureSettings
from pipeline.errors import SettingsError
from pipeline.presets import CAPTION_PRESETS, ENCODER_PRESETS, UNNAMED_MODEL
from pipeline.session import ClusterRuntime, wait_faults

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
        faults = _failure_rate_faults(self.max_failure_rate) + wait_faults(self)
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
        faults = _failure_rate_faults(self.max_failure_rate) + captioning.runtime_faults(self)
        faults += captioning.address_faults(self.base_url)
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
class EmbedConfig(EmbedRuntime, EmbedSettings):
    """How `embed` turns captions into unit-length vectors."""

    def __post_init__(self) -> None:
        faults = _failure_rate_faults(self.max_failure_rate) + embedding.runtime_faults(self)
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
class FeatureConfig(FeatureRuntime, FeatureSettings):
    """What a frozen vision tower says of every picture, once: for methods that learn from it."""

    def __post_init__(self) -> None:
        faults = _failure_rate_faults(self.max_failure_rate) + embedding.tower_faults(self)
        if self.feature_size < 0:
            faults.append(f"feature_size={self.feature_size}: must be 0 (the tower's own) or more.")
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

    tower: str = ""
    """Also what `features` with this vision tower will take; empty: without."""
    tower_revision: str = ""
    """See `features --help`, as the next four."""
    tokens: bool = False
    """Keep the features of every patch."""
    feature_size: int = 0
    """Edge that the tower sees; 0: its own."""
    tower_batch: int = FeatureRuntime.tower_batch
    """Pictures in a forward pass of the tower."""
    tower_replicas: int = 0
    """Towers; 0: as many as fit."""
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
class RetryConfig(FeatureRuntime, EmbedRuntime, CaptionRuntime):
    """Redo only the rows that have an error, in every stage: what decides captions, vectors and features is
    on record in the store, how and where they are made is said here. Captions that were imported are imported
    again instead."""

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
        faults = _failure_rate_faults(self.max_failure_rate) + captioning.runtime_faults(self)
        others = embedding.runtime_faults(self) + embedding.tower_faults(self)
        faults += [fault for fault in dict.fromkeys(others) if fault not in faults]
        faults += captioning.address_faults(self.base_url) if self.base_url else []
        if self.max_pixels < 0 or self.max_bytes < 0:
            faults.append(
                f"max_pixels={self.max_pixels}, max_bytes={self.max_bytes}: must be 0 (as recorded) or more."
            )
        _raise_faults(faults)
