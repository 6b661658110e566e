"""The alignment loss between projected images and frozen texts in four forms, exact at any number of
processes.

Legend: b local batch, W processes, B texts of the global batch, K targets of an image, N further texts of the
store, d shared width. Source: GPT4Image (arXiv 2306.00693), whose code keeps only local gradients after its
gather, so that its weight acts like 1/W of itself; here the gradient equals one process's on the joint batch.
No gradient travels between processes, so memory is O(b B): each process needs all texts, its own images, and
for the text-to-image direction a few numbers a text (such as the log-sum-exp over all images), which
all-reduces of B-vectors give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from training.engine.distributed import world_size

Form = Literal["symmetric", "image-to-text", "sigmoid", "cosine"]


@dataclass(frozen=True)
class Texts:
    """The texts of the global batch, or further ones of the store; constants, or a linear map of constants
    (`TextProjection`)."""

    targets_Bd: Tensor
    """[B, d] unit length; rows without a text are zero."""
    groups_B: Tensor
    """[B] int64, equal for equal captions; -1 where there is no text."""

    @property
    def valid_B(self) -> Tensor:
        """[B] whether there is a text."""
        return self.groups_B >= 0


class TextGather:
    """Gathers every process's texts; started before the backbone's forward pass, it runs under it."""

    def __init__(self, targets_bd: Tensor, groups_b: Tensor, size: int | None = None) -> None:
        """Begins to gather.

        Args:
            targets_bd: [b, d] this process's texts.
            groups_b: [b] their groups.
            size: the largest b of all processes, where it differs between them; others are filled up with
                rows of group -1.

        Raises:
            ValueError: more than `size` texts.
        """
        self._world = world_size()
        self._targets, self._groups = targets_bd.detach().contiguous(), groups_b.contiguous()
        self._work: list[dist.Work] = []
        missing = 0 if size is None else size - len(groups_b)
        if missing < 0:
            message = (
                f"{len(groups_b)} texts, but size={size}: pass the largest local batch of all processes."
            )
            raise ValueError(message)
        if self._world > 1:
            self._targets = self._start(functional.pad(self._targets, (0, 0, 0, missing)))
            self._groups = self._start(functional.pad(self._groups, (0, missing), value=-1))

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
        return Texts(self._targets, self._groups)


def alignment_loss(
    image_bd: Tensor,
    texts: Texts,
    target_groups_bK: Tensor,
    target_weights_bK: Tensor,
    temperature: Tensor | float,
    *,
    form: Form = "symmetric",
    negatives: Texts | None = None,
    bias: Tensor | float | None = None,
    grading: float | None = None,
) -> Tensor:
    """The alignment loss of the global batch.

    Image i aims at the texts of its target groups: one group of weight 1, or with mixup and cutmix the groups
    of both pictures with the labels' weights; a mixture with one text missing aims fully at the other. Images
    without a text take no part. With logits s = z.t / temperature:

    - symmetric: mean of both InfoNCE directions (CLIP, arXiv 2103.00020). All texts of one group share its
      weight (true positives are positives); of each text, the images aiming at it share its mass.
    - image-to-text: the first direction alone.
    - sigmoid: binary cross entropy of sigmoid(s + bias) for every pair, over the number of images that take
      part (SigLIP, arXiv 2303.15343). An image's target is the same, its group's weight, for all texts of a
      group.
    - cosine: 2 - 2 z.t of an image and its targets, no negatives (GPT4Image's option `byol`).

    Graded positives: an image aims at every text, the more the likelier that is to its own: with texts t of
    unit length and the image's own text u, by softmax(u.t / grading) over the batch's texts, and for the
    sigmoid by exp((u.t - 1) / grading). Mixed images mix those (soft targets, as in SoftCLIP, arXiv
    2303.17561).

    Args:
        image_bd: [b, d] unit-length projected features, with gradient. b may differ between processes, and be
            0.
        texts: the gathered texts.
        target_groups_bK: [b, K] int64 group of each target; -1 for none.
        target_weights_bK: [b, K] weight of each target, summing to 1 over K.
        temperature: above 0; a tensor with gradient when it is learned. Has no meaning for cosine.
        form: see above.
        negatives: N further texts, equal on all processes: more columns of an image's row, but for those of
            the row's own targets. They take no part in the text-to-image direction.
        bias: of the sigmoid's logits; a tensor with gradient when it is learned. None: 0.
        grading: temperature of graded positives, above 0; None: an image aims at texts of its own groups
            alone.

    Returns:
        Scalar in float32 (float64 for float64 input): its value is the loss of the global batch, equal on all
        processes. Its gradient is W times this process's share, so that DDP's mean over processes is the
        exact gradient.

    Raises:
        ValueError: negatives for cosine, or with graded positives, of which they have no share; grading for
            cosine; a bias for another form than sigmoid.
    """
    if negatives is not None and form == "cosine":
        message = (
            "form=cosine: has no negatives, as it compares nothing; leave them out, or use another form."
        )
        raise ValueError(message)
    if grading is not None and (negatives is not None or form == "cosine"):
        message = "grading: goes with neither further negatives nor form=cosine; leave it out."
        raise ValueError(message)
    if bias is not None and form != "sigmoid":
        message = f"form={form}: has no bias, as a softmax would cancel it; leave it out, or use sigmoid."
        raise ValueError(message)
    with torch.autocast(image_bd.device.type, enabled=False):
        dtype = torch.promote_types(image_bd.dtype, torch.float32)
        z_bd, weights_bK = image_bd.to(dtype), target_weights_bK.to(dtype)
        matches_bB = _matches(texts, target_groups_bK, weights_bK, divided=form != "sigmoid", grading=grading)
        taking_part = matches_bB.sum(1) > 0
        if form == "cosine":
            aimed_bd = matches_bB @ texts.targets_Bd.to(dtype)
            share, value = _mean(
                torch.where(taking_part, 2 - 2 * (z_bd * aimed_bd).sum(1), 0).sum(), taking_part
            )
        else:
            scaled_bd = z_bd / temperature
            logits_bB = _logits(scaled_bd, texts, bias)
            further_bN = (
                None
                if negatives is None
                else _further(scaled_bd, negatives, bias, target_groups_bK, weights_bK)
            )
            matched_B = (matches_bB * logits_bB).sum(0)
            spread = _softplus if form == "sigmoid" else _logsumexp
            image_part = torch.where(taking_part, spread(logits_bB, further_bN), 0).sum() - matched_B.sum()
            if form == "symmetric":
                share, value = _both_directions(
                    image_part, logits_bB, matched_B, matches_bB.sum(0), taking_part
                )
            else:
                share, value = _mean(image_part, taking_part)
        share = world_size() * share
        return value + (share - share.detach())


def _matches(
    texts: Texts, groups_bK: Tensor, weights_bK: Tensor, *, divided: bool, grading: float | None
) -> Tensor:
    """[b, B] how far each image aims at each text: its group's weight, `divided` among the group's texts or
    not; or graded by similarity.

    Weights of groups that have no text go to the image's other groups; rows of images without any text are
    zero.
    """
    matches = weights_bK.new_zeros((groups_bK.shape[0], texts.groups_B.shape[0]))
    total_b1 = weights_bK.new_zeros((groups_bK.shape[0], 1))
    for groups_b, weights_b in zip(groups_bK.T, weights_bK.T, strict=True):
        same = (groups_b[:, None] == texts.groups_B[None, :]) & (groups_b >= 0)[:, None]
        count_b1 = same.sum(1, keepdim=True)
        weights_b1 = torch.where(count_b1 > 0, weights_b[:, None], 0)
        if grading is not None:
            own = same.to(matches.dtype) / count_b1.clamp_min(1)
            matches += weights_b1 * _graded(own, texts, grading, divided=divided)
        else:
            matches += torch.where(same, weights_b1 / count_b1.clamp_min(1) if divided else weights_b1, 0)
        total_b1 += weights_b1
    return matches.div_(torch.where(total_b1 > 0, total_b1, 1))


def _graded(own_bB: Tensor, texts: Texts, grading: float, *, divided: bool) -> Tensor:
    """[b, B] how near every text is to an image's own, which `own_bB` averages; constants, also where texts
    are projected by a learned map."""
    targets_Bd = texts.targets_Bd.detach().to(own_bB.dtype)
    nearness_bB = own_bB @ targets_Bd @ targets_Bd.T / grading
    nearness_bB = nearness_bB.masked_fill(~texts.valid_B, _lowest(nearness_bB))
    return nearness_bB.softmax(1) if divided else (nearness_bB - 1 / grading).exp()


def _logits(scaled_bd: Tensor, texts: Texts, bias: Tensor | float | None) -> Tensor:
    """[b, B] logits; without a text the lowest finite number, as minus infinity times a weight of 0 is not a
    number."""
    logits = scaled_bd @ texts.targets_Bd.to(scaled_bd.dtype).T
    if bias is not None:
        logits = logits + bias
    return logits.masked_fill_(~texts.valid_B, _lowest(logits))


def _further(
    scaled_bd: Tensor, negatives: Texts, bias: Tensor | float | None, groups_bK: Tensor, weights_bK: Tensor
) -> Tensor:
    """[b, N] logits of the store's texts, the lowest number for those that the image aims at."""
    logits = _logits(scaled_bd, negatives, bias)
    for groups_b, weights_b in zip(groups_bK.T, weights_bK.T, strict=True):
        own = (groups_b[:, None] == negatives.groups_B[None, :]) & (weights_b > 0)[:, None]
        logits.masked_fill_(own, _lowest(logits))
    return logits


def _lowest(like: Tensor) -> float:
    return torch.finfo(like.dtype).min


def _logsumexp(logits_bB: Tensor, further_bN: Tensor | None) -> Tensor:
    own_b = logits_bB.logsumexp(1)
    return own_b if further_bN is None else torch.logaddexp(own_b, further_bN.logsumexp(1))


def _softplus(logits_bB: Tensor, further_bN: Tensor | None) -> Tensor:
    """[b] sum over texts of what binary cross entropy with target q costs beyond - q times the logit."""
    own_b = functional.softplus(logits_bB).sum(1)
    return own_b if further_bN is None else own_b + functional.softplus(further_bN).sum(1)


def _mean(local: Tensor, taking_part: Tensor) -> tuple[Tensor, Tensor]:
    """(this process's share of the mean over images, its value), from the sum over this process's images."""
    total, count = _summed(local.detach(), taking_part.sum())
    count = count.clamp_min(1)
    return local / count, total / count


def _both_directions(
    image_part: Tensor, logits_bB: Tensor, matched_B: Tensor, mass_B: Tensor, taking_part: Tensor
) -> tuple[Tensor, Tensor]:
    """As `_mean`, for half of each direction; `matched_B` and `mass_B` are sums over this process's
    images."""
    lowest = _lowest(logits_bB)
    # The clamp is for a process without images, whose log-sum-exp is minus infinity.
    local_B = logits_bB.masked_fill(~taking_part[:, None], lowest).logsumexp(0).clamp_min(lowest)
    top_B = _highest(local_B.detach())
    exp_B, all_matched_B, all_mass_B, images_total, images = _summed(
        (local_B.detach() - top_B).exp(), matched_B.detach(), mass_B, image_part.detach(), taking_part.sum()
    )
    global_B = exp_B.log() + top_B
    aimed_at = all_mass_B > 0
    images, count = images.clamp_min(1), aimed_at.sum().clamp_min(1)
    inverse_B = torch.where(aimed_at, 1 / all_mass_B.clamp_min(torch.finfo(all_mass_B.dtype).tiny), 0)
    # The local log-sum-exp of each text, weighted by its part in the global one, has the global one's
    # gradient.
    part_B = torch.where(aimed_at, (local_B.detach() - global_B).exp(), 0)
    text_part = (part_B * local_B).sum() - (inverse_B * matched_B).sum()
    text_value = torch.where(aimed_at, global_B - inverse_B * all_matched_B, 0).sum()
    return 0.5 * (image_part / images + text_part / count), 0.5 * (images_total / images + text_value / count)


def _highest(value: Tensor) -> Tensor:
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def _summed(*parts: Tensor) -> list[Tensor]:
    """Sums over processes, in one all-reduce; the parts come in the first one's dtype."""
    if world_size() == 1:
        return [part.to(parts[0].dtype) for part in parts]
    flat = torch.cat([part.to(parts[0].dtype).reshape(-1) for part in parts])
    dist.all_reduce(flat)
    return [
        total.view(part.shape)
        for total, part in zip(flat.split_with_sizes([part.numel() for part in parts]), parts, strict=True)
    ]
