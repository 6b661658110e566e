"""Muon, the optimiser of the captioner's inner matrices: momentum, made orthogonal before it is applied.

Nothing to run here; `train_captioner.py` uses it beside AdamW, which keeps embeddings, norms and biases.
At two million parameters it costs about a tenth of a second a step, and saves more than half of the steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import distributed


class Muon(torch.optim.Optimizer):
    """Momentum whose every matrix is replaced by the nearest orthogonal one: fewer steps than AdamW needs
    here."""

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], lr: float = 0.02, momentum: float = 0.95
    ) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Matrices of one shape go through the iteration together, which small matrices need to be fast."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for (rows, columns), parameters in shapes.items():
                updates = shared_orthogonal(
                    torch.stack([self._direction(p, group["momentum"]) for p in parameters])
                )
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - 0.01 * group["lr"]).add_(update, alpha=-rate)

    def _direction(self, parameter: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        state = self.state[parameter]
        if not state:
            state["average"] = torch.zeros_like(parameter)
        state["average"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["average"], momentum)


def shared_orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """All matrices made orthogonal; where several processes train in step, each does its share of them."""
    if not distributed.is_initialized():
        return orthogonal(matrices)
    mine = slice(distributed.get_rank(), None, distributed.get_world_size())
    result = torch.zeros_like(matrices)
    if len(matrices[mine]):
        result[mine] = orthogonal(matrices[mine])
    distributed.all_reduce(result)
    return result


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Push all singular values of a stack of matrices towards one by five steps of a quintic iteration."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(5):
        square = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.transpose(1, 2) if tall else x
