"""What the loop of one worker works with, made of a run's settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.encoders.cut import Cut
from pipeline.store import Store
from training.config import TrainConfig
from training.data import order
from training.data.augment import Augment
from training.data.columns import Columns
from training.data.decoder import DecoderSpec
from training.data.few_shot import rows_of
from training.data.loader import Decoding, Loader, ThreadDecoding, lookahead
from training.data.order import Rows, Sequence
from training.data.views import Norm, Views
from training.engine import checkpoint
from training.engine.distributed import world_size
from training.engine.step import Stepper
from training.models import backbones, optimizers
from training.objectives.protocol import Precision, objective_of


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that the loop of one worker works with."""

    device: torch.device
    rank: int
    world: int
    store: Store
    task: Any
    model: nn.Module
    """The task, or the task in DDP's wrapper."""
    optimizer: torch.optim.Optimizer
    ema: Any
    """timm's moving average, or None."""
    state: checkpoint.State
    """Where training stands."""
    loader: Loader
    sequence: Sequence
    eval_rows: Rows
    stepper: Stepper
    frozen: bool
    """Whether the backbone stays as it is."""

    def train(self) -> None:
        """Lets modules do what they do in training, but for a backbone that stays as it is."""
        self.model.train()
        if self.frozen:
            self.task.backbone.eval()

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        device: torch.device,
        rank: int,
        resume_from: str | None,
        decode: Callable[[DecoderSpec, int], Decoding] | None,
    ) -> Run:
        """Makes it of a run's settings, and a checkpoint's folder to go on from; see `loop.fit`."""
        store, world = Store(config.store), world_size()
        objective = objective_of(config)
        facts = objective.check(config, store)
        begun = config.without_weights if resume_from else config
        task = objective.build(begun, facts, len(store.dataset.classes))
        if config.compute.checkpoint_activations:
            task.backbone.set_grad_checkpointing()
        if config.model.freeze_backbone:
            backbones.freeze(task.backbone)
        if config.compute.sync_batch_norm and world > 1:
            from timm.layers import convert_sync_batchnorm

            task = convert_sync_batchnorm(task)
        task = to_device(task, device, channels_last=config.compute.channels_last)
        if in_bfloat16(config, device) and device.type == "cpu":
            unfuse_attention(task)
        optimizer = optimizers.optimizer(config, task)
        ema = moving_average(config, task)
        state = checkpoint.load(resume_from, task, optimizer, ema) if resume_from else checkpoint.State()
        norm = make_norm(task.backbone, device, channels_last=config.compute.channels_last)
        by = order.deal(store.dataset.source, looks_across=config.data.mixes or has_own_statistics(task))
        sharing = 1 if by == "place" else world  # workers that share the shards of a window
        spec = decoder_spec(
            config,
            facts.columns,
            task.backbone,
            sharing * config.place.loader_workers if decode else sharing,
            facts.fixed_cut,
            pictures=facts.pictures,
        )
        decoding = (
            decode(spec, config.place.loader_workers)
            if decode
            else ThreadDecoding(spec.build(), config.place.loader_workers)
        )
        train_rows = rows_of(config, store, config.data.train_split, training=True)
        eval_rows = rows_of(config, store, config.data.eval_split)
        sequence = Sequence(
            train_rows,
            seed=config.seed,
            window=config.data.shuffle_shards,
            batch=config.optim.batch_size,
            repeats=config.data.repeats,
            epoch_samples=config.epoch_samples(len(train_rows)),
            by=by,
        )
        ahead = lookahead(
            sequence, len(train_rows) / max(1, len(train_rows.rows)), config.data.shuffle_shards
        )
        loader = Loader(decoding, lookahead=ahead, pin=device.type == "cuda")
        if config.compute.compile:
            task.compile()
        model: nn.Module = task
        if world > 1:
            model = DistributedDataParallel(
                task, device_ids=[device.index] if device.type == "cuda" else None
            )
        precision = make_precision(config, device)
        stepper = Stepper(
            config=config,
            task=task,
            model=model,
            optimizer=optimizer,
            ema=ema,
            views=Views(config, norm, len(store.dataset.classes)),
            rank=rank,
            world=world,
            steps=sequence.steps(config.optim.epochs),
            warmup_steps=round(config.optim.warmup_epochs * sequence.epoch_samples / config.optim.batch_size),
            precision=precision,
        )
        return cls(
            device=device,
            rank=rank,
            world=world,
            store=store,
            task=task,
            model=model,
            optimizer=optimizer,
            ema=ema,
            state=state,
            loader=loader,
            sequence=sequence,
            eval_rows=eval_rows,
            stepper=stepper,
            frozen=config.model.freeze_backbone,
        )


