"""Where bytes are: a folder of this machine, or s3:// and gs:// through pyarrow's file systems, and parts of files by range.

A *place* names a picture below a source: `train/dog/1.jpg`, or `shard-07.tar#512-20480` for 20,480 bytes from offset 512.
Credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS and so on), never
from the address, since addresses are recorded in the store. `gs://anonymous@BUCKET` is a public one.
"""

from __future__ import annotations

import functools
import os
import re
from urllib.parse import urlsplit

from pyarrow import fs

RANGE = re.compile(r"(.*)#(\d+)-(\d+)", re.DOTALL)


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URI, and the path in it.

    Raises:
        ValueError: the address holds credentials, is of an unknown kind, or cannot be understood.
    """
    if "://" not in uri:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    if urlsplit(uri).password is not None or urlsplit(uri).username not in (None, "anonymous"):
        message = f"{urlsplit(uri).scheme}://...: credentials do not belong into an address; set them in the environment."
        raise ValueError(message)
    filesystem, root = _file_system(uri)
    return filesystem, root.rstrip("/")


@functools.lru_cache(maxsize=16)
def _file_system(uri: str) -> tuple[fs.FileSystem, str]:
    # Kept: a file system of its own for every picture would open a connection of its own for every picture.
    try:
        filesystem, root = _google(uri) if uri.startswith(("gs://", "gcs://")) else fs.FileSystem.from_uri(uri)
    except (ValueError, OSError) as error:
        message = f"{uri}: cannot be opened ({error}); known are paths, file://, s3://BUCKET/KEY and gs://BUCKET/KEY."
        raise ValueError(message) from None
    return filesystem, str(root)


def _google(uri: str) -> tuple[fs.FileSystem, str]:
    """STORAGE_EMULATOR_HOST, which Google's own clients know, is to gs:// what AWS_ENDPOINT_URL is to s3://."""
    parts = urlsplit(uri)
    if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
        there = urlsplit(emulator if "://" in emulator else f"http://{emulator}")
        google = fs.GcsFileSystem(anonymous=True, scheme=there.scheme, endpoint_override=there.netloc)
        return google, f"{parts.hostname}{parts.path}"
    # Google's client asks again for a quarter of an hour when there are no credentials, or no network.
    limit = "" if "retry_limit_seconds" in parts.query else f"{'&' if parts.query else '?'}retry_limit_seconds=60"
    filesystem, root = fs.FileSystem.from_uri(uri + limit)
    return filesystem, root


def join(root: str, place: str) -> str:
    """The address of a place; one that is an absolute path or a URI itself stays as it is."""
    if not place or "://" in place or place.startswith("/"):
        return place or root
    base, question, query = root.partition("?")  # s3://bucket/key?region=... keeps its settings
    return f"{base.rstrip('/')}/{place}{question}{query}"


def fetch(root: str, place: str, max_bytes: int | None = None) -> bytes:
    """The bytes of a place, at most `max_bytes` of them plus one (so that the caller can tell a longer file).

    Raises:
        OSError: the file is not there or cannot be read.
    """
    part = RANGE.fullmatch(place)
    filesystem, path = resolve(join(root, part[1] if part else place))
    wanted = int(part[3]) if part else None
    if max_bytes is not None:
        wanted = max_bytes + 1 if wanted is None else min(wanted, max_bytes + 1)
    if isinstance(filesystem, fs.LocalFileSystem):
        with open(path, "rb") as stream:
            stream.seek(int(part[2]) if part else 0)
            return stream.read(wanted)
    if part is None:
        with filesystem.open_input_stream(path, compression=None) as stream:
            return bytes(stream.read(wanted))
    with filesystem.open_input_file(path) as stream:
        return bytes(stream.read_at(wanted, int(part[2])))


def is_local(uri: str) -> bool:
    """Whether an address is a path of this machine."""
    return "://" not in uri or uri.startswith("file://")
