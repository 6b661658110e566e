"""One training step: augmentation of the batch, forward and backward (in parts, if wanted), clipping, optimizer, moving average.

Random draws of a step (mixing, erasing, dropout, stochastic depth) are seeded by (seed, step, part, worker). So a resumed run
draws what the uninterrupted one would have drawn, and no state of any generator has to be kept.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.config import TrainConfig
from training.data.loader import Batch
from training.data.mixing import Mixing, class_targets, text_targets
from training.data.negatives import Negatives
from training.losses.alignment import TextGather
from training.objectives.align import AlignTask, Cached, Goal

Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Norm:
    """Normalises uint8 images on the device: (x / 255 - mean) / std, in place after the conversion."""

    mean: Tensor
    std: Tensor
    channels_last: bool = True

    def __call__(self, images: Tensor) -> Tensor:
        """[b, 3, S, S] uint8 to float32."""
        scaled = images.float().mul_(1 / (255 * self.std)).sub_(self.mean / self.std)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return scaled.contiguous(memory_format=layout)


@dataclass
class Stepper:
    """Holds what a step changes; `model` is the task, or the task in DDP's wrapper."""

    config: TrainConfig
    task: AlignTask
    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Any
    norm: Norm
    negatives: Negatives | None
    classes: int
    rank: int
    world: int
    warmup_steps: int
    steps: int
    autocast: bool

    def __post_init__(self) -> None:
        from timm.data.random_erasing import RandomErasing

        config = self.config
        self._mixing = None
        if config.mixes:
            self._mixing = Mixing(
                mixup=config.mixup, cutmix=config.cutmix, prob=config.mix_prob, switch_prob=config.mix_switch_prob
            )
        device = self.norm.mean.device.type
        self._erase = RandomErasing(probability=config.erase, mode="pixel", device=device) if config.erase else None

    def __call__(self, batch: Batch, step: int) -> Parts:
        """Trains on this worker's share of global batch `step`; returns means over the share, and `correct`."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step) * group.get("lr_scale", 1.0)
        goal, images, classes = self._prepared(batch, step)
        self.optimizer.zero_grad(set_to_none=True)
        # DDP takes the mean over workers; shares may differ by one image.
        share = self.world * len(images) / config.batch_size
        parts = self._whole(images, classes, goal, share, step) if config.accumulate == 1 else self._in_parts(
            images, classes, goal, share, step
        )  # fmt: skip
        if config.clip_grad:
            from timm.models import model_parameters
            from timm.utils.clip_grad import dispatch_clip_grad

            limited = (
                model_parameters(self.task.backbone, exclude_head=True) if config.clip_mode == "agc" else self.task.parameters()
            )
            dispatch_clip_grad(list(limited), config.clip_grad, config.clip_mode)
        self.optimizer.step()
        self.task.keep_bounds()
        if self.ema is not None:
            # The warm-up follows from the step: a resumed run's average goes on as it would have.
            self.ema.update(self.task, step + 1 if config.ema_warmup else None)
        return parts

    def learning_rate(self, step: int) -> float:
        """Linear warm-up to `lr`, then a cosine to `min_lr` at the last step."""
        config = self.config
        if step < self.warmup_steps:
            return config.warmup_lr + (config.lr - config.warmup_lr) * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def _prepared(self, batch: Batch, step: int) -> tuple[Goal | None, Tensor, Tensor]:
        goal = None
        groups = batch.groups
        gather = None
        if self.task.head is not None:
            assert batch.texts is not None and groups is not None
            gather = TextGather(batch.texts, groups, -(-self.config.batch_size // self.world))  # runs under what follows
        self._seed(step, 0)
        images, classes = self.norm(batch.images), batch.labels
        if self._erase is not None:
            images = self._erase(images)
        partner = weights = None
        if self._mixing is not None:
            images, partner, weights = self._mixing(images, (self.config.seed, step, self.rank))
            # Cross entropy smooths what it is given; timm's binary one does so only with class numbers.
            smoothing = self.config.label_smoothing if self.config.loss == "bce" else 0.0
            classes = class_targets(batch.labels, partner, weights, self.classes, smoothing)
        if gather is not None and groups is not None:
            negatives = self.negatives.draw(step, images.device) if self.negatives is not None else None
            goal = Goal(gather, *text_targets(groups, partner, weights), negatives)
        return goal, images, classes

    def _whole(self, images: Tensor, classes: Tensor, goal: Goal | None, share: float, step: int) -> Parts:
        self._seed(step, 1)
        with self._precision():
            parts: Parts = self.model(images, classes, goal, None, share)
        torch.autograd.backward(parts["loss"])
        return parts

    def _in_parts(self, images: Tensor, classes: Tensor, goal: Goal | None, share: float, step: int) -> Parts:
        """The same gradient with the memory of one part (GradCache, arXiv 2101.06983).

        First all features without a graph, then the alignment loss of the whole batch and its gradient with respect to them,
        then each part again with its gradient. Both passes of a part draw the same dropout and use the same batch statistics.
        """
        pieces = [piece for piece in torch.arange(len(images)).tensor_split(self.config.accumulate) if len(piece)]
        cut = [slice(int(piece[0]), int(piece[-1]) + 1) for piece in pieces]
        caches: list[Cached | None] = [None] * len(cut)
        alignment = None
        if goal is not None:
            with torch.no_grad(), self._precision(), frozen_statistics(self.task):
                z_bd = torch.cat([self._features(images[place], step, n) for n, place in enumerate(cut)])
            z_bd.requires_grad_()
            alignment = self.task.align(z_bd, goal)
            wanted = [z_bd, *self.task.loss_parameters()]
            found, *own = torch.autograd.grad(alignment, wanted)
            caches = [Cached(found[place], own if n == len(cut) - 1 else None) for n, place in enumerate(cut)]
        sums: Parts = {}
        for n, (place, cached) in enumerate(zip(cut, caches, strict=True)):
            self._seed(step, 1 + n)
            weight = (place.stop - place.start) / len(images)
            last = n == len(cut) - 1
            wait = contextlib.nullcontext() if last or self.world == 1 else self.model.no_sync()  # type: ignore[operator]
            with wait:
                with self._precision():
                    parts = self.model(images[place], classes[place], None, cached, share * weight)
                torch.autograd.backward(parts["loss"])
            for name in ("cross_entropy", "correct"):
                sums[name] = sums.get(name, 0) + weight * parts[name].detach().float().mean()
        sums["loss"] = sums["cross_entropy"]
        if alignment is not None:
            sums["alignment"] = alignment.detach()
            sums["loss"] = sums["loss"] + self.task.alignment.weight * alignment.detach()
        return sums

    def _features(self, images: Tensor, step: int, part: int) -> Tensor:
        self._seed(step, 1 + part)
        return self.task.project(images)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.norm.mean.device.type, torch.bfloat16, enabled=self.autocast)

    def _seed(self, step: int, part: int) -> None:
        draw = int(np.random.SeedSequence([self.config.seed, step, part, self.rank]).generate_state(1)[0])
        random.seed(draw)
        torch.manual_seed(draw)


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm uses the batch's statistics, as in training, without adding them to the running ones."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
