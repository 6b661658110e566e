"""Text targets of training: which embedding variant, how wide, and PCA for a shared space narrower than the
embeddings.

PCA is fitted once for an embedding variant and the split that is trained on, streaming over its shards in
float64, and kept in the store beside the vectors (`pca.safetensors`), so that every trial and every resumed
run projects alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from pipeline.errors import SettingsError
from pipeline.store import Store
from training.config import TrainConfig
from training.data import few_shot
from training.data.texts import classes as class_texts
from training.data.texts.vectors import Array, classes_of, kept, rows_of

ALL_OF_IT = 0.999
"""Shrinkage from which texts of a class are one."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """How text embeddings become text targets: drawn towards their class, centred, projected on what tells
    classes apart, reduced, whitened, and of unit length again. Where a field is None (or 0) its step is left
    out."""

    embeddings: str
    captions: str
    dim: int
    mean: Array | None = None
    """[D] of the split that is trained on."""
    basis: Array | None = None
    """[D, dim] PCA's directions."""
    scale: Array | None = None
    """[dim] factors of whitening."""
    between: Array | None = None
    """[D, D] projector on the directions in which classes differ; needs `mean`."""
    directions: int = 0
    """How many these are."""
    shrinkage: float = 0.0
    """Share of the class's mean in a target."""
    class_means: Array | None = None
    """[C, D], zero for a class without a text."""
    by_class: bool = False
    """All pictures of a class are positives of each other, and not those of equal captions alone."""
    trained: frozenset[int] = frozenset()
    """Shards of the split that is trained on: of no others classes are looked at."""
    rows: Mapping[int, Array] | None = None
    """Rows by shard whose classes may be looked at, where they are few of the split."""
    several: int = 0
    """Captions a picture has at most, where one is drawn in each pass; 0: their mean is the target."""

    @property
    def needs_classes(self) -> bool:
        """Whether targets or positives depend on the class."""
        return self.by_class or self.class_means is not None

    @property
    def tells_no_classes_apart(self) -> bool:
        """Whether the mean texts of all described classes are one."""
        if self.class_means is None:
            return False
        described = self.class_means[np.abs(self.class_means).sum(1) > 0]
        return not len(described) or bool(np.ptp(described, axis=0).max() < 1e-4)

    def project(self, embeddings: Array, classes: Array | None = None) -> Array:
        """[n, D] unit-length text embeddings to [n, dim] unit-length text targets in float32.

        Args:
            embeddings: of n texts.
            classes: [n] of their pictures; None: targets are not drawn towards any.
        """
        full: Array = embeddings.astype(np.float32)
        if classes is not None and self.class_means is not None:
            full = (1 - self.shrinkage) * full + self.shrinkage * self.class_means[classes]
        elif self.mean is None:
            return full
        if self.mean is not None:
            full = full - self.mean
        if self.between is not None:
            full = full @ self.between
        if self.basis is not None:
            full = full @ self.basis
        if self.scale is not None:
            full = full * self.scale
        unit: Array = full / np.maximum(np.linalg.norm(full, axis=1, keepdims=True), 1e-12)
        return unit


def _of_embeddings(config: TrainConfig, store: Store) -> Targets:
    """Those of any classes; as wide as the embeddings where the run learns its own projection of them."""
    method = config.method
    named = method.embeddings
    if not named and method.several_captions == "draw":
        of_each = [
            name
            for name in store.variants("embeddings")
            if store.variant("embeddings", name).get("each_caption")
        ]
        named = of_each[0] if len(of_each) == 1 else ""
    return load(
        store,
        embeddings=named,
        dim=0 if method.text_projection == "learned" else method.projection_dim,
        split=config.data.train_split,
        center=method.center_texts or method.class_target == "projected",
        whitening=method.whitening,
    )


def of_config(config: TrainConfig, store: Store) -> Targets:
    """The targets that a run is trained on.

    Raises:
        SettingsError: settings that the store's texts do not fit.
    """
    method, split, targets = config.method, config.data.train_split, _of_embeddings(config, store)
    several = _several(store, targets) if method.several_captions == "draw" else 0
    described = of_classes(config, store, targets.embeddings)
    targets, shrinkage, means = _projected(targets, config, described), method.class_shrinkage, None
    if method.class_target != "shrunk":
        shrinkage = class_texts.shrinkage(described) if method.class_target == "estimated" else 0.0
    if shrinkage > ALL_OF_IT and method.positives == "caption" and method.alignment != "cosine":
        message = (
            f"class_target={method.class_target}: texts say nothing that is not of all of their class "
            f"(shrinkage {shrinkage:.3f}), and an image would be told apart from its own; add --positives "
            "class."
        )
        raise SettingsError(message)
    if shrinkage:
        means = class_texts.means(described)
    if means is None and method.positives == "caption" and not several:
        return targets
    return replace(
        targets,
        several=several,
        shrinkage=shrinkage,
        class_means=means,
        by_class=method.positives == "class",
        trained=frozenset(store.split_shards(split)),
        rows=described.rows,
    )


