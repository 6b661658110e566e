"""Settings of tuning's verbs."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """A grid of trainings over one store: weight x dimension x backbone x seed."""

    train: tyro.conf.OmitArgPrefixes[TrainConfig]
    """What all trials share; the four settings below are set by the grid."""
    sweep: str = ""
    """Folder of the sweep, one run folder a trial in it; the same folder again resumes. Empty: a new one below runs/."""
    alignment_weights: tuple[float, ...] = (0.0, 0.1, 0.3, 1.0)
    """Weights to try; 0 is the baseline and is trained once for each backbone and seed, whatever the dimensions."""
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
        for name in ("alignment_weights", "projection_dims", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                faults.append(f"{name}={values}: give one or more values, each once.")
        if any(weight < 0 for weight in self.alignment_weights):
            faults.append(f"alignment_weights={self.alignment_weights}: must be 0 or more.")
        if self.concurrent < 0:
            faults.append(f"concurrent={self.concurrent}: must be 0 or more.")
        if faults:
            raise ValueError("\n".join(faults))


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The table of one or more sweeps, and the page."""

    sweeps: tyro.conf.Positional[tuple[str, ...]]
    """Folders of sweeps."""
    html: str = ""
    """Also write a self-contained page into this file."""
    pictures: int = 12
    """Pictures with captions on the page."""

    def __post_init__(self) -> None:
        if not self.sweeps:
            message = "sweeps: name at least one folder that `gpt4image tune` made."
            raise ValueError(message)
