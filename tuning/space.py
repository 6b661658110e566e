"""The grid: which trainings a sweep consists of."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

from training.config import TrainConfig
from tuning.config import TuneConfig


def trials(config: TuneConfig, sweep: str) -> list[TrainConfig]:
    """The settings of every trial, each with a run folder of its own below `sweep`; the baseline has no dimension.

    Trials log no models: the sweep logs its best one.
    """
    found = []
    for backbone in config.backbones or (config.train.backbone,):
        for weight, dim, seed in itertools.product(config.alignment_weights, config.projection_dims, config.seeds):
            if weight == 0 and dim != config.projection_dims[0]:
                continue
            trial = replace(config.train, backbone=backbone, alignment_weight=weight, projection_dim=dim, seed=seed)
            found.append(replace(trial, run=os.path.join(sweep, trial_name(trial)), log_artifacts="none"))
    return found


def trial_name(trial: TrainConfig) -> str:
    """backbone-weight-dimension-seed, or backbone-baseline-seed."""
    kind = f"w{trial.alignment_weight:g}-d{trial.projection_dim}" if trial.alignment_weight else "baseline"
    return f"{trial.backbone.replace('/', '_')}-{kind}-s{trial.seed}"
