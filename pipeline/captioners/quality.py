"""Captions not worth training on: refusals, endless repetition, cut-off ends; and pictures that never reached
the model.

Recognised by their words, in English, which is what the prompts ask for. A refusal or an empty answer is an
error of its row (training gives that picture no text, `retry` asks again); a doubtful caption stays and is
marked in its `flag`.
"""

from __future__ import annotations

import re

REFUSAL = re.compile(
    r"\s*(?:i(?:'m| am) (?:sorry|unable|not able|afraid)|i (?:cannot|can(?:'|no)t|do not|don't|am not able "
    r"to|won't) (?:assist|help|describe|see|view|provide|process|identify|access|fulfil|comply|create|have "
    r"access|discuss)|sorry,|unfortunately, i|"
    r"as an ai|no image (?:was|is|has been)|(?:the|your) (?:image|picture) (?:is missing|was not|did "
    r"not|could not)|please (?:provide|upload|attach|share) (?:an|the|your) (?:image|picture|photo))",
    re.IGNORECASE,
)
# Up to 8 words, four times in a row.
LOOP = re.compile(r"(\b\w+(?:\W+\w+){0,7}?)(?:\W+\1\b){3,}", re.IGNORECASE)


def refusal(answer: str) -> bool:
    """Whether the model declines to answer, or says that it sees no picture."""
    return REFUSAL.match(answer.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")) is not None


def repetition(caption: str) -> bool:
    """Whether the model fell into a loop: a phrase four times in a row, or hardly any new triple of words in
    a long one."""
    words = re.findall(r"\w+", caption.lower())
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return LOOP.search(caption) is not None or (len(triples) >= 40 and len(set(triples)) < len(triples) / 2)


def flag(captions: list[str], finish_reason: str | None) -> str | None:
    """The mark of a caption that is doubtful: `repetition` before `cut`, which it usually ends in; None for a
    good one."""
    if any(map(repetition, captions)):
        return "repetition"
    return "cut" if finish_reason == "length" else None


def check_picture_reached(prompt_tokens: int | None, text_tokens: int) -> str | None:
    """An error when a prompt with its picture is no longer than without: the engine dropped the picture
    silently."""
    if prompt_tokens is None or prompt_tokens > text_tokens:
        return None
    return (
        f"the picture did not reach the model: {prompt_tokens} prompt tokens, {text_tokens} of them without "
        "a picture; is it a vision model with a chat template that places pictures?"
    )
