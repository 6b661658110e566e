"""timm backbones as (pooled feature, logits), built at the image size of the run; models of the hub or a
folder, too."""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import asdict
from typing import Any

import timm
import torch
from torch import Tensor, nn

from pipeline.encoders import models
from pipeline.errors import SettingsError
from training.config import TrainConfig
from training.models import chain
from training.models.settings import FOLDER, HUB
from training.models.weights import (
    WEIGHTS,
    Source,
    describe_source,
    is_pin,
    model_files,
    source_of,
    split_name,
)


def resolved(config: TrainConfig, recorded: dict[str, Any] | None = None) -> TrainConfig:
    """The settings with a backbone of the hub or a folder pinned; others as they are.

    Args:
        config: of a run.
        recorded: what the run was begun with, if it was begun before: its pin holds, whatever became of the
            model since.

    Raises:
        ValueError: no such model, none of timm's, or no safetensors that fit.
    """
    if not config.model.brings_weights or config.model.architecture:
        return config
    if recorded is not None and is_pin(str(recorded.get("backbone")), config.model.backbone):
        return config.but(
            backbone=recorded["backbone"],
            architecture=recorded.get("architecture", ""),
            pretrained=True,
        )
    hub, name, revision = config.model.backbone.startswith(HUB), *split_name(config.model.backbone)
    try:
        model = models.resolve(name, revision)
    except ValueError as error:
        message = f"backbone={config.model.backbone!r}: {error}"
        raise SettingsError(message) from None
    if hub and model.hub_revision is None:
        message = (
            f"backbone={config.model.backbone!r}: a folder of that name lies here, too; pass {FOLDER}{name} "
            "if it is meant."
        )
        raise SettingsError(message)
    source = describe_source(config.model.backbone, model)
    pinned = f"{HUB}{name}@{model.revision}" if hub else f"{FOLDER}{model.location}"
    config = config.but(backbone=pinned, architecture=json.dumps(asdict(source)), pretrained=True)
    build(  # once, so that weights that do not fit are found before anything starts
        config.model.backbone,
        num_classes=2,
        image_size=config.model.image_size,
        pretrained=True,
        patch_size=config.model.patch_size,
        small_stem=config.model.small_stem,
        architecture=config.model.architecture,
    )
    return config


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


def of_run(config: TrainConfig, num_classes: int) -> nn.Module:
    """The backbone that a run begins with: see `build`. Its new weights depend on torch's seed alone."""
    given = config.model
    model = build(
        given.backbone,
        num_classes=num_classes,
        image_size=given.image_size,
        pretrained=given.pretrained and not given.init_from,
        drop_path=given.drop_path,
        patch_size=given.patch_size,
        small_stem=given.small_stem,
        architecture=given.architecture,
    )
    if given.init_from:
        chain.start(model, given.init_from, given.init_state)
    return model


def build(
    name: str,
    *,
    num_classes: int,
    image_size: int,
    pretrained: bool = False,
    drop_path: float = 0.0,
    patch_size: int = 0,
    small_stem: bool = False,
    architecture: str = "",
) -> nn.Module:
    """A timm model with a new classifier, or with that of its weights if they have as many classes, as timm
    does it.

    Args:
        name: timm's, or one of the hub or a folder.
        num_classes: of the classifier; 0: without one.
        image_size: edge of the input.
        pretrained: load weights.
        drop_path: stochastic depth.
        patch_size: 0 for the model's own.
        small_stem: see `shrink_stem`.
        architecture: `Source` of a model of the hub or a folder, as JSON.

    Raises:
        ValueError: unknown name, a size that the architecture does not allow, no single linear classifier, or
            weights that do not fit.
    """
    extra: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    arguments = model_args(name, image_size, patch_size, architecture) | extra
    source, weights = source_of(name, architecture), None
    if source is not None and pretrained:
        folder, revision = split_name(name)
        files = models.ModelRef(name=folder, location=folder, revision=revision or source.revision)
        weights = os.path.join(model_files(files), WEIGHTS)
    if source is not None and weights is not None and small_stem and _has_small_stem(weights):
        model = shrink_stem(
            name, _created(name, source, None, num_classes, arguments, image_size, architecture)
        )
        try:
            timm.models.load_pretrained(model, {**source.config, "file": weights}, num_classes=num_classes)
        except RuntimeError as error:
            raise _misfit(name, error) from None
        return model
    if source is not None:
        model = _created(name, source, weights, num_classes, arguments, image_size, architecture)
    else:
        try:
            model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **arguments)
        except (TypeError, AssertionError, RuntimeError) as error:
            if "drop_path_rate" in str(error):
                message = (
                    f"drop_path={drop_path}: timm's {name} has no stochastic depth; pass --drop-path 0, or "
                    "another backbone."
                )
                raise SettingsError(message) from None
            raise _unfit(name, image_size, patch_size, error, architecture) from None
    if num_classes and not isinstance(_classifier(model), nn.Linear):
        message = (
            f"backbone={name!r}: has no single linear classifier, so there is no pooled feature to align; "
            "use another."
        )
        raise SettingsError(message)
    return shrink_stem(name, model) if small_stem else model


