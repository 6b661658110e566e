"""The per-worker loop, one page: load, step, evaluate, report. Knows torch.distributed, not Ray; `run.py` brings the rest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.store import Store
from training import backbones, checkpoint, targets
from training.config import TrainConfig
from training.data import Augment, Loader, Rows
from training.losses import world_size
from training.objectives.align import AlignTask

Metrics = dict[str, float]
Report = Callable[[Metrics, Callable[[str], None]], None]
"""Called after every epoch with its metrics and a function that writes the checkpoint into a folder (rank 0's is used)."""


@dataclass(frozen=True)
class Norm:
    """Normalises uint8 images on the device: (x / 255 - mean) / std, channels last."""

    mean: Tensor
    std: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """[b, 3, S, S] uint8 to float32."""
        scaled = (images.float() / 255 - self.mean) / self.std
        return scaled.contiguous(memory_format=torch.channels_last)


def build_task(config: TrainConfig, num_classes: int, dim: int) -> AlignTask:
    """The model of a run, with weights that depend on the seed alone; baseline and aligned start from the same backbone."""
    torch.manual_seed(config.seed)
    backbone = backbones.build(
        config.backbone, num_classes=num_classes, image_size=config.image_size, pretrained=config.pretrained,
        drop_path=config.drop_path,
    )  # fmt: skip
    return AlignTask(
        backbone, weight=config.alignment_weight, dim=dim, head=config.head, temperature=config.temperature,
        learn_temperature=config.learn_temperature, label_smoothing=config.label_smoothing,
    )  # fmt: skip


def to_device(task: AlignTask, device: torch.device) -> AlignTask:
    """The task on a device, convolutions in the memory format that is fastest on GPUs and CPUs alike."""
    moved: nn.Module = task.to(device)
    moved = cast(Any, moved).to(memory_format=torch.channels_last)
    return cast(AlignTask, moved)


def data_config(model: nn.Module) -> dict[str, Any]:
    """timm's mean, std and crop_pct of a backbone."""
    import timm.data

    found: dict[str, Any] = timm.data.resolve_model_data_config(model)
    return found


def make_norm(model: nn.Module, device: torch.device) -> Norm:
    """The normalisation that belongs to a backbone."""
    found = data_config(model)
    mean, std = (torch.tensor(found[name], device=device).view(1, 3, 1, 1) for name in ("mean", "std"))
    return Norm(mean, std)


def make_loader(config: TrainConfig, store: Store, found: targets.Targets | None, model: nn.Module) -> Loader:
    """A loader whose evaluation crops as timm's for this backbone."""
    augment = Augment(
        size=config.image_size, crop_scale=config.crop_scale, flip=config.flip, seed=config.seed,
        crop_pct=float(data_config(model)["crop_pct"]), interpolation=str(data_config(model)["interpolation"]),
    )  # fmt: skip
    return Loader(store, found, augment, threads=config.loader_threads, window=config.shuffle_shards)


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Linear warm-up to `lr`, then a cosine to `min_lr` at the last step."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.epochs * steps_per_epoch - 1 - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def fit(config: TrainConfig, device: torch.device, rank: int, resume_from: str | None, report: Report) -> list[Metrics]:
    """Trains on this worker; every worker of the group calls it. Returns the metrics of all epochs."""
    from timm.optim import create_optimizer_v2

    store = Store(config.store)
    found = None
    if config.alignment_weight > 0:
        found = targets.load(store, embeddings=config.embeddings, dim=config.projection_dim, split=config.train_split)
    task = to_device(build_task(config, len(store.dataset.classes), found.dim if found else 0), device)
    optimizer = create_optimizer_v2(
        task, opt="sgd" if config.optimizer == "sgd" else "adamw", lr=config.lr, weight_decay=config.weight_decay,
        momentum=config.momentum,
    )  # fmt: skip
    history = list(checkpoint.load(resume_from, task, optimizer).history) if resume_from else []
    torch.manual_seed(hash((config.seed, rank, len(history))) % 2**31)  # stochastic depth and dropout differ by worker
    norm, loader = make_norm(task.backbone, device), make_loader(config, store, found, task.backbone)
    train_rows, eval_rows = Rows(store, config.train_split), Rows(store, config.eval_split)
    steps = len(train_rows) // config.batch_size
    model: nn.Module = task
    if world_size() > 1:
        model = DistributedDataParallel(task, device_ids=[device.index] if device.type == "cuda" else None)
    amp = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")

    for epoch in range(len(history), config.epochs):
        start = time.monotonic()
        model.train()
        sums: dict[str, Tensor] = {}
        order = train_rows.shuffled(config.seed, epoch, config.shuffle_shards)
        for step, host_batch in enumerate(loader.train(order, config.batch_size, rank, world_size(), epoch)):
            batch = host_batch.to(device)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, epoch * steps + step, steps) * group.get("lr_scale", 1.0)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                parts = model(norm(batch.images), batch.labels, batch.texts, batch.groups)
            optimizer.zero_grad(set_to_none=True)
            parts["loss"].backward()
            optimizer.step()
            for name, value in parts.items():
                sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach().float().mean()
        seconds = time.monotonic() - start
        means = _mean_over_workers({name: value / steps for name, value in sums.items()})
        if not math.isfinite(means["loss"]):
            message = (
                f"epoch {epoch + 1}: the loss is {means['loss']}; try a lower --lr (now {config.lr}) or a longer --warmup-epochs."
            )
            raise FloatingPointError(message)
        means["train_top1"] = 100 * means.pop("correct")
        _agree_on_buffers(task)
        means |= evaluate(task, loader, eval_rows, norm, config.batch_size, device, amp, rank)
        means |= {"epoch": epoch + 1, "lr": float(optimizer.param_groups[0]["lr"]), "seconds": seconds}
        means["images_per_s"] = steps * config.batch_size / seconds
        history.append(means)
        state = checkpoint.State(epoch=epoch + 1, history=history)
        report(means, lambda folder, state=state: checkpoint.save(folder, task, optimizer, state))  # type: ignore[misc]
    return history


@torch.inference_mode()
def evaluate(
    task: AlignTask, loader: Loader, rows: Rows, norm: Norm, batch_size: int, device: torch.device, amp: bool, rank: int
) -> Metrics:
    """top-1 and top-5 in percent over all rows of a split, each row counted once whatever the number of workers."""
    task.eval()
    hits = torch.zeros(3, device=device, dtype=torch.float64)
    for host_batch in loader.evaluate(rows.in_order(), batch_size, rank, world_size()):
        batch = host_batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = task.backbone(norm(batch.images))
        best = logits.topk(min(5, logits.shape[1])).indices == batch.labels[:, None]
        hits += torch.stack([best[:, 0].sum(), best.sum(), torch.tensor(len(best), device=device)])
    if world_size() > 1:
        dist.all_reduce(hits)
    top1, top5, count = hits.tolist()
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "eval_images": count}


def _agree_on_buffers(task: nn.Module) -> None:
    """Rank 0's batch-norm statistics for all: they are what the checkpoint holds, so they are what is evaluated."""
    if world_size() > 1:
        for buffer in task.buffers():
            dist.broadcast(buffer, 0)


def _mean_over_workers(values: dict[str, Tensor]) -> Metrics:
    stacked = torch.stack(list(values.values())).double()
    if world_size() > 1:
        dist.all_reduce(stacked)
        stacked /= world_size()
    return dict(zip(values, stacked.tolist(), strict=True))