def to_device(task: Any, device: torch.device, *, channels_last: bool = True) -> Any:
    """The task on a device, convolutions in the memory format that is fastest on GPUs and CPUs alike."""
    moved: nn.Module = task.to(device)
    if channels_last:
        moved = cast(Any, moved).to(memory_format=torch.channels_last)
    return moved


def data_config(model: nn.Module) -> dict[str, Any]:
    """timm's mean, std and crop_pct of a backbone."""
    import timm.data

    timm_data: dict[str, Any] = timm.data.resolve_model_data_config(model)
    return timm_data


def make_norm(model: nn.Module, device: torch.device, *, channels_last: bool = True) -> Norm:
    """The normalisation that belongs to a backbone."""
    timm_data = data_config(model)
    mean, std = (torch.tensor(timm_data[name], device=device).view(1, 3, 1, 1) for name in ("mean", "std"))
    return Norm(mean, std, channels_last)


def decoder_spec(
    config: TrainConfig,
    columns: tuple[Columns, ...],
    model: nn.Module,
    decoders: int,
    fixed_cut: Cut | None = None,
    *,
    pictures: bool = True,
) -> DecoderSpec:
    """What a decoder needs to know; evaluation cuts by `fixed_cut` (see `protocol.Facts`), as the model's own
    `cut` where it is no timm's, or as timm for this backbone. `decoders` share the work of a batch."""
    from_timm = data_config(model)
    cut: Cut | None = fixed_cut or getattr(model, "cut", None)
    augment = Augment(
        size=config.model.image_size,
        crop_scale=config.data.crop_scale,
        flip=config.data.flip,
        seed=config.seed,
        crop_pct=float(from_timm["crop_pct"]),
        interpolation=str(from_timm["interpolation"]),
        mean=tuple(from_timm["mean"]),
        auto_augment=config.data.auto_augment,
        color_jitter=config.data.color_jitter,
        fixed=fixed_cut is not None,
        cut=cut and cut.at(config.model.image_size),
    )
    # Of the window in use and of the next one, each decoder opens its part; one shard more at either end.
    keep = 2 * (math.ceil(config.data.shuffle_shards / decoders) + 2)
    return DecoderSpec(store=config.store, columns=columns, augment=augment, keep=keep, pictures=pictures)


def make_loader(
    config: TrainConfig, columns: tuple[Columns, ...], model: nn.Module, fixed_cut: Cut | None = None
) -> Loader:
    """A loader that decodes in threads of this process, for evaluation; see `decoder_spec`."""
    decoder = decoder_spec(config, columns, model, 1, fixed_cut).build()
    return Loader(ThreadDecoding(decoder, config.place.loader_workers), lookahead=4)


def make_precision(config: TrainConfig, device: torch.device) -> Precision:
    """The context of forward passes: bfloat16 where torch's autocast says so, if the run or its device is for
    that."""
    wanted = in_bfloat16(config, device)
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def in_bfloat16(config: TrainConfig, device: torch.device) -> bool:
    """Whether forward passes on a device are in bfloat16."""
    return config.compute.precision == "bfloat16" or (
        config.compute.precision == "auto" and device.type == "cuda"
    )


def unfuse_attention(model: nn.Module) -> None:
    """Has timm's attention multiply matrices in place of calling `scaled_dot_product_attention`: on CPUs its
    backward pass is slow in bfloat16, so that a ViT's step takes 1.2 to 1.7 times as long."""
    for module in model.modules():
        if getattr(module, "fused_attn", False):
            cast(Any, module).fused_attn = False


def has_own_statistics(task: nn.Module) -> bool:
    """Whether BatchNorm computes with a worker's images alone."""
    norms = [module for module in task.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return any(not isinstance(norm, nn.SyncBatchNorm) for norm in norms)


def moving_average(config: TrainConfig, task: nn.Module) -> Any:
    if not config.optim.ema:
        return None
    from timm.utils import ModelEmaV3

    # Decay n / (10 + n) after n steps, so that the last tenth counts, until it reaches --ema; the first
    # step's is 0.
    return ModelEmaV3(
        task, decay=config.optim.ema, use_warmup=config.optim.ema_warmup, warmup_gamma=10.0, warmup_power=1.0
    )
