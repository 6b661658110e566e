"""The grid: which trainings a sweep consists of."""

from __future__ import annotations

import itertools
from collections import Counter

from pipeline.errors import SettingsError
from pipeline.store import locations
from training import preparation
from training.config import TrainConfig
from training.settings import flat
from tuning.config import TuneConfig


def trials(config: TuneConfig, sweep: str) -> list[TrainConfig]:
    """The settings of every trial, each with a run folder of its own below `sweep`; the baseline has no
    dimension.

    Trials log no models: the sweep logs its best one.
    """
    found = []
    shared = flat(config.train)
    for backbone in config.backbones or (config.train.model.backbone,):
        for cell, seed in itertools.product(config.grid.cells(), config.seeds):
            own = {"backbone": backbone, "seed": seed, "log_artifacts": "none"}
            trial = TrainConfig.of(**shared | cell | own)
            found.append(trial.but(run=locations.join(sweep, trial_name(trial))))
    names = Counter(trial_name(trial) for trial in found)
    if twice := [name for name, count in names.items() if count > 1]:
        message = (
            f"trials of one name, which would share a folder: {', '.join(twice)}; leave one of each out of "
            "the grid."
        )
        raise SettingsError(message)
    return found


def trial_name(trial: TrainConfig) -> str:
    """backbone-weight-dimension-seed, or backbone-baseline-seed; of a trial that has its folder the folder's
    name.

    A backbone of the hub or a folder is pinned after its trial was named.
    """
    if trial.run:
        return locations.split_options(trial.run)[0].rstrip("/").rpartition("/")[2]
    return preparation.title(trial)
