"""Settings and recipes of masked modelling towards a teacher's features (`objectives/mvp.py`)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from training.objectives.metric import Metric
from training.settings import Grid, MethodSettings, below

METRIC = Metric(
    name="cosine", title="cosine to the teacher", digits=4, unit="", difference="of cosine to the teacher"
)


@dataclass(frozen=True, kw_only=True)
class MvpGrid(Grid):
    """Teachers x mask ratios."""

    teachers: tuple[str, ...] = ("",)
    """Teachers to try, as --teacher names them; an empty one is that of --teacher. Each run is judged by the
    cosine to its own, so what a teacher is worth shows when a run is started from (--init-from)."""
    mask_ratios: tuple[float, ...] = (0.4,)
    """Shares of masked patches to try."""

    def cells(self) -> list[dict[str, Any]]:
        """See `Grid.cells`."""
        named: list[dict[str, Any]] = [{"teacher": each} if each else {} for each in self.teachers]
        return [cell | {"mask_ratio": ratio} for cell in named for ratio in self.mask_ratios]


@dataclass(frozen=True, kw_only=True)
class MvpSettings(MethodSettings):
    """The training method: masked image modelling towards a frozen vision tower's features of patches."""

    left_open = ("teacher", "teacher_revision", "feature_variant")
    axes: ClassVar = {"teacher": "teacher", "mask_ratio": "masked"}
    legend: ClassVar = {
        "teacher": "whose features of patches are predicted",
        "mask_ratio": "share of a picture's patches that the student does not see",
    }
    grid = MvpGrid

    teacher: str = ""
    """Frozen vision tower: a CLIP, SigLIP or DINOv2 of transformers (hub name or folder), or one of timm's as
    timm:NAME, hf-hub:ORG/NAME or local-dir:FOLDER. Empty with --stored-features: the one that made them."""
    teacher_revision: str = ""
    """Commit on the hub; empty: what main is when the run begins, which is recorded."""
    teacher_size: int = 0
    """Edge in pixels at which the teacher sees the student's crop, where it can be another than its own, so
    that both have as many patches; 0: its own."""
    stored_features: bool = False
    """Read the teacher's features from the store (`gpt4image features --tokens`) in place of asking it at
    every step: then without crops and flips (--crop-scale 1 --flip 0)."""
    feature_variant: str = ""
    """Which features of the store; empty: the only ones, or those that a resumed run was begun with."""
    mask_ratio: float = 0.4
    """Share of a picture's patches that is masked."""
    mask_shape: Literal["blocks", "random"] = "blocks"
    """Masked patches lie in blocks (BEiT's) or anywhere."""
    masked_patches: Literal["replaced", "dropped"] = "replaced"
    """replaced: the student sees one learned token for each (BEiT); dropped: it sees the others alone, and a
    light decoder behind it predicts (MAE)."""
    regressor_width: int = 256
    """Width of that decoder, a multiple of 64."""
    regressor_depth: int = 4
    """Blocks of that decoder."""
    token_loss: Literal["cosine", "smooth-l1"] = "cosine"
    """Between prediction and the teacher's feature, which is brought to mean 0 and deviation 1 over its
    components: 2 - 2 cos, or the smooth L1 of PyTorch."""
    smooth_l1_beta: float = 1.0
    """Difference from which the smooth L1 loss is linear."""
    supervised_patches: Literal["masked", "all"] = "masked"
    """Patches that count for the loss."""

    def told(self) -> dict[str, str]:
        """The teacher by its last name."""
        return {"teacher": _short(self.teacher), "masked": f"{self.mask_ratio:g}"}

    def title(self) -> str:
        """See `told`."""
        return f"mvp-{_short(self.teacher)}-m{self.mask_ratio:g}"

    def faults(self) -> list[str]:
        """See `Settings.faults`."""
        faults = below(0, self, "teacher_size") + below(1, self, "regressor_depth")
        if not (self.teacher or self.stored_features):
            faults.append("teacher: name the vision tower, such as --teacher openai/clip-vit-base-patch16.")
        if self.teacher_revision and not re.fullmatch("[0-9a-f]{40}|files-[0-9a-f]+", self.teacher_revision):
            faults.append(
                f"teacher_revision={self.teacher_revision}: pass the 40 digits of a commit, so that the "
                "run goes on with the same one, or leave it out."
            )
        if not 0 < self.mask_ratio < 1:
            faults.append(f"mask_ratio={self.mask_ratio}: must lie between 0 and 1, such as 0.4.")
        if self.regressor_width < 64 or self.regressor_width % 64:
            faults.append(f"regressor_width={self.regressor_width}: must be a multiple of 64, such as 256.")
        if self.smooth_l1_beta <= 0:
            faults.append(f"smooth_l1_beta={self.smooth_l1_beta}: must be above 0, such as 1.")
        if self.stored_features and (self.teacher_revision or self.teacher_size):
            faults.append(
                "stored_features: revision and size of the teacher are those of the store's features; leave "
                "--teacher-revision and --teacher-size out."
            )
        if self.feature_variant and not self.stored_features:
            faults.append("feature_variant: is for --stored-features; pass that, too, or leave it out.")
        return faults


def _short(teacher: str) -> str:
    last = teacher.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    return re.sub("[^A-Za-z0-9._-]", "_", last) or "stored"


PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2203.05175: ViT-B/16, 300 epochs of ImageNet, CLIP's ViT-B/16 as teacher. What its pages say no
    # more of is BEiT's (arXiv 2106.08254): blocks of 40 %, batch 2048, AdamW with lr 1.5e-3, 10 warm-up
    # epochs, weight decay 0.05, drop path 0.1, gradients limited to 3, colour jitter 0.4. Ours: the crop's
    # least share (BEiT: 0.08, at 300 epochs less is lost by seeing more of a picture), the loss, masked
    # patches alone.
    "mvp-vit-b": {
        "backbone": "vit_base_patch16_224",
        "image_size": 224,
        "teacher": "openai/clip-vit-base-patch16",
        "epochs": 300,
        "batch_size": 2048,
        "lr": 1.5e-3,
        "min_lr": 1e-5,
        "warmup_lr": 1e-6,
        "warmup_epochs": 10.0,
        "weight_decay": 0.05,
        "drop_path": 0.1,
        "clip_grad": 3.0,
        "crop_scale": 0.2,
        "color_jitter": 0.4,
        "loader_workers": 12,
    },
    # The embedded default: no flips, since "left of" must stay true; a tiny ViT with 8 x 8 patches.
    "mvp-scenes": {
        "backbone": "test_vit2",
        "image_size": 64,
        "patch_size": 8,
        "teacher": "examples/scenes/clip",
        "epochs": 20,
        "epoch_repeats": 4,
        "batch_size": 32,
        "lr": 2e-3,
        "warmup_epochs": 1.0,
        "clip_grad": 3.0,
        "crop_scale": 0.5,
        "flip": 0.0,
        "workers": 1,
    },
}
