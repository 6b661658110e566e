"""One picture for training or for evaluation, as uint8; what a training view looks like is a function of
(seed, sample).

Crop and flip draw from a generator of their own, so that threads may share a process. RandAugment and colour
jitter are timm's; they draw from the global generators of Python, NumPy and torch, which are seeded for each
view: they need a process without other users of those (`Augment.needs_own_process`). Erasing, mixup and
cutmix work on whole batches, on the device (`views`).
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from pipeline.encoders.cut import Cut
from pipeline.sources import images

Array = npt.NDArray[Any]
ImageArray = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random resized crop, flip and timm's extras for training; resize and centre crop, as timm validates,
    for evaluation."""

    size: int
    crop_scale: float
    flip: float
    crop_pct: float
    interpolation: str
    seed: int
    auto_augment: str = ""
    color_jitter: float = 0.0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    fixed: bool = False
    """Train on the views of evaluation."""
    cut: Cut | None = None
    """A frozen tower's way to cut for evaluation, in place of timm's."""

    @property
    def needs_own_process(self) -> bool:
        """Whether a view draws from global generators."""
        return bool(self.auto_augment or self.color_jitter)

    def train(self, data: bytes, width: int, height: int, sample: Array) -> list[ImageArray]:
        """[S, S, 3] uint8 views of one picture, decoded once.

        Args:
            data: the encoded picture.
            width: its width in pixels as recorded in the store, upright.
            height: its height.
            sample: [n, 4] one row a view (`order.PASS` to `order.REPEAT`), all of the same picture.
        """
        if self.fixed:
            return [self.evaluate(data)] * len(sample)
        generators = [np.random.default_rng([self.seed, *map(int, row)]) for row in sample]
        boxes = [random_box(rng, width, height, self.crop_scale) for rng in generators]
        # A JPEG is decoded at 1/2, 1/4 or 1/8 where even the smallest crop keeps a pixel for every pixel of
        # the view.
        smallest = min(min(box[2] - box[0], box[3] - box[1]) for box in boxes)
        picture = images.decode(
            data, max_pixels=2**62, shrink_to=math.ceil(self.size * min(width, height) / max(smallest, 1))
        )
        scale = picture.width / width, picture.height / height
        return [self._view(picture, box, scale, rng) for box, rng in zip(boxes, generators, strict=True)]

    def _view(
        self, picture: Image.Image, box: Box, scale: tuple[float, float], rng: np.random.Generator
    ) -> ImageArray:
        left, right = _whole_pixels(box[0], box[2], scale[0], picture.width)
        upper, lower = _whole_pixels(box[1], box[3], scale[1], picture.height)
        # torch's resize of uint8 pixels equals Pillow's, of which it is a vectorised form, to the last bit
        # but one, in a fourth of the time (benchmarks/loading.py).
        crop = torch.from_numpy(np.array(picture.crop((left, upper, right, lower))))[None].permute(0, 3, 1, 2)
        resized = torch.nn.functional.interpolate(
            crop, (self.size, self.size), mode="bicubic", antialias=True
        )
        pixels = resized[0].permute(1, 2, 0)
        view: ImageArray = (pixels.flip(1) if rng.random() < self.flip else pixels).numpy()
        if self.needs_own_process:
            # Before the seeds: it may draw itself.
            extras = _extras(self.size, self.auto_augment, self.color_jitter, self.mean)
            draw = int(rng.integers(2**31))
            random.seed(draw)
            np.random.seed(draw)
            torch.manual_seed(draw)
            view = np.asarray(extras(Image.fromarray(view)))
        return view

    def evaluate(self, data: bytes) -> ImageArray:
        """[S, S, 3] uint8: the shorter edge to size / crop_pct, then the centre; or as a tower wants it."""
        from torchvision.transforms.v2 import functional

        image = images.decode(data, max_pixels=2**62)
        if self.cut is not None:
            return self.cut(image)
        edge = math.floor(self.size / self.crop_pct)
        image = functional.resize(
            image, [edge], interpolation=functional.InterpolationMode(self.interpolation)
        )
        return np.asarray(functional.center_crop(image, [self.size, self.size]))


@functools.lru_cache
def _extras(size: int, auto_augment: str, color_jitter: float, mean: Any) -> Any:
    """timm's transform between the flip and the conversion to numbers: RandAugment and its kin, or colour
    jitter."""
    from timm.data.transforms_factory import transforms_imagenet_train

    _, extras, _ = transforms_imagenet_train(
        size,
        hflip=0.0,
        color_jitter=color_jitter or 0.0,
        auto_augment=auto_augment or None,
        interpolation="bicubic",
        mean=mean,
        separate=True,
    )
    return extras


def _whole_pixels(start: float, end: float, scale: float, limit: int) -> tuple[int, int]:
    """The nearest whole pixels of a span, at least one."""
    first = min(round(start * scale), limit - 1)
    return first, min(max(round(end * scale), first + 1), limit)


def random_box(rng: np.random.Generator, width: int, height: int, scale: float) -> Box:
    """A crop with a share of the area in [scale, 1] and an aspect ratio in [3/4, 4/3], as Inception's; else
    the whole."""
    for _ in range(10):
        area = width * height * rng.uniform(scale, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return x, y, x + w, y + h
    return 0, 0, width, height
