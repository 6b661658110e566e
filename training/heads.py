"""The projection head: pooled backbone feature to the shared space. Used in training only, thrown away at export.

The paper's head is Linear - BatchNorm - ReLU - Linear for ResNets and the same without BatchNorm for ViTs; a bias in front
of BatchNorm would be cancelled by it, so there is none.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["linear", "mlp"]


class ProjectionHead(nn.Module):
    """[b, num_features] -> [b, dim] of unit length, float32 whatever the autocast."""

    def __init__(self, num_features: int, dim: int, kind: Kind, *, batch_norm: bool) -> None:
        super().__init__()
        self.layers: nn.Module
        if kind == "linear":
            self.layers = nn.Linear(num_features, dim, bias=False)
        else:
            hidden = 2 * dim
            norm = nn.BatchNorm1d(hidden) if batch_norm else nn.Identity()
            self.layers = nn.Sequential(
                nn.Linear(num_features, hidden, bias=not batch_norm), norm, nn.ReLU(), nn.Linear(hidden, dim)
            )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        """Projects and normalises."""
        projected: Tensor = self.layers(features)
        return torch.nn.functional.normalize(projected.float(), dim=-1)
