"""How a frozen tower wants a picture resized and cut: known without the tower, so that a decoder beside a
training can do the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt
from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A picture to a square of `size` pixels."""

    size: int
    resize: int
    """A picture's shorter edge becomes this, and the middle is cut out; 0: the picture is squashed."""
    interpolation: str
    rounds: bool
    """Where the margin is odd: torchvision, and with it timm, rounds half of it (to even), transformers takes
    the pixel below."""

    def at(self, size: int) -> Self:
        """The same middle in another size."""
        return replace(self, size=size, resize=self.resize * size // self.size)

    def __call__(self, picture: Image.Image) -> npt.NDArray[np.uint8]:
        """[S, S, 3] of an RGB picture."""
        kind = Image.Resampling[self.interpolation.upper()]
        if not self.resize:
            return np.asarray(picture.resize((self.size, self.size), kind))
        shorter = min(picture.size)
        width, height = (self.resize * edge // shorter for edge in picture.size)
        picture = picture.resize((width, height), kind)
        margins = [edge - self.size for edge in picture.size]
        left, top = (round(margin / 2) if self.rounds else margin // 2 for margin in margins)
        return np.asarray(picture.crop((left, top, left + self.size, top + self.size)))
