"""Settings of text embeddings and of vision features: what decides them, and how and where they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.session import ModelRuntime, wait_faults


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


def runtime_faults(config: EmbedRuntime) -> list[str]:
    """What is wrong with how and where vectors are made."""
    faults = wait_faults(config)
    if config.encoder_batch < 1:
        faults.append(f"encoder_batch={config.encoder_batch}: must be at least 1.")
    if config.encoder_replicas < 0:
        faults.append(f"encoder_replicas={config.encoder_replicas}: must be 0 (one a GPU) or more.")
    return faults


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """What decides vision features: all of it makes the variant (`variants.FeatureVariant`)."""

    tower: str
    """Frozen vision tower: hub name or folder of a CLIP, SigLIP or DINOv2 of transformers (of a CLIP the
    vision part is taken); or one of timm's as timm:NAME, hf-hub:ORG/NAME or local-dir:FOLDER (such as an
    export). Only safetensors are read."""
    tower_revision: str = ""
    """Commit, tag or branch on the hub; resolved to a commit and recorded. Empty: main."""
    tokens: bool = False
    """Keep the features of every patch beside the pooled one: at 224 pixels some 300 kB a picture."""
    feature_size: int = 0
    """Edge in pixels that the tower sees pictures at, where it can be another than its own; 0: its own."""


@dataclass(frozen=True, kw_only=True)
class FeatureRuntime(ModelRuntime):
    """How and where vision features are made: nothing of it is in the variant's name."""

    store: str
    """Folder of a store that holds pictures."""
    tower_batch: int = 64
    """Pictures in a forward pass of the tower."""
    tower_replicas: int = 0
    """Towers; 0: one for each GPU. Without GPUs: one for each core if the model is small (and the store is
    not), else one with all cores."""
    max_failure_rate: float = 0.01
    """Stop (exit code 3) when more than this share of all rows has failed."""


def tower_faults(config: FeatureRuntime) -> list[str]:
    """What is wrong with how and where vision features are made."""
    faults = wait_faults(config)
    if config.tower_batch < 1:
        faults.append(f"tower_batch={config.tower_batch}: must be at least 1.")
    if config.tower_replicas < 0:
        faults.append(f"tower_replicas={config.tower_replicas}: must be 0 (one a GPU) or more.")
    return faults
