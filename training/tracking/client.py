"""How MLflow is asked: a client without telemetry, short time limits, and the searches that make every
request repeatable."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from training.tracking.secrets import masked

_TIMEOUT_S, _MAX_TIMEOUT_S = 10, 120


def connect(uri: str) -> Any:
    """An MLflow client that sends no telemetry and prints no page of migrations on first use of an SQLite
    file."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import logging

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    with _alone(uri):
        return MlflowClient(tracking_uri=uri)


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """One process at a time opens an SQLite file: two that find it new both migrate it, and both fail in the
    middle of it."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = uri.removeprefix("sqlite:///")
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(f"{path}.lock", "w", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def find_experiment(client: Any, uri: str, name: str) -> str:
    """The id of an experiment, which is made if it does not exist."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    location = None
    if uri.startswith("sqlite:///"):
        location = f"file://{os.path.dirname(uri.removeprefix('sqlite:///'))}/mlartifacts"
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another trial was first
            raise
        return str(client.get_experiment_by_name(name).experiment_id)


def find_run(client: Any, experiments: list[str], tag: str, value: str) -> str:
    """The oldest run with a tag; empty if there is none."""
    runs = client.search_runs(
        experiments, f"tags.{tag} = '{value}'", max_results=1, order_by=["attributes.start_time ASC"]
    )
    return str(runs[0].info.run_id) if runs else ""


@contextmanager
def patience(failures: int) -> Iterator[None]:
    """MLflow's own time limits and retries (120 s, 7 times), made short where the user has not set them.

    MLflow reads them from the environment at each request, so they are there during ours only. A server that
    is slow rather than down gets twice the time at each try.
    """
    wanted = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(min(_MAX_TIMEOUT_S, _TIMEOUT_S * 2 ** min(failures, 10))),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    ours = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def brief(error: Exception) -> str:
    """The kind of an error and the start of its text, in one line and without secrets."""
    return masked(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
