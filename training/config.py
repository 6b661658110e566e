"""Settings of training's verbs: one frozen dataclass a verb, filled from a preset and the flags given after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. The baseline is the same run with --alignment-weight 0."""

    store: str
    """Folder of a store; needs embeddings unless the alignment weight is 0."""
    run: str = ""
    """Folder of the run: checkpoints, metrics, settings. The same folder again resumes. Empty: a new one below runs/."""
    preset: str = "small-64"
    """Recipe that fills all settings below; flags given beside it win. `gpt4image train --help` names the recipes."""
    backbone: str = "resnet18"
    """Any timm model with a linear classifier."""
    pretrained: bool = False
    """Start from timm's pre-trained weights (network)."""
    image_size: int = 64
    """Edge of the square input in pixels."""
    epochs: int = 40
    """Passes over the train split."""
    batch_size: int = 128
    """Images a step over all workers together; must be a multiple of --workers."""
    alignment_weight: float = 0.3
    """lambda of L = L_CE + lambda L_align; 0 is the plain baseline."""
    projection_dim: int = 256
    """Width d of the shared space; below the embedding's D texts are reduced by PCA, 0 means D."""
    head: Literal["mlp", "linear"] = "mlp"
    """Projection head on the pooled feature."""
    temperature: float = 0.2
    """tau of the alignment loss (the paper: 0.2 for ResNets, 0.05 for ViTs)."""
    learn_temperature: bool = False
    """Learn tau, starting from --temperature."""
    embeddings: str = ""
    """Embedding variant; empty: the only one of the store."""
    train_split: str = "train"
    """Split to train on."""
    eval_split: str = "val"
    """Split that top-1 and top-5 are measured on after every epoch."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """SGD with momentum, or AdamW; norms and biases have no weight decay."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 0.05
    """Weight decay (decoupled with AdamW)."""
    warmup_epochs: float = 2.0
    """Linear warm-up before the cosine."""
    label_smoothing: float = 0.0
    """Of the cross entropy."""
    drop_path: float = 0.0
    """Stochastic depth of the backbone."""
    crop_scale: float = 0.35
    """Smallest share of the picture's area that a random resized crop keeps."""
    flip: float = 0.5
    """Probability of a horizontal flip; 0 where left and right carry meaning."""
    workers: int = 0
    """Data-parallel processes; 0: one for each GPU of the cluster, or two on a cluster without GPUs."""
    threads: int = 0
    """CPU threads of a worker that has no GPU; 0: this machine's cores, shared out. More threads than cores are far slower."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on CUDA, float32 elsewhere; the losses are float32 always."""
    loader_threads: int = 2
    """Threads a worker that decode and augment ahead of the step."""
    shuffle_shards: int = 16
    """Shards whose rows are mixed at a time; a worker keeps as many in memory."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    max_failures: int = 3
    """Times that a failed worker group is started again from the last checkpoint."""
    tracking_uri: str = ""
    """MLflow: a server, sqlite:///FILE, or none. Empty: MLFLOW_TRACKING_URI, else runs/mlflow.db."""
    experiment: str = "gpt4image"
    """MLflow experiment."""
    parent_run: tyro.conf.Suppress[str] = ""
    """MLflow run that this one is nested under; set by `tune`."""

    def __post_init__(self) -> None:
        faults = []
        if self.alignment_weight < 0:
            faults.append(f"alignment_weight={self.alignment_weight}: must be 0 (the baseline) or more.")
        if self.temperature <= 0:
            faults.append(f"temperature={self.temperature}: must be above 0, such as 0.2.")
        for name in ("image_size", "epochs", "batch_size", "loader_threads", "shuffle_shards"):
            if getattr(self, name) < 1:
                faults.append(f"{name}={getattr(self, name)}: must be at least 1.")
        for name in ("workers", "threads", "projection_dim", "warmup_epochs", "max_failures", "weight_decay", "min_lr"):
            if getattr(self, name) < 0:
                faults.append(f"{name}={getattr(self, name)}: must be 0 or more.")
        if self.workers and self.batch_size % self.workers:
            near = max(1, round(self.batch_size / self.workers)) * self.workers
            faults.append(f"batch_size={self.batch_size}: no multiple of workers={self.workers}; pass --batch-size {near}.")
        if self.alignment_weight > 0 and self.batch_size == 1:
            faults.append("batch_size=1: the contrastive loss needs negatives; pass --batch-size 2 or more.")
        if self.lr <= 0 or self.lr < self.min_lr:
            faults.append(f"lr={self.lr}, min_lr={self.min_lr}: need lr > 0 and lr >= min_lr.")
        for name in ("flip", "crop_scale", "label_smoothing", "drop_path"):
            if not 0 <= getattr(self, name) <= 1:
                faults.append(f"{name}={getattr(self, name)}: must lie between 0 and 1.")
        if faults:
            raise ValueError("\n".join(faults))


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Top-1 and top-5 of a run's model."""

    run: tyro.conf.Positional[str]
    """Folder of a run."""
    split: str = ""
    """Split to measure on; empty: the run's --eval-split."""
    checkpoint: Literal["last", "best"] = "last"
    """The last epoch's model, or the one with the best top-1 (chosen on the eval split, so its figure there is optimistic)."""
    json: bool = False
    """One JSON object on standard output, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A run's backbone as a plain timm model: no head, no text, the baseline's size and speed."""

    run: tyro.conf.Positional[str]
    """Folder of a run."""
    to: str
    """Folder to write; load it with timm.create_model("local-dir:FOLDER")."""
    checkpoint: Literal["last", "best"] = "last"
    """Which of the run's models."""
