"""Which patches of a picture are masked: at random, or in blocks (BEiT, arXiv 2106.08254, algorithm 1).

A mask is a function of (seed, step, sample), so it is the same for any number of workers and in a resumed
run; all masks of a grid and ratio have equally many patches, so that batches are rectangular without them.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from training.data.order import ROW, SHARD

Kind = Literal["blocks", "random"]
BoolArray = npt.NDArray[np.bool_]
SMALLEST = 16 / 196
"""Share of a grid that a block has at least: BEiT's 16 patches of 14 x 14."""
NARROWEST = 0.3
"""A block's ratio of height to width is between this and its inverse."""


def masks(
    kind: Kind, grid: int, ratio: float, seeds: tuple[int, ...], samples: npt.NDArray[Any]
) -> BoolArray:
    """[b, grid * grid], True where a patch is masked, row by row.

    Args:
        kind: blocks, or random patches.
        grid: patches along an edge.
        ratio: share of the patches that is masked.
        seeds: numbers of at least 0, such as seed and step, that draws depend on beside the sample.
        samples: [b, 4], see `order`.
    """
    made = blocks if kind == "blocks" else scattered
    drawn = [np.random.default_rng([*seeds, *map(int, sample)]) for sample in samples]
    found = [made(rng, grid, num_masked(grid, ratio)) for rng in drawn]
    return np.stack(found) if found else np.zeros((0, grid * grid), bool)


def fixed(kind: Kind, grid: int, ratio: float, samples: npt.NDArray[Any]) -> BoolArray:
    """As `masks`, the same for a picture whenever and in whatever run it is asked for."""
    of_pictures = np.zeros_like(samples)
    of_pictures[:, [SHARD, ROW]] = samples[:, [SHARD, ROW]]
    return masks(kind, grid, ratio, (0,), of_pictures)


def num_masked(grid: int, ratio: float) -> int:
    """Masked patches of a picture."""
    return round(ratio * grid**2)


def scattered(rng: np.random.Generator, grid: int, count: int) -> BoolArray:
    """[grid * grid] with `count` random patches masked."""
    mask = np.zeros(grid**2, bool)
    mask[rng.permutation(grid**2)[:count]] = True
    return mask


def blocks(rng: np.random.Generator, grid: int, count: int) -> BoolArray:
    """[grid * grid] with `count` patches masked in rectangles, which may overlap.

    A rectangle's area is drawn between BEiT's least and what is still to mask, its shape evenly in the
    logarithm. The last one may be more than is left: some of its new patches, drawn at random, stay.
    """
    mask = np.zeros((grid, grid), bool)
    least = max(1, round(SMALLEST * grid**2))
    while (left := count - int(mask.sum())) > 0:
        area = rng.uniform(least, max(least, left))
        shape = math.exp(rng.uniform(math.log(NARROWEST), -math.log(NARROWEST)))
        height, width = (min(grid, max(1, round(math.sqrt(area * s)))) for s in (shape, 1 / shape))
        top, start = int(rng.integers(grid - height + 1)), int(rng.integers(grid - width + 1))
        block = np.zeros_like(mask)
        block[top : top + height, start : start + width] = True
        fresh = np.flatnonzero(block & ~mask)
        mask.flat[rng.permutation(fresh)[:left]] = True
    return mask.ravel()
