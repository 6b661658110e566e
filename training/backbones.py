"""timm backbones as (pooled feature, logits), built at the image size of the run."""

from __future__ import annotations

import difflib
from typing import Any

import timm
import torch
from torch import Tensor, nn

from training.config import TrainConfig


def model_args(name: str, image_size: int, patch_size: int = 0) -> dict[str, Any]:
    """Arguments beyond the name that make timm build this backbone at this size; recorded in every export.

    Raises:
        ValueError: timm has no such model.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=4, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() names all."
        message = f"backbone={name!r}: timm {timm.__version__} has no such model; {hint}"
        raise ValueError(message)
    arguments: dict[str, Any] = {"patch_size": patch_size} if patch_size else {}
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.fixed_input_size or config.input_size[-1] == image_size:
        return arguments
    return arguments | {"img_size": image_size}


def build(
    name: str, *, num_classes: int, image_size: int, pretrained: bool = False, drop_path: float = 0.0, patch_size: int = 0,
    small_stem: bool = False,
) -> nn.Module:  # fmt: skip
    """A timm model with a new classifier; `small_stem` as in `shrink_stem`.

    Raises:
        ValueError: unknown name, a size that the architecture does not allow, or no single linear classifier.
    """
    extra: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    arguments = model_args(name, image_size, patch_size)
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **arguments, **extra)
    except (TypeError, AssertionError, RuntimeError) as error:
        raise _unfit(name, image_size, error) from None
    if not isinstance(_classifier(model), nn.Linear):
        message = f"backbone={name!r}: has no single linear classifier, so there is no pooled feature to align; use another."
        raise ValueError(message)
    return shrink_stem(name, model) if small_stem else model


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
        raise ValueError(message)
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
        raise ValueError(message)


def probe(name: str, image_size: int, patch_size: int = 0, *, small_stem: bool = False) -> None:
    """Builds a backbone and runs it on one picture without memory or arithmetic (torch's meta device).

    Raises:
        ValueError: as `build`, and where only the forward pass shows that the size does not fit.
    """
    with torch.device("meta"):
        model = build(name, num_classes=2, image_size=image_size, patch_size=patch_size, small_stem=small_stem).eval()
        try:
            features_and_logits(model, torch.empty(1, 3, image_size, image_size))
        except (AssertionError, RuntimeError) as error:
            raise _unfit(name, image_size, error) from None


def _unfit(name: str, image_size: int, error: Exception) -> ValueError:
    native = timm.get_pretrained_cfg(name)
    size = native.input_size[-1] if native else 224
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    message = (
        f"backbone={name!r}, image_size={image_size}: timm cannot run it so ({reason}); "
        f"its own size is {size}: pass --image-size {size}, or another backbone."
    )
    return ValueError(message)


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
