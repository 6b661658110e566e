"""Refusals, loops and cut ends are told from captions."""

from __future__ import annotations

import pytest

from pipeline.captioners import quality
from pipeline.captioners.protocol import finish

GOOD = [
    "A small red circle left of a large blue star on a dark background.",
    "Sorry-looking dog in the rain, its ears hanging; very very wet.",
    "The sign says: I cannot wait! Two children point at it.",
    "A row of houses: a red house, a blue house, a green house, a red house.",
    "An image of a person who is unable to lift a box.",
]


@pytest.mark.parametrize("text", GOOD)
def test_a_caption_is_a_caption(text: str) -> None:
    assert not quality.refusal(text) and not quality.repetition(text)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I\N{RIGHT SINGLE QUOTATION MARK}m unable to view images.",
        "As an AI language model, I have no eyes.",
        "I cannot assist with this request.",
        "No image was provided.",
        "Please upload an image so that I can help.",
        "Unfortunately, I cannot see the picture.",
        "I don't see any picture.",
    ],
)
def test_refusals(text: str) -> None:
    assert quality.refusal(text)
    assert (finish([text]).error or "").startswith("refusal: ")


@pytest.mark.parametrize(
    "text",
    [
        "a red circle circle circle circle on a wall",
        "The dog runs. The dog runs. The dog runs. The dog runs.",
        " ".join(f"there is a {w} and there is" for w in ("cat", "dog") * 20),
    ],
)
def test_loops(text: str) -> None:
    assert quality.repetition(text)
    assert finish([text]).flag == "repetition"


def test_what_is_no_caption_is_an_error_and_what_is_doubtful_is_marked() -> None:
    assert finish(["  "]).error is not None and finish(["  "]).caption is None
    assert finish(["A dog in the"], finish_reason="length").flag == "cut"
    assert finish([" A  dog. "], finish_reason="stop", prompt_tokens=70, text_tokens=10).caption == "A dog."
    assert "did not reach the model" in (finish(["A dog."], prompt_tokens=10, text_tokens=10).error or "")


def test_of_several_answers_the_bad_ones_are_left_out() -> None:
    found = finish(["I'm sorry.", "A dog.", "", "A wet dog."])
    assert (found.caption, found.others, found.error) == ("A dog.", ["A wet dog."], None)
    assert finish(["", "No image was given."]).error == "refusal: No image was given."


def test_a_long_text_is_judged_in_no_time() -> None:
    import time

    start = time.monotonic()
    quality.repetition("word other thing " * 3 + " ".join(f"w{n}" for n in range(3000)))
    assert time.monotonic() - start < 2
