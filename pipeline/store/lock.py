"""One process at a time in a folder: `with held(folder, "sweep"): ...`.

On a disk the kernel lets go of the lock when the process ends, however it ends, so nothing is left to clear
away; over NFS it holds between nodes, too. An object store knows no such lock: there, whoever works in a
folder says so in an object, which it writes again and again, and whoever comes later looks whether that goes
on. Times are the store's own, so clocks need not agree.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from pyarrow import fs

from pipeline.errors import SettingsError
from pipeline.store import locations
from pipeline.store.files import is_alive

FILE = "lock.json"
_PREFIX = "lock-"
_OURS: set[str] = set()  # announcements of this very process
BEAT_S = 15.0  # between two announcements on an object store
SILENCE_S = 60.0  # after which whoever announced itself is taken for dead
# What was told to end takes a moment: a run after Ctrl-C, the second of two jobs that were sent at once.
PATIENCE_S = 10.0
_UNKNOWN = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of file systems without locks


@contextmanager
def held(folder: str, what: str) -> Iterator[None]:
    """Holds a folder, which is made if need be.

    Args:
        folder: path or URI.
        what: the setting that names the folder, for the message.

    Raises:
        SettingsError: another process holds it, `PATIENCE_S` later too; the text says which.
    """
    if not locations.is_local(folder):
        with _announced(folder, what):
            yield
        return
    path = locations.resolve(folder)[1]
    os.makedirs(path, exist_ok=True)
    # Never deleted: whoever waits for a deleted file's lock would hold a file that nobody else sees.
    with open(os.path.join(path, FILE), "a+", encoding="utf-8") as stream:
        _lock(stream, folder, what)
        stream.truncate(0)
        json.dump(_owner(), stream)
        stream.flush()
        yield


def is_held(folder: str) -> bool:
    """Whether some process, this one too, is at work in a folder, as far as can be told without waiting."""
    try:
        if locations.is_local(folder):
            with open(os.path.join(locations.resolve(folder)[1], FILE), encoding="utf-8") as stream:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        filesystem, root = locations.resolve(folder)
        infos = filesystem.get_file_info(fs.FileSelector(root))
        said = [info for info in infos if info.base_name.startswith(_PREFIX) and info.mtime]
        return any(
            time.time() - each.mtime.timestamp() < SILENCE_S and not _is_dead(each.path) for each in said
        )
    except BlockingIOError:
        return True
    except OSError:
        return False


@contextmanager
def _announced(folder: str, what: str) -> Iterator[None]:
    filesystem, root = locations.resolve(folder)
    mine = f"{root}/{_PREFIX}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.json"
    ended = threading.Event()

    def announce() -> None:
        with filesystem.open_output_stream(mine, compression=None) as stream:
            stream.write(json.dumps(_owner()).encode())

    def repeat() -> None:
        while not ended.wait(BEAT_S):
            with contextlib.suppress(OSError):  # an outage: the work itself will say so
                announce()

    _OURS.add(mine)
    announce()
    thread = threading.Thread(target=repeat, name="lock", daemon=True)
    thread.start()
    try:
        _outlive_others(filesystem, root, mine, folder, what)
        yield
    finally:
        ended.set()
        thread.join(timeout=BEAT_S)  # a server that is gone keeps it waiting for longer
        with contextlib.suppress(OSError):
            filesystem.delete_file(mine)
        _OURS.discard(mine)


def _outlive_others(filesystem: fs.FileSystem, root: str, mine: str, folder: str, what: str) -> None:
    """Returns once no other process says that it is at work; of a killed one that takes as long as its
    silence must last."""
    first: dict[str, float] = {}
    warned, begun = False, time.monotonic()
    while True:
        infos = filesystem.get_file_info(fs.FileSelector(root))
        times = {
            info.path: info.mtime.timestamp()
            for info in infos
            if info.base_name.startswith(_PREFIX) and info.mtime
        }
        now = max(times.values(), default=0.0)  # of the latest announcement, which this process keeps making
        others = {
            path: at
            for path, at in times.items()
            if path != mine and now - at < SILENCE_S and not _is_dead(path)
        }
        if not others:
            for path in times.keys() - {mine}:
                with contextlib.suppress(OSError):
                    filesystem.delete_file(path)
            return
        here = [path for path in others if _is_here(path)]
        alive = [path for path, at in others.items() if at > first.setdefault(path, at) and path not in here]
        patient = time.monotonic() - begun < PATIENCE_S and not _OURS & set(here)
        alive += [] if patient else here
        if alive:
            host, pid = _host_and_pid(alive[0])
            raise _refused(folder, what, f"process {pid} on {host}")
        if not warned:
            host, pid = _host_and_pid(next(iter(others)))
            print(
                f"{what}={folder}: process {pid} on {host} was at work in it less than {SILENCE_S:.0f} s "
                "ago; waiting to see whether it still is",
                file=sys.stderr,
                flush=True,
            )
            warned = True
        time.sleep(min(BEAT_S, PATIENCE_S, 0.5 if here else 5))


def _host_and_pid(path: str) -> tuple[str, int]:
    """(host, process) of an announcement."""
    host, pid, _ = path.rpartition("/")[2].removeprefix(_PREFIX).rsplit("-", 2)
    return host, int(pid)


def _is_here(path: str) -> bool:
    return _host_and_pid(path)[0] == socket.gethostname() and not _is_dead(path)


def _is_dead(path: str) -> bool:
    """Whether it was a process of this machine, which can be looked for.

    A container that is started again has the name, and often the number of its process, of the one before.
    """
    host, pid = _host_and_pid(path)
    if host != socket.gethostname():
        return False
    return not is_alive(pid) or (pid == os.getpid() and path not in _OURS)


def _owner() -> dict[str, object]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _lock(stream: IO[str], folder: str, what: str) -> None:
    begun, warned = time.monotonic(), False
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(stream)
            itself = f"process {os.getpid()} on {socket.gethostname()} " in holder
            if itself or time.monotonic() - begun > PATIENCE_S:
                raise _refused(folder, what, holder) from None
            if not warned:
                said = f"{what}={folder}: {holder} is at work in it; waiting {PATIENCE_S:.0f} s for its end"
                print(said, file=sys.stderr, flush=True)
                warned = True
            time.sleep(min(PATIENCE_S, 0.2))
        except OSError as error:
            if error.errno not in _UNKNOWN:
                raise
            print(
                f"{what}={folder}: its file system has no locks; take care that no second process works in "
                "it.",
                file=sys.stderr,
            )
            return
        else:
            return


def _refused(folder: str, what: str, holder: str) -> SettingsError:
    return SettingsError(
        f"{what}={folder}: {holder} is at work in it; wait until it ends, or pass another --{what}."
    )


def _holder(stream: IO[str]) -> str:
    stream.seek(0)
    try:
        owner = json.loads(stream.read())
        return f"process {owner['pid']} on {owner['host']} (since {owner['since']})"
    except (json.JSONDecodeError, KeyError, TypeError):  # it has just begun
        return "another process"
