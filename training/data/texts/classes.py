"""What the texts of a class's pictures have in common: their mean, how far single ones lie from it, in which
directions classes differ, and which class is like which.

Fitted on the pictures that are trained on, streaming over their shards in float64, and kept in the store
where these are a whole split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

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
        for shard in self.store.split_shards(self.split):
            vectors = rows_of(
                self.store.read_shard("embeddings", self.embeddings, shard, ["embedding"])["embedding"]
            )
            classes = classes_of(self.store, shard)
            present = (np.abs(vectors).sum(1) > 0) & (classes >= 0)
            if self.rows is not None:
                chosen = np.zeros(len(present), dtype=bool)
                chosen[self.rows.get(shard, np.array([], dtype=np.int64))] = True
                present &= chosen
            yield vectors[present].astype(np.float64), classes[present]

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


@dataclass(frozen=True)
class Variation:
    """How texts vary within classes and between them: the variance components of a one-way random-effects
    analysis of variance, summed over the D dimensions."""

    within: float
    between: float
    directions: Array
    """[D, D] float32 projector on the directions in which mean texts of classes differ."""

    @property
    def shrinkage(self) -> float:
        """Weight of the mean of its class in the best linear estimate of what a text says of its class alone:
        one minus the intraclass correlation. 1 where all texts are alike."""
        return self.within / total if (total := self.within + self.between) > 0 else 1.0


def variation(described: Described) -> Variation:
    """See `Variation`.

    Raises:
        SettingsError: no class has two described pictures, or less than two classes have any.
    """

    def fit() -> dict[str, Array]:
        centres = means(described).astype(np.float64)
        pictures, squares = np.zeros(len(centres)), 0.0
        for vectors, classes in described.texts():
            pictures += np.bincount(classes, minlength=len(pictures))
            squares += float(((vectors - centres[classes]) ** 2).sum())
        total, groups = pictures.sum(), int((pictures > 0).sum())
        if groups < 2 or total == groups:
            message = (
                f"embeddings={described.embeddings}: of the split {described.split} {total:.0f} pictures of "
                f"{groups} classes have a description; what classes have in common takes two of some. Pass "
                "--class-target shrunk."
            )
            raise SettingsError(message)
        away = centres - (pictures @ centres) / total
        scatter = (away * pictures[:, None]).T @ away
        within = squares / (total - groups)
        size = (total - (pictures**2).sum() / total) / (groups - 1)  # of a class, all of one size: that
        between = max(0.0, (np.trace(scatter) / (groups - 1) - within) / size)
        variance, basis = np.linalg.eigh(scatter)
        basis = basis[:, variance > NOTHING * variance[-1]]
        return {"components": np.array([within, between]), "directions": (basis @ basis.T).astype(np.float32)}

    parts = described.once("class-variation", fit)
    within, between = parts["components"].tolist()
    return Variation(within, between, parts["directions"])


def similar(described: Described, temperature: float) -> Array:
    """[C, C] float32, rows sum to 1: how like each class's mean text is to those of all classes, its own
    among them: the softmax of their cosines, without the mean of all, / `temperature`. A class without a text
    is like itself alone."""
    centres = means(described).astype(np.float64)
    known = np.abs(centres).sum(1) > 0
    away = centres - centres[known].mean(0)
    unit = away / np.maximum(np.linalg.norm(away, axis=1, keepdims=True), 1e-12)
    likeness = np.exp((unit @ unit.T - 1) / temperature) * np.outer(known, known)
    np.fill_diagonal(likeness, np.where(known, likeness.diagonal(), 1.0))
    found: Array = (likeness / likeness.sum(1, keepdims=True)).astype(np.float32)
    return found
