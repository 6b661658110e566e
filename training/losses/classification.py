"""Classification losses, for class numbers or probabilities."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def criterion(name: str, smoothing: float) -> nn.Module:
    """The loss that `--loss` names."""
    from timm.loss import BinaryCrossEntropy

    if name == "bce":
        # A mean over classes, timm's default, would leave 1 / classes of cross entropy's gradient: optimizers
        # without a scale do not mind (ResNet strikes back, DeiT III: LAMB), but an alignment beside it would
        # outweigh it.
        loss: nn.Module = BinaryCrossEntropy(smoothing, sum_classes=True)
        return loss
    return CrossEntropy(smoothing)


class CrossEntropy(nn.Module):
    """torch's cross entropy for class numbers or probabilities."""

    def __init__(self, smoothing: float) -> None:
        super().__init__()
        self.smoothing = smoothing

    def forward(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Mean over the batch; `classes` are [b] numbers, or [b, C] probabilities, which are smoothed
        likewise."""
        return functional.cross_entropy(logits, classes, label_smoothing=self.smoothing)


class SimilarLabels(nn.Module):
    """Another loss of labels of which a share is spread over similar classes.

    Args:
        criterion: takes [b, C] probabilities.
        similar_CC: rows of how similar a class is to each other, which sum to 1.
        share: of a label that is spread.
    """

    spread: Tensor

    def __init__(self, criterion: nn.Module, similar_CC: Tensor, share: float) -> None:
        super().__init__()
        self.criterion = criterion
        spread = share * similar_CC + (1 - share) * torch.eye(len(similar_CC))
        self.register_buffer("spread", spread, persistent=False)  # a matter of training: exports have none

    def forward(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Mean over the batch; `classes` are [b] numbers, or [b, C] probabilities."""
        if classes.ndim == 1:
            labels = self.spread[classes]
        else:
            with torch.autocast(logits.device.type, enabled=False):  # in bfloat16 rows would not sum to 1
                labels = classes.to(self.spread.dtype) @ self.spread
        loss: Tensor = self.criterion(logits, labels)
        return loss
