"""One process at a time in a folder of this machine: `with held(folder, "sweep"): ...`.

The kernel lets go of the lock when the process ends, however it ends, so nothing is left to clear away; over NFS it holds between
nodes, too. An object store knows no such lock: there, nothing is kept out.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from pipeline import locations
from pipeline.errors import SettingsError

FILE = "lock.json"
_UNKNOWN = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of file systems without locks


@contextmanager
def held(folder: str, what: str) -> Iterator[None]:
    """Holds a folder, which is made if need be.

    Args:
        folder: path or URI; below s3:// and gs:// this does nothing.
        what: the setting that names the folder, for the message.

    Raises:
        SettingsError: another process holds it; the text says which.
    """
    if not locations.is_local(folder):
        yield
        return
    path = locations.resolve(folder)[1]
    os.makedirs(path, exist_ok=True)
    # Never deleted: whoever waits for a deleted file's lock would hold a file that nobody else sees.
    with open(os.path.join(path, FILE), "a+", encoding="utf-8") as stream:
        _lock(stream, folder, what)
        stream.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}, stream)
        stream.flush()
        yield


def _lock(stream: IO[str], folder: str, what: str) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        message = f"{what}={folder}: {_holder(stream)} is at work in it; wait until it ends, or pass another --{what}."
        raise SettingsError(message) from None
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        print(f"{what}={folder}: its file system has no locks; take care that no second process works in it.", file=sys.stderr)


def _holder(stream: IO[str]) -> str:
    stream.seek(0)
    try:
        owner = json.loads(stream.read())
        return f"process {owner['pid']} on {owner['host']} (since {owner['since']})"
    except (json.JSONDecodeError, KeyError, TypeError):  # it has just begun
        return "another process"
