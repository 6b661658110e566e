"""Files of weights in the layout of the authors' package, hiera-transformer: a classifier's, or of a masked
autoencoder's encoder, fusion and decoder.

The authors' own weights (dl.fbaipublicfiles.com/hiera, and those tagged mae on the hub) are under CC BY-NC
4.0: free to use with attribution, not for commercial purposes; the package's code is under Apache 2.0.
Nothing is fetched from here.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pipeline.errors import SettingsError

LICENCE = "the weights that the authors of Hiera publish are under CC BY-NC 4.0, not for commercial use"
_ENCODER = {"encoder_norm.": "head.norm.", "norm.": "head.norm.", "head.projection.": "head.fc."}
_DECODER = {
    "multi_scale_fusion_heads.": "fusion.heads.",
    "decoder_": "decoder.",
    "mask_token": "decoder.mask_token",
}


def is_file(path: str) -> bool:
    """Whether a name is one of a file of weights."""
    return path.endswith((".safetensors", ".pth"))


def read(path: str) -> dict[str, Tensor]:
    """The tensors of a file, of a .pth those under `model_state` where it has that; no code in it is run.

    Raises:
        SettingsError: it is not there, or holds more than tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        message = (
            f"{path}: cannot be read as weights ({str(error).splitlines()[0]}); only tensors are loaded."
        )
        raise SettingsError(message) from None
    found = found.get("model_state", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        message = f"{path}: holds no weights by name."
        raise SettingsError(message)
    return found


def of_backbone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the encoder, by timm's names, which may be theirs already."""
    kept = {name: value for name, value in tensors.items() if not name.startswith(tuple(_DECODER))}
    return {_renamed(name, _ENCODER): value for name, value in kept.items()}


def of_decoder(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of fusion and decoder, by the names of `objectives.mae.MaeTask`; empty for a classifier's."""
    return {
        _renamed(name, _DECODER): value for name, value in tensors.items() if name.startswith(tuple(_DECODER))
    }


def resized_positions(positions: Tensor, grid: Sequence[int], window: Sequence[int]) -> Tensor:
    """[1, N, C] position embeddings for the tokens of another square grid, as they are where it is their own.

    What repeats from mask unit to mask unit is apart from the rest: the mean unit is laid out anew, and only
    what is left is interpolated, since units do not grow with the picture ("Window Attention is Bugged",
    arXiv 2311.05613, section 4).
    """
    edge = math.isqrt(positions.shape[1])
    fits = positions.ndim == 3 and edge**2 == positions.shape[1] and edge % window[0] == 0
    if not fits or edge == grid[0]:
        return positions
    plane = positions.float().transpose(1, 2).reshape(1, -1, edge, edge)
    units = plane.unfold(2, window[0], window[0]).unfold(3, window[1], window[1])
    mean = units.mean((2, 3))
    rest = plane - mean.tile(1, 1, edge // window[0], edge // window[1])
    larger = interpolate(rest, size=tuple(grid), mode="bicubic", antialias=True)
    laid: Tensor = larger + mean.tile(1, 1, grid[0] // window[0], grid[1] // window[1])
    return laid.flatten(2).transpose(1, 2).to(positions.dtype)


def fill_decoder(task: nn.Module, path: str) -> bool:
    """Loads fusion and decoder of a masked autoencoder from its file; whether that has them, else they stay
    as they are.

    Raises:
        SettingsError: they are of another size, or some of them are missing.
    """
    weights, own = of_decoder(read(path)), task.state_dict()
    if not weights:
        return False
    needed = {name: value.shape for name, value in own.items() if not name.startswith("backbone.")}
    found = {name: value.shape for name, value in weights.items()}
    if needed != found:
        theirs = _sizes(found)
        if theirs is None or theirs == _sizes(needed):
            wrong = sorted(name for name in needed | found if needed.get(name) != found.get(name))
            message = (
                f"init_from={path}: its fusion and decoder do not fit ({wrong[0]}"
                f"{f' and {len(wrong) - 1} more' * (len(wrong) > 1)}); pass a file that has all of them, or "
                "one that has the encoder alone."
            )
            raise SettingsError(message)
        width, depth, size = theirs
        message = (
            f"init_from={path}: its decoder is another one; that has --decoder-width {width} --decoder-depth "
            f"{depth} --image-size {size}."
        )
        raise SettingsError(message)
    task.load_state_dict(weights, strict=False, assign=own["decoder.mask_token"].is_meta)
    return True


def _sizes(shapes: Mapping[str, Sequence[int]]) -> tuple[int, int, int] | None:
    """(width, depth, image size) of a decoder; None of a part of one."""
    try:
        (width,), (pixels,) = shapes["decoder.norm.weight"], shapes["decoder.pred.bias"]
        _, patches, _ = shapes["decoder.pos_embed"]
    except (KeyError, ValueError):
        return None
    depth = sum(name.endswith(".attn.proj.bias") for name in shapes)
    return width, depth, math.isqrt(patches * pixels // 3)


def _renamed(name: str, table: dict[str, str]) -> str:
    for theirs, ours in table.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name
