"""Measures of a model's answers, as functions of arrays: calibration, confusion, k-NN, retrieval, zero-shot.

They know neither the store nor the model. n rows, C classes, M candidates, F and d widths; everything is
vectorised, and what is quadratic runs in blocks: 50,000 rows of 1,000 classes take seconds on two cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]

_BLOCK = 2**26  # elements of a block of cosines: 256 MiB in float32


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Equal-width bins of confidence; `ece` is a share of 1, and empty bins have nan for a mean."""

    ece: float
    edges: Array
    counts: Array
    confidence: Array
    accuracy: Array


def calibration(confidence: Array, correct: Array, bins: int = 15) -> Calibration:
    """Expected calibration error as in Guo et al. 2017 (arXiv 1706.04599, eq. 3): sum over bins of n_m / n
    |acc_m - conf_m|.

    Args:
        confidence: [n] probability of the predicted class.
        correct: [n] whether it was the right one.
        bins: of equal width; bin m holds ((m - 1) / bins, m / bins].
    """
    edges = np.linspace(0, 1, bins + 1)
    bin_of = np.digitize(confidence, edges[1:-1], right=True)
    counts = np.bincount(bin_of, minlength=bins)
    filled = np.where(counts > 0, counts, np.nan)
    means = np.bincount(bin_of, confidence.astype(np.float64), bins) / filled
    accuracy = np.bincount(bin_of, correct.astype(np.float64), bins) / filled
    ece = float(np.nansum(counts * np.abs(accuracy - means)) / len(confidence))
    return Calibration(ece=ece, edges=edges, counts=counts, confidence=means, accuracy=accuracy)


def confusion(labels: Array, predicted: Array, classes: int) -> Array:
    """[C, C] counts, a row for each true class, a column for each predicted one."""
    return np.bincount(labels.astype(np.int64) * classes + predicted, minlength=classes * classes).reshape(
        classes, classes
    )


