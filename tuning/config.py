"""Settings of tuning's verbs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache
from typing import Any, Generic, Literal, get_type_hints

import tyro
from typing_extensions import TypeVar
from tyro.conf import OmitArgPrefixes, UseAppendAction

from pipeline.errors import SettingsError
from training.config import TrainConfig
from training.objectives.registry import settings_of
from training.objectives.settings.align import AlignGrid
from training.settings import Grid, below, flat

SET_BY_SWEEP = {
    "run": "each trial has a folder of its own below --sweep",
    "backbone": "did you mean --backbones?",
    "seed": "did you mean --seeds?",
    "log_artifacts": "of a sweep's models MLflow keeps the best, which --no-export leaves out",
    "gpu_share": "did you mean --trials-per-gpu?",
    "until_epoch": "did you mean --scheduler asha?",
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
    """A sweep of trainings over one store: values of the training method's axes, and of any other setting, x
    backbone x seed, beside the baseline with the same search; then the winner against the baseline's best on
    fresh seeds."""

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
    """Seeds of each configuration; the choice is by their mean."""
    axis: UseAppendAction[tuple[str, ...]] = ()
    """Another setting to vary, as often as wanted: NAME=VALUE,VALUE or NAME=log(LOW,HIGH), uniform(...),
    int(...), of which a grid has 3 points, or as many as a third number says. Settings that are no part of
    the method (lr, weight-decay, label-smoothing) are searched for the baseline, too."""
    search: Literal["grid", "random", "tpe"] = "grid"
    """Which values: every combination, drawn at random, or drawn where results were good (TPE, by Optuna)."""
    trials: int = 0
    """Configurations that random or tpe draws, for each backbone's baseline and as many for the method; 0:
    until --hours or --gpu-hours is spent."""
    search_seed: int = 0
    """Seed of random and tpe."""
    scheduler: Literal["none", "asha"] = "none"
    """asha: train all configurations a little, the best of them on; seeds of a configuration stay
    together, and the baseline's compete among themselves."""
    reduction_factor: int = 3
    """asha: one in so many configurations goes on, for so many times as long."""
    grace_epochs: int = 0
    """asha: epochs before the first choice; 0: a ninth of the training (of --reduction-factor 3)."""
    hours: float = 0.0
    """Begin no training of the search after so many hours of wall time, those of earlier starts counted, too;
    the final comparison comes after; 0: no limit."""
    gpu_hours: float = 0.0
    """Begin no training of the search after so many hours of GPUs; the final comparison comes after; 0: no
    limit."""
    fresh_seeds: int = 5
    """How many seeds, none of them searched on, to train each backbone's best configuration and its best
    baseline with: the comparison that counts; 0: none, below 3 nothing is tested."""
    test_split: str = ""
    """Split of the store that nothing was chosen on, to measure those trainings on, once; empty: their
    figure is of --eval-split, and flatters."""
    concurrent: int = 0
    """Trials at a time; 0: as many as the GPUs allow, or one without GPUs."""
    trials_per_gpu: int = 1
    """Trials that share a GPU, each of one worker."""
    max_failed_trials: int = 5
    """Trainings that crashed, each twice, after which no more are begun; 0: no limit. Those that diverged do
    not count."""
    export: bool = True
    """Export the best configuration's model into SWEEP/best; --register-as makes it a version in MLflow's
    registry."""

    def axes(self) -> dict[str, tuple[Any, ...]]:
        """What the sweep tries: of these the same folder may be given other values."""
        return {**flat(self.grid), "backbones": self.backbones, "seeds": self.seeds}

    @property
    def rungs(self) -> tuple[int, ...]:
        """Epochs after which configurations are compared; the last is the whole training."""
        last, eta = self.train.optim.epochs, self.reduction_factor
        if self.scheduler == "none":
            return (last,)
        if not self.grace_epochs:
            return tuple(sorted({max(1, round(last / eta**2)), max(1, round(last / eta)), last}))
        powers = range(max(1, round(math.log(last / self.grace_epochs, eta))))
        return (*(self.grace_epochs * eta**power for power in powers), last)

    def __post_init__(self) -> None:
        faults = [
            f"{name}={values}: give one or more values, each once."
            for name, values in self.axes().items()
            if (not values and name != "backbones") or len(set(values)) != len(values)
        ]
        faults += self.grid.faults()
        faults += below(
            0, self, "trials", "hours", "gpu_hours", "fresh_seeds", "concurrent", "max_failed_trials"
        )
        faults += [*below(0, self, "grace_epochs"), *below(1, self, "trials_per_gpu")]
        faults += below(2, self, "reduction_factor")
        if self.search != "grid" and not (self.trials or self.hours or self.gpu_hours):
            faults.append(f"search={self.search}: has no end; pass --trials, --hours or --gpu-hours.")
        if self.search == "grid" and self.trials:
            faults.append("trials: a grid has the trials that it has; pass --search random or tpe.")
        if self.grace_epochs and (self.scheduler == "none" or self.grace_epochs >= self.train.optim.epochs):
            faults.append(
                f"grace_epochs={self.grace_epochs}: needs --scheduler asha, and less than the "
                f"{self.train.optim.epochs} epochs of a training."
            )
        if self.trials_per_gpu > 1 and self.train.place.workers > 1:
            faults.append(
                f"trials_per_gpu={self.trials_per_gpu}: workers of one trial do not share a GPU; pass "
                "--workers 1."
            )
        if self.test_split and not self.fresh_seeds:
            faults.append("test_split: measures the trainings of --fresh-seeds, of which there are none.")
        data = self.train.data
        if self.test_split and self.test_split in (data.eval_split, data.train_split):
            which = (
                "eval-split, which the choice is made on"
                if self.test_split == data.eval_split
                else "train-split"
            )
            faults.append(f"test_split={self.test_split}: is the --{which}; pass another, or none.")
        if self.scheduler == "asha" and len(self.rungs) == 1:
            faults.append(
                f"scheduler=asha: trainings of {self.rungs[0]} epochs have nothing to compare before their "
                "end; pass more --epochs, a smaller --grace-epochs, or --scheduler none."
            )
        if faults:
            raise SettingsError("\n".join(faults))


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What one or more sweeps found, in words, as a table and as a page; while they run, too."""

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
