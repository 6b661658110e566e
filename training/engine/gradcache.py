"""A step in parts: the gradient of the whole batch with the memory of one part (GradCache, arXiv 2101.06983).

First the features of all parts without a graph, then the joint loss and its gradient with respect to them,
then each part again with its gradient. Both passes of a part draw the same dropout and use the same batch
statistics.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from training.data.views import Draw
from training.objectives.protocol import Contrastive, Gradient, Inputs, Losses, Precision, Task


def in_parts(
    task: Task, model: Any, inputs: Inputs, parts: int, share: float, draw: Draw, precision: Precision
) -> Losses:
    """Forward and backward; the losses of the whole batch.

    Args:
        task: what trains; of a `Contrastive` one the joint loss is that of all workers and parts.
        model: the task, or the task in DDP's wrapper.
        inputs: this worker's share.
        parts: how many; fewer where there are fewer rows.
        share: see `protocol.Task`.
        draw: of this step.
        precision: see `protocol.Precision`.
    """
    pieces = [piece for piece in torch.arange(len(inputs)).tensor_split(parts) if len(piece)]
    cut = [slice(int(piece[0]), int(piece[-1]) + 1) for piece in pieces]
    gradients: list[Gradient | None] = [None] * len(cut)
    joint: Tensor | None = None
    contrastive = cast(Contrastive, task)
    features = _features(contrastive, inputs, cut, draw, precision) if hasattr(task, "contrast") else None
    if features is not None:
        features.requires_grad_()
        joint = contrastive.contrast(features, inputs)
        of_features, *own = torch.autograd.grad(joint, [features, *contrastive.loss_parameters()])
        gradients = [
            Gradient(of_features[rows], own if n == len(cut) - 1 else None) for n, rows in enumerate(cut)
        ]
    sums: Losses = {}
    for n, (rows, gradient) in enumerate(zip(cut, gradients, strict=True)):
        draw.begin(1 + n)
        weight = (rows.stop - rows.start) / len(inputs)
        last = n == len(cut) - 1
        wait = contextlib.nullcontext() if last or draw.world == 1 else model.no_sync()
        with wait:
            with precision():
                losses: Losses = model(inputs.part(rows, gradient), share * weight)
            torch.autograd.backward(losses["loss"])
        for name, value in losses.items():
            if name != "loss" or joint is None:
                # `loss` is this part's share of the whole; the others are means over its rows.
                factor = weight if name != "loss" else 1 / share
                sums[name] = sums.get(name, 0) + factor * value.detach().float().mean()
    return sums if joint is None else contrastive.joined(sums, joint.detach())


def _features(
    task: Contrastive, inputs: Inputs, cut: list[slice], draw: Draw, precision: Precision
) -> Tensor | None:
    features_of_parts = []
    with torch.no_grad(), precision(), frozen_statistics(cast(nn.Module, task)):
        for n, rows in enumerate(cut):
            draw.begin(1 + n)
            features = task.features(inputs.part(rows, None))
            if features is None:
                return None
            features_of_parts.append(features)
    return torch.cat(features_of_parts)


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm uses the batch's statistics, as in training, without adding them to the running ones."""
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
