"""What a run consists of, made of its settings: the task, its normalisation, its decoders, its moving average."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import nn

from pipeline.store import Store
from training.config import TrainConfig
from training.data import text_targets
from training.data.augment import Augment
from training.data.decoder import DecoderSpec
from training.data.loader import Loader, ThreadDecoding
from training.engine.step import Norm
from training.models import backbones
from training.objectives.align import Alignment, AlignTask, CrossEntropy


def build_task(config: TrainConfig, num_classes: int, dim: int, text_dim: int = 0) -> AlignTask:
    """The model of a run, with weights that depend on the seed alone; baseline and aligned start from the same backbone."""
    from timm.loss import BinaryCrossEntropy

    torch.manual_seed(config.seed)
    backbone = backbones.build(
        config.backbone, num_classes=num_classes, image_size=config.image_size, pretrained=config.pretrained,
        drop_path=config.drop_path, patch_size=config.patch_size, small_stem=config.small_stem,
        architecture=config.architecture,
    )  # fmt: skip
    alignment = Alignment(
        weight=config.alignment_weight, dim=dim, head=config.head, variant=config.alignment,
        temperature=config.temperature, learn_temperature=config.learn_temperature, text_dim=text_dim,
        texts=config.batch_size + config.store_negatives,
    )  # fmt: skip
    # A mean over classes, timm's default, would leave 1 / classes of cross entropy's gradient: optimizers without a scale do not
    # mind (ResNet strikes back, DeiT III: LAMB), but the alignment beside it would outweigh it.
    criterion: nn.Module = CrossEntropy(config.label_smoothing)
    if config.loss == "bce":
        criterion = BinaryCrossEntropy(config.label_smoothing, sum_classes=True)
    return AlignTask(backbone, alignment, criterion)


def to_device(task: AlignTask, device: torch.device, *, channels_last: bool = True) -> AlignTask:
    """The task on a device, convolutions in the memory format that is fastest on GPUs and CPUs alike."""
    moved: nn.Module = task.to(device)
    if channels_last:
        moved = cast(Any, moved).to(memory_format=torch.channels_last)
    return cast(AlignTask, moved)


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


def decoder_spec(config: TrainConfig, found: text_targets.Targets | None, model: nn.Module, decoders: int) -> DecoderSpec:
    """What a decoder needs to know; evaluation crops as timm's for this backbone. `decoders` share the work of a batch."""
    from_timm = data_config(model)
    augment = Augment(
        size=config.image_size, crop_scale=config.crop_scale, flip=config.flip, seed=config.seed,
        crop_pct=float(from_timm["crop_pct"]), interpolation=str(from_timm["interpolation"]), mean=tuple(from_timm["mean"]),
        auto_augment=config.auto_augment, color_jitter=config.color_jitter,
    )  # fmt: skip
    # Of the window in use and of the next one, each decoder opens its part; one shard more at either end.
    keep = 2 * (math.ceil(config.shuffle_shards / decoders) + 2)
    return DecoderSpec(store=config.store, targets=found, augment=augment, keep=keep)


def make_loader(config: TrainConfig, store: Store, found: text_targets.Targets | None, model: nn.Module) -> Loader:
    """A loader that decodes in threads of this process, for evaluation."""
    return Loader(ThreadDecoding(decoder_spec(config, found, model, 1).build(), config.loader_workers), lookahead=4)


def use_autocast(config: TrainConfig, device: torch.device) -> bool:
    """Whether to compute in bfloat16 where torch's autocast says so."""
    return config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")


def has_own_statistics(task: nn.Module) -> bool:
    """Whether BatchNorm computes with a worker's images alone."""
    norms = [module for module in task.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return any(not isinstance(norm, nn.SyncBatchNorm) for norm in norms)


def moving_average(config: TrainConfig, task: AlignTask) -> Any:
    if not config.ema:
        return None
    from timm.utils import ModelEmaV3

    # Decay n / (10 + n) after n steps, so that the last tenth counts, until it reaches --ema; the first step's is 0.
    return ModelEmaV3(task, decay=config.ema, use_warmup=config.ema_warmup, warmup_gamma=10.0, warmup_power=1.0)
