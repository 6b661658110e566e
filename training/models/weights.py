"""Backbones that bring their own weights, from the hub or a folder: which ones exactly, and what timm builds
them from."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_data_config

from pipeline.encoders import models
from pipeline.errors import SettingsError
from training.config import TrainConfig
from training.models.settings import FOLDER, HUB

WEIGHTS = "model.safetensors"
# What of timm's configuration of a model tells how to build it, to prepare its input and to read its weights.
_KEPT = (
    "input_size",
    "fixed_input_size",
    "interpolation",
    "crop_pct",
    "crop_mode",
    "mean",
    "std",
    "num_classes",
    "label_offset",
    "pool_size",
    "first_conv",
    "classifier",
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a model of the hub or of a folder is built from. A run keeps it, so that only its first weights
    need the model."""

    name: str
    """timm's architecture."""
    arguments: dict[str, Any]
    """Of timm's `create_model`."""
    config: dict[str, Any]
    """Of timm's `pretrained_cfg`, see `_KEPT`."""
    revision: str
    """Commit of the hub, or hash of the folder's files."""


_NANO: dict[str, Any] = {
    "embed_dim": 32,
    "num_heads": 1,
    "stages": (1, 1, 2, 1),
    "patch_kernel": (5, 5),
    "patch_stride": (2, 2),
    "patch_padding": (2, 2),
}
OWN = {
    # Hiera for pictures of 64 pixels: its published sizes have four mask units there, this has 16 of 16 x 16
    # pixels. 1.3 million parameters; every timm builds it from the arguments that an export records.
    "hiera_nano_64": Source(
        name="hiera_tiny_224",
        arguments={**_NANO, "img_size": 64},
        config={
            "input_size": (3, 64, 64),
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "num_classes": 1000,
            "first_conv": "patch_embed.proj",
            "classifier": "head.fc",
        },
        revision="",
    )
}
"""Architectures of ours, made of timm's by other arguments; they have no pre-trained weights."""


def split_name(backbone: str) -> tuple[str, str]:
    """(repository, revision or nothing) of a name on the hub, (folder, nothing) of a folder."""
    name = backbone.partition(":")[2]
    if backbone.startswith(FOLDER):
        return os.path.abspath(os.path.expanduser(name)), ""
    repository, _, revision = name.partition("@")
    return repository, revision


def is_pin(pinned: str, backbone: str) -> bool:
    """Whether `pinned` is what `backbone` may have been resolved to."""
    if pinned.startswith(HUB) and backbone.startswith(HUB):
        (name, commit), (other, revision) = split_name(pinned), split_name(backbone)
        # A branch may have moved since, and the pin holds; another commit, short or whole, is another model.
        return name == other and (
            commit.startswith(revision) or re.fullmatch("[0-9a-f]{7,40}", revision) is None
        )
    if pinned.startswith(FOLDER) and backbone.startswith(FOLDER):
        return split_name(pinned) == split_name(backbone)
    return False


def model_files(model: models.ModelRef) -> str:
    """The folder of a model on this machine: its own, or the hub's cache.

    Raises:
        ValueError: it is not there, holds other files than when the run began, or no safetensors.
    """
    folder = model.here()
    if model.hub_revision is not None:
        fetched(model, WEIGHTS)
        folder = os.path.dirname(fetched(model, "config.json"))
    missing = [name for name in ("config.json", WEIGHTS) if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        message = (
            f"backbone={model.name}: has no {' and no '.join(missing)}; only timm's format with safetensors "
            "is read."
        )
        raise SettingsError(message)
    return folder


def fetch_weights(name: str) -> None:
    """Fetches timm's pre-trained weights into this machine's cache, so that a run without a network ends
    before it begins.

    Raises:
        ValueError: timm has none for it, or they are not to be had.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    known = timm.get_pretrained_cfg(name)
    if known is None or not known.has_weights:
        message = (
            f"pretrained: timm has no pre-trained weights for {name}; leave the flag out, or choose another "
            "backbone."
        )
        raise SettingsError(message)
    if not known.hf_hub_id:
        return  # of the few that timm has from elsewhere the workers tell
    repository, _, revision = known.hf_hub_id.partition("@")
    try:
        hf_hub_download(repository, known.hf_hub_filename or WEIGHTS, revision=revision or None)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return  # the repository has its weights under another name, which timm knows
        message = (
            f"pretrained: the weights of {name} ({repository} on the hub) are not to be had "
            f"({str(error).splitlines()[0]}). On a machine without a network fill the hub's cache elsewhere "
            f"and copy it, or pass --backbone {FOLDER}FOLDER."
        )
        raise SettingsError(message) from None


def fetched(model: models.ModelRef, file: str) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return str(hf_hub_download(model.location, file, revision=model.revision))
    except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
        message = (
            f"backbone={HUB}{model.name}@{model.revision}: {file} is not to be had "
            f"({str(error).splitlines()[0]}); only timm's format with {WEIGHTS} is read. On a machine "
            f"without a network copy the folder there and pass {FOLDER}FOLDER."
        )
        raise SettingsError(message) from None


def describe_source(backbone: str, model: models.ModelRef) -> Source:
    from timm.models import resolve_model_input_args

    folder = model_files(model)
    try:
        arguments = resolve_model_input_args(f"{FOLDER}{folder}")
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        message = (
            f"backbone={backbone!r}: its config.json describes no model of timm {timm.__version__} "
            f"({type(error).__name__}: {error}); `gpt4image export` and timm's save_for_hf write such "
            "folders."
        )
        raise SettingsError(message) from None
    config = arguments.pop("pretrained_cfg")
    name = arguments.pop("model_name")
    # Settings of this run, not of that.
    for other in (
        "pretrained_model_args",
        "num_classes",
        "drop_rate",
        "drop_path_rate",
    ):
        arguments.pop(other, None)
    kept = {key: config[key] for key in _KEPT if key in config}
    return Source(name=name, arguments=arguments, config=kept, revision=model.revision)


def source_of(name: str, architecture: str) -> Source | None:
    """What a backbone of the hub, a folder or of `OWN` is built from; None for a name of timm's."""
    if name in OWN:
        return OWN[name]
    return Source(**json.loads(architecture)) if name.startswith((HUB, FOLDER)) else None


def architecture_of(config: TrainConfig) -> str:
    """timm's name of the architecture."""
    source = source_of(config.model.backbone, config.model.architecture)
    return config.model.backbone if source is None else source.name


def normalisation_of(config: TrainConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, deviation) of the pictures that a backbone sees, found without building it."""
    source = source_of(config.model.backbone, config.model.architecture)
    if source is None:
        known = timm.get_pretrained_cfg(config.model.backbone)
        told = {} if known is None else known.to_dict()
    else:
        told = source.config
    data = resolve_data_config(pretrained_cfg=told)
    return tuple(data["mean"]), tuple(data["std"])
