"""A run that restarts go on in, logged to from rank 0, which never waits for the server.

Everything logged is appended to a journal in a folder (journal.py), a few microseconds a call; a thread of
its own (sender.py) carries it to the server whenever that answers. A server that is down, slow or coming back
costs the training nothing, and no metric is lost with a killed process: the next one on the same folder sends
the rest, or by hand `python -m training.tracking FOLDER --uri URI`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
import uuid
from typing import Any

from pipeline.errors import SettingsError
from training.tracking.journal import Journal, Record
from training.tracking.secrets import masked, metric_name, recordable
from training.tracking.sender import PENDING, Sender

__all__ = ["OFF", "Tracker", "actual_run_id", "masked", "send", "start_run", "tracking_uri"]

OFF = "none"
_LONGEST_PARAM, _LONGEST_TAG = 6000, 5000  # characters that MLflow takes
_CHUNK = 1000  # metrics of one record: what one request may hold
# A server gets this long to give the run's id before training starts without it; a new SQLite file is first
# migrated, 10 s.
_PATIENCE_SERVER_S, _PATIENCE_FILE_S = 15.0, 60.0


def tracking_uri(wanted: str, runs: str) -> str:
    """The given address, else MLFLOW_TRACKING_URI, else an SQLite file in the folder of runs."""
    return wanted or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{os.path.abspath(runs)}/mlflow.db"


def start_run(
    uri: str,
    experiment: str,
    name: str,
    params: dict[str, Any],
    tags: dict[str, str],
    parent: str = "",
    *,
    spool: str = "",
) -> str:
    """Creates a run and returns its id; empty when tracking is off.

    If the server does not answer at once, the id is a provisional one, `pending-KEY`: a `Tracker` takes it
    like any other and the run is created when the server comes; `actual_run_id` then knows its id. Called
    again on the same spool folder it finds the same run. Secrets in params and tags are masked.

    Args:
        uri: address of MLflow, or `none`.
        experiment: made if it does not exist.
        name: of the run.
        params: settings, logged as text.
        tags: such as the variants of the store that are trained on.
        parent: id of the run that this one is nested under; may be provisional.
        spool: folder of the journal, which `Tracker` is to be given too, such as RUN/tracking. Where rank 0
            does not see it, it finds the run by its key once this process, which keeps trying while it lives,
            has created it.
    """
    if uri == OFF:
        return ""
    key = uuid.uuid4().hex
    folder = spool or _own_spool(uri, key)
    journal = Journal(folder)
    first = next((record for _, record in journal.read()), None)
    if first is None:
        journal.append(
            {
                "kind": "create",
                "key": key,
                "t": _now(),
                "uri": masked(uri),
                "experiment": experiment,
                "name": name,
                "parent": parent,
                "params": recordable(params, _LONGEST_PARAM),
                "tags": recordable(dict(tags), _LONGEST_TAG),
            }
        )
    else:
        key = str(first.get("key", key))
    sender = Sender(uri, journal, only_create=True)
    sender.start()
    on_file = uri.startswith("sqlite:")  # may be locked for a moment, but is never down
    deadline = time.monotonic() + (_PATIENCE_FILE_S if on_file else _PATIENCE_SERVER_S)
    while sender.is_alive() and (on_file or sender.tries < 2) and time.monotonic() < deadline:
        sender.join(0.05)
    state = journal.state()
    if state.points and not spool:
        shutil.rmtree(folder, ignore_errors=True)
    return state.run_id or PENDING + key


def actual_run_id(run_id: str, spool: str) -> str:
    """The id on the server of a run that may have been started with a provisional one; that one while there
    is no other."""
    return (Journal(spool).state().run_id if run_id and os.path.isdir(spool) else "") or run_id


class Tracker:
    """Logs to a run of `start_run`; a no-op for an empty id. No method waits for the server but `finish`.

    Args:
        uri: address of MLflow.
        run_id: of `start_run`.
        spool: folder of the journal; give the one given to `start_run`. Empty: one beside the SQLite file, or
            in ~/.cache.
        system_metrics_s: seconds between samples of CPU, memory, disk, network and GPUs; 0: none.
    """

    def __init__(self, uri: str, run_id: str, *, spool: str = "", system_metrics_s: float = 10.0) -> None:
        self._journal: Journal | None = None
        self._ended = threading.Event()
        if not run_id or uri == OFF:
            return
        self._uri, self._given, self._spool = (
            uri,
            run_id,
            spool or _own_spool(uri, run_id.removeprefix(PENDING)),
        )
        self._own = not spool and not run_id.startswith(PENDING)
        self._logged: set[tuple[str, int]] | None = None
        self._complained = False
        try:
            self._journal = Journal(self._spool)
            state = self._journal.state()
            begins = not self._journal.size
            if begins:
                self._journal.append({"kind": "find", "run": run_id})
            if begins or state.ended:  # where the journal was elsewhere, it may have ended there
                self._journal.append({"kind": "status", "status": "RUNNING", "t": _now()})
        except OSError as error:
            self._journal = None
            self._complain(error)
            return
        self._sender = Sender(uri, self._journal)
        self._sender.start()
        if system_metrics_s:
            threading.Thread(
                target=self._sample, args=(system_metrics_s,), name="system-metrics", daemon=True
            ).start()

    @property
    def run_id(self) -> str:
        """The run's id on the server; a provisional one until the server created it; empty when tracking is
        off."""
        return (self._journal.state().run_id or self._given) if self._journal else ""

    def metrics(self, values: dict[str, float], step: int, *, once: bool = False) -> None:
        """Logs metrics of a step, with the time of now; returns at once.

        Args:
            values: any names; losses, images/s, accuracies.
            step: of all of them.
            once: leave out what this run has logged for this step before, in this process or in one before
                it. For a restart that goes over steps again, or logs its whole history lest the last epoch be
                missing.
        """
        journal = self._open
        if journal is None:
            return
        points = [(metric_name(name), float(value)) for name, value in values.items()]
        if once or self._logged is not None:
            points = self._new(journal, points, step, once)
        for start in range(0, len(points), _CHUNK):
            values = dict(points[start : start + _CHUNK])
            self._append(journal, {"kind": "points", "t": _now(), "step": int(step), "values": values})

    def artifacts(self, folder: str, path: str) -> None:
        """Uploads a folder's files under a path of the run's artefacts, later.

        Files are hard-linked (copied, if from another disk): they may be replaced or removed as soon as this
        returns, but not rewritten in place.
        """
        self._keep(folder, path)

    def register(self, name: str, folder: str, path: str = "model") -> None:
        """Uploads an exported model's folder and makes it the next version of a registered model, once the
        files have arrived."""
        journal = self._open
        if journal is not None and self._keep(folder, path):
            self._append(journal, {"kind": "register", "name": name, "path": path, "key": uuid.uuid4().hex})

    def finish(self, status: str = "FINISHED", wait_s: float = 60.0) -> bool:
        """Closes the run and waits at most so many seconds for all to arrive; returns whether it has, and
        says it if not."""
        journal = self._open
        if journal is None:
            return True
        self._append(journal, {"kind": "status", "status": status, "t": _now()})
        self._ended.set()
        done = _flush(self._sender, journal, self._uri, wait_s)
        if done and self._own and status == "FINISHED":  # one that goes on must know what it has logged
            shutil.rmtree(self._spool, ignore_errors=True)
        return done

    @property
    def _open(self) -> Journal | None:
        return None if self._ended.is_set() else self._journal

    def _keep(self, folder: str, path: str) -> bool:
        journal = self._open
        if journal is None:
            return False
        try:
            name = journal.keep(folder)
        except OSError as error:  # shutil.Error, which tells of several files, is one too
            self._complain(error)
            return False
        self._append(journal, {"kind": "artifacts", "folder": name, "path": path})
        return True

    def _append(self, journal: Journal, record: Record) -> None:
        try:
            journal.append(record)
        except OSError as error:
            self._complain(error)
        self._sender.wake()

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            self._complained = True
            print(
                f"tracking: can not keep what is logged: {error}; training goes on, free or name another "
                "disk",
                file=sys.stderr,
            )

    def _new(
        self, journal: Journal, points: list[tuple[str, float]], step: int, once: bool
    ) -> list[tuple[str, float]]:
        if self._logged is None:
            records = (record for _, record in journal.read() if record.get("kind") == "points")
            self._logged = {(name, record["step"]) for record in records for name in record["values"]}
        new = [(name, value) for name, value in points if not once or (name, step) not in self._logged]
        self._logged |= {(name, step) for name, _ in new}
        return new

    def _sample(self, interval_s: float) -> None:
        """MLflow's own monitors, under its own names, but into the journal: with the server down MLflow's
        thread gives up."""
        journal = self._journal
        assert journal is not None
        if self._ended.wait(interval_s):
            return
        monitors = _monitors()
        earlier = (
            record
            for _, record in journal.read()
            if any(name.startswith("system/") for name in record.get("values", ()))
        )
        step = max((int(record["step"]) for record in earlier), default=-1)
        while True:
            step += 1
            values: dict[str, float] = {}
            for monitor in monitors:
                monitor.collect_metrics()
                values |= {
                    f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()
                }
                monitor.clear_metrics()
            self._append(journal, {"kind": "points", "t": _now(), "step": step, "values": values})
            if self._ended.wait(interval_s):
                return


def send(spool: str, uri: str = "", wait_s: float = 600.0) -> bool:
    """Sends what a run's folder still holds; returns whether all has arrived.

    Raises:
        ValueError: the folder holds no journal, or nothing says where to send it.
    """
    if not os.path.isfile(os.path.join(spool, "journal.jsonl")):
        message = (
            f"{spool}: holds no journal.jsonl; pass the folder that the message named, such as RUN/tracking."
        )
        raise SettingsError(message)
    journal = Journal(spool)
    first = next((record for _, record in journal.read()), {})
    recorded = str(first.get("uri", ""))
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or (recorded if "***" not in recorded else "")
    if not uri:
        message = f"{spool}: the address of MLflow is not recorded ({recorded or 'none'}); pass --uri."
        raise SettingsError(message)
    sender = Sender(uri, journal)
    sender.start()
    return _flush(sender, journal, uri, wait_s)


def is_sent(spool: str) -> bool:
    """Whether nothing of a run's folder is left to send; touches no file."""
    if not os.path.isfile(os.path.join(spool, "journal.jsonl")):
        return True
    journal = Journal(spool)
    state = journal.state()
    return min(state.points, state.files) >= journal.size


