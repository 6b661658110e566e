"""What every captioner is: built once with its settings, then called with pictures and prompts, giving one
caption each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from PIL import Image

from pipeline.captioners import quality

_Row = TypeVar("_Row")


@dataclass(frozen=True, kw_only=True)
class Caption:
    """One description, or the reason why there is none. Token counts are the engine's, over all of a
    picture's captions.

    `flag` marks a caption that is there but doubtful (`cut`, `repetition`); `others` are further captions of
    the same picture.
    """

    caption: str | None = None
    others: list[str] | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None
    flag: str | None = None
    error: str | None = None


class Captioner(Protocol):
    """Loads in `__init__`; a call may take any number of pictures."""

    def __call__(self, pictures: list[Image.Image], prompts: list[str], ids: list[str]) -> list[Caption]:
        """One caption for each RGB picture, in order. Failures of single pictures are captions with an
        error."""
        ...


@runtime_checkable
class HasProcess(Protocol):
    """A captioner whose engine may be a process of its own, whose death a call need not notice."""

    def is_dead(self) -> bool:
        """Whether the engine's process has ended."""
        ...


def finish(
    answers: list[str],
    *,
    prompt_tokens: int | None = None,
    output_tokens: int | None = None,
    finish_reason: str | None = None,
    text_tokens: int = 0,
) -> Caption:
    """A caption from an engine's answers: white space trimmed; empty answers and refusals are errors, loops
    and cut ends marked.

    Args:
        answers: the engine's, one or more; what is not a caption is left out of `others`.
        prompt_tokens: tokens of the prompt, its picture included.
        output_tokens: tokens of all answers.
        finish_reason: `stop`, or `length` for an answer that was cut.
        text_tokens: tokens of the prompt without its picture, 0 where that is not known.
    """
    trimmed = [" ".join(answer.split()) for answer in answers]
    good = [answer for answer in trimmed if answer and not quality.refusal(answer)]
    error = quality.check_picture_reached(prompt_tokens, text_tokens) if text_tokens else None
    if not good and error is None:
        said = next((answer for answer in trimmed if answer), None)
        error = (
            f"refusal: {said[:200]}"
            if said
            else "empty caption: the model stopped at once; try another prompt or model"
        )
    return Caption(
        caption=None if error else good[0],
        others=None if error or len(answers) == 1 else good[1:],
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        finish_reason=finish_reason,
        flag=None if error else quality.flag(good, finish_reason),
        error=error,
    )


def in_halves(
    rows: list[_Row],
    caption: Callable[[list[_Row]], list[Caption]],
    refusals: tuple[type[Exception], ...] = (ValueError,),
) -> list[Caption]:
    """Captions of all rows by an engine that refuses a whole call, with one of `refusals`, for one bad row:
    halving finds that.

    It takes 1 + 2 log2(n) calls for one bad row of n, and the others keep being computed together.
    """
    if not rows:
        return []
    try:
        return caption(rows)
    except refusals as error:
        if len(rows) == 1:
            # vLLM's own text quotes the picture's array; what the processor said of it is the cause.
            return [Caption(error=f"refused by the engine: {error.__cause__ or error}"[:500])]
    middle = len(rows) // 2
    return in_halves(rows[:middle], caption, refusals) + in_halves(rows[middle:], caption, refusals)
