"""The captioner's lessons: thumbnails of fresh scenes, their captions, the prompts, and what lies under every
patch.

Nothing to run here; `train_captioner.py` and `evaluate_captioner.py` use it.
A core draws some 250 lessons a second, and each takes 12 kB of memory.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from draw import thumbnail_of
from numpy.typing import NDArray
from scene import (
    BACKGROUND_COLOURS,
    BACKGROUND_KINDS,
    COLOURS,
    RELATION_CLASSES,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    caption_of,
    sample_scene,
)

Batch = dict[str, torch.Tensor]

SPECIAL = PAD, IMAGE, USER, ASSISTANT, END = "<|pad|>", "<image>", "<|user|>", "<|assistant|>", "<|end|>"
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
    """Thumbnails (n, side, side, 3), the answers for every patch (n, patches, fields), captions and class
    names."""

    images: NDArray[np.uint8]
    patches: NDArray[np.int8]
    captions: list[str]
    labels: list[str]


def draw_lessons(start: int, count: int, seed: int, split: str) -> Lessons:
    """Fresh scenes of all classes in turn; numbers `start` to `start + count` of this seed and split."""
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    patches = np.empty((count, GRID * GRID, len(PATCH_FIELDS)), np.int8)
    captions, labels = [], []
    for row, number in enumerate(range(start, start + count)):
        label, index = RELATION_CLASSES[number % len(RELATION_CLASSES)], number // len(RELATION_CLASSES)
        raw, scene = thumbnail_of((seed, split, label, index, SIDE))
        images[row] = np.frombuffer(raw, np.uint8).reshape(SIDE, SIDE, 3)
        patches[row] = patch_answers(scene)
        captions.append(caption_of(scene))
        labels.append(label)
    return Lessons(images, patches, captions, labels)


def sample_captions(count: int, seed: int) -> list[str]:
    """Captions alone, which cost no drawing: what the tokenizer learns its words from."""
    numbers = (
        (RELATION_CLASSES[i % len(RELATION_CLASSES)], i // len(RELATION_CLASSES)) for i in range(count)
    )
    return [caption_of(sample_scene(seed, "captioner-words", label, index)) for label, index in numbers]


def patch_answers(scene: Scene) -> NDArray[np.int8]:
    """For every patch the object over it (or none) in the first four fields, else the background; -1 is not
    asked."""
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
    """Half the time no label; else the true one in one of its spellings, now and then a word that says
    nothing."""
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
    alphabet = chance.choice(
        ("abcdefghijklmnopqrstuvwxyz", "abcdeiounrst ", "n0123456789", "àéîõüßøçñ日本語中文кошка")
    )
    return "".join(chance.choice(alphabet) for _ in range(chance.randint(2, 12))).strip() or "thing"


def pixels_of(images: NDArray[np.uint8]) -> torch.Tensor:
    """What the exported image processor makes of thumbnails: mean 0.5, deviation 0.25, channels first."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 63.75 - 2


class Batches:
    """Cuts lessons into batches; prompts are drawn anew each time a lesson comes round."""

    def __init__(self, lessons: Lessons, tokenizer: Any, seed: int) -> None:
        self.lessons, self.tokenizer, self.chance = lessons, tokenizer, random.Random(seed)
        self.known: dict[str, list[int]] = {}
        self.user, self.assistant, self.end = tokenizer.convert_tokens_to_ids([USER, ASSISTANT, END])

    def forever(self, size: int) -> Iterator[Batch]:
        """Shuffled passes over all lessons without end."""
        order = list(range(len(self.lessons.captions)))
        while True:
            self.chance.shuffle(order)
            for start in range(0, len(order) - size + 1, size):
                numbers = order[start : start + size]
                yield self.batch(numbers, [prompt_for(self.lessons.labels[i], self.chance) for i in numbers])

    def batch(self, numbers: Sequence[int], prompts: Sequence[str]) -> Batch:
        """Tokens without the image's own, which target they ask for, the pixels and the patches' answers."""
        fronts = [[self.user, *self._encode(prompt), self.assistant] for prompt in prompts]
        captions = [[*self._encode(self.lessons.captions[i]), self.end] for i in numbers]
        longest = max(len(front) + len(caption) for front, caption in zip(fronts, captions, strict=True))
        tokens = torch.full((len(fronts), longest), self.end)
        asked = torch.zeros((len(fronts), longest - 1), dtype=torch.bool)
        for row, (front, caption) in enumerate(zip(fronts, captions, strict=True)):
            tokens[row, : len(front) + len(caption)] = torch.tensor(front + caption)
            asked[row, len(front) - 1 : len(front) + len(caption) - 1] = True
        patches = torch.from_numpy(self.lessons.patches[list(numbers)]).long()
        pixels = pixels_of(self.lessons.images[list(numbers)])
        return {"tokens": tokens, "asked": asked, "pixels": pixels, "patches": patches}

    def _encode(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.known[text]
