"""timm backbones as (pooled feature, logits), built at the image size of the run; models of the hub or a folder, too."""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import asdict, dataclass, replace
from typing import Any

import timm
import torch
from torch import Tensor, nn

from pipeline import models
from pipeline.errors import SettingsError
from training.config import FOLDER, HUB, TrainConfig

WEIGHTS = "model.safetensors"
# What of timm's configuration of a model tells how to build it, to prepare its input and to read its weights.
_KEPT = (
    "input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "num_classes", "label_offset",
    "pool_size", "first_conv", "classifier",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a model of the hub or of a folder is built from. A run keeps it, so that only its first weights need the model."""

    name: str
    """timm's architecture."""
    arguments: dict[str, Any]
    """Of timm's `create_model`."""
    config: dict[str, Any]
    """Of timm's `pretrained_cfg`, see `_KEPT`."""
    revision: str
    """Commit of the hub, or hash of the folder's files."""


def resolved(config: TrainConfig, recorded: dict[str, Any] | None = None) -> TrainConfig:
    """The settings with a backbone of the hub or a folder pinned; others as they are.

    Args:
        config: of a run.
        recorded: what the run was begun with, if it was begun before: its pin holds, whatever became of the model since.

    Raises:
        ValueError: no such model, none of timm's, or no safetensors that fit.
    """
    if not config.brings_weights or config.architecture:
        return config
    if recorded is not None and _is_pin(str(recorded.get("backbone")), config.backbone):
        return replace(config, backbone=recorded["backbone"], architecture=recorded.get("architecture", ""), pretrained=True)
    hub, name, revision = config.backbone.startswith(HUB), *_split(config.backbone)
    try:
        found = models.resolve(name, revision)
    except ValueError as error:
        message = f"backbone={config.backbone!r}: {error}"
        raise SettingsError(message) from None
    if hub and found.hub_revision is None:
        message = f"backbone={config.backbone!r}: a folder of that name lies here, too; pass {FOLDER}{name} if it is meant."
        raise SettingsError(message)
    source = _described(config.backbone, found)
    pinned = f"{HUB}{name}@{found.revision}" if hub else f"{FOLDER}{found.location}"
    config = replace(config, backbone=pinned, architecture=json.dumps(asdict(source)), pretrained=True)
    build(  # once, so that weights that do not fit are found before anything starts
        config.backbone, num_classes=2, image_size=config.image_size, pretrained=True, patch_size=config.patch_size,
        small_stem=config.small_stem, architecture=config.architecture,
    )  # fmt: skip
    return config


def _split(backbone: str) -> tuple[str, str]:
    """(repository, revision or nothing) of a name on the hub, (folder, nothing) of a folder."""
    name = backbone.partition(":")[2]
    if backbone.startswith(FOLDER):
        return os.path.abspath(os.path.expanduser(name)), ""
    repository, _, revision = name.partition("@")
    return repository, revision


def _is_pin(pinned: str, backbone: str) -> bool:
    """Whether `pinned` is what `backbone` may have been resolved to."""
    if pinned.startswith(HUB) and backbone.startswith(HUB):
        (name, commit), (other, revision) = _split(pinned), _split(backbone)
        # A branch may have moved since, and the pin holds; another commit, short or whole, is another model.
        return name == other and (commit.startswith(revision) or re.fullmatch("[0-9a-f]{7,40}", revision) is None)
    if pinned.startswith(FOLDER) and backbone.startswith(FOLDER):
        return _split(pinned) == _split(backbone)
    return False


def _files(found: models.ModelRef) -> str:
    """The folder of a model on this machine: its own, or the hub's cache.

    Raises:
        ValueError: it is not there, holds other files than when the run began, or no safetensors.
    """
    folder = found.here()
    if found.hub_revision is not None:
        _fetched(found, WEIGHTS)
        folder = os.path.dirname(_fetched(found, "config.json"))
    missing = [name for name in ("config.json", WEIGHTS) if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        message = f"backbone={found.name}: has no {' and no '.join(missing)}; only timm's format with safetensors is read."
        raise SettingsError(message)
    return folder


def fetch_weights(name: str) -> None:
    """Fetches timm's pre-trained weights into this machine's cache, so that a run without a network ends before it begins.

    Raises:
        ValueError: timm has none for it, or they are not to be had.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    known = timm.get_pretrained_cfg(name)
    if known is None or not known.has_weights:
        message = f"pretrained: timm has no pre-trained weights for {name}; leave the flag out, or choose another backbone."
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
            f"pretrained: the weights of {name} ({repository} on the hub) are not to be had ({str(error).splitlines()[0]}). On a "
            f"machine without a network fill the hub's cache elsewhere and copy it, or pass --backbone {FOLDER}FOLDER."
        )
        raise SettingsError(message) from None


def _fetched(found: models.ModelRef, file: str) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return str(hf_hub_download(found.location, file, revision=found.revision))
    except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
        message = (
            f"backbone={HUB}{found.name}@{found.revision}: {file} is not to be had ({str(error).splitlines()[0]}); only timm's "
            f"format with {WEIGHTS} is read. On a machine without a network copy the folder there and pass {FOLDER}FOLDER."
        )
        raise SettingsError(message) from None


def _described(backbone: str, found: models.ModelRef) -> Source:
    from timm.models import resolve_model_input_args

    folder = _files(found)
    try:
        arguments = resolve_model_input_args(f"{FOLDER}{folder}")
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        message = (
            f"backbone={backbone!r}: its config.json describes no model of timm {timm.__version__} "
            f"({type(error).__name__}: {error}); `gpt4image export` and timm's save_for_hf write such folders."
        )
        raise SettingsError(message) from None
    config = arguments.pop("pretrained_cfg")
    name = arguments.pop("model_name")
    for other in ("pretrained_model_args", "num_classes", "drop_rate", "drop_path_rate"):  # settings of this run, not of that
        arguments.pop(other, None)
    kept = {key: config[key] for key in _KEPT if key in config}
    return Source(name=name, arguments=arguments, config=kept, revision=found.revision)


def source_of(name: str, architecture: str) -> Source | None:
    """What a backbone of the hub or a folder is built from; None for a name of timm's."""
    return Source(**json.loads(architecture)) if name.startswith((HUB, FOLDER)) else None


def architecture_of(config: TrainConfig) -> str:
    """timm's name of the architecture."""
    source = source_of(config.backbone, config.architecture)
    return config.backbone if source is None else source.name


def model_args(name: str, image_size: int, patch_size: int = 0, architecture: str = "") -> dict[str, Any]:
    """Arguments beyond the name that make timm build this backbone at this size; recorded in every export.

    Raises:
        ValueError: timm has no such model.
    """
    source = source_of(name, architecture)
    if source is not None:
        arguments = source.arguments | ({"patch_size": patch_size} if patch_size else {})
        sized = source.config.get("fixed_input_size") or "img_size" in arguments
        return arguments | {"img_size": image_size} if sized else arguments
    if not timm.is_model(name):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=4, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() names all."
        message = f"backbone={name!r}: timm {timm.__version__} has no such model; {hint}"
        raise SettingsError(message)
    arguments = {"patch_size": patch_size} if patch_size else {}
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.fixed_input_size or config.input_size[-1] == image_size:
        return arguments
    return arguments | {"img_size": image_size}


def build(
    name: str, *, num_classes: int, image_size: int, pretrained: bool = False, drop_path: float = 0.0, patch_size: int = 0,
    small_stem: bool = False, architecture: str = "",
) -> nn.Module:  # fmt: skip
    """A timm model with a new classifier, or with that of its weights if they have as many classes, as timm does it.

    Args:
        name: timm's, or one of the hub or a folder.
        num_classes: of the classifier.
        image_size: edge of the input.
        pretrained: load weights.
        drop_path: stochastic depth.
        patch_size: 0 for the model's own.
        small_stem: see `shrink_stem`.
        architecture: `Source` of a model of the hub or a folder, as JSON.

    Raises:
        ValueError: unknown name, a size that the architecture does not allow, no single linear classifier, or weights that do
            not fit.
    """
    extra: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    arguments = model_args(name, image_size, patch_size, architecture) | extra
    source, weights = source_of(name, architecture), None
    if source is not None and pretrained:
        folder, revision = _split(name)
        found = models.ModelRef(name=folder, location=folder, revision=revision or source.revision)
        weights = os.path.join(_files(found), WEIGHTS)
    if source is not None and weights is not None and small_stem and _has_small_stem(weights):
        model = shrink_stem(name, _created(name, source, None, num_classes, arguments, image_size))
        try:
            timm.models.load_pretrained(model, {**source.config, "file": weights}, num_classes=num_classes)
        except RuntimeError as error:
            raise _misfit(name, error) from None
        return model
    if source is not None:
        model = _created(name, source, weights, num_classes, arguments, image_size)
    else:
        try:
            model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **arguments)
        except (TypeError, AssertionError, RuntimeError) as error:
            if "drop_path_rate" in str(error):
                message = (
                    f"drop_path={drop_path}: timm's {name} has no stochastic depth; pass --drop-path 0, or another backbone."
                )
                raise SettingsError(message) from None
            raise _unfit(name, image_size, error) from None
    if not isinstance(_classifier(model), nn.Linear):
        message = f"backbone={name!r}: has no single linear classifier, so there is no pooled feature to align; use another."
        raise SettingsError(message)
    return shrink_stem(name, model) if small_stem else model


def _created(
    name: str, source: Source, weights: str | None, num_classes: int, arguments: dict[str, Any], image_size: int
) -> nn.Module:
    config = source.config if weights is None else {**source.config, "file": weights}
    try:
        model: Any = timm.create_model(
            source.name, pretrained=weights is not None, pretrained_cfg=config, pretrained_model_args=source.arguments,
            num_classes=num_classes, **arguments,
        )  # fmt: skip
    except (TypeError, AssertionError, RuntimeError) as error:
        raise (_misfit(name, error) if "state_dict" in str(error) else _unfit(name, image_size, error)) from None
    model.pretrained_cfg.pop("file", None)  # where the weights once lay is no part of the model
    created: nn.Module = model
    return created


def _has_small_stem(weights: str) -> bool:
    from safetensors import safe_open

    with safe_open(weights, "pt") as tensors:
        return "conv1.weight" in tensors.keys() and tensors.get_slice("conv1.weight").get_shape()[-1] == 3  # noqa: SIM118


def _misfit(name: str, error: Exception) -> SettingsError:
    reason = str(error).splitlines()[1:2] or [str(error)]
    message = (
        f"backbone={name!r}: its weights do not fit at these settings ({reason[0].strip()}); give --patch-size and --small-stem "
        f"as they were when it was trained, or leave them out."
    )
    return SettingsError(message)


def shrink_stem(name: str, model: nn.Module) -> nn.Module:
    """A ResNet of timm with the stem that is usual for CIFAR: a 3 x 3 convolution of stride 1 and no pooling after it.

    timm has no argument for it; an exported model is loaded by making the same change to timm's model first.

    Raises:
        ValueError: the backbone is no ResNet with a single first convolution.
    """
    timm_model: Any = model
    first = getattr(model, "conv1", None)
    if not isinstance(model, timm.models.ResNet) or not isinstance(first, nn.Conv2d):
        message = f"small_stem: {name} is no ResNet with one first convolution; ViT and ConvNeXt take --patch-size instead."
        raise SettingsError(message)
    timm_model.conv1 = nn.Conv2d(3, first.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(timm_model.conv1.weight, mode="fan_out", nonlinearity="relu")
    timm_model.maxpool = nn.Identity()
    return model


def optimizer(config: TrainConfig, task: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer of that name; norms, biases and what the backbone names do not decay, layers have their factors."""
    from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay

    settings: dict[str, Any] = {
        "opt": config.optimizer, "lr": config.lr, "weight_decay": config.weight_decay, "momentum": config.momentum
    }  # fmt: skip
    if config.optimizer in ("adam", "adamw", "momentum", "sgd"):  # torch's own, which have one kernel for all parameters
        settings["fused"] = True
    backbone: Any = task.backbone
    kept = set(backbone.no_weight_decay()) if hasattr(backbone, "no_weight_decay") else set()
    if config.layer_decay == 1:
        groups = param_groups_weight_decay(task, config.weight_decay, no_weight_decay_list={f"backbone.{name}" for name in kept})
    else:
        groups = param_groups_layer_decay(
            backbone, config.weight_decay, no_weight_decay_list=kept, layer_decay=config.layer_decay
        )
        others = nn.ModuleDict({name: module for name, module in task.named_children() if name != "backbone"})
        groups += param_groups_weight_decay(others, config.weight_decay)
        own = [parameter for parameter in task.parameters(recurse=False) if parameter.requires_grad]
        groups += [{"params": own, "weight_decay": 0.0}] if own else []
    return create_optimizer_v2(groups, **settings)


def check_optimizer(name: str) -> None:
    """Finds a misspelt optimizer before anything starts.

    Raises:
        ValueError: timm has none of that name.
    """
    from timm.optim import list_optimizers

    known = [str(known) for known in list_optimizers()]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=4, cutoff=0.4)
        message = f"optimizer={name!r}: timm has none of that name; did you mean {', '.join(close) or 'adamw'}?"
        raise SettingsError(message)


def probe(
    name: str, image_size: int, patch_size: int = 0, *, small_stem: bool = False, drop_path: float = 0.0, architecture: str = "",
) -> None:  # fmt: skip
    """Builds a backbone and runs it on one picture without memory or arithmetic (torch's meta device).

    Raises:
        ValueError: as `build`, and where only the forward pass shows that the size does not fit.
    """
    with torch.device("meta"):
        model = build(
            name,
            num_classes=2,
            image_size=image_size,
            patch_size=patch_size,
            small_stem=small_stem,
            drop_path=drop_path,
            architecture=architecture,
        ).eval()
        try:
            features_and_logits(model, torch.empty(1, 3, image_size, image_size))
        except (AssertionError, RuntimeError) as error:
            raise _unfit(name, image_size, error) from None


def _unfit(name: str, image_size: int, error: Exception) -> SettingsError:
    native = None if name.startswith((HUB, FOLDER)) else timm.get_pretrained_cfg(name)
    size = native.input_size[-1] if native else 224
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    message = (
        f"backbone={name!r}, image_size={image_size}: timm cannot run it so ({reason}); "
        f"its own size is {size}: pass --image-size {size}, or another backbone."
    )
    return SettingsError(message)


def features_and_logits(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """([b, F] the classifier's input, [b, C] logits) of images [b, 3, H, W]."""
    timm_model: Any = model
    features: Tensor = timm_model.forward_head(timm_model.forward_features(images), pre_logits=True)
    logits: Tensor = _classifier(model)(features)
    return features, logits


def num_features(model: nn.Module) -> int:
    """F, the width of the classifier's input."""
    return int(_classifier(model).in_features)


def uses_batch_norm(model: nn.Module) -> bool:
    """Whether the paper's head for it has BatchNorm: convolutional networks with BatchNorm do, transformers do not."""
    return any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def _classifier(model: nn.Module) -> Any:
    timm_model: Any = model
    return timm_model.get_classifier()
