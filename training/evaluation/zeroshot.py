"""Zero-shot: an aligned model scores class prompts through the text encoder, also for classes that it never
saw a picture of.

The prompt's vector goes the way of the captions: encoder of the run's embedding variant, then the run's PCA
or learned map. The class whose vector has the largest cosine with the projected image feature is the answer,
as in CLIP (arXiv 2103.00020).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.captioners.prompts import class_name, fill
from pipeline.encoders.models import ModelRef, resolve
from pipeline.encoders.text import TextEncoder
from pipeline.errors import MissingError, SettingsError
from pipeline.store import Store
from training.data.few_shot import classes_of
from training.data.order import Rows
from training.evaluation import measures

if TYPE_CHECKING:
    from training.objectives.protocol import TextSpace

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The M classes that are asked for."""

    names: list[str]
    """[M] what stands in the prompts."""
    of_class: Array
    """[C] the candidate that is each class of the store, -1 where none is."""


def candidates(classes: list[str], file: str = "") -> Candidates:
    """The store's classes, or those of a file: one name a line, or `CLASS<tab>NAME` to give a class of the
    store another name.

    A name is matched with the store's classes as words (separators are spaces, case does not count). Names
    that match none are candidates all the same: classes that no image has.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, names a class twice, or none of the store's.
    """
    if not file:
        return Candidates(names=[class_name(name) for name in classes], of_class=np.arange(len(classes)))
    try:
        with open(file, encoding="utf-8") as stream:
            lines = [line.strip("\n").split("\t") for line in stream if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        message = f"classes_file={file}: cannot be read ({error})."
        raise MissingError(message) from None
    keys = [_key(parts[0]) for parts in lines]
    twice = [name for name, count in Counter(keys).items() if count > 1]
    known = {key: number for number, key in enumerate(keys)}
    of_class = np.array([known.get(_key(name), -1) for name in classes])
    if twice or (of_class < 0).all():
        why = f"names {twice[0]!r} more than once" if twice else "names none of the store's classes"
        message = (
            f"classes_file={file}: {why}; it needs one class a line, as the store calls it "
            f"({', '.join(classes[:3])}, ...), and after a tab another name for it, if wanted."
        )
        raise SettingsError(message)
    return Candidates(names=[class_name(parts[-1].strip()) for parts in lines], of_class=of_class)


def seen_classes(store: Store, split: str, half: str = "all") -> Array:
    """[C] whether a class has usable images in a split, and is of the half that was trained on."""
    trained = classes_of(half, len(store.dataset.classes))
    seen = np.zeros(len(store.dataset.classes), bool)
    for shard, rows in Rows(store, split).rows.items():
        labels = store.read_shard("images", "", shard, ["label"])["label"].to_numpy()
        seen[np.intersect1d(labels[rows], trained)] = True
    return seen


def prompt_vectors(store: Store, space: TextSpace, names: list[str], templates: tuple[str, ...]) -> Array:
    """[M, d] unit-length vectors in the shared space, each the mean over the templates.

    Raises:
        ValueError: the encoder that made the run's embeddings is not to be had, or has changed.
    """
    encoder = _encoder(store, space.embeddings)
    vectors = encoder.averaged(
        [[fill(template, name) for template in templates] for name in names]
    ).embeddings
    return space.prompts(vectors)


def judge(z: Array, labels: Array, prompts: Array, classes: Candidates, seen: Array) -> dict[str, Any]:
    """Top-1 and top-5 in percent among all candidates, and apart for the images of seen and of unseen
    classes.

    Args:
        z: [n, d] projected image features.
        labels: [n] classes of the store.
        prompts: [M, d] of the candidates.
        classes: what the candidates are; images of a class that is none of them are left out and counted.
        seen: [C] whether the run was trained on images of a class.
    """
    truth = classes.of_class[labels]
    asked = truth >= 0
    z, truth, of_seen = z[asked], truth[asked], seen[labels[asked]]
    hits = measures.best_texts(z, prompts, 5) == truth[:, None]
    scores: dict[str, Any] = {
        "classes": len(classes.names),
        "images": len(truth),
        "left_out": int((~asked).sum()),
        "top1": _percent(hits[:, 0]),
        "top5": _percent(hits.any(1)),
        "seen_images": int(of_seen.sum()),
        "seen_top1": _percent(hits[of_seen, 0]),
        "unseen_images": int((~of_seen).sum()),
        "unseen_top1": _percent(hits[~of_seen, 0]),
        "harmonic_mean": None,
        "unseen_only_top1": None,
    }
    if scores["seen_images"] and scores["unseen_images"]:
        scores["harmonic_mean"] = round(measures.harmonic_mean(scores["seen_top1"], scores["unseen_top1"]), 3)
    if scores["unseen_images"]:
        # The older, easier question: the right one among the unseen classes alone.
        others = np.ones(len(classes.names), bool)
        others[classes.of_class[seen & (classes.of_class >= 0)]] = False
        numbers = np.flatnonzero(others)
        best = numbers[measures.best_texts(z[~of_seen], prompts[others], 1)[:, 0]]
        scores["unseen_only_top1"] = _percent(best == truth[~of_seen])
    return scores


def _percent(hits: Array) -> float | None:
    return round(100 * float(hits.mean()), 3) if len(hits) else None


def _encoder(store: Store, variant: str) -> TextEncoder:
    settings = store.variant("embeddings", variant)
    name, revision = settings.get("encoder", ""), settings.get("revision", "")
    if not revision:
        message = (
            f"embeddings={variant}: records no encoder and revision, so class prompts cannot be encoded "
            "alike; train on a variant that `gpt4image embed` made."
        )
        raise SettingsError(message)
    if not revision.startswith("files-"):
        return TextEncoder(ModelRef(name=name, location=name, revision=revision), settings["pooling"])
    model = resolve(name)
    if model.revision != revision:
        message = (
            f"embeddings={variant}: the files of its encoder {name!r} have changed ({model.revision} now, "
            f"{revision} then); bring the former ones back, or embed and train again."
        )
        raise SettingsError(message)
    return TextEncoder(model, settings["pooling"])


def _key(name: str) -> str:
    return class_name(name.strip()).casefold()
