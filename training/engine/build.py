"""What a run consists of, made of its settings: the task, its normalisation, its decoders, its moving average."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import nn

from training.config import TrainConfig
from training.data.augment import Augment
from training.data.columns import Columns
from training.data.decoder import DecoderSpec
from training.data.loader import Loader, ThreadDecoding
from training.data.views import Norm
from training.objectives.protocol import Precision


def to_device(task: Any, device: torch.device, *, channels_last: bool = True) -> Any:
    """The task on a device, convolutions in the memory format that is fastest on GPUs and CPUs alike."""
    moved: nn.Module = task.to(device)
    if channels_last:
        moved = cast(Any, moved).to(memory_format=torch.channels_last)
    return moved


def data_config(model: nn.Module) -> dict[str, Any]:
    """timm's mean, std and crop_pct of a backbone."""
    import timm.data

    found: dict[str, Any] = timm.data.resolve_model_data_config(model)
    return found


def make_norm(model: nn.Module, device: torch.device, *, channels_last: bool = True) -> Norm:
    """The normalisation that belongs to a backbone."""
    found = data_config(model)
    mean, std = (torch.tensor(found[name], device=device).view(1, 3, 1, 1) for name in ("mean", "std"))
    return Norm(mean, std, channels_last)


def decoder_spec(config: TrainConfig, columns: tuple[Columns, ...], model: nn.Module, decoders: int) -> DecoderSpec:
    """What a decoder needs to know; evaluation crops as timm's for this backbone. `decoders` share the work of a batch."""
    from_timm = data_config(model)
    augment = Augment(
        size=config.image_size, crop_scale=config.crop_scale, flip=config.flip, seed=config.seed,
        crop_pct=float(from_timm["crop_pct"]), interpolation=str(from_timm["interpolation"]), mean=tuple(from_timm["mean"]),
        auto_augment=config.auto_augment, color_jitter=config.color_jitter,
    )  # fmt: skip
    # Of the window in use and of the next one, each decoder opens its part; one shard more at either end.
    keep = 2 * (math.ceil(config.shuffle_shards / decoders) + 2)
    return DecoderSpec(store=config.store, columns=columns, augment=augment, keep=keep)


def make_loader(config: TrainConfig, columns: tuple[Columns, ...], model: nn.Module) -> Loader:
    """A loader that decodes in threads of this process, for evaluation."""
    return Loader(ThreadDecoding(decoder_spec(config, columns, model, 1).build(), config.loader_workers), lookahead=4)


def make_precision(config: TrainConfig, device: torch.device) -> Precision:
    """The context of forward passes: bfloat16 where torch's autocast says so, if the run or its device is for that."""
    wanted = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def has_own_statistics(task: nn.Module) -> bool:
    """Whether BatchNorm computes with a worker's images alone."""
    norms = [module for module in task.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return any(not isinstance(norm, nn.SyncBatchNorm) for norm in norms)


def moving_average(config: TrainConfig, task: nn.Module) -> Any:
    if not config.ema:
        return None
    from timm.utils import ModelEmaV3

    # Decay n / (10 + n) after n steps, so that the last tenth counts, until it reaches --ema; the first step's is 0.
    return ModelEmaV3(task, decay=config.ema, use_warmup=config.ema_warmup, warmup_gamma=10.0, warmup_power=1.0)
