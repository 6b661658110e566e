"""MLflow, from one place: a run with a fixed id that a restarted training reopens, logged to asynchronously from rank 0.

Tracking never decides about training: a server that does not answer costs a warning, not the run.
"""

from __future__ import annotations

import os
import sys
from typing import Any

OFF = "none"


def tracking_uri(wanted: str, runs: str) -> str:
    """The given address, else MLFLOW_TRACKING_URI, else an SQLite file in the folder of runs."""
    return wanted or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{os.path.abspath(runs)}/mlflow.db"


def start_run(uri: str, experiment: str, name: str, params: dict[str, Any], tags: dict[str, str], parent: str = "") -> str:
    """Creates a run and returns its id; empty when tracking is off."""
    if uri == OFF:
        return ""
    client = _client(uri)
    tags = {"mlflow.runName": name, **tags, **({"mlflow.parentRunId": parent} if parent else {})}
    run = client.create_run(_experiment(client, uri, experiment), tags=tags, run_name=name)
    for key, value in params.items():
        client.log_param(run.info.run_id, key, value)
    return str(run.info.run_id)


def _experiment(client: Any, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    location = None
    if uri.startswith("sqlite:///"):
        location = f"file://{os.path.dirname(uri.removeprefix('sqlite:///'))}/mlartifacts"
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:  # another trial was first
        return str(client.get_experiment_by_name(name).experiment_id)


class Tracker:
    """Logs to an existing run; a no-op for an empty id."""

    def __init__(self, uri: str, run_id: str) -> None:
        self._run_id = run_id
        self._client = _client(uri) if run_id else None

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Queues metrics; returns at once."""
        if self._client is None:
            return
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch = [Metric(key, float(value), now, step) for key, value in values.items()]
        self._attempt(lambda client: client.log_batch(self._run_id, metrics=batch, synchronous=False))

    def artifacts(self, folder: str, path: str) -> None:
        """Uploads a folder."""
        self._attempt(lambda client: client.log_artifacts(self._run_id, folder, path))

    def finish(self, status: str = "FINISHED") -> None:
        """Waits for what is queued and closes the run."""
        if self._client is not None:
            import mlflow

            self._attempt(lambda client: mlflow.flush_async_logging())
            self._attempt(lambda client: client.set_terminated(self._run_id, status))

    def _attempt(self, action: Any) -> None:
        from mlflow.exceptions import MlflowException

        if self._client is None:
            return
        try:
            action(self._client)
        except (MlflowException, OSError) as error:
            print(f"tracking: {type(error).__name__}: {str(error).splitlines()[0]}; training goes on", file=sys.stderr)


def _client(uri: str) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import logging

    logging.getLogger("alembic").setLevel(logging.WARNING)  # a page of migrations on first use of an SQLite file
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)
