"""How much an alignment must weigh for its gradient to be as long as the classification's.

Source: TextTeacher (arXiv 2605.22098): `L = (1 - lambda) L_CE + lambda w L_align` with
w = |dL_CE/dh| / |dL_align/dh| and h the feature before the classifier, so that lambda means the same for
every backbone, data set and form.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from training.engine.distributed import world_size


def gradient_ratio(of_classes: Tensor, of_texts: Tensor) -> Tensor:
    """w over the global batch; equal on all processes, without gradient.

    Args:
        of_classes: [b, F] gradient of the classification loss with respect to this process's features, or
            any parts of it below each other.
        of_texts: [b, F] that of the alignment loss; both times the same factor of DDP's mean.

    Returns:
        Scalar in float32; 1 where no picture of the batch has a text.
    """
    squares = torch.stack(
        [of_classes.detach().float().square().sum(), of_texts.detach().float().square().sum()]
    )
    if world_size() > 1:
        dist.all_reduce(squares)
    return torch.where(squares[1] > 0, (squares[0] / squares[1].clamp(min=1e-30)).sqrt(), 1.0)
