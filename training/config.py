"""Settings of training's verbs: one frozen dataclass a verb, filled from a preset and the flags given after
it."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from typing import Literal

import tyro

from pipeline.errors import SettingsError

BUILT_IN = {"align": "training.objectives.align"}
"""Training methods by name."""
HUB, FOLDER = "hf-hub:", "local-dir:"
"""How a backbone is named that brings its own weights: timm's prefixes."""


def short_name(backbone: str) -> str:
    """A backbone's name for folders and titles, without slashes; two models of the same last name stay
    apart."""
    if not backbone.startswith((HUB, FOLDER)):
        return backbone
    last = backbone.partition(":")[2].partition("@")[0].rstrip("/").rpartition("/")[2]
    digest = hashlib.blake2b(backbone.encode(), digest_size=3).hexdigest()
    return f"{re.sub('[^A-Za-z0-9._-]', '_', last)}-{digest}"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. The baseline is the same run with --alignment-weight 0."""

    store: str
    """Folder or s3:// address of a store; needs embeddings unless the alignment weight is 0."""
    run: str = ""
    """Folder or s3:// address of the run: checkpoints, metrics, settings. The same resumes. Empty: a new one
    below runs/."""
    preset: str = "small-64"
    """Recipe that fills all settings below; flags given beside it win. Recipes are named at the top of this
    help."""

    objective: str = "align"
    """Training method: align (GPT4Image; with a weight of 0 its baseline), or the import path of a module of
    one's own (see training/objectives/protocol.py)."""
    backbone: str = "resnet18"
    """Any timm model with a linear classifier; or hf-hub:ORG/NAME (@REVISION) or local-dir:FOLDER (such as an
    export), whose weights training then starts from. Only safetensors are read; a hub revision is pinned to
    its commit."""
    architecture: tyro.conf.Suppress[str] = ""
    """What a backbone of the hub or a folder is built from, as JSON (`backbones.Source`); found when a run
    begins."""
    pretrained: bool = False
    """Start from timm's pre-trained weights (network); hf-hub: and local-dir: imply it (to start from
    nothing, name timm's architecture)."""
    image_size: int = 64
    """Edge of the square input in pixels."""
    patch_size: int = 0
    """Patch of a ViT or of ConvNeXt's stem, in pixels; 0: the backbone's own."""
    small_stem: bool = False
    """ResNets for small pictures: first convolution 3 x 3 with stride 1 and no pooling after it (as is usual
    for CIFAR)."""
    drop_path: float = 0.0
    """Stochastic depth of the backbone."""

    epochs: int = 40
    """Passes over the train split."""
    batch_size: int = 128
    """Images a step over all workers together, and the batch that the alignment contrasts."""
    accumulate: int = 1
    """Parts that each worker's share of a batch is computed in, to save memory; the loss stays that of the
    whole batch."""

    alignment_weight: float = 0.3
    """lambda of L = L_CE + lambda L_align; 0 is the plain baseline."""
    alignment: Literal["symmetric", "image-to-text", "sigmoid", "cosine"] = "symmetric"
    """Form of L_align: InfoNCE both ways (the paper's), one way, SigLIP's pairwise sigmoid, or 2 - 2 cos
    without negatives."""
    projection_dim: int = 256
    """Width d of the shared space; below the embedding's D texts are reduced, 0 means D."""
    text_projection: Literal["pca", "learned"] = "pca"
    """How texts come to width d: by PCA, fitted once and kept in the store, or by a linear map learned with
    the model."""
    head: Literal["mlp", "linear"] = "mlp"
    """Projection head on the pooled feature."""
    temperature: float = 0.2
    """tau of the alignment loss (the paper: 0.2 for ResNets, 0.05 for ViTs)."""
    learn_temperature: bool = False
    """Learn tau, starting from --temperature; it stays at 0.01 or above, CLIP's bound."""
    store_negatives: int = 0
    """Further texts, drawn from the store for every step, that images are told apart from."""
    embeddings: str = ""
    """Embedding variant; empty: the only one of the store, or the one that a resumed run was begun with."""

    optimizer: str = "adamw"
    """Any optimizer of timm: adamw, lamb, momentum (plain SGD with it), sgd (Nesterov's), ...; norms and
    biases do not decay."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine."""
    warmup_lr: float = 0.0
    """Learning rate that the warm-up starts from."""
    warmup_epochs: float = 2.0
    """Linear warm-up before the cosine."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 0.05
    """Weight decay (decoupled with AdamW)."""
    layer_decay: float = 1.0
    """Factor on the learning rate from each layer of the backbone to the one below it, for fine-tuning; 1:
    none."""
    clip_grad: float = 0.0
    """Limit on the gradient; 0: none."""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """What --clip-grad limits: the norm of all, each value, or each unit's share of its weights
    (adaptive)."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which is kept beside them and is what evaluation and export
    take; 0: none."""
    ema_warmup: bool = True
    """Let the average span the last tenth of the steps so far until that is what --ema spans. Without it (as
    in the papers' recipes) the average of a run of fewer than a few times 1 / (1 - ema) steps is mostly the
    weights it began with."""
    loss: Literal["cross-entropy", "bce"] = "cross-entropy"
    """Classification loss; bce: binary cross entropy, summed over the classes so that it weighs as much as
    cross entropy."""
    label_smoothing: float = 0.0
    """Of the classification loss."""

    crop_scale: float = 0.35
    """Smallest share of the picture's area that a random resized crop keeps."""
    flip: float = 0.5
    """Probability of a horizontal flip; 0 where left and right carry meaning."""
    auto_augment: str = ""
    """timm's policy, such as rand-m9-mstd0.5-inc1 (RandAugment), 3a, augmix-m5-w4-d2."""
    color_jitter: float = 0.0
    """Brightness, contrast and saturation; timm leaves it out beside RandAugment."""
    erase: float = 0.0
    """Probability of random erasing."""
    mixup: float = 0.0
    """alpha of mixup; text targets are mixed as the labels are."""
    cutmix: float = 0.0
    """alpha of cutmix; likewise."""
    mix_prob: float = 1.0
    """Probability that a batch is mixed, where --mixup or --cutmix is set."""
    mix_switch_prob: float = 0.5
    """Probability of cutmix where both are set."""
    repeats: int = 1
    """Views of a picture in a batch (repeated augmentation); an epoch keeps its number of images."""

    train_split: str = "train"
    """Split to train on."""
    eval_split: str = "val"
    """Split that top-1 and top-5 are measured on after every epoch."""
    seed: int = 0
    """Seed of weights, order and augmentation."""

    workers: int = 0
    """Data-parallel processes; 0: one for each GPU of the cluster, or two on a cluster without GPUs."""
    min_workers: int = 0
    """Elastic training: go on with as few workers as this when nodes are lost, and with up to --workers when
    they are back."""
    resize_seconds: float = 60
    """Elastic training: how often to look whether nodes have come back; growing restarts the workers from the
    last checkpoint."""
    threads: int = 0
    """CPU threads of a worker that has no GPU; 0: this machine's cores, shared out. More threads than cores
    are far slower."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on CUDA, float32 elsewhere; the losses are float32 always."""
    channels_last: bool = True
    """Memory format of convolutions; faster on GPUs and CPUs alike."""
    compile: bool = False
    """torch.compile the backbone: minutes at the start, faster steps."""
    checkpoint_activations: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third slower."""
    sync_batch_norm: bool = False
    """BatchNorm statistics over all workers; needs GPUs."""
    loader: Literal["auto", "threads", "actors"] = "auto"
    """Where pictures are decoded: threads of each worker, or actors on any CPUs of the cluster. auto:
    threads, but actors for augmentation that threads cannot share (--auto-augment, --color-jitter)."""
    loader_workers: int = 2
    """Threads, or actors, that decode for each worker."""
    shuffle_shards: int = 16
    """Shards whose rows are mixed at a time; all workers together keep about twice as many in memory, of
    Parquet sources (where a shard may hold few classes) each worker does, with BatchNorm, --mixup or
    --cutmix."""
    checkpoint_minutes: float = 10.0
    """Time between checkpoints inside an epoch; there is one after every epoch in any case."""
    checkpoint_steps: int = 0
    """Steps between checkpoints inside an epoch, in place of a time."""
    max_failures: int = 3
    """Times that a failed worker group is started again from the last checkpoint."""
    tracking_uri: str = ""
    """MLflow: a server, sqlite:///FILE, or none. Empty: MLFLOW_TRACKING_URI, else runs/mlflow.db."""
    experiment: str = "gpt4image"
    """MLflow experiment."""
    log_artifacts: Literal["none", "model", "all"] = "model"
    """What MLflow keeps at the end: the exported model; all: the last checkpoint, too."""
    register_as: str = ""
    """Name in MLflow's model registry that the exported model gets a version of at the end; empty: none."""
    parent_run: tyro.conf.Suppress[str] = ""
    """MLflow run that this one is nested under; set by `tune`."""

    @property
    def brings_weights(self) -> bool:
        """Whether the backbone is a model of the hub or of a folder."""
        return self.backbone.startswith((HUB, FOLDER))

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def __post_init__(self) -> None:
        values = vars(self).items()
        faults = [f"{name}={value}: must be a finite number." for name, value in values if _endless(value)]
        if self.alignment_weight < 0:
            faults.append(f"alignment_weight={self.alignment_weight}: must be 0 (the baseline) or more.")
        if self.temperature <= 0:
            faults.append(f"temperature={self.temperature}: must be above 0, such as 0.2.")
        for name in (
            "image_size",
            "epochs",
            "batch_size",
            "accumulate",
            "loader_workers",
            "shuffle_shards",
            "repeats",
        ):
            if getattr(self, name) < 1:
                faults.append(f"{name}={getattr(self, name)}: must be at least 1.")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                faults.append(f"{name}={getattr(self, name)}: must be 0 or more.")
        if self.batch_size < 2 * max(self.workers, 1) * self.accumulate:  # BatchNorm has no statistics of one
            faults.append(
                f"batch_size={self.batch_size}: fewer than two images for each of {max(self.workers, 1)} "
                f"workers x {self.accumulate} parts; pass a larger --batch-size, or less --workers or "
                "--accumulate."
            )
        if self.min_workers and (not self.workers or self.min_workers > self.workers):
            faults.append(
                f"min_workers={self.min_workers}: needs --workers of at least as many (now {self.workers})."
            )
        if self.alignment == "cosine" and (self.store_negatives or self.learn_temperature):
            faults.append(
                "alignment=cosine: has neither negatives nor a temperature; leave the flags for them out."
            )
        if self.text_projection == "learned" and self.alignment == "cosine":
            faults.append(
                "text_projection=learned: without negatives all texts would be mapped to one point; use pca."
            )
        if self.lr <= 0 or self.lr < self.min_lr:
            faults.append(f"lr={self.lr}, min_lr={self.min_lr}: need lr > 0 and lr >= min_lr.")
        if not 0 < self.layer_decay <= 1:
            faults.append(f"layer_decay={self.layer_decay}: must be above 0 and at most 1.")
        for name in (
            "flip",
            "crop_scale",
            "label_smoothing",
            "drop_path",
            "erase",
            "mix_prob",
            "mix_switch_prob",
        ):
            if not 0 <= getattr(self, name) <= 1:
                faults.append(f"{name}={getattr(self, name)}: must lie between 0 and 1.")
        if not 0 <= self.ema < 1:
            faults.append(f"ema={self.ema}: must be 0 (none) or below 1, such as 0.9999.")
        if self.repeats > self.batch_size:
            faults.append(f"repeats={self.repeats}: more views than the {self.batch_size} images of a batch.")
        if self.loader == "threads" and (self.auto_augment or self.color_jitter):
            faults.append("loader=threads: --auto-augment and --color-jitter need --loader actors (or auto).")
        if faults:
            raise SettingsError("\n".join(faults))


def _endless(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


# Every setting is one or the other, and a test holds it: what is computed, which a resumed run must not
# change, or where it is computed, how it is watched and kept, which it may.
DECIDING = frozenset(
    {
        "store",
        "preset",
        "objective",
        "backbone",
        "architecture",
        "pretrained",
        "image_size",
        "patch_size",
        "small_stem",
        "drop_path",
        "epochs",
        "batch_size",
        "accumulate",
        "alignment_weight",
        "alignment",
        "projection_dim",
        "text_projection",
        "head",
        "temperature",
        "learn_temperature",
        "store_negatives",
        "embeddings",
        "optimizer",
        "lr",
        "min_lr",
        "warmup_lr",
        "warmup_epochs",
        "momentum",
        "weight_decay",
        "layer_decay",
        "clip_grad",
        "clip_mode",
        "ema",
        "ema_warmup",
        "loss",
        "label_smoothing",
        "crop_scale",
        "flip",
        "auto_augment",
        "color_jitter",
        "erase",
        "mixup",
        "cutmix",
        "mix_prob",
        "mix_switch_prob",
        "repeats",
        "train_split",
        "eval_split",
        "seed",
        "precision",
        "channels_last",
        "compile",
        "checkpoint_activations",
        "sync_batch_norm",
        "shuffle_shards",
    }
)
FREE = frozenset(
    {
        "run",
        "workers",
        "min_workers",
        "resize_seconds",
        "threads",
        "loader",
        "loader_workers",
        "checkpoint_minutes",
        "checkpoint_steps",
        "max_failures",
        "tracking_uri",
        "experiment",
        "log_artifacts",
        "register_as",
        "parent_run",
    }
)


_NOT_NEGATIVE = (
    "workers",
    "min_workers",
    "resize_seconds",
    "threads",
    "projection_dim",
    "warmup_epochs",
    "warmup_lr",
    "max_failures",
    "weight_decay",
    "min_lr",
    "patch_size",
    "store_negatives",
    "clip_grad",
    "color_jitter",
    "mixup",
    "cutmix",
    "checkpoint_minutes",
    "checkpoint_steps",
)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What a run's model can do on a split: accuracy, calibration, confusions; aligned ones also retrieval
    and zero-shot."""

    run: tyro.conf.Positional[str]
    """Folder or s3:// address of a run."""
    split: str = ""
    """Split to measure on; empty: the run's --eval-split."""
    checkpoint: Literal["last", "best"] = "last"
    """The last epoch's model, or the one with the best top-1 (chosen on the eval split, so its figure there
    is optimistic)."""
    weights: Literal["auto", "raw", "ema"] = "auto"
    """The weights themselves or their moving average; auto: the average where the run kept one."""
    retrieval: bool = True
    """Of aligned runs: how well an image finds its own caption among all different ones of the split."""
    knn: bool = False
    """k-NN accuracy of the backbone's features (k = 20, T = 0.07, as DINO's); costs a pass over the train
    split."""
    zero_shot: bool = False
    """Of aligned runs: accuracy of class prompts, through the encoder of the embeddings. The two flags below
    imply it."""
    class_prompts: tuple[str, ...] = ()
    """Prompt templates, averaged for each class; {label} becomes its name. Empty: "a photo of a {label}"."""
    classes_file: str = ""
    """Classes to choose from, one name a line (or CLASS, a tab, and another name for it); empty: the
    store's."""
    to: str = ""
    """Folder for evaluation.json, per_class.csv, predictions.parquet, confusion.png and reliability.png;
    empty: none."""
    json: bool = False
    """One JSON object on standard output, and nothing else."""

    @property
    def asks_zero_shot(self) -> bool:
        """Whether zero-shot is wanted, by its flag or by those that say how."""
        return self.zero_shot or bool(self.class_prompts or self.classes_file)

    def __post_init__(self) -> None:
        faults = []
        for template in self.class_prompts:
            try:
                fits = template.format(label="\0") != template.format(label="")
            except (KeyError, IndexError, ValueError, AttributeError):
                fits = False
            if not fits:
                faults.append(
                    f"class_prompts={template!r}: must hold {{label}} and no other braces: 'a photo of a "
                    f"{{label}}'."
                )
        if "://" in self.to:
            faults.append(f"to={self.to}: must be a folder of this machine.")
        if faults:
            raise SettingsError("\n".join(faults))


FORMATS = ("timm", "onnx", "torch")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A run's backbone as a plain model: no head, no text, the baseline's size and speed."""

    run: tyro.conf.Positional[str]
    """Folder or s3:// address of a run."""
    to: str
    """Folder to write; load it with timm.create_model("local-dir:FOLDER", pretrained=True)."""
    checkpoint: Literal["last", "best"] = "last"
    """Which of the run's models."""
    weights: Literal["auto", "raw", "ema"] = "auto"
    """The weights themselves or their moving average; auto: the average where the run kept one."""
    format: str = "timm"
    """What to write, with commas between: timm (folder), onnx (model.onnx, for ONNX Runtime), torch
    (model.pt2, torch.export)."""
    overwrite: bool = False
    """Replace an earlier export in the folder; other files in it stay."""

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats, each once, in the order of FORMATS."""
        named = {name.strip() for name in self.format.split(",")}
        return tuple(name for name in FORMATS if name in named)

    def __post_init__(self) -> None:
        faults = []
        unknown = [name for name in self.format.split(",") if name.strip() not in FORMATS]
        if unknown:
            known = ", ".join(FORMATS)
            faults.append(
                f"format={self.format!r}: {unknown[0]!r} is unknown; choose from {known}, with commas "
                "between."
            )
        if "://" in self.to:
            faults.append(f"to={self.to}: must be a folder of this machine; copy it from there.")
        if faults:
            raise SettingsError("\n".join(faults))
