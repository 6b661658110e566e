"""The projections into the shared space. Used in training only, thrown away at export.

The paper's head (pooled backbone feature to the shared space) is Linear - BatchNorm - ReLU - Linear for
ResNets and the same without BatchNorm for ViTs; a bias in front of BatchNorm would be cancelled by it, so
there is none.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["linear", "mlp", "narrow"]
"""narrow: the paper's, whose hidden layer is no wider than the backbone's feature. At 2 d, beside a backbone
of some hundred thousand parameters, the head is as large as what it is to teach."""


class ProjectionHead(nn.Module):
    """[b, num_features] -> [b, dim] of unit length, float32 whatever the autocast."""

    def __init__(self, num_features: int, dim: int, kind: Kind, *, batch_norm: bool) -> None:
        super().__init__()
        self.layers: nn.Module
        if kind == "linear":
            self.layers = nn.Linear(num_features, dim, bias=False)
        else:
            hidden = 2 * dim if kind == "mlp" else min(2 * dim, num_features)
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


class TextProjection(nn.Module):
    """[B, D] text embeddings -> [B, dim] of unit length by one learned linear map; rows of zeros (no text)
    stay zeros."""

    def __init__(self, text_dim: int, dim: int, basis_Dd: Tensor | None = None) -> None:
        """Starts from a random orthogonal map, or from `basis_Dd` ([D, dim], such as the leading principal
        components).

        Raises:
            ValueError: a basis of another shape.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, text_dim))
        if basis_Dd is None:
            nn.init.orthogonal_(self.weight)
        elif basis_Dd.shape == (text_dim, dim):
            with torch.no_grad():
                self.weight.copy_(basis_Dd.T)
        else:
            message = (
                f"basis of shape {tuple(basis_Dd.shape)}: must be ({text_dim}, {dim}), a column for each "
                "direction kept."
            )
            raise ValueError(message)

    def forward(self, vectors_BD: Tensor) -> Tensor:
        """Projects and normalises, in the weight's precision (float32) whatever the autocast."""
        with torch.autocast(vectors_BD.device.type, enabled=False):
            projected = torch.nn.functional.linear(vectors_BD.to(self.weight.dtype), self.weight)
            return torch.nn.functional.normalize(projected, dim=-1)
