"""Settings of tuning's verbs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache
from typing import Any, Generic, get_type_hints

import tyro
from typing_extensions import TypeVar
from tyro.conf import OmitArgPrefixes

from pipeline.errors import SettingsError
from training.config import TrainConfig
from training.objectives.settings import AlignGrid, settings_of
from training.settings import Grid, flat

SET_BY_SWEEP = {
    "run": "each trial has a folder of its own below --sweep",
    "backbone": "did you mean --backbones?",
    "seed": "did you mean --seeds?",
    "log_artifacts": "of a sweep's models MLflow keeps the best, which --no-export leaves out",
    "parent_run": "trials are nested under the sweep's own run",
}
"""Settings of `train` that are no flags of `tune`, beside the axes of the method, and what to pass
instead."""

Shared = TypeVar("Shared", bound=TrainConfig, default=TrainConfig)
Axes = TypeVar("Axes", bound=Grid, default=Any)


@cache
def shared(objective: str) -> type[TrainConfig]:
    """Settings of `train` as flags of `tune`: without those that the sweep gives each trial."""
    method = settings_of(objective)
    names = {*SET_BY_SWEEP, *(method.axes if fields(method.grid) else ())}
    groups = TrainConfig.groups(objective)
    parts: list[Any] = [
        (name, OmitArgPrefixes[(part := _without(kind, names))], field(default_factory=part))  # type: ignore[misc]
        for name, kind in groups.items()
    ]
    found: type[TrainConfig] = _without(TrainConfig, names, parts)
    return found


def _without(kind: Any, names: set[str], parts: Sequence[Any] = ()) -> Any:
    """A class of the same settings, some of which are no flags."""
    hints = get_type_hints(kind, include_extras=True)
    own: list[Any] = []
    for part in fields(kind):
        if part.name in names:
            hidden: Any = tyro.conf.Suppress[hints[part.name]]  # type: ignore[misc,valid-type,name-defined]
            own.append((part.name, hidden, field(default=part.default)))
    told = {"__doc__": kind.__doc__, "__module__": kind.__module__}
    bases = (kind,)
    return make_dataclass(
        kind.__name__, [*own, *parts], bases=bases, frozen=True, kw_only=True, namespace=told
    )


@dataclass(frozen=True, kw_only=True)
class TuneConfig(Generic[Shared, Axes]):
    """A grid of trainings over one store: the axes of the training method x backbone x seed."""

    grid: OmitArgPrefixes[Axes] = field(default_factory=AlignGrid)  # type: ignore[assignment]
    """Values of the training method's axes."""
    train: OmitArgPrefixes[Shared]
    """What all trials share."""
    sweep: str = ""
    """Folder or s3:// address of the sweep, a run folder a trial in it. The same again resumes, with more
    values, too. Empty: a new one below runs/."""
    backbones: tuple[str, ...] = ()
    """timm models to try; empty: the preset's."""
    seeds: tuple[int, ...] = (0,)
    """Seeds to try; three or more give paired differences with an interval."""
    concurrent: int = 0
    """Trials at a time; 0: as many as the GPUs allow, or one on a cluster without GPUs."""
    export: bool = True
    """Export the best model of the sweep (by the last epoch's metric) into SWEEP/best."""

    def axes(self) -> dict[str, tuple[Any, ...]]:
        """What the sweep tries: of these the same folder may be given other values."""
        return {**flat(self.grid), "backbones": self.backbones, "seeds": self.seeds}

    def __post_init__(self) -> None:
        faults = [
            f"{name}={values}: give one or more values, each once."
            for name, values in self.axes().items()
            if (not values and name != "backbones") or len(set(values)) != len(values)
        ]
        faults += self.grid.faults()
        if self.concurrent < 0:
            faults.append(f"concurrent={self.concurrent}: must be 0 or more.")
        if faults:
            raise SettingsError("\n".join(faults))


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
