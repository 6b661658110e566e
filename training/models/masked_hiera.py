"""timm's Hiera as a masked autoencoder (arXiv 2306.00989, section 3.1): what it sees, how its stages are
brought together, the decoder, and what that is to predict.

The encoder is timm's own, with its names of weights; what trains beside it stays behind. Shapes: b pictures,
of U mask units k are kept; at the end of the encoder a unit is h x w tokens of width C.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import LayerNorm
from timm.models.hiera import Hiera, HieraBlock, Reroll, undo_windowing
from torch import Tensor, nn

from pipeline.errors import SettingsError


def encoder_of(backbone: nn.Module, name: str) -> Any:
    """The backbone, if it can be one.

    Raises:
        SettingsError: it is no Hiera of timm's.
    """
    if isinstance(backbone, Hiera) and len(backbone.q_stride) == 2:
        return backbone
    message = (
        f"backbone={name}: is no Hiera, whose mask units can be left out; take one of hiera_tiny_224, "
        "hiera_small_224, hiera_base_224, hiera_base_plus_224, hiera_large_224, hiera_huge_224 or, for small "
        "pictures, hiera_nano_64."
    )
    raise SettingsError(message)


def unit_pixels(hiera: Any) -> int:
    """Edge of a mask unit in pixels, of which the edge of an input is a multiple."""
    return int(hiera.patch_stride[0] * hiera.mask_unit_size[0])


def num_units(hiera: Any) -> int:
    """U, the mask units of a picture."""
    return math.prod(hiera.mask_spatial_shape)


def set_pooling(hiera: Any, stages: int) -> None:
    """Lets queries be pooled at the beginning of so many stages.

    Pooling has no weights: 3 is what classifies; 2 is what is pre-trained, whose last stage keeps the tokens
    of the one before.
    """
    for number, end in enumerate(hiera.stage_ends[:-1]):
        pooled = number < stages
        hiera.blocks[end + 1].attn.q_stride = math.prod(hiera.q_stride) if pooled else 1
    hiera.q_pool = stages
    height, width = (n * edge for n, edge in zip(hiera.tokens_spatial_shape, hiera.patch_stride, strict=True))
    schedule = [hiera.q_stride] * (len(hiera.stage_ends) - 1)
    hiera.reroll = Reroll((height, width), hiera.patch_stride, schedule, hiera.stage_ends, stages)


class Fusion(nn.Module):
    """Stage outputs brought to the resolution of the last by strided convolutions, summed, and normalised by
    the encoder's own norm."""

    def __init__(self, hiera: Any) -> None:
        super().__init__()
        last = hiera.blocks[-1].dim_out
        self.heads = nn.ModuleList()
        for number, end in enumerate(hiera.stage_ends[: hiera.q_pool]):
            edge = hiera.q_stride[0] ** (hiera.q_pool - number)
            self.heads.append(nn.Conv2d(hiera.blocks[end].dim_out, last, kernel_size=edge, stride=edge))

    def forward(self, stages: list[Tensor], norm: nn.Module) -> Tensor:
        """[b, k, h, w, C] of the outputs of all stages, [b, k, h', w', C'] each."""
        fused = stages[-1]
        for head, stage in zip(self.heads, stages, strict=False):
            projected = head(stage.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            fused = fused + projected.unflatten(0, stage.shape[:2])
        normalised: Tensor = norm(fused)
        return normalised


class Decoder(nn.Module):
    """Puts mask tokens where units were left out, and predicts the pixels of every patch."""

    def __init__(self, hiera: Any, *, width: int, depth: int, heads: int) -> None:
        super().__init__()
        pooled = hiera.q_stride[0] ** hiera.q_pool
        self.unit = [edge // pooled for edge in hiera.mask_unit_size]
        self.grid = [edge // pooled for edge in hiera.tokens_spatial_shape]
        self.patch = hiera.patch_stride[0] * pooled
        self.embed = nn.Linear(hiera.blocks[-1].dim_out, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.grid), width))
        self.blocks = nn.ModuleList(
            HieraBlock(width, width, heads, norm_layer=LayerNorm) for _ in range(depth)
        )
        self.norm = LayerNorm(width)
        self.pred = nn.Linear(width, hiera.in_chans * self.patch**2)

    def forward(self, seen: Tensor, keep: Tensor) -> Tensor:
        """[b, N, 3 P P] predictions for [b, k, h, w, C] tokens of the units that [b, U] `keep` says."""
        embedded = self.embed(seen)
        # Of each unit which of the kept ones it is; of one left out, any.
        places = (keep.cumsum(1) - 1).clamp(min=0)[..., None, None, None]
        spread = embedded.gather(1, places.expand(-1, -1, *embedded.shape[2:]))
        units = torch.where(keep[..., None, None, None], spread, self.mask_token.to(spread.dtype))
        tokens = undo_windowing(units, self.grid, self.unit).flatten(1, 2) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        predicted: Tensor = self.pred(self.norm(tokens))
        return predicted

    def masked(self, keep: Tensor) -> Tensor:
        """[b, N] bool, which patches were left out."""
        units = keep[..., None, None, None].expand(-1, -1, *self.unit, 1)
        return ~undo_windowing(units, self.grid, self.unit).flatten(1)


def initialise(fusion: Fusion, decoder: Decoder, hiera: Any = None) -> None:
    """As published for pre-training: Xavier-uniform linear maps with biases of 0, LayerNorm 1 and 0, the stem
    as a linear map, positions and mask token a truncated normal of 0.02. Without `hiera` that stays as it
    is."""
    for part in (fusion, decoder) if hiera is None else (hiera, fusion, decoder):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
    if hiera is not None:
        nn.init.xavier_uniform_(hiera.patch_embed.proj.weight.data.flatten(1))
    for parameter in (decoder.mask_token, decoder.pos_embed):
        nn.init.trunc_normal_(parameter, std=0.02)


def patches_of(images: Tensor, edge: int) -> Tensor:
    """[b, N, 3 P P] pixels of the patches of [b, 3, S, S] images, row by row."""
    count, channels, size = images.shape[0], images.shape[1], images.shape[-1] // edge
    split = images.reshape(count, channels, size, edge, size, edge)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(count, size**2, channels * edge**2)


def images_of(patches: Tensor, edge: int) -> Tensor:
    """The inverse of `patches_of`."""
    count, size, channels = len(patches), math.isqrt(patches.shape[1]), patches.shape[2] // edge**2
    split = patches.reshape(count, size, size, channels, edge, edge)
    return split.permute(0, 3, 1, 4, 2, 5).reshape(count, channels, size * edge, size * edge)


def normalised(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """([b, N, D] patches with mean 0 and deviation 1, [b, N, 1] their means, [b, N, 1] their deviations)."""
    deviation, mean = (patches.var(-1, keepdim=True) + 1e-6).sqrt(), patches.mean(-1, keepdim=True)
    return (patches - mean) / deviation, mean, deviation
