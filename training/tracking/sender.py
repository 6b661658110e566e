"""The thread that carries a journal to MLflow: in order, in batches, again and again until the server has it.

Everything it does may be done twice: a run is found by its key before it is created, MLflow's SQL stores keep
equal points once, files overwrite themselves, a model version is found by its id. So a killed sender, a lost
answer or two senders do no harm.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

from training.tracking.client import brief, connect, find_experiment, find_run, patience
from training.tracking.journal import Journal, Record, State
from training.tracking.secrets import masked

KEY, PARENT_KEY, VERSION_KEY = "gpt4image_key", "gpt4image_parent_key", "gpt4image_version_key"
PENDING = "pending-"  # before the key of a run that no server has created yet

_MAX_METRICS, _MAX_PARAMS = 1000, 100  # of one request: limits of MLflow's server
_GATHER_S = 0.3  # what is logged within this time goes in one request
_BACK_OFF_S, _MAX_BACK_OFF_S = 1.0, 30.0
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST")


@dataclass
class _Lane:
    """Records that go in order among themselves: files that can not be stored must not hold up the
    metrics."""

    kinds: tuple[str, ...]
    failures: int = 0
    not_before: float = 0.0


class Sender(threading.Thread):
    """Sends a journal until it is told to stop, or, if so wished, until the run exists.

    Args:
        uri: MLflow's address.
        journal: what to send.
        only_create: end when the run is created.
    """

    def __init__(self, uri: str, journal: Journal, *, only_create: bool = False) -> None:
        super().__init__(name="mlflow-sender", daemon=True)
        self._uri, self._journal, self._only_create = uri, journal, only_create
        self._points = _Lane(("create", "find", "points"))
        self._files = _Lane(("artifacts", "register", "status"))
        self._news, self._ended, self._hurry = threading.Event(), threading.Event(), threading.Event()
        self._client: Any = None
        self._silent = True
        self.tries = 0
        """Requests that failed so far."""

    def wake(self) -> None:
        """There is something new in the journal."""
        self._news.set()

    def stop(self) -> None:
        """Ends the thread after the request in flight."""
        self._ended.set()
        self._news.set()

    def flush(self, wait_s: float) -> bool:
        """Waits until everything has arrived, at most so many seconds; returns whether it has."""
        self._hurry.set()
        self._news.set()
        deadline = time.monotonic() + wait_s
        while not (done := self._journal.state().files >= self._journal.size):
            if time.monotonic() > deadline or not self.is_alive():
                break
            time.sleep(0.05)
        return done

    def run(self) -> None:
        """Until stopped: sends what there is, then waits for news or for the next try."""
        while not self._ended.is_set():
            self._news.clear()
            waits = [
                wait for wait in (self._advance(self._points), self._advance(self._files)) if wait is not None
            ]
            if self._only_create and self._journal.state().points:
                return
            wait = min(waits, default=None)
            self._news.wait(wait if wait is None or not self._hurry.is_set() else 0)
            # Also while hurrying: a server that refuses connections is asked some times a second, not some
            # thousand.
            self._ended.wait(_GATHER_S)

    def _advance(self, lane: _Lane) -> float | None:
        """Sends all that is left in a lane; returns the seconds until the next try, or None if nothing is
        left."""
        left = lane.not_before - time.monotonic()
        if left > 0 and not self._hurry.is_set():
            return left
        try:
            while not self._ended.is_set():
                with self._journal.locked() as mine:
                    if not mine:
                        return _GATHER_S
                    with patience(lane.failures):
                        more = self._step(lane)
                self._succeeded(lane, more)
                if not more:
                    return None
        except (
            Exception
        ) as error:  # of MLflow, its database or any object store's client: the journal keeps the data
            return self._failed(lane, error)
        return None

    def _succeeded(self, lane: _Lane, sent: bool) -> None:
        lane.failures, lane.not_before = 0, 0.0
        if not self._silent and not self._points.failures and not self._files.failures:
            self._silent = True
            if sent:  # rather than found sent by another
                print(f"tracking: {masked(self._uri)} answers again", file=sys.stderr)

    def _failed(self, lane: _Lane, error: Exception) -> float:
        lane.failures += 1
        self.tries += 1
        wait = min(_MAX_BACK_OFF_S, _BACK_OFF_S * 2.0 ** min(lane.failures - 1, 10)) * random.uniform(
            0.8, 1.2
        )
        lane.not_before = time.monotonic() + wait
        if lane.failures == 1 and self._silent:
            self._silent = False
            print(
                f"tracking: {masked(self._uri)}: {brief(error)}; training goes on, what it logs waits in "
                f"{self._journal.folder}",
                file=sys.stderr,
            )
        return wait

    def _step(self, lane: _Lane) -> bool:
        """Sends the next batch of a lane and notes it; returns whether there may be more."""
        state = self._journal.state()
        if lane is self._files:
            return self._send_file(state)
        if self._only_create and state.points:
            return False
        batch: list[Record] = []
        end, size = state.points, 0
        for offset, record in self._journal.read(state.points):
            kind = record.get("kind")
            size += len(record["values"]) if kind == "points" else 0
            if size > _MAX_METRICS or (batch and kind in ("create", "find")):
                break
            end = offset
            if kind in lane.kinds:
                batch.append(record)
            if kind in ("create", "find"):
                break
        if end == state.points:
            return False
        if batch and batch[0]["kind"] == "points":
            self._log(batch, state.run_id)
        elif batch:
            self._identify(batch[0], state)
        self._journal.save(replace(self._journal.state(), points=end))
        return True

    def _connection(self) -> Any:
        if self._client is None:
            self._client = connect(self._uri)
        return self._client

    # Parameters and metrics.

    def _identify(self, record: Record, state: State) -> None:
        """Notes the run's id, creating it unless a try did of which only the answer was lost; then logs its
        parameters."""
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        client, run_id = self._connection(), state.run_id
        if not run_id:
            run_id = (
                self._created(client, record)
                if record["kind"] == "create"
                else self._found(client, record["run"])
            )
            self._journal.save(replace(state, run_id=run_id))
        params = [Param(key, value) for key, value in record.get("params", {}).items()]
        try:
            for start in range(0, len(params), _MAX_PARAMS):
                client.log_batch(run_id, params=params[start : start + _MAX_PARAMS])
        except MlflowException as error:
            self._refused(record, error)

    def _found(self, client: Any, run_id: str) -> str:
        """The run of a provisional id, which the process that called `start_run` creates."""
        if not run_id.startswith(PENDING):
            return run_id
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        known = find_run(client, experiments, KEY, run_id.removeprefix(PENDING))
        if not known:
            message = f"the run {run_id} is not created yet"
            raise LookupError(message)
        return known

    def _created(self, client: Any, record: Record) -> str:
        experiment = find_experiment(client, self._uri, record["experiment"])
        run_id = find_run(client, [experiment], KEY, record["key"])
        parent = str(record["parent"])
        if not run_id:
            tags = {"mlflow.runName": record["name"], KEY: record["key"], **record["tags"]}
            if parent:
                tags[PARENT_KEY if parent.startswith(PENDING) else "mlflow.parentRunId"] = (
                    parent.removeprefix(PENDING)
                )
            run = client.create_run(experiment, start_time=record["t"], tags=tags, run_name=record["name"])
            run_id = str(run.info.run_id)
        # Parent and child may come to the server in either order: whichever is second ties the two together.
        if parent.startswith(PENDING) and (
            parent_id := find_run(client, [experiment], KEY, parent.removeprefix(PENDING))
        ):
            client.set_tag(run_id, "mlflow.parentRunId", parent_id)
        for child in client.search_runs([experiment], f"tags.{PARENT_KEY} = '{record['key']}'"):
            client.set_tag(child.info.run_id, "mlflow.parentRunId", run_id)
        return run_id

    def _log(self, records: list[Record], run_id: str) -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        metrics = [
            Metric(key, value, r["t"], r["step"]) for r in records for key, value in r["values"].items()
        ]
        try:
            self._connection().log_batch(run_id, metrics=metrics)
        except MlflowException as error:
            if len(records) == 1:
                self._refused(records[0], error)
            elif error.error_code in _REFUSALS:
                for record in records:
                    self._log([record], run_id)
            else:
                raise

    def _refused(self, record: Record, error: Any) -> None:
        """Puts aside what the server calls wrong, so that the rest can go on; any other error may pass and is
        raised."""
        if error.error_code not in _REFUSALS:
            raise error
        reason = brief(error)
        self._journal.reject(record, reason)
        print(
            f"tracking: not taken: {reason}; kept in {self._journal.folder}/rejected.jsonl", file=sys.stderr
        )

    # Files, model versions and the status.

    def _send_file(self, state: State) -> bool:
        """The next record of the lane of files, once all metrics logged before it have arrived."""
        from mlflow.exceptions import MlflowException

        if not state.run_id:
            return False
        for end, record in self._journal.read(state.files, state.points):
            changed: dict[str, Any] = {}
            try:
                if record.get("kind") == "artifacts":
                    self._upload(record, state.run_id)
                elif record.get("kind") == "register":
                    self._register(record, state.run_id)
                elif record.get("kind") == "status":
                    changed["ended"] = self._set_status(record, state.run_id)
            except MlflowException as error:
                self._refused(record, error)
            if record.get("kind") in self._files.kinds or end == state.points:
                self._journal.save(replace(self._journal.state(), files=end, **changed))
                return end < state.points
        return False

    def _upload(self, record: Record, run_id: str) -> None:
        folder = self._journal.outbox(record["folder"])
        if os.path.isdir(folder):  # not after an upload whose note was lost
            self._connection().log_artifacts(run_id, folder, record["path"])
            self._journal.drop(record["folder"])

    def _set_status(self, record: Record, run_id: str) -> bool:
        running = record["status"] == "RUNNING"
        if running:
            self._connection().update_run(run_id, status="RUNNING")
        else:
            self._connection().set_terminated(run_id, record["status"], record["t"])
        return not running

    def _register(self, record: Record, run_id: str) -> None:
        from mlflow.exceptions import MlflowException

        client, name = self._connection(), record["name"]
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        versions = client.search_model_versions(f"name = '{name}'")
        if any(version.tags.get(VERSION_KEY) == record["key"] for version in versions):
            return
        source = f"{client.get_run(run_id).info.artifact_uri}/{record['path']}"
        client.create_model_version(
            name, source, run_id, tags={VERSION_KEY: record["key"]}, await_creation_for=0
        )
