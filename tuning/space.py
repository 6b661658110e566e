"""The grid: which trainings a sweep consists of."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import asdict, replace

from pipeline.errors import SettingsError
from pipeline.store import locations
from training.config import TrainConfig, short_name
from tuning.config import TuneConfig


def trials(config: TuneConfig, sweep: str) -> list[TrainConfig]:
    """The settings of every trial, each with a run folder of its own below `sweep`; the baseline has no
    dimension.

    Trials log no models: the sweep logs its best one.
    """
    found = []
    shared = asdict(config.train)
    # Weight and width are the alignment's: of another method a trial is a backbone and a seed.
    aligned = config.train.objective == "align"
    weights, dims = (config.alignment_weights, config.projection_dims) if aligned else ((0.0,), (0,))
    for backbone in config.backbones or (config.train.backbone,):
        for weight, dim, seed in itertools.product(weights, dims, config.seeds):
            if aligned and weight == 0 and dim != config.projection_dims[0]:
                continue
            own = {
                "backbone": backbone,
                "alignment_weight": weight,
                "projection_dim": dim if weight else 0,
                "seed": seed,
            }
            trial = TrainConfig(**{**shared, **own, "log_artifacts": "none"})
            found.append(replace(trial, run=locations.join(sweep, trial_name(trial))))
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
    weight = f"{trial.alignment_weight:g}"
    weight = weight if float(weight) == trial.alignment_weight else repr(trial.alignment_weight)
    kind = f"w{weight}-d{trial.projection_dim}" if trial.alignment_weight else "baseline"
    if trial.objective != "align":
        kind = trial.objective.rpartition(".")[2]
    return f"{short_name(trial.backbone)}-{kind}-s{trial.seed}"
