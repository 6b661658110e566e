"""What every captioner is: built once with its settings, then called with pictures and prompts, giving one caption each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Caption:
    """One description, or the reason why there is none. Token counts are the engine's, over all of a picture's captions.

    `flag` marks a caption that is there but doubtful (`cut`, `repetition`); `others` are further captions of the same picture.
    """

    text: str | None = None
    others: list[str] | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None
    flag: str | None = None
    error: str | None = None


class Captioner(Protocol):
    """Loads in `__init__`; a call may take any number of pictures."""

    def __call__(self, images: list[Image.Image], prompts: list[str], ids: list[str]) -> list[Caption]:
        """One caption for each RGB picture, in order. Failures of single pictures are captions with an error."""
        ...


def finish(text: str, **counts: int | str | None) -> Caption:
    """A caption from an engine's text: white space trimmed, an empty one marked as an error."""
    text = " ".join(text.split())
    error = None if text else "empty caption: the model stopped at once; try another prompt or model"
    return Caption(text=text or None, error=error, **counts)  # type: ignore[arg-type]
