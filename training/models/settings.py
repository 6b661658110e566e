"""Which backbone."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import tyro

from training.settings import Deciding, below, no_share

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
class ModelSettings(Deciding):
    """Which backbone, at which size, started from what."""

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
    init_from: str = ""
    """Start from the backbone of another run (folder or s3://), such as one of --objective mae: its last
    checkpoint, the average where it kept one; the classifier only where it has as many classes. Or from a
    FILE.safetensors or FILE.pth with timm's names of weights or those of Hiera's authors."""
    init_state: tyro.conf.Suppress[str] = ""
    """Which weights --init-from names; found when a run begins."""
    freeze_backbone: bool = False
    """Train nothing of the backbone but its classifier, with statistics of BatchNorm as they are: a linear
    probe of what --init-from or --pretrained bring."""
    image_size: int = 64
    """Edge of the square input in pixels."""
    patch_size: int = 0
    """Patch of a ViT or of ConvNeXt's stem, in pixels; 0: the backbone's own."""
    small_stem: bool = False
    """ResNets for small pictures: first convolution 3 x 3 with stride 1 and no pooling after it (as is usual
    for CIFAR)."""
    drop_path: float = 0.0
    """Stochastic depth of the backbone."""

    @property
    def brings_weights(self) -> bool:
        """Whether the backbone is a model of the hub or of a folder."""
        return self.backbone.startswith((HUB, FOLDER))

    def faults(self) -> list[str]:
        """See `Settings.faults`."""
        faults = below(1, self, "image_size") + below(0, self, "patch_size") + no_share(self, "drop_path")
        if self.init_from and self.pretrained and not self.brings_weights:
            faults.append("init_from: the run's weights take the place of --pretrained; leave one out.")
        return faults