def confused_pairs(matrix: Array, most: int) -> list[tuple[int, int, int]]:
    """(true class, predicted class, images) of the `most` commonest mistakes, commonest first."""
    mistakes = matrix.copy()
    np.fill_diagonal(mistakes, 0)
    flat = mistakes.ravel()
    cells = np.argpartition(flat, -most)[-most:] if most < flat.size else np.arange(flat.size)
    cells = cells[flat[cells] > 0]
    cells = cells[np.lexsort((cells, -flat[cells]))]
    return [(int(cell // len(matrix)), int(cell % len(matrix)), int(flat[cell])) for cell in cells]


def interval(hits: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, for the images being a sample; both ends between 0 and 1."""
    from scipy.stats import binomtest

    interval = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def nearest(
    queries: Array,
    bank: Array,
    labels: Array,
    classes: int,
    *,
    k: int = 20,
    temperature: float = 0.07,
    same: bool = False,
) -> Array:
    """Weighted k-NN as in DINO (arXiv 2104.14294, F.1, after Wu et al. 2018, arXiv 1805.01978).

    The k rows of the bank with the largest cosine vote for their classes with weight exp(cosine /
    temperature).

    Args:
        queries: [n, F] features.
        bank: [m, F] features of the training images.
        labels: [m] their classes.
        classes: C.
        k: neighbours; all of a smaller bank.
        temperature: of the weights.
        same: queries and bank are the same rows; none is its own neighbour.

    Returns:
        [n] predicted classes.
    """
    import torch

    device = _device()
    bank_mF = torch.nn.functional.normalize(torch.from_numpy(bank).to(device), dim=1)
    labels_m = torch.from_numpy(labels).to(device)
    k = min(k, len(bank) - same)
    predicted = np.empty(len(queries), np.int64)
    for start, stop in _blocks(len(queries), max(len(bank), classes)):
        block = torch.nn.functional.normalize(torch.from_numpy(queries[start:stop]).to(device), dim=1)
        cosines = block @ bank_mF.T
        if same:
            rows = torch.arange(stop - start, device=device)
            cosines[rows, rows + start] = -torch.inf
        values, places = cosines.topk(k)
        votes = torch.zeros(stop - start, classes, device=device)
        votes.scatter_add_(1, labels_m[places], (values / temperature).exp())
        predicted[start:stop] = votes.argmax(1).cpu().numpy()
    return predicted


def different_texts(texts: Array, groups: Array) -> tuple[Array, Array]:
    """The different captions of a split.

    Captions count as one if they are equal, and also if their vectors are: no model could tell them apart.

    Args:
        texts: [n, D] text vectors.
        groups: [n] equal for equal captions, never negative.

    Returns:
        ([M] a row that holds each of the different ones, [n] which of them is each row's own).
    """
    _, first, of_group = np.unique(groups, return_index=True, return_inverse=True)
    _, one_of, of_vector = np.unique(texts[first], axis=0, return_index=True, return_inverse=True)
    return first[one_of], of_vector.ravel()[of_group]


def caption_ranks(z: Array, texts: Array, own: Array) -> Array:
    """[n] rank, from 1, of each image's own caption by cosine.

    Ties count against the model, so one that gives all images or all texts the same vector gets the last
    rank.

    Args:
        z: [n, d] unit-length image features.
        texts: [M, d] unit-length vectors of the different captions.
        own: [n] which of them is the image's.
    """
    import torch

    device = _device()
    texts_Md = torch.from_numpy(texts).to(device)
    ranks = np.empty(len(z), np.int64)
    for start, stop in _blocks(len(z), len(texts)):
        cosines = torch.from_numpy(z[start:stop]).to(device) @ texts_Md.T
        ranks[start:stop] = ranks_of(cosines, torch.from_numpy(own[start:stop]).to(device)).cpu().numpy()
    return ranks


def ranks_of(cosines: Tensor, own: Tensor) -> Tensor:
    """[n] rank, from 1, of entry `own` ([n]) in each row of [n, M] cosines; ties, and what is no number,
    count against it."""
    return (~(cosines < cosines.gather(1, own[:, None]))).sum(1)


def both_ranks(images: Tensor, texts: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks, from 1, by cosine: of each picture's own caption among the different ones, and of each different
    caption's best picture among those of other captions. Ties, and what is no number, count against them.

    Args:
        images: [n, d] of unit length.
        texts: [n, d] of unit length, of the pictures' captions.
        groups: [n] equal for equal captions; -1 where there is none, which takes no part.

    Returns:
        ([m] of the m pictures with a caption, [M] of the M different captions).
    """
    import torch

    kept = groups >= 0
    images, texts = images[kept], texts[kept]
    different, own = torch.unique(groups[kept], return_inverse=True)
    first = torch.zeros(len(different), dtype=torch.long, device=own.device)
    first[own.flip(0)] = torch.arange(len(own), device=own.device).flip(0)
    texts = texts[first]
    of_images = [
        ranks_of(images[start:stop] @ texts.T, own[start:stop])
        for start, stop in _blocks(len(images), len(texts))
    ]
    of_texts = []
    for start, stop in _blocks(len(texts), len(images)):
        cosines = texts[start:stop] @ images.T
        mine = own == torch.arange(start, stop, device=own.device)[:, None]
        best = cosines.masked_fill(~mine, -torch.inf).amax(1, keepdim=True)
        of_texts.append(1 + (~(cosines < best) & ~mine).sum(1))
    empty = [own.new_zeros(0)]
    return torch.cat(of_images or empty), torch.cat(of_texts or empty)


def retrieval(ranks: Array) -> dict[str, float]:
    """Recall at 1, 5 and 10 in percent, and the median rank."""
    recalls = {f"recall{k}": 100 * float((ranks <= k).mean()) for k in (1, 5, 10)}
    return recalls | {"median_rank": float(np.median(ranks))}


def best_texts(z: Array, texts: Array, k: int) -> Array:
    """[n, k] the k texts [M, d] with the largest cosine to each image [n, d], best first."""
    import torch

    device = _device()
    texts_Md = torch.from_numpy(texts).to(device)
    best = np.empty((len(z), min(k, len(texts))), np.int64)
    for start, stop in _blocks(len(z), len(texts)):
        cosines = torch.from_numpy(z[start:stop]).to(device) @ texts_Md.T
        best[start:stop] = cosines.topk(best.shape[1]).indices.cpu().numpy()
    return best


def harmonic_mean(seen: float, unseen: float) -> float:
    """2 s u / (s + u), by which generalised zero-shot learning is compared (Xian et al. 2017, arXiv
    1707.00600, eq. 8)."""
    return 2 * seen * unseen / (seen + unseen) if seen + unseen else 0.0


def _blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, _BLOCK // max(1, columns))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
