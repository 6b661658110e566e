"""Whole-file writes: readers see the old file or the new one, never a part."""

from __future__ import annotations

import json
import os
import platform
import uuid
from typing import Any

from pyarrow import fs


def write_whole(filesystem: fs.FileSystem, path: str, data: bytes, lasting: bool = True) -> None:
    """Object stores put a stream whole when it is closed; on a disk, a rename does the same."""
    if not isinstance(filesystem, fs.LocalFileSystem):
        with filesystem.open_output_stream(path, compression=None) as stream:
            stream.write(data)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    folder, name = os.path.split(path)
    temporary = f"{folder}/.{name}.{platform.node()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            if lasting:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def json_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
