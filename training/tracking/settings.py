"""Where a run's metrics go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro

from training.settings import Free


@dataclass(frozen=True, kw_only=True)
class TrackSettings(Free):
    """MLflow."""

    tracking_uri: str = ""
    """MLflow: a server, sqlite:///FILE, or none. Empty: MLFLOW_TRACKING_URI, else runs/mlflow.db."""
    experiment: str = "gpt4image"
    """MLflow experiment."""
    log_artifacts: Literal["none", "model", "all"] = "model"
    """What MLflow keeps at the end: the exported model; all: the last checkpoint, too."""
    register_as: str = ""
    """Name in MLflow's model registry that the exported model gets a version of at the end; empty: none."""
    parent_run: tyro.conf.Suppress[str] = ""
    """MLflow run that this one is nested under; set by `tune`."""
