"""timm's optimizers, with no decay of norms and biases, and a learning rate for each layer where wanted."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn

from pipeline.errors import SettingsError
from training.config import TrainConfig


def optimizer(config: TrainConfig, task: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer of that name; norms, biases and what the backbone names do not decay, layers have
    their factors."""
    from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay

    settings: dict[str, Any] = {
        "opt": config.optim.optimizer,
        "lr": config.optim.lr,
        "weight_decay": config.optim.weight_decay,
        "momentum": config.optim.momentum,
    }
    if config.optim.betas:
        settings["betas"] = config.optim.betas
    # Torch's own, which have one kernel for all parameters.
    if config.optim.optimizer in (
        "adam",
        "adamw",
        "momentum",
        "sgd",
    ):
        settings["fused"] = True
    backbone: Any = task.backbone
    kept = set(backbone.no_weight_decay()) if hasattr(backbone, "no_weight_decay") else set()
    if config.optim.layer_decay == 1:
        groups = param_groups_weight_decay(
            task, config.optim.weight_decay, no_weight_decay_list={f"backbone.{name}" for name in kept}
        )
    else:
        groups = param_groups_layer_decay(
            backbone,
            config.optim.weight_decay,
            no_weight_decay_list=kept,
            layer_decay=config.optim.layer_decay,
        )
        others = nn.ModuleDict({name: module for name, module in task.named_children() if name != "backbone"})
        groups += param_groups_weight_decay(others, config.optim.weight_decay)
        own = [parameter for parameter in task.parameters(recurse=False) if parameter.requires_grad]
        groups += [{"params": own, "weight_decay": 0.0}] if own else []
    return create_optimizer_v2(groups, **settings)


def check_optimizer(name: str, betas: tuple[float, ...] = ()) -> None:
    """Finds a misspelt optimizer, or one without betas, before anything starts.

    Raises:
        ValueError: timm has none of that name, or it takes no betas.
    """
    from timm.optim import get_optimizer_info, list_optimizers

    known = [str(known) for known in list_optimizers()]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=4, cutoff=0.4)
        message = (
            f"optimizer={name!r}: timm has none of that name; did you mean {', '.join(close) or 'adamw'}?"
        )
        raise SettingsError(message)
    if betas and not get_optimizer_info(name).has_betas:
        message = f"betas={betas}: {name} has none; leave the flag out, or take another --optimizer."
        raise SettingsError(message)
