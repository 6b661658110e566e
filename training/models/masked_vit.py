"""A timm ViT that predicts features of masked patches: from mask tokens at its input (BEiT, arXiv
2106.08254), or from the visible patches alone with a light decoder behind it (MAE, arXiv 2111.06377).

The ViT itself stays timm's, with its names of weights; only the way through it is written out here.
"""

from __future__ import annotations

import math
from typing import Any

import timm
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pipeline.errors import SettingsError


def grid_of(vit: nn.Module, name: str, image_size: int) -> tuple[int, int]:
    """(patches along an edge, pixels of a patch's edge) of a ViT that can be masked.

    Raises:
        SettingsError: it is no plain ViT.
    """
    timm_model: Any = vit
    plain = isinstance(vit, timm.models.VisionTransformer)
    if not plain or timm_model.attn_pool is not None or timm_model.patch_embed.patch_size is None:
        message = (
            f"backbone={name}: is no plain ViT of timm's, whose patches can be masked; take one such as "
            "vit_small_patch16_224 or deit3_small_patch16_224."
        )
        raise SettingsError(message)
    patch = int(timm_model.patch_embed.patch_size[0])
    return image_size // patch, patch


def initialised(parameter: Tensor) -> nn.Parameter:
    """As ViTs initialise tokens: a truncated normal of 0.02."""
    return nn.Parameter(nn.init.trunc_normal_(parameter, std=0.02))


class MaskTokens(nn.Module):
    """All patches go through the ViT, masked ones as one learned token; a linear map predicts features."""

    def __init__(self, width: int, dim: int) -> None:
        """Of a ViT of `width`, towards features of `dim`."""
        super().__init__()
        self.mask_token = initialised(torch.zeros(1, 1, width))
        self.linear = nn.Linear(width, dim)

    def forward(self, vit: Any, images: Tensor, masked: Tensor) -> Tensor:
        """[b, N, dim] predictions for [b, 3, S, S] images, of which [b, N] patches are masked."""
        patches = vit.patch_embed(images)
        # [b, N, C], or [b, H, W, C] of a ViT that takes any size.
        where = masked.view(*patches.shape[:-1], 1)
        patches = torch.where(where, self.mask_token.to(patches.dtype), patches)
        found: Tensor = self.linear(_through(vit, vit._pos_embed(patches))[:, vit.num_prefix_tokens :])
        return found


class Decoder(nn.Module):
    """Only visible patches go through the ViT; a few narrow blocks see them and mask tokens, and a linear map
    predicts features. Positions of the decoder are fixed sines and cosines."""

    def __init__(self, width: int, dim: int, grid: int, visible: int, *, narrow: int, depth: int) -> None:
        """Of a ViT of `width` that sees so many patches of a grid; `depth` blocks of `narrow`, a multiple of
        64; towards features of `dim`."""
        super().__init__()
        self.visible = visible
        self.embed = nn.Linear(width, narrow)
        self.mask_token = initialised(torch.zeros(1, 1, narrow))
        self.positions: Tensor
        self.register_buffer("positions", sines(grid, narrow), persistent=False)
        self.blocks = nn.Sequential(*(Block(narrow, narrow // 64, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(narrow, eps=1e-6)
        self.linear = nn.Linear(narrow, dim)

    def forward(self, vit: Any, images: Tensor, masked: Tensor) -> Tensor:
        """See `MaskTokens.forward`; each row of `masked` leaves `visible` patches."""
        embedded, first = vit._pos_embed(vit.patch_embed(images)), vit.num_prefix_tokens
        # Visible patches first, each kind in its order.
        order = masked.to(torch.uint8).argsort(dim=1, stable=True)
        kept = order[:, : self.visible]
        visible = _rows(embedded[:, first:], kept)
        seen = self.embed(_through(vit, torch.cat([embedded[:, :first], visible], 1)))
        tokens = self.mask_token.to(seen.dtype).expand(len(seen), masked.shape[1], -1)
        places = kept[..., None].expand(-1, -1, seen.shape[-1])
        patches = tokens.scatter(1, places, seen[:, first:]) + self.positions.to(seen.dtype)
        decoded = self.norm(self.blocks(torch.cat([seen[:, :first], patches], 1)))
        found: Tensor = self.linear(decoded[:, first:])
        return found


def _through(vit: Any, tokens: Tensor) -> Tensor:
    """[b, n, C] embedded tokens to those of the last layer behind the norm that the classifier would see."""
    tokens = vit.norm_pre(tokens)
    if vit.grad_checkpointing:
        from timm.models import checkpoint_seq

        tokens = checkpoint_seq(vit.blocks, tokens)
    else:
        tokens = vit.blocks(tokens)
    found: Tensor = vit.fc_norm(vit.norm(tokens))
    return found


def _rows(tokens: Tensor, order: Tensor) -> Tensor:
    """[b, k, C] of [b, n, C] by [b, k] places."""
    return tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[-1]))


def sines(grid: int, width: int) -> Tensor:
    """[1, grid * grid, width] fixed positions: of row and column, a sine and a cosine of falling frequency
    each (arXiv 1706.03762, in two dimensions as in MAE)."""
    count = width // 4
    rates = torch.exp(-math.log(10000.0) * torch.arange(count, dtype=torch.float64) / count)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * rates
    one = torch.cat([angles.sin(), angles.cos()], 1)
    both = torch.cat([one[None].expand(grid, -1, -1), one[:, None].expand(-1, grid, -1)], -1)
    return both.reshape(1, grid**2, 4 * count).float()
