"""Classification losses, for class numbers or probabilities."""

from __future__ import annotations

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
