"""The alignment loss: symmetric InfoNCE between projected images and frozen texts, exact at any number of processes.

Legend: b local batch, W processes, B = W b global batch, d shared width. Source: GPT4Image (arXiv 2306.00693), whose code keeps
only local gradients after its gather, so that its weight acts like 1/W of itself; here the gradient equals one process's on the
joint batch. Texts carry no gradient, so memory is O(b B): each process needs all texts, its own images, and one number a text
(the log-sum-exp over all images), which an all-reduce of B-vectors gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Texts:
    """The texts of the global batch, constants of the loss."""

    vectors_Bd: Tensor
    """[B, d] unit length, float32; rows without a text are zero."""
    groups_B: Tensor
    """[B] int64, equal for equal captions; -1 where there is no text."""

    @property
    def valid_B(self) -> Tensor:
        """[B] whether there is a text."""
        return self.groups_B >= 0


class TextGather:
    """Gathers every process's texts; started before the backbone's forward pass, it runs under it."""

    def __init__(self, vectors_bd: Tensor, groups_b: Tensor) -> None:
        self._world = world_size()
        self._vectors, self._groups = vectors_bd.detach().contiguous(), groups_b.contiguous()
        self._work: list[dist.Work] = []
        if self._world > 1:
            self._vectors = self._start(self._vectors)
            self._groups = self._start(self._groups)

    def _start(self, part: Tensor) -> Tensor:
        whole = part.new_empty((self._world * part.shape[0], *part.shape[1:]))
        work = dist.all_gather_into_tensor(whole, part, async_op=True)
        assert work is not None
        self._work.append(work)
        return whole

    def wait(self) -> Texts:
        """The texts of all processes, in order of rank."""
        for work in self._work:
            work.wait()
        return Texts(self._vectors, self._groups)


def world_size() -> int:
    """Processes that train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def alignment_loss(
    image_bd: Tensor, texts: Texts, target_groups_bK: Tensor, target_weights_bK: Tensor, temperature: Tensor | float
) -> Tensor:
    """Symmetric InfoNCE over the global batch.

    Image i aims at the texts of its target groups: one group of weight 1, or with mixup and cutmix the groups of both
    pictures with the labels' weights. All texts of one group share its weight (true positives are positives); of each text,
    the images aiming at it share its mass. Images without a text take no part.

    Args:
        image_bd: [b, d] unit-length projected features, with gradient. b must be equal on every process.
        texts: the gathered texts.
        target_groups_bK: [b, K] int64 group of each target; -1 for none.
        target_weights_bK: [b, K] weight of each target, summing to 1 over K.
        temperature: tau > 0; a tensor with gradient when it is learned.

    Returns:
        Scalar in float32 (float64 for float64 input): its value is the loss of the global batch, equal on all processes. Its
        gradient is W times this process's share, so that DDP's mean over processes is the exact gradient.
    """
    with torch.autocast(image_bd.device.type, enabled=False):
        dtype = torch.promote_types(image_bd.dtype, torch.float32)
        logits = image_bd.to(dtype) @ texts.vectors_Bd.to(dtype).T / temperature
        logits = logits.masked_fill(~texts.valid_B, -math.inf)
        rows_bB = _row_targets(texts, target_groups_bK, target_weights_bK.to(dtype))
        taking_part = rows_bB.sum(1) > 0
        mass_B, num_images = _reduced_mass(rows_bB, taking_part)
        columns_bB = rows_bB / mass_B.clamp_min(torch.finfo(dtype).tiny)
        num_texts = (mass_B > 0).sum().clamp_min(1)

        # Image to text: rows need all texts and only local images.
        image_part = torch.where(taking_part, logits.logsumexp(1), 0).sum() - _dot(rows_bB, logits)
        # Text to image: the local log-sum-exp of each text, weighted by its share of the global one, has the global gradient.
        local_B = logits.masked_fill(~taking_part[:, None], -math.inf).logsumexp(0)
        global_B = _reduced_logsumexp(local_B.detach())
        aimed_at = mass_B > 0
        share_B = torch.where(aimed_at, (local_B.detach() - global_B).exp(), 0)
        text_part = _dot(share_B, local_B) - _dot(columns_bB, logits)
        surrogate = 0.5 * (image_part / num_images + text_part / num_texts)

        with torch.no_grad():
            texts_value = torch.where(aimed_at, global_B, 0).sum()
            local = 0.5 * (image_part / num_images - _dot(columns_bB, logits) / num_texts)
            value = _all_reduced(local) + 0.5 * texts_value / num_texts
        share = world_size() * surrogate
        return share + (value - share).detach()


def _row_targets(texts: Texts, groups_bK: Tensor, weights_bK: Tensor) -> Tensor:
    """[b, B] target of each image over all texts; rows of images without any text are zero."""
    rows = weights_bK.new_zeros((groups_bK.shape[0], texts.groups_B.shape[0]))
    for groups_b, weights_b in zip(groups_bK.T, weights_bK.T, strict=True):
        same = (groups_b[:, None] == texts.groups_B[None, :]) & (groups_b >= 0)[:, None]
        rows += weights_b[:, None] * same / same.sum(1, keepdim=True).clamp_min(1)
    total = rows.sum(1, keepdim=True)
    # A mixture with one text missing aims fully at the other.
    return rows / torch.where(total > 0, total, 1)


def _dot(weights: Tensor, values: Tensor) -> Tensor:
    """Sum of products in which weight 0 silences a value of minus infinity."""
    return (weights * values.masked_fill(weights == 0, 0)).sum()


def _reduced_mass(rows_bB: Tensor, taking_part: Tensor) -> tuple[Tensor, Tensor]:
    """([B] target mass that each text receives from all images, number of images that take part)."""
    both = torch.cat([rows_bB.sum(0), taking_part.sum().to(rows_bB.dtype)[None]])
    both = _all_reduced(both)
    return both[:-1], both[-1].clamp_min(1)


def _reduced_logsumexp(local_B: Tensor) -> Tensor:
    if world_size() == 1:
        return local_B
    top = local_B.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX)
    shift = torch.where(top.isinf(), 0, top)
    return _all_reduced((local_B - shift).exp()).log() + shift


def _all_reduced(value: Tensor) -> Tensor:
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value
