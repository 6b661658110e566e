"""Linear probe: what a frozen model's features tell of classes by themselves, also from a few pictures.

Multinomial logistic regression on features of unit length, by L-BFGS, convex: no seed, no rate, no epochs.
How strongly weights are held down is chosen among a few strengths by two-fold cross-validation on the
pictures that it is fitted to, where every class has two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from training.data.columns import Array

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""On half the squared weights, beside the mean cross entropy."""
USUAL = 1e-3
"""Where a class has one picture alone, and nothing can be chosen."""


@dataclass(frozen=True)
class Probe:
    """A fitted one: [n, F] features to [n] classes."""

    weights: Tensor
    """[F + 1, c], the last row the bias."""
    classes: Array
    penalty: float

    def __call__(self, features: Array) -> Array:
        found: Array = self.classes[(_unit(features) @ self.weights).argmax(1).numpy()]
        return found


def fit(features: Array, labels: Array) -> Probe:
    """Fitted to [n, F] features and [n] labels."""
    classes, numbers = np.unique(labels, return_inverse=True)
    x, y = _unit(features), torch.from_numpy(numbers)
    penalty = USUAL
    if np.bincount(numbers).min() >= 2:
        fold = torch.from_numpy(_folds(numbers))
        hits = [sum(_hits(x, y, fold == half, len(classes), each) for half in (0, 1)) for each in PENALTIES]
        # Of equally good ones the strongest.
        penalty = max(zip(hits, PENALTIES, strict=True))[1]
    return Probe(_fitted(x, y, len(classes), penalty), classes, penalty)


def _folds(numbers: Array) -> Array:
    """[n] 0 or 1, in turn within each class."""
    found = np.zeros(len(numbers), dtype=np.int64)
    for number in np.unique(numbers):
        places = np.flatnonzero(numbers == number)
        found[places] = np.arange(len(places)) % 2
    return found


def _hits(x: Tensor, y: Tensor, left_out: Tensor, classes: int, penalty: float) -> int:
    weights = _fitted(x[~left_out], y[~left_out], classes, penalty)
    return int(((x[left_out] @ weights).argmax(1) == y[left_out]).sum())


def _fitted(x: Tensor, y: Tensor, classes: int, penalty: float) -> Tensor:
    weights = torch.zeros(x.shape[1], classes, dtype=x.dtype, requires_grad=True)
    optimizer: Any = torch.optim.LBFGS(
        [weights], max_iter=500, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(x @ weights, y) + penalty / 2 * weights[:-1].square().sum()
        torch.autograd.backward(value)
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weights.detach()


def _unit(features: Array) -> Tensor:
    x = functional.normalize(torch.from_numpy(np.asarray(features, dtype=np.float64)), dim=1)
    return functional.pad(x, (0, 1), value=1.0)