def _created(
    name: str,
    source: Source,
    weights: str | None,
    num_classes: int,
    arguments: dict[str, Any],
    image_size: int,
    architecture: str,
) -> nn.Module:
    config = source.config if weights is None else {**source.config, "file": weights}
    try:
        model: Any = timm.create_model(
            source.name,
            pretrained=weights is not None,
            pretrained_cfg=config,
            pretrained_model_args=source.arguments,
            num_classes=num_classes,
            **arguments,
        )
    except (TypeError, AssertionError, RuntimeError) as error:
        raise (
            _misfit(name, error)
            if "state_dict" in str(error)
            else _unfit(name, image_size, int(arguments.get("patch_size", 0)), error, architecture)
        ) from None
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
        f"backbone={name!r}: its weights do not fit at these settings ({reason[0].strip()}); give "
        f"--patch-size and --small-stem as they were when it was trained, or leave them out."
    )
    return SettingsError(message)


def shrink_stem(name: str, model: nn.Module) -> nn.Module:
    """A ResNet of timm with the stem that is usual for CIFAR: a 3 x 3 convolution of stride 1 and no pooling
    after it.

    timm has no argument for it; an exported model is loaded by making the same change to timm's model first.

    Raises:
        ValueError: the backbone is no ResNet with a single first convolution.
    """
    timm_model: Any = model
    first = getattr(model, "conv1", None)
    if not isinstance(model, timm.models.ResNet) or not isinstance(first, nn.Conv2d):
        message = (
            f"small_stem: {name} is no ResNet with one first convolution; ViT and ConvNeXt take --patch-size "
            "instead."
        )
        raise SettingsError(message)
    timm_model.conv1 = nn.Conv2d(3, first.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(timm_model.conv1.weight, mode="fan_out", nonlinearity="relu")
    timm_model.maxpool = nn.Identity()
    return model


def probe(
    name: str,
    image_size: int,
    patch_size: int = 0,
    *,
    small_stem: bool = False,
    drop_path: float = 0.0,
    architecture: str = "",
) -> None:
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
            raise _unfit(name, image_size, patch_size, error, architecture) from None


def _unfit(
    name: str, image_size: int, patch_size: int, error: Exception, architecture: str = ""
) -> SettingsError:
    source = source_of(name, architecture)
    native = timm.get_pretrained_cfg(name) if source is None else None
    told = native.input_size if native else source.config.get("input_size") if source else None
    size = told[-1] if told else 224
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    mend = f"its own size is {size}: pass --image-size {size}"
    if patch_size and image_size % patch_size:
        below, above = image_size // patch_size * patch_size, (image_size // patch_size + 1) * patch_size
        reason = f"{image_size} is no multiple of its patch of {patch_size}"
        mend = f"pass --image-size {f'{below} or {above}' if below else above}, or another --patch-size"
    if patch_size and ("'patch_size'" in reason or (source.name if source else name).startswith("hiera_")):
        reason, mend = "it has no patches of a size to choose", "leave --patch-size out (0)"
    elif edge := _edge(source.name if source else name, model_args(name, size, 0, architecture)):
        below, above = image_size // edge * edge, (image_size // edge + 1) * edge
        reason = f"its mask units are of {edge} x {edge} pixels, and {image_size} is no multiple of {edge}"
        mend = f"pass --image-size {f'{below} or {above}' if below else above}"
    message = (
        f"backbone={name!r}, image_size={image_size}: timm cannot run it so ({reason}); {mend}, or another "
        "backbone."
    )
    return SettingsError(message)


def freeze(model: nn.Module) -> None:
    """Leaves nothing but the classifier to train."""
    model.requires_grad_(False)
    _classifier(model).requires_grad_(True)


def _edge(name: str, arguments: dict[str, Any]) -> int:
    """Pixels that the edge of a Hiera's input must be a multiple of; 0 of other architectures."""
    if not name.startswith("hiera_"):
        return 0
    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=0, **arguments)
    return int(model.patch_stride[0] * model.mask_unit_size[0])


def features_and_logits(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """([b, F] the classifier's input, [b, C] logits) of images [b, 3, H, W]."""
    timm_model: Any = model
    features: Tensor = timm_model.forward_head(timm_model.forward_features(images), pre_logits=True)
    return features, classified(model, features)


def classifies(model: nn.Module) -> bool:
    """Whether it has a classifier; timm's without one give their features."""
    return not isinstance(_classifier(model), nn.Identity)


def classified(model: nn.Module, features: Tensor) -> Tensor:
    """[b, C] logits of [b, F] features."""
    logits: Tensor = _classifier(model)(features)
    return logits


def num_features(model: nn.Module) -> int:
    """F, the width of the classifier's input."""
    return int(_classifier(model).in_features)


def uses_batch_norm(model: nn.Module) -> bool:
    """Whether the paper's head for it has BatchNorm: convolutional networks with BatchNorm do, transformers
    do not."""
    return any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def _classifier(model: nn.Module) -> Any:
    timm_model: Any = model
    return timm_model.get_classifier()
