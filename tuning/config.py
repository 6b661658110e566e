"""Settings of tuning's verbs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro

from pipeline.errors import SettingsError
from training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class SharedConfig(TrainConfig):
    """The settings that all trials share. Those below are no flags of `tune`: the sweep gives each trial its
    own."""

    run: tyro.conf.Suppress[str] = ""
    backbone: tyro.conf.Suppress[str] = "resnet18"
    alignment_weight: tyro.conf.Suppress[float] = 0.0
    projection_dim: tyro.conf.Suppress[int] = 0
    seed: tyro.conf.Suppress[int] = 0
    log_artifacts: tyro.conf.Suppress[Literal["none", "model", "all"]] = "none"


INSTEAD = {
    "--run": "each trial has a folder of its own below --sweep",
    "--backbone": "did you mean --backbones?",
    "--alignment-weight": "did you mean --alignment-weights?",
    "--projection-dim": "did you mean --projection-dims?",
    "--seed": "did you mean --seeds?",
    "--log-artifacts": "of a sweep's models MLflow keeps the best, which --no-export leaves out",
    "--parent-run": "trials are nested under the sweep's own run",
}
"""Flags of `train` that `tune` does not have, and what to pass instead."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """A grid of trainings over one store: weight x dimension x backbone x seed."""

    train: tyro.conf.OmitArgPrefixes[SharedConfig]
    """What all trials share."""
    sweep: str = ""
    """Folder or s3:// address of the sweep, a run folder a trial in it. The same again resumes, with more
    values, too. Empty: a new one below runs/."""
    alignment_weights: tuple[float, ...] = (0.0, 0.1, 0.3, 1.0)
    """Weights to try; 0 is the baseline and is trained once for each backbone and seed, whatever the
    dimensions."""
    projection_dims: tuple[int, ...] = (128, 0)
    """Widths of the shared space to try; 0 is the embedding's own."""
    backbones: tuple[str, ...] = ()
    """timm models to try; empty: the preset's."""
    seeds: tuple[int, ...] = (0,)
    """Seeds to try; three or more give paired differences with an interval."""
    concurrent: int = 0
    """Trials at a time; 0: as many as the GPUs allow, or one on a cluster without GPUs."""
    export: bool = True
    """Export the best model of the sweep (by the last epoch's top-1) into SWEEP/best."""

    def __post_init__(self) -> None:
        faults = []
        for name in ("alignment_weights", "projection_dims", "seeds", "backbones"):
            values = getattr(self, name)
            if (not values and name != "backbones") or len(set(values)) != len(values):
                faults.append(f"{name}={values}: give one or more values, each once.")
        if any(not 0 <= weight < float("inf") for weight in self.alignment_weights):
            faults.append(f"alignment_weights={self.alignment_weights}: must be 0 or more.")
        if self.concurrent < 0:
            faults.append(f"concurrent={self.concurrent}: must be 0 or more.")
        if faults:
            raise SettingsError("\n".join(faults))


# What the same folder may be given again. A test holds that every setting is one of the three: what decides
# the results of trials that are there already; axes of the grid, which may have other values; and the rest,
# which changes no result.
DECIDING = ("train",)
GROWING = ("alignment_weights", "projection_dims", "backbones", "seeds")
FREE = ("sweep", "concurrent", "export")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The table of one or more sweeps, and the page."""

    sweeps: tyro.conf.Positional[tuple[str, ...]]
    """Folders or s3:// addresses of sweeps."""
    html: str = ""
    """Also write a self-contained page into this file."""
    pictures: int = 12
    """Pictures with captions on the page."""

    def __post_init__(self) -> None:
        if not self.sweeps:
            message = "sweeps: name at least one folder that `gpt4image tune` made."
            raise SettingsError(message)
