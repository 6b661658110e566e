"""What is logged waits here: an append-only file of JSON lines in a folder, and how far it has been sent.

A folder holds journal.jsonl, state.json (the MLflow run id and the offsets sent so far), outbox/ (links to
the files still to be uploaded) and, if the server refused something for good, rejected.jsonl. An append is
one write of some hundred bytes: about 20 microseconds on a local disk. Losing state.json costs nothing but
sending again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class State:
    """How far the journal has been sent."""

    run_id: str = ""
    """Id of the run on the server; empty until the server created it."""
    points: int = 0
    """Bytes of the journal whose parameters and metrics have arrived."""
    files: int = 0
    """Bytes of the journal whose files, model versions and status have arrived."""
    ended: bool = False
    """Whether the run was closed on the server."""


class Journal:
    """The journal of one run. Any number of processes may open it; `locked` keeps their senders apart."""

    def __init__(self, folder: str) -> None:
        self.folder = os.path.abspath(folder)
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        self._path = os.path.join(self.folder, "journal.jsonl")
        self._file = open(self._path, "a+b", buffering=0)  # noqa: SIM115 - open as long as the journal lives
        self._writing = threading.Lock()
        size = self.size
        # A line cut off by a full disk or a power failure must not spoil the next one.
        self._torn = size > 0 and os.pread(self._file.fileno(), 1, size - 1) != b"\n"

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return os.fstat(self._file.fileno()).st_size

    def append(self, record: Record) -> None:
        """Adds a record; it outlives this process when this returns.

        Raises:
            OSError: the disk is full, or gone.
        """
        with self._writing:
            line = b"\n" * self._torn + json.dumps(record).encode() + b"\n"
            self._torn = self._file.write(line) < len(line)
            if self._torn:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._path)

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Record]]:
        """The whole records from one byte to another, each with the offset of its end; a spoilt line is an
        empty record."""
        with open(self._path, "rb") as stream:
            stream.seek(start)
            for line in stream:
                start += len(line)
                if not line.endswith(b"\n") or (stop is not None and start > stop):
                    return
                try:
                    record = json.loads(line)
                except ValueError:
                    record = {}
                yield start, record if isinstance(record, dict) else {}

    def state(self) -> State:
        """How far sending got; the beginning, where that is not known."""
        try:
            with open(os.path.join(self.folder, "state.json"), encoding="utf-8") as stream:
                return State(**json.load(stream))
        except (FileNotFoundError, ValueError, TypeError):
            return State()

    def save(self, state: State) -> None:
        """Replaces the state whole."""
        path = os.path.join(self.folder, "state.json")
        temporary = f"{path}.{uuid.uuid4().hex}"
        with open(temporary, "w", encoding="utf-8") as stream:
            json.dump(asdict(state), stream)
        os.replace(temporary, path)

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Whether this sender may send now: one at a time, over all threads and processes. Ends with the
        process that has it."""
        with open(os.path.join(self.folder, "lock"), "w", encoding="utf-8") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def reject(self, record: Record, reason: str) -> None:
        """Puts aside what the server will never take."""
        with open(os.path.join(self.folder, "rejected.jsonl"), "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"reason": reason, "record": record}) + "\n")

    def keep(self, folder: str) -> str:
        """Links, or copies from another disk, a folder into the outbox; returns its name there."""
        name = uuid.uuid4().hex
        shutil.copytree(folder, self.outbox(name), copy_function=_link_or_copy)
        return name

    def outbox(self, name: str) -> str:
        """The folder of what is kept under a name."""
        return os.path.join(self.folder, "outbox", name)

    def drop(self, name: str) -> None:
        """Removes what is kept under a name."""
        shutil.rmtree(self.outbox(name), ignore_errors=True)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)
