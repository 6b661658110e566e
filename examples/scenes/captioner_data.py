"""The captioner's lessons: thumbnails of fresh scenes, their captions, the prompts, and what lies under every patch.

Nothing to run here; `train_captioner.py` and `evaluate_captioner.py` use it.
Sixty thousand lessons take about two minutes to draw on two cores and 750 MB of memory.
"""

from __future__ import annotations

import math
import multiprocessing
import random
from dataclasses import dataclass

import numpy as np
from draw import thumbnail_of
from numpy.typing import NDArray
from scene import BACKGROUND_COLOURS, BACKGROUND_KINDS, CLASSES, COLOURS, SHAPES, SIZES, TEXTURES, Scene, caption_of

SIDE, PATCH = 64, 8
GRID = SIDE // PATCH
PROMPTS = (
    "Describe this image in detail.",
    "Describe the image.",
    "Describe this image.",
    "Describe the image in detail.",
    "Describe this picture in detail.",
    "Please describe this image.",
    "What is in this image?",
    "What does the picture show?",
    "Write a caption for this image.",
    "Caption this image.",
    "Give a detailed description of the image.",
    "Write one detailed sentence about what you see in this picture.",
)
LABELLED_PROMPTS = (
    "Describe this image of {label} in detail.",
    "Describe this image of {label}.",
    "Describe the image of {label} in detail.",
    "Please describe this picture of {label} in detail.",
    "This is an image of {label}. Describe it in detail.",
    "Describe this image, which belongs to the class {label}, in detail.",
    "Class: {label}. Describe the image.",
    "Caption this photo of {label}.",
)
# What each patch is asked about while training; 0 stands for "no object here".
PATCH_FIELDS = {
    "shape": ("", *SHAPES),
    "colour": ("", *COLOURS),
    "texture": ("", *TEXTURES),
    "size": ("", *SIZES),
    "background_colour": BACKGROUND_COLOURS,
    "background_kind": BACKGROUND_KINDS,
}


@dataclass
class Lessons:
    """Thumbnails (n, side, side, 3), the answers for every patch (n, patches, fields), captions and class names."""

    images: NDArray[np.uint8]
    patches: NDArray[np.int8]
    captions: list[str]
    labels: list[str]


def draw_lessons(count: int, seed: int, split: str, workers: int = 2, start: int = 0) -> Lessons:
    """Fresh scenes of all classes in turn; numbers `start` to `start + count` of this seed and split."""
    jobs = [(seed, split, CLASSES[i % len(CLASSES)], i // len(CLASSES), SIDE) for i in range(start, start + count)]
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    patches = np.empty((count, GRID * GRID, len(PATCH_FIELDS)), np.int8)
    captions, labels = [], []
    with multiprocessing.get_context("spawn").Pool(max(1, workers)) as pool:
        for i, (raw, scene) in enumerate(pool.imap(thumbnail_of, jobs, chunksize=64)):
            images[i] = np.frombuffer(raw, np.uint8).reshape(SIDE, SIDE, 3)
            patches[i] = patch_answers(scene)
            captions.append(caption_of(scene))
            labels.append(scene.label)
    return Lessons(images, patches, captions, labels)


def patch_answers(scene: Scene) -> NDArray[np.int8]:
    """For every patch the object over it (or none) in the first four fields, else the background; -1 is not asked."""
    width, height = (side / min(scene.width, scene.height) for side in (scene.width, scene.height))
    row, column = np.divmod(np.arange(GRID * GRID), GRID)
    x, y = (column + 0.5) / GRID * width, (row + 0.5) / GRID * height
    answers = np.zeros((GRID * GRID, len(PATCH_FIELDS)), np.int8)
    answers[:, 4] = BACKGROUND_COLOURS.index(scene.background_colour)
    answers[:, 5] = BACKGROUND_KINDS.index(scene.background_kind)
    for thing in (scene.second, scene.first, *scene.distractors):  # an inner object last, over the outer one
        covered = np.hypot(x - thing.x, y - thing.y) < 0.42 * thing.diameter
        # The patch of the centre always counts: a tiny object may lie between four patch centres.
        covered[int(thing.y / height * GRID) * GRID + int(thing.x / width * GRID)] = True
        for i, name in enumerate(("shape", "colour", "texture", "size")):
            answers[covered, i] = PATCH_FIELDS[name].index(getattr(thing, name))
        answers[covered, 4:] = -1
    return answers


def prompt_for(label: str, chance: random.Random) -> str:
    """Half the time no label; else the true one in one of its spellings, now and then a word that says nothing."""
    if chance.random() < 0.5:
        return chance.choice(PROMPTS)
    # The two phrasings that the pipeline uses get a larger share than the paraphrases.
    template = LABELLED_PROMPTS[0] if chance.random() < 0.4 else chance.choice(LABELLED_PROMPTS)
    return template.format(label=_spelling(label, chance))


def _spelling(label: str, chance: random.Random) -> str:
    roll = chance.random()
    if roll < 0.1:
        return _any_word(chance)
    if roll < 0.5:
        return label
    return label.replace("-", "_" if roll < 0.55 else " ")


def _any_word(chance: random.Random) -> str:
    """Something of no meaning: letters, digits or any other characters, so that odd labels do no harm."""
    alphabet = chance.choice(("abcdefghijklmnopqrstuvwxyz", "abcdeiounrst ", "n0123456789", "àéîõüßøçñ日本語中文кошка"))
    return "".join(chance.choice(alphabet) for _ in range(chance.randint(2, 12))).strip() or "thing"


def learning_rate(step: int, steps: int, warm_up: int) -> float:
    """The share of the peak rate: a linear rise, then half a cosine down to nothing."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
