"""timm backbones as (pooled feature, logits), built at the image size of the run."""

from __future__ import annotations

import difflib
from typing import Any

import timm
import torch
from torch import Tensor, nn


def model_args(name: str, image_size: int) -> dict[str, Any]:
    """Arguments beyond the name that make timm build this backbone at this size; recorded in every export.

    Raises:
        ValueError: timm has no such model.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=4, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() names all."
        message = f"backbone={name!r}: timm {timm.__version__} has no such model; {hint}"
        raise ValueError(message)
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.fixed_input_size or config.input_size[-1] == image_size:
        return {}
    return {"img_size": image_size}


def build(name: str, *, num_classes: int, image_size: int, pretrained: bool = False, drop_path: float = 0.0) -> nn.Module:
    """A timm model with a new classifier.

    Raises:
        ValueError: unknown name, a size that the architecture does not allow, or no single linear classifier.
    """
    extra: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    arguments = model_args(name, image_size)
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **arguments, **extra)
    except (TypeError, AssertionError, RuntimeError) as error:
        raise _unfit(name, image_size, error) from None
    if not isinstance(_classifier(model), nn.Linear):
        message = f"backbone={name!r}: has no single linear classifier, so there is no pooled feature to align; use another."
        raise ValueError(message)
    return model


def probe(name: str, image_size: int) -> None:
    """Builds a backbone and runs it on one picture without memory or arithmetic (torch's meta device).

    Raises:
        ValueError: as `build`, and where only the forward pass shows that the size does not fit.
    """
    with torch.device("meta"):
        model = build(name, num_classes=2, image_size=image_size).eval()
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