def of_judging(config: TrainConfig, store: Store) -> Targets:
    """The targets of a run for judging: there a picture has its own caption, or the mean of its own."""
    targets = _of_embeddings(config, store)
    return _projected(targets, config, of_classes(config, store, targets.embeddings))


def of_classes(config: TrainConfig, store: Store, embeddings: str = "") -> class_texts.Described:
    """The texts whose labels a run may look at: those of the pictures that it is trained on."""
    data, rows = config.data, None
    if data.shots or data.class_half != "all":
        rows = few_shot.rows_of(config, store, data.train_split, training=True).rows
    name = store.only_variant("embeddings", embeddings or config.method.embeddings)
    return class_texts.Described(store, name, data.train_split, rows)


def _projected(targets: Targets, config: TrainConfig, described: class_texts.Described) -> Targets:
    if config.method.class_target != "projected":
        return targets
    projector, kept_ = class_texts.directions(described)
    return replace(targets, between=projector, directions=kept_)


def _several(store: Store, targets: Targets) -> int:
    """Captions a picture has at most.

    Raises:
        SettingsError: there is one each, or their vectors were not kept.
    """
    most = int(store.variant("captions", targets.captions).get("captions_per_image", 1))
    if most == 1:
        message = (
            f"several_captions=draw: the captions {targets.captions} are one a picture; leave the flag out, "
            "or make several (`caption --captions-per-image 3 --temperature 0.7`)."
        )
        raise SettingsError(message)
    if not store.variant("embeddings", targets.embeddings).get("each_caption"):
        message = (
            f"several_captions=draw: the embeddings {targets.embeddings} hold means only; make others with "
            f"`embed --each-caption --captions {targets.captions} --store {store.uri}`."
        )
        raise SettingsError(message)
    return most


def load(
    store: Store, *, embeddings: str, dim: int, split: str, center: bool = False, whitening: float = 0.0
) -> Targets:
    """The targets of an embedding variant at width `dim` (0: as wide as the embeddings).

    Args:
        store: that holds them.
        embeddings: the variant; empty: the only one.
        dim: below their width D, PCA reduces them.
        split: that mean and PCA are of.
        center: subtract the split's mean; below D it is subtracted in any case.
        whitening: power p; components are divided by their standard deviation to the power of p.

    Raises:
        ValueError: no such variant, an unfinished one, or a `dim` above its width.
    """
    name = store.only_variant("embeddings", embeddings)
    store.require_complete("embeddings", name)
    captions = str(store.variant("embeddings", name)["captions"])
    width = int(
        store.read_shard("embeddings", name, 0, ["embedding"]).schema.field("embedding").type.list_size
    )
    if dim > width:
        message = (
            f"projection_dim={dim}: the embeddings of {name} have {width} dimensions; pass --projection-dim "
            f"{width} or less."
        )
        raise SettingsError(message)
    dim, plain = dim or width, Targets(embeddings=name, captions=captions, dim=dim or width)
    if dim == width and not center and not whitening:
        return plain
    mean, basis, variance = _pca(store, name, split, width)
    if dim == width and not whitening:  # turning changes no product of two targets
        return replace(plain, mean=mean)
    scale = None
    if whitening:
        # A direction in which texts hardly differ is noise: what is below a thousandth of the first counts as
        # that.
        deviation = np.sqrt(np.maximum(variance[:dim], 1e-3 * variance[0]))
        scale = ((deviation[0] / deviation) ** whitening).astype(np.float32)
    return replace(plain, mean=mean, basis=basis[:, :dim], scale=scale)


@dataclass(frozen=True)
class TextColumns:
    """Columns `targets` and `groups`, and of a split that is trained on with one of several captions
    `each_target` and `each_group` (see `columns.Columns`)."""

    targets: Targets

    def read(self, store: Store, shard: int, ids: pa.ChunkedArray) -> dict[str, Array]:
        """[n, d] float32 text targets of unit length, zero where there is no text, and [n] int64 groups, -1
        there; the same of each of k captions, [n, k, d] and [n, k]."""
        targets, groups = target_columns(self.targets, store, shard, ids)
        found = {"targets": targets, "groups": groups}
        if self.targets.several and shard in self.targets.trained:
            found |= dict(
                zip(("each_target", "each_group"), each_columns(self.targets, store, shard), strict=True)
            )
        return found