def _flush(sender: Sender, journal: Journal, uri: str, wait_s: float) -> bool:
    done = sender.flush(wait_s)
    sender.stop()
    if not done:
        state = journal.state()
        points = sum(len(record.get("values", ())) for _, record in journal.read(state.points))
        files = sum(record.get("kind") == "artifacts" for _, record in journal.read(state.files))
        print(
            f"tracking: {masked(uri)} has not taken {points} metrics and {files} folders of files in "
            f"{wait_s:.0f} s. Nothing is lost; send them with: python -m training.tracking {journal.folder} "
            f"--uri {masked(uri)}",
            file=sys.stderr,
        )
    return done


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = []
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
        # No pynvml or no NVIDIA GPU; no network counters in some containers.
        with contextlib.suppress(ImportError, RuntimeError, AttributeError, OSError):
            monitors.append(kind())
    return monitors


def _own_spool(uri: str, key: str) -> str:
    """A folder for a caller that names none: beside the SQLite file, else in the user's cache."""
    root = (
        os.path.dirname(uri.removeprefix("sqlite:///"))
        if uri.startswith("sqlite:///")
        else "~/.cache/gpt4image"
    )
    return os.path.join(os.path.abspath(os.path.expanduser(root)), "tracking", key)


def _now() -> int:
    return int(time.time() * 1000)
