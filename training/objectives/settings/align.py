"""Settings of GPT4Image's alignment (`objectives/align.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from training.settings import Grid, MethodSettings, below, no_share


@dataclass(frozen=True, kw_only=True)
class AlignGrid(Grid):
    """Weight x dimension; the baseline has no dimension."""

    alignment_weights: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5)
    """Weights to try; 0 is the baseline and is trained once for each backbone and seed, whatever the
    dimensions."""
    projection_dims: tuple[int, ...] = (128, 0)
    """Widths of the shared space to try; 0 is the embedding's own."""

    def cells(self) -> list[dict[str, Any]]:
        """See `Grid.cells`."""
        return [
            {"alignment_weight": weight, "projection_dim": dim if weight else 0}
            for weight in self.alignment_weights
            for dim in (self.projection_dims if weight else (0,))
        ]

    def faults(self) -> list[str]:
        """See `Settings.faults`."""
        if any(not 0 <= weight < float("inf") for weight in self.alignment_weights):
            return [f"alignment_weights={self.alignment_weights}: must be 0 or more."]
        return []


@dataclass(frozen=True, kw_only=True)
class AlignSettings(MethodSettings):
    """The training method: GPT4Image's alignment of image features to text embeddings."""

    left_open = ("embeddings",)
    axes: ClassVar = {"alignment_weight": "weight", "projection_dim": "dim"}
    legend: ClassVar = {
        "alignment_weight": "how much descriptions count beside the labels; the plain model has 0",
        "projection_dim": "width of the space that pictures and texts are compared in; D is the texts' own",
    }
    grid = AlignGrid
    baseline: ClassVar = {"alignment_weight": 0.0, "projection_dim": 0, "similar_labels": 0.0}

    alignment_weight: float = 0.3
    """lambda of L = L_CE + lambda L_align, or below 1 of (1 - lambda) L_CE + lambda w L_align with --balance
    gradients; 0 is the plain baseline."""
    balance: Literal["none", "gradients"] = "none"
    """gradients: L = (1 - lambda) L_CE + lambda w L_align, where w makes both gradients equally long at the
    feature before the classifier, anew in each step; lambda then means the same for every backbone and data
    set."""
    alignment_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How lambda goes to 0 until --alignment-until; constant: not before."""
    alignment_until: float = 1.0
    """Share of the training's steps after which lambda is 0."""
    alignment: Literal["symmetric", "image-to-text", "sigmoid", "cosine"] = "symmetric"
    """Form of L_align: InfoNCE both ways (the paper's), one way, SigLIP's pairwise sigmoid, or 2 - 2 cos
    without negatives."""
    projection_dim: int = 256
    """Width d of the shared space; below the embedding's D texts are reduced, 0 means D."""
    text_projection: Literal["pca", "learned"] = "pca"
    """How texts come to width d: by PCA, fitted once and kept in the store, or by a linear map learned with
    the model."""
    center_texts: bool = False
    """Subtract the train split's mean embedding, which all descriptions have in common; below the embedding's
    D it is subtracted in any case."""
    whitening: float = 0.0
    """Power p of whitening: components of texts are divided by their deviation to the power of p; 0: none, 1:
    all."""
    class_shrinkage: float = 0.0
    """Draw a picture's target towards the mean text of its class, 0 (its own caption alone) to 1 (the mean
    alone, with --positives class or similar): averages away what captions say of all but the class."""
    class_target: Literal["shrunk", "estimated", "projected"] = "shrunk"
    """How a target leaves out what captions say of all but the class. shrunk: as --class-shrinkage says; in
    place of that, estimated: the share that variance within classes has of that within and between them (a
    rule of thumb); projected: only directions in which mean texts of classes differ are kept."""
    positives: Literal["caption", "class", "similar"] = "caption"
    """What an image is not told apart from: texts of equal captions, all texts of its class, or every text in
    so far as it is like its own (soft targets)."""
    similarity_temperature: float = 0.1
    """With --positives similar: how fast a text counts less the less it is like an image's own (softmax of
    cosine / this); with --similar-labels likewise of classes."""
    similar_labels: float = 0.0
    """Share of each label that goes to other classes, most to those whose mean texts are similar (after TeS,
    arXiv 2304.01489), in place of even label smoothing; goes with any --alignment-weight, also with 0."""
    several_captions: Literal["average", "draw"] = "average"
    """Of several captions a picture: their mean vector is the target, or one of them, drawn anew in each pass
    over the pictures (needs embeddings made with --each-caption)."""
    caption_dropout: float = 0.0
    """Share of pictures that aim at no text and count for classification only, drawn anew in each step."""
    head: Literal["mlp", "narrow", "linear"] = "mlp"
    """Projection head on the pooled feature: the paper's two layers with 2 d between them, the same with no
    more than the feature's width between them, or one linear map."""
    temperature: float = 0.2
    """tau of the alignment loss (the paper: 0.2 for ResNets, 0.05 for ViTs)."""
    learn_temperature: bool = False
    """Learn tau, starting from --temperature; it stays at 0.01 or above, CLIP's bound."""
    store_negatives: int = 0
    """Further texts, drawn from the store for every step, that images are told apart from."""
    embeddings: str = ""
    """Embedding variant; empty: the only one of the store, or the one that a resumed run was begun with."""

    @property
    def is_baseline(self) -> bool:
        """Without texts: classification alone."""
        return self.alignment_weight == 0 and self.similar_labels == 0

    @property
    def aims_at_class_means(self) -> bool:
        """Whether the target of a picture is the mean text of its class alone."""
        return self.class_shrinkage == 1 and self.class_target == "shrunk"

    def told(self) -> dict[str, str]:
        """Weight and dimension; dimension 0 is the embedding's own, D."""
        dim = "-" if self.alignment_weight == 0 else str(self.projection_dim or "D")
        return {"weight": f"{self.alignment_weight:g}", "dim": dim}

    def title(self) -> str:
        """Weight and dimension."""
        if self.is_baseline:
            return "baseline"
        if self.alignment_weight == 0:
            return f"labels{self.similar_labels!r}-d{self.projection_dim}"
        weight = f"{self.alignment_weight:g}"
        exact = weight if float(weight) == self.alignment_weight else repr(self.alignment_weight)
        return f"w{exact}-d{self.projection_dim}"

    def faults(self) -> list[str]:
        """See `Settings.faults`."""
        faults = below(0, self, "projection_dim", "store_negatives")
        if self.alignment_weight < 0:
            faults.append(f"alignment_weight={self.alignment_weight}: must be 0 (the baseline) or more.")
        faults += no_share(
            self, "whitening", "class_shrinkage", "alignment_until", "caption_dropout", "similar_labels"
        )
        if self.caption_dropout == 1:
            faults.append(
                "caption_dropout=1: leaves no picture a text; the baseline is --alignment-weight 0."
            )
        if self.several_captions == "draw" and self.store_negatives:
            faults.append(
                "several_captions=draw: goes with no --store-negatives, which are means of all captions."
            )
        if self.several_captions == "draw" and self.class_target == "estimated":
            faults.append(
                "class_target=estimated: how single captions vary is not known where one of several is "
                "drawn; pass --class-target shrunk with a --class-shrinkage."
            )
        if self.balance == "gradients" and self.alignment_weight >= 1:
            faults.append(
                f"alignment_weight={self.alignment_weight}: must be below 1 with --balance gradients, where "
                "it is the alignment's share; --balance none takes any weight."
            )
        for name, value in (("temperature", 0.2), ("similarity_temperature", 0.1)):
            if getattr(self, name) <= 0:
                faults.append(f"{name}={getattr(self, name)}: must be above 0, such as {value}.")
        if self.positives == "similar":
            faults += [
                f"positives=similar: {why}."
                for wrong, why in (
                    (
                        self.alignment == "cosine",
                        "has no meaning for --alignment cosine, which tells nothing apart",
                    ),
                    (
                        self.store_negatives,
                        "goes with no --store-negatives, of which each may be like an image's own",
                    ),
                    (
                        self.text_projection == "learned",
                        "needs texts that stay as they are; use --text-projection pca",
                    ),
                )
                if wrong
            ]
        if self.alignment == "cosine" and (self.store_negatives or self.learn_temperature):
            faults.append(
                "alignment=cosine: has neither negatives nor a temperature; leave the flags for them out."
            )
        if self.aims_at_class_means and self.positives == "caption" and self.alignment != "cosine":
            faults.append(
                "class_shrinkage=1: all texts of a class are one then, and an image would be told apart from "
                "its own; add --positives class, or --class-shrinkage 0 for each picture's own caption."
            )
        if self.text_projection == "learned" and self.alignment == "cosine":
            faults.append(
                "text_projection=learned: without negatives all texts would be mapped to one point; use pca."
            )
        return faults
