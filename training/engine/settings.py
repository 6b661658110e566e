"""How weights are updated, how steps are computed, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from training.settings import Deciding, Free, below, no_share


@dataclass(frozen=True, kw_only=True)
class OptimSettings(Deciding):
    """Length, optimizer, schedule, classification loss, averaging of weights."""

    epochs: int = 40
    """Each is --epoch-repeats passes over the train split, or as many as --min-epoch-steps takes."""
    batch_size: int = 128
    """Images a step over all workers together, and the batch that contrastive losses contrast."""
    accumulate: int = 1
    """Parts that each worker's share of a batch is computed in, to save memory; the loss stays that of the
    whole batch."""
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
    betas: tuple[float, ...] = ()
    """The two decays of moments of Adam and its kin, such as 0.9 0.95; empty: the optimizer's own."""
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

    def faults(self) -> list[str]:
        """See `Settings.faults`."""
        faults = [
            *below(1, self, "epochs", "batch_size", "accumulate"),
            *below(0, self, "warmup_epochs", "warmup_lr", "weight_decay", "min_lr", "clip_grad"),
            *no_share(self, "label_smoothing"),
        ]
        if self.lr <= 0 or self.lr < self.min_lr:
            faults.append(f"lr={self.lr}, min_lr={self.min_lr}: need lr > 0 and lr >= min_lr.")
        if not 0 < self.layer_decay <= 1:
            faults.append(f"layer_decay={self.layer_decay}: must be above 0 and at most 1.")
        if self.betas and (len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas)):
            faults.append(f"betas={self.betas}: must be two numbers from 0 to below 1, such as 0.9 0.95.")
        if not 0 <= self.ema < 1:
            faults.append(f"ema={self.ema}: must be 0 (none) or below 1, such as 0.9999.")
        return faults


@dataclass(frozen=True, kw_only=True)
class ComputeSettings(Deciding):
    """How a step is computed; each changes rounding or the statistics of BatchNorm."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on CUDA, float32 elsewhere; the losses are float32 always. On a CPU
    with instructions for it (avx512_bf16, amx_bf16 in /proc/cpuinfo) bfloat16 makes a ViT's step three times
    as fast."""
    channels_last: bool = True
    """Memory format of convolutions; faster on GPUs and CPUs alike."""
    compile: bool = False
    """torch.compile the backbone: minutes at the start, faster steps."""
    checkpoint_activations: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third slower."""
    sync_batch_norm: bool = False
    """BatchNorm statistics over all workers; needs GPUs."""


@dataclass(frozen=True, kw_only=True)
class PlaceSettings(Free):
    """Workers, where they decode, and how often they save."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """What workers compute on. auto: GPUs, and the CPUs of a machine without any; a cluster that has no GPU
    computes on CPUs only when told to. On a cluster that grows, auto and cuda ask for nodes with GPUs."""
    workers: int = 0
    """Data-parallel processes; 0: one for each GPU of the cluster, or two without GPUs."""
    gpu_share: float = 1.0
    """Share of a GPU that each worker is given; two runs of 0.5 train side by side on one card, whose memory
    they must share by themselves. Workers of one run never share a card: with a share below 1 there is one
    worker."""
    wait_minutes: float = 60.0
    """Longest wait until a cluster has room for all workers (with --min-workers for so many), where it grows
    or others work on it; said while it lasts."""
    min_workers: int = 0
    """Elastic training: go on with as few workers as this when nodes are lost, and with up to --workers when
    they are back."""
    resize_seconds: float = 60
    """Elastic training: how often to look whether nodes have come back; growing restarts the workers from the
    last checkpoint."""
    threads: int = 0
    """CPU threads of a worker that has no GPU; 0: this machine's cores, shared out. More threads than cores
    are far slower."""
    loader: Literal["auto", "threads", "actors"] = "auto"
    """Where pictures are decoded: threads of each worker, or actors on any CPUs of the cluster. auto:
    threads, but actors for augmentation that threads cannot share (--auto-augment, --color-jitter)."""
    loader_workers: int = 2
    """Threads, or actors, that decode for each worker."""
    checkpoint_minutes: float = 10.0
    """Time between checkpoints inside an epoch; there is one after every epoch in any case."""
    checkpoint_steps: int = 0
    """Steps between checkpoints inside an epoch, in place of a time."""
    max_failures: int = 3
    """Times that a failed worker group is started again from the last checkpoint."""
    until_epoch: int = 0
    """End after this epoch, as if interrupted there: schedule and length stay those of --epochs, and the same
    command goes on later; 0: at the end."""

    def faults(self) -> list[str]:
        """See `Settings.faults`."""
        faults = [
            *below(1, self, "loader_workers"),
            *below(
                0,
                self,
                "workers",
                "min_workers",
                "resize_seconds",
                "threads",
                "max_failures",
                "wait_minutes",
                "checkpoint_minutes",
                "checkpoint_steps",
                "until_epoch",
            ),
        ]
        if not 0 < self.gpu_share <= 1:
            faults.append(f"gpu_share={self.gpu_share}: must be above 0 and at most 1.")
        elif self.gpu_share < 1 and self.workers > 1:
            faults.append(
                f"gpu_share={self.gpu_share}: is for a run of one worker, and --workers is {self.workers}; "
                "workers of one run never share a card."
            )
        if self.min_workers and (not self.workers or self.min_workers > self.workers):
            faults.append(
                f"min_workers={self.min_workers}: needs --workers of at least as many (now {self.workers})."
            )
        return faults
