"""What the texts of a class's pictures have in common: their mean, how far single ones lie from it, in which
directions classes differ, and which class is like which.

Fitted on the pictures that are trained on, streaming over their shards in float64, and kept in the store
where these are a whole split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.errors import SettingsError
from pipeline.store import Store
from training.data.texts.vectors import Array, classes_of, kept, rows_of

NOTHING = 1e-6
"""Share of the largest variance between classes below which a direction tells nothing of them."""


@dataclass(frozen=True)
class Described:
    """The described pictures whose labels may be looked at."""

    store: Store
    embeddings: str
    split: str
    rows: Mapping[int, Array] | None = None
    """Rows by shard, where they are few of the split; None: all of it."""

    def texts(self) -> Iterator[tuple[Array, Array]]:
        """([n, D] float64 vectors, [n] classes) of each shard; of pictures that have both."""
        if self.rows is None:
            yield from map(self._of_shard, self.store.split_shards(self.split))
        else:
            yield from self._few

    @cached_property
    def _few(self) -> list[tuple[Array, Array]]:
        return [self._of_shard(shard) for shard in sorted(self.rows or ())]

    def _of_shard(self, shard: int) -> tuple[Array, Array]:
        vectors = rows_of(
            self.store.read_shard("embeddings", self.embeddings, shard, ["embedding"])["embedding"]
        )
        classes = classes_of(self.store, shard)
        present = (np.abs(vectors).sum(1) > 0) & (classes >= 0)
        if self.rows is not None:
            chosen = np.zeros(len(present), dtype=bool)
            chosen[self.rows[shard]] = True
            present &= chosen
        return vectors[present].astype(np.float64), classes[present]

    def once(self, what: str, fit: Callable[[], dict[str, Array]]) -> dict[str, Array]:
        """What `fit` finds; of a whole split it is kept."""
        return kept(self.store, self.embeddings, self.split, what, fit) if self.rows is None else fit()


def means(described: Described) -> Array:
    """[C, D] float32 mean embedding of the described pictures of each class; zero where there is none."""

    def fit() -> dict[str, Array]:
        count = len(described.store.dataset.classes)
        sums, pictures = np.zeros((count, 0)), np.zeros(count)
        for vectors, classes in described.texts():
            sums = sums if sums.shape[1] else np.zeros((count, vectors.shape[1]))
            np.add.at(sums, classes, vectors)
            pictures += np.bincount(classes, minlength=count)
        return {"means": (sums / np.maximum(pictures, 1)[:, None]).astype(np.float32)}

    return described.once("class-means", fit)["means"]


def shrinkage(described: Described) -> float:
    """within / (within + between) of the variance components of texts, summed over the D dimensions (one-way
    random-effects analysis of variance, one minus the intraclass correlation): the more texts of a class
    differ from each other, the nearer to 1.

    Raises:
        SettingsError: no class has two described pictures, or less than two classes have any.
    """

    def fit() -> dict[str, Array]:
        centres, pictures = _counted(described)
        squares = sum(
            float(((vectors - centres[classes]) ** 2).sum()) for vectors, classes in described.texts()
        )
        total, groups = pictures.sum(), int((pictures > 0).sum())
        if groups < 2 or total == groups:
            message = (
                f"embeddings={described.embeddings}: of the split {described.split} {total:.0f} pictures of "
                f"{groups} classes have a description; how texts vary within classes takes two of some. Pass "
                "--class-target shrunk."
            )
            raise SettingsError(message)
        away = centres - (pictures @ centres) / total
        within = squares / (total - groups)
        size = (total - (pictures**2).sum() / total) / (groups - 1)  # of a class, all of one size: that
        between = max(0.0, (float(pictures @ (away**2).sum(1)) / (groups - 1) - within) / size)
        return {"components": np.array([within, between])}

    within, between = described.once("class-variance", fit)["components"].tolist()
    return within / (within + between) if within + between > 0 else 1.0


def directions(described: Described) -> tuple[Array, int]:
    """([D, D] float32 projector on the directions in which mean texts of classes differ, how many they are).

    Raises:
        SettingsError: less than two classes have texts that differ.
    """

    def fit() -> dict[str, Array]:
        centres, pictures = _counted(described)
        away = centres - (pictures @ centres) / max(1, pictures.sum())
        variance, basis = np.linalg.eigh((away * pictures[:, None]).T @ away)
        basis = basis[:, variance > NOTHING * max(variance[-1], 1e-12)]
        return {"projector": (basis @ basis.T).astype(np.float32), "kept": np.array([basis.shape[1]])}

    found = described.once("class-directions", fit)
    if not (kept_ := int(found["kept"][0])):
        message = (
            f"embeddings={described.embeddings}: texts of the split {described.split} tell no classes apart; "
            "pass --class-target shrunk."
        )
        raise SettingsError(message)
    return found["projector"], kept_


def _counted(described: Described) -> tuple[Array, Array]:
    """([C, D] means, [C] described pictures)."""
    centres = means(described).astype(np.float64)
    pictures = np.zeros(len(centres))
    for _, classes in described.texts():
        pictures += np.bincount(classes, minlength=len(pictures))
    return centres, pictures


def similar(described: Described, temperature: float) -> Array:
    """[C, C] float32, rows sum to 1: to which other classes each class's mean text is how similar, the
    softmax of their cosines, without the mean of all, / `temperature`. A class that has no text, or no other
    to be similar to, is itself alone.

    Raises:
        SettingsError: no picture has a text.
    """
    centres = means(described).astype(np.float64)
    known = np.abs(centres).sum(1) > 0
    if not known.any():
        message = (
            f"embeddings={described.embeddings}: no picture of the split {described.split} that is trained "
            "on has one; leave out --similar-labels."
        )
        raise SettingsError(message)
    away = centres - centres[known].mean(0)
    unit = away / np.maximum(np.linalg.norm(away, axis=1, keepdims=True), 1e-12)
    cosines = np.where(np.outer(known, known), unit @ unit.T, -np.inf)
    np.fill_diagonal(cosines, -np.inf)
    alone = np.isneginf(cosines).all(1)
    cosines[alone, alone] = 0.0
    likeness = np.exp((cosines - cosines.max(1, keepdims=True)) / temperature)
    found: Array = (likeness / likeness.sum(1, keepdims=True)).astype(np.float32)
    return found
