"""GPT4Image (arXiv 2306.00693): cross entropy plus a weight times the alignment of image features to description embeddings.

`L = L_CE + weight * L_align`. With weight 0 there is no head and no text: the plain baseline, step for step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from training import backbones
from training.heads import Kind, ProjectionHead
from training.losses import TextGather, alignment_loss


class AlignTask(nn.Module):
    """Everything that trains: the backbone, and for a weight above 0 the head and (if learned) the temperature."""

    def __init__(
        self, backbone: nn.Module, *, weight: float, dim: int, head: Kind, temperature: float, learn_temperature: bool,
        label_smoothing: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.backbone = backbone
        self.weight = weight
        self.label_smoothing = label_smoothing
        self.head: ProjectionHead | None = None
        self.log_temperature: Tensor | None
        self.register_buffer("log_temperature", None, persistent=False)
        if weight > 0:
            width = backbones.num_features(backbone)
            self.head = ProjectionHead(width, dim, head, batch_norm=backbones.uses_batch_norm(backbone))
            start = torch.tensor(math.log(temperature))
            if learn_temperature:
                del self.log_temperature  # a buffer's name cannot become a parameter's
                self.log_temperature = nn.Parameter(start)
            else:
                self.log_temperature = start

    def forward(self, images: Tensor, labels: Tensor, texts_bd: Tensor | None, groups_b: Tensor | None) -> dict[str, Tensor]:
        """One step's losses.

        Args:
            images: [b, 3, H, W].
            labels: [b] class numbers.
            texts_bd: [b, d] unit-length text targets; None for the baseline.
            groups_b: [b] int64, equal for equal captions, -1 for images without one; None for the baseline.

        Returns:
            `loss` to differentiate, and for the log `cross_entropy`, `alignment` (over the global batch) and `correct` ([b]).
        """
        gather = None
        if self.head is not None:
            assert texts_bd is not None and groups_b is not None
            gather = TextGather(texts_bd, groups_b)
        features, logits = backbones.features_and_logits(self.backbone, images)
        entropy = functional.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        parts = {"loss": entropy, "cross_entropy": entropy.detach(), "correct": logits.detach().argmax(1) == labels}
        if gather is not None and self.head is not None and groups_b is not None and self.log_temperature is not None:
            ones = torch.ones_like(groups_b, dtype=torch.float32)[:, None]
            temperature = self.log_temperature.exp().clamp_min(0.01)  # CLIP's bound: logits of at most 100
            alignment = alignment_loss(self.head(features), gather.wait(), groups_b[:, None], ones, temperature)
            parts["loss"] = entropy + self.weight * alignment
            parts["alignment"] = alignment.detach()
        return parts
