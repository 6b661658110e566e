"""One training step: preparation of the batch, forward and backward (in parts, if wanted), clipping,
optimizer, moving average.

Random draws of a step (mixing, erasing, dropout, stochastic depth) are seeded by (seed, step, part, worker).
So a resumed run draws what the uninterrupted one would have drawn, and no state of any generator has to be
kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from training.config import TrainConfig
from training.data.loader import Batch
from training.data.views import Draw, Views
from training.engine.gradcache import in_parts
from training.objectives.protocol import Losses, Precision


@dataclass(kw_only=True)
class Stepper:
    """Holds what a step changes; `model` is the task, or the task in DDP's wrapper."""

    config: TrainConfig
    task: Any
    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Any
    views: Views
    rank: int
    world: int
    warmup_steps: int
    steps: int
    precision: Precision

    def __call__(self, batch: Batch, step: int) -> Losses:
        """Trains on this worker's share of global batch `step`; returns the losses of the share."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step) * group.get("lr_scale", 1.0)
        done = step / max(1, self.steps)
        draw = Draw(config.seed, step, self.rank, self.world, config.optim.batch_size, done)
        inputs = self.task.prepare(batch, self.views, draw)
        self.optimizer.zero_grad(set_to_none=True)
        # DDP takes the mean over workers; shares may differ by one image.
        share = self.world * len(inputs) / config.optim.batch_size
        if config.optim.accumulate == 1:
            draw.begin(1)
            with self.precision():
                losses: Losses = self.model(inputs, share)
            torch.autograd.backward(losses["loss"])
        else:
            losses = in_parts(
                self.task, self.model, inputs, config.optim.accumulate, share, draw, self.precision
            )
        self._clip()
        self.optimizer.step()
        self.task.after_step()
        if self.ema is not None:
            # The warm-up follows from the step: a resumed run's average goes on as it would have.
            self.ema.update(self.task, step + 1 if config.optim.ema_warmup else None)
        return losses

    def learning_rate(self, step: int) -> float:
        """Linear warm-up to `lr`, then a cosine to `min_lr` at the last step."""
        config = self.config
        if step < self.warmup_steps:
            return (
                config.optim.warmup_lr
                + (config.optim.lr - config.optim.warmup_lr) * (step + 1) / self.warmup_steps
            )
        progress = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        return config.optim.min_lr + (config.optim.lr - config.optim.min_lr) * 0.5 * (
            1 + math.cos(math.pi * min(1.0, progress))
        )

    def _clip(self) -> None:
        config = self.config
        if not config.optim.clip_grad:
            return
        from timm.utils.clip_grad import dispatch_clip_grad

        limited = list(self.task.parameters())
        if config.optim.clip_mode == "agc":  # as its authors have it, but for the classifier
            last: Any = getattr(self.task.backbone, "get_classifier", lambda: None)()
            own = set(last.parameters()) if isinstance(last, nn.Module) else set()
            limited = [each for each in limited if each not in own]
        dispatch_clip_grad(limited, config.optim.clip_grad, config.optim.clip_mode)