def target_columns(
    settings: Targets, store: Store, shard: int, ids: pa.ChunkedArray | None = None
) -> tuple[Array, Array]:
    """([n, d] float32 text targets, [n] int64 groups) of a shard; zero and -1 where there is no text.

    Raises:
        SettingsError: its rows are not those of `ids`.
    """
    captions = store.read_shard("captions", settings.captions, shard, ["id", "caption", "others"])
    embeddings = store.read_shard("embeddings", settings.embeddings, shard, ["id", "embedding"])
    ids = captions["id"] if ids is None else ids
    if not ids.equals(captions["id"]) or not ids.equals(embeddings["id"]):
        message = (
            f"shard {shard}: images, captions and embeddings hold different rows; was the store copied "
            "in part?"
        )
        raise SettingsError(message)
    classes = None
    if settings.needs_classes and shard in settings.trained:
        classes = classes_of(store, shard)
    full = rows_of(embeddings["embedding"])
    present = np.abs(full).sum(1) > 0
    targets = np.where(present[:, None], settings.project(full, classes), 0).astype(np.float32)
    if settings.by_class and classes is not None:
        groups = classes
    else:
        texts = zip(captions["caption"].to_pylist(), captions["others"].to_pylist(), strict=True)
        groups = np.array([_group(caption, others) for caption, others in texts], dtype=np.int64)
    return targets, np.where(present, groups, -1)


def each_columns(settings: Targets, store: Store, shard: int) -> tuple[Array, Array]:
    """([n, k, d] float16 text targets, [n, k] int64 groups) of all captions of a shard's pictures; zero and
    -1 where a picture has fewer than k."""
    captions = store.read_shard("captions", settings.captions, shard, ["caption", "others"])
    lists = captions["others"].to_pylist()
    texts = zip(captions["caption"].to_pylist(), (others or [] for others in lists), strict=True)
    table = store.read_shard("embeddings", settings.embeddings, shard, ["embedding", "each"])
    width, each = table["embedding"].type.list_size, table["each"].combine_chunks()
    begins = each.offsets.to_numpy()
    counts = np.diff(begins) // width  # none where there was no caption to embed
    vectors = each.values.to_numpy(zero_copy_only=False)[begins[0] : begins[-1]].reshape(-1, width)
    rows = np.repeat(np.arange(len(counts)), counts)
    places = np.arange(len(rows)) - np.repeat((begins[:-1] - begins[0]) // width, counts)
    classes = classes_of(store, shard) if settings.needs_classes else None
    targets = np.zeros((len(counts), settings.several, settings.dim), np.float16)  # as the store has them
    groups = np.full(targets.shape[:2], -1, np.int64)
    if len(rows):
        targets[rows, places] = settings.project(vectors, None if classes is None else classes[rows])
    if settings.by_class and classes is not None:
        groups[rows, places] = classes[rows]
    else:
        own = [
            _group(text, None)
            for (first, others), n in zip(texts, counts, strict=True)
            if n
            for text in [first, *others]
        ]
        groups[rows, places] = own
    return targets, groups


def _group(caption: str | None, others: list[str] | None) -> int:
    """Equal for pictures all of whose captions are equal: their one vector is made of all of them."""
    if caption is None:
        return -1
    text = "\n".join([caption, *(others or [])])
    # 63 bits: never negative.
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _pca(store: Store, name: str, split: str, width: int) -> tuple[Array, Array, Array]:
    """(mean [D], basis [D, D], variance [D] along it, largest first) of a split's embeddings."""

    def fit() -> dict[str, Array]:
        mean, basis, variance = _fit(store, name, split, width)
        return {"mean": mean, "basis": basis, "variance": variance}

    parts = kept(store, name, split, "pca", fit)
    return parts["mean"], parts["basis"], parts["variance"]


def _fit(store: Store, name: str, split: str, width: int) -> tuple[Array, Array, Array]:
    count, total, second = 0, np.zeros(width), np.zeros((width, width))
    for shard in store.split_shards(split):
        vectors = rows_of(store.read_shard("embeddings", name, shard, ["embedding"])["embedding"]).astype(
            np.float64
        )
        vectors = vectors[np.abs(vectors).sum(1) > 0]
        count += len(vectors)
        total += vectors.sum(0)
        second += vectors.T @ vectors
    if count < 2:
        message = (
            f"embeddings={name}: {count} vectors in split {split}, too few for PCA and for a mean; pass "
            "--projection-dim 0 without --center-texts and --whitening."
        )
        raise SettingsError(message)
    mean = total / count
    variance, basis = np.linalg.eigh(second / count - np.outer(mean, mean))
    order = np.argsort(variance)[::-1]
    basis = basis[:, order]
    # Eigenvectors have no sign of their own; the largest component positive makes two fits agree.
    basis = basis * np.sign(basis[np.abs(basis).argmax(0), np.arange(width)])
    return (
        mean.astype(np.float32),
        np.ascontiguousarray(basis, dtype=np.float32),
        variance[order].astype(np.float32),
    )
