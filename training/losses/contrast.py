"""CLIP's loss (arXiv 2103.00020, figure 3) between pictures and texts that both learn, exact at any number of
processes.

Legend: b local batch, W processes, B pairs of the global batch (shares filled up to one size), d width.
Each process has the rows of its own pictures and of its own texts, so memory is O(b B); features travel with
their gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from training.engine.distributed import world_size


class _Gather(torch.autograd.Function):
    """[m, n] of this process to [W m, n] of all; backward, what all processes' losses ask of its rows."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        whole = part.new_empty((world_size() * len(part), *part.shape[1:]))
        dist.all_gather_into_tensor(whole, part.contiguous())
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        whole = gradients[0].contiguous()
        dist.all_reduce(whole)
        return whole.chunk(world_size())[dist.get_rank()]


def contrastive_loss(
    image_bd: Tensor, text_bd: Tensor, groups_b: Tensor, scale: Tensor, size: int | None = None
) -> Tensor:
    """Mean of both directions' cross entropies over the global batch's pairs.

    Pairs of equal captions are positives of each other: they share a row's mass.

    Args:
        image_bd: [b, d] unit-length features of pictures, with gradient; float32 or wider.
        text_bd: [b, d] of their captions, with gradient.
        groups_b: [b] int64, equal for equal captions; -1 where there is none: such a pair takes no part.
        scale: 1 / temperature.
        size: the largest b of all processes, where it differs between them.

    Returns:
        W times this process's part, since DDP takes the mean over processes: the gradient is that of one
        process on the joint batch.
    """
    world, own = world_size(), len(groups_b)
    both, groups = torch.cat([image_bd, text_bd], 1), groups_b
    if world > 1:
        missing = (own if size is None else size) - own
        gather: Any = _Gather
        both = gather.apply(functional.pad(both, (0, 0, 0, missing)))
        padded = functional.pad(groups_b, (0, missing), value=-1)
        groups = padded.new_empty(world * len(padded))
        dist.all_gather_into_tensor(groups, padded)
    with torch.autocast(both.device.type, enabled=False):
        images, texts = both.chunk(2, 1)
        valid = groups >= 0
        same = (groups_b[:, None] == groups) & valid & (groups_b >= 0)[:, None]
        total = sum(
            _rows(scale * rows @ columns.T, same, valid)
            for rows, columns in ((image_bd, texts), (text_bd, images))
        )
        loss: Tensor = world * total / (2 * valid.sum().clamp_min(1))
    return loss


def _rows(logits_bB: Tensor, same_bB: Tensor, valid_B: Tensor) -> Tensor:
    """Sum over rows of the cross entropy towards all columns of the row's own caption."""
    # No infinity: a batch without any caption would have no finite row.
    logs = logits_bB.masked_fill(~valid_B, torch.finfo(logits_bB.dtype).min).log_softmax(1)
    share = same_bB.to(logs.dtype) / same_bB.sum(1, keepdim=True).clamp_min(1)
    return -torch.where(same_bB, logs * share, 0.0).sum()
