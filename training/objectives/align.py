"""GPT4Image (arXiv 2306.00693): classification plus a weight times the alignment of image features to description embeddings.

`L = L_CE + weight * L_align`. With weight 0 there is no head and no text: the plain baseline, step for step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.losses.alignment import TextGather, Texts, Variant, alignment_loss
from training.models import backbones
from training.models.heads import Kind, ProjectionHead, TextProjection

COLDEST = 0.01
"""CLIP's bound of a learned temperature: logits of at most 100."""


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Settings of the loss's second part; `text_dim` is D where texts are mapped to `dim` by a learned projection, else 0."""

    weight: float
    dim: int
    head: Kind = "mlp"
    variant: Variant = "symmetric"
    temperature: float = 0.2
    learn_temperature: bool = False
    text_dim: int = 0
    texts: int = 2
    """How many an image is told apart from, its own among them; what the sigmoid's bias starts from."""


@dataclass(frozen=True)
class Goal:
    """What a worker's images aim at: all texts of the global batch (on their way), and which of them with which weight."""

    gather: TextGather
    groups_bK: Tensor
    weights_bK: Tensor
    negatives: Texts | None = None


@dataclass(frozen=True)
class Cached:
    """Gradients of the alignment loss of a whole batch with respect to some of its features, and to the loss's own parameters."""

    features_bd: Tensor
    parameters: list[Tensor] | None = None


class AlignTask(nn.Module):
    """Everything that trains: the backbone, and for a weight above 0 the head and what of the loss is learned."""

    def __init__(self, backbone: nn.Module, alignment: Alignment, criterion: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.criterion = criterion
        self.alignment = alignment
        self.head: ProjectionHead | None = None
        self.text_projection: TextProjection | None = None
        self.log_temperature: Tensor | None
        self.bias: Tensor | None
        self.register_buffer("log_temperature", None, persistent=False)
        self.register_buffer("bias", None, persistent=False)
        self.features_and_logits: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]] = backbones.features_and_logits
        if alignment.weight > 0:
            width = backbones.num_features(backbone)
            self.head = ProjectionHead(width, alignment.dim, alignment.head, batch_norm=backbones.uses_batch_norm(backbone))
            if alignment.text_dim:
                self.text_projection = TextProjection(alignment.text_dim, alignment.dim)
            start = torch.tensor(math.log(alignment.temperature))
            if alignment.learn_temperature:
                del self.log_temperature  # a buffer's name cannot become a parameter's
                self.log_temperature = nn.Parameter(start)
            else:
                self.log_temperature = start
            if alignment.variant == "sigmoid":
                del self.bias
                # One of so many pairs is a match: the bias starts at the logit of that, so that negatives, nearly all pairs, do
                # not push everything apart first. SigLIP's -10 (arXiv 2303.15343) is this for its batches of 32 k.
                self.bias = nn.Parameter(torch.tensor(-math.log(max(1, alignment.texts - 1))))

    def forward(
        self, images: Tensor, classes: Tensor, goal: Goal | None = None, cached: Cached | None = None, share: float = 1.0
    ) -> dict[str, Tensor]:
        """One step's losses, or those of a part of it.

        Args:
            images: [b, 3, H, W].
            classes: [b] class numbers, or [b, C] probabilities.
            goal: what the features aim at; None for the baseline and beside `cached`.
            cached: in place of a goal the gradients of the alignment loss, where the batch is computed in parts (GradCache,
                arXiv 2101.06983): their products have the gradient of the whole batch's loss.
            share: factor on the classification loss, so that the mean over workers and parts is that of the whole batch.

        Returns:
            `loss` to differentiate, and for the log `cross_entropy`, `correct` ([b]) and with a goal `alignment` (over the
            global batch).
        """
        features, logits = self.features_and_logits(self.backbone, images)
        entropy = self.criterion(logits.float(), classes)
        aimed = classes if classes.ndim == 1 else classes.argmax(1)
        parts = {"loss": share * entropy, "cross_entropy": entropy.detach(), "correct": logits.detach().argmax(1) == aimed}
        if self.head is None:
            return parts
        z = self.head(features)
        if cached is not None:
            linear = (z * cached.features_bd).sum()
            if cached.parameters is not None:
                linear = linear + sum((p * g).sum() for p, g in zip(self.loss_parameters(), cached.parameters, strict=True))
            else:  # every part uses every parameter, or DDP would wait for it
                linear = linear + sum((0 * p).sum() for p in self.loss_parameters())
            parts["loss"] = parts["loss"] + self.alignment.weight * linear
        else:
            assert goal is not None
            alignment = self.align(z, goal)
            parts["loss"] = parts["loss"] + self.alignment.weight * alignment
            parts["alignment"] = alignment.detach()
        return parts

    def align(self, z_bd: Tensor, goal: Goal) -> Tensor:
        """The alignment loss of [b, d] projected features (see `losses.alignment_loss`)."""
        assert self.log_temperature is not None
        texts, negatives = goal.gather.wait(), goal.negatives
        if self.text_projection is not None:
            texts = replace(texts, vectors_Bd=self.text_projection(texts.vectors_Bd))
            if negatives is not None:
                negatives = replace(negatives, vectors_Bd=self.text_projection(negatives.vectors_Bd))
        temperature, variant = self.log_temperature.exp(), self.alignment.variant
        return alignment_loss(
            z_bd, texts, goal.groups_bK, goal.weights_bK, temperature, variant=variant, negatives=negatives, bias=self.bias
        )

    @torch.no_grad()
    def keep_bounds(self) -> None:
        """After an optimizer's step: a learned temperature does not fall below its bound, and its gradient can bring it back.

        As CLIP does it. A clamp in the forward pass would have no gradient beyond the bound, where a step may have led.
        """
        if isinstance(self.log_temperature, nn.Parameter):
            self.log_temperature.clamp_(min=math.log(COLDEST))

    def project(self, images: Tensor) -> Tensor:
        """[b, d] unit-length projected features."""
        assert self.head is not None
        features, _ = self.features_and_logits(self.backbone, images)
        projected: Tensor = self.head(features)
        return projected

    def loss_parameters(self) -> list[nn.Parameter]:
        """What the alignment loss itself learns: temperature, bias, text projection."""
        own = [part for part in (self.log_temperature, self.bias) if isinstance(part, nn.Parameter)]
        return own + (list(self.text_projection.parameters()) if self.text_projection is not None else [])


class CrossEntropy(nn.Module):
    """torch's cross entropy for class numbers or probabilities."""

    def __init__(self, smoothing: float) -> None:
        super().__init__()
        self.smoothing = smoothing

    def forward(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Mean over the batch; `classes` are [b] numbers, or [b, C] probabilities, which are smoothed likewise."""
        return functional.cross_entropy(logits, classes, label_smoothing=self.smoothing)
