"""Where bytes are: a folder of this machine, or s3:// and gs:// through pyarrow's file systems, and parts of
files by range.

A *place* names a picture below a source: `train/dog/1.jpg`, or `shard-07.tar#512-20480` for 20,480 bytes from
offset 512. Only the source's own address is parsed, once; a place is joined to it as it is written. Parsed as
addresses, keys with a space or an umlaut would be refused, and `50%25` would read another key.

Credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS and
so on), never from the address, since addresses are recorded in the store. `gs://anonymous@BUCKET` is a public
one.
"""

from __future__ import annotations

import functools
import os
import re
import tempfile
from urllib.parse import urlsplit

from pyarrow import fs

from pipeline.errors import SettingsError

RANGE = re.compile(r"(.*)#(\d+)-(\d+)", re.DOTALL)
_NOT_UTF8 = re.compile(r"[\ud800-\udfff]|<(?=(?:[0-9a-f]{2}|d[89a-f][0-9a-f]{2})>)")
_ESCAPE = re.compile(r"<([0-9a-f]{2}|d[89a-f][0-9a-f]{2})>")
# Times that one file is read before it is unreadable; pyarrow's client for S3 asks three times itself.
TRIES = 3
# What may stand behind an address: pyarrow's settings of S3 and of Google's storage.
OPTIONS = frozenset(
    (
        "region",
        "scheme",
        "endpoint_override",
        "allow_bucket_creation",
        "allow_bucket_deletion",
        "allow_delayed_open",
        "check_directory_existence_before_creation",
        "force_virtual_addressing",
        "tls_ca_file_path",
        "retry_limit_seconds",
        "default_bucket_location",
        "project_id",
    )
)


class StorageError(OSError):
    """The place that holds the files does not answer, or is gone: no fault of any one file. The same command
    goes on later."""


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URI, and the path in it. An object's key is taken as it is written,
    without any decoding.

    Raises:
        ValueError: the address holds credentials, is of an unknown kind, or cannot be understood.
    """
    if "://" not in uri:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    if urlsplit(uri).password is not None or urlsplit(uri).username not in (None, "anonymous"):
        message = (
            f"{urlsplit(uri).scheme}://...: credentials do not belong into an address; set them in the "
            "environment."
        )
        raise SettingsError(message)
    base, options = split_options(uri)
    scheme, _, rest = base.partition("://")
    if scheme not in ("s3", "gs", "gcs"):
        filesystem, root = _file_system(uri)
        return filesystem, root.rstrip("/")
    bucket, _, key = rest.partition("/")
    return _file_system(f"{scheme}://{bucket}{options}")[0], f"{bucket.rpartition('@')[2]}/{key}".rstrip("/")


def split_options(uri: str) -> tuple[str, str]:
    """An address, and its settings with their question mark (`?region=eu-west-1`); a key may hold question
    marks, too."""
    base, question, query = uri.rpartition("?")
    names = [option.partition("=")[0] for option in query.split("&")]
    return (base, f"?{query}") if question and all(name in OPTIONS for name in names) else (uri, "")


@functools.lru_cache(maxsize=64)
def _file_system(uri: str) -> tuple[fs.FileSystem, str]:
    # Kept, one a bucket: a file system of its own for every picture would open a connection of its own for
    # every picture.
    try:
        if uri.startswith(("gs://", "gcs://")):
            filesystem, root = _google(uri)
        elif uri.startswith("s3://"):
            # A small object is put in one request, and not in the three of an upload in parts.
            delayed = (
                "" if "allow_delayed_open" in uri else f"{'&' if '?' in uri else '?'}allow_delayed_open=true"
            )
            filesystem, root = fs.FileSystem.from_uri(uri + delayed)
        else:
            filesystem, root = fs.FileSystem.from_uri(uri)
    except (ValueError, OSError) as error:
        message = (
            f"{uri}: cannot be opened ({error}); known are paths, file://, s3://BUCKET/KEY and "
            "gs://BUCKET/KEY."
        )
        raise SettingsError(message) from None
    return filesystem, str(root)


def _google(uri: str) -> tuple[fs.FileSystem, str]:
    """STORAGE_EMULATOR_HOST, which Google's own clients know, is to gs:// what AWS_ENDPOINT_URL is to
    s3://."""
    address = urlsplit(uri)
    if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
        there = urlsplit(emulator if "://" in emulator else f"http://{emulator}")
        google = fs.GcsFileSystem(anonymous=True, scheme=there.scheme, endpoint_override=there.netloc)
        return google, f"{address.hostname}{address.path}"
    # Google's client asks again for a quarter of an hour when there are no credentials, or no network.
    limit = (
        ""
        if "retry_limit_seconds" in address.query
        else f"{'&' if address.query else '?'}retry_limit_seconds=60"
    )
    filesystem, root = fs.FileSystem.from_uri(uri + limit)
    return filesystem, root


def join(root: str, place: str) -> str:
    """The address of a place; s3://bucket/key?region=... keeps its settings."""
    base, options = split_options(root)
    return f"{base.rstrip('/')}/{place}{options}"


def locate(root: str, place: str) -> tuple[fs.FileSystem, str]:
    """The file system of a source, and the path of a place in it, joined as it is written."""
    filesystem, path = resolve(root)
    return filesystem, f"{path}/{place}" if place else path


def escaped(name: str) -> str:
    """A name as valid UTF-8, for columns and JSON: a byte that is none stands as <e9>. Other names stay as
    they are.

    No two names become one: a name that holds such a mark itself has its `<` as <3c>.
    """
    return _NOT_UTF8.sub(lambda match: _mark(ord(match[0])), name)


def _mark(code: int) -> str:
    return f"<{code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code:02x}>"


def unescaped(name: str) -> str:
    """The name that `escaped` was given, as Python's own functions take it."""
    return _ESCAPE.sub(lambda match: chr(_code(int(match[1], 16))), name)


def _code(mark: int) -> int:
    return 0xDC00 + mark if 0x80 <= mark <= 0xFF else mark


def place_of(name: str) -> str:
    """The place of a whole file, also where its name looks like a part of another (`x.tar#512-20`)."""
    return re.sub(r"#(?=g?\d+-\d+\Z)", "<23>", escaped(name))


def fetch(root: str, place: str, max_bytes: int | None = None) -> bytes:
    """The bytes of a place, at most `max_bytes` of them plus one (so that the caller can tell a longer file).

    Raises:
        OSError: the file is not there or cannot be read.
    """
    match = RANGE.fullmatch(place)
    filesystem, path = locate(root, unescaped(match[1] if match else place))
    wanted = int(match[3]) if match else None
    if max_bytes is not None:
        wanted = max_bytes + 1 if wanted is None else min(wanted, max_bytes + 1)
    return _read(filesystem, path, int(match[2]) if match else None, wanted)


def fetch_picture(root: str, place: str, max_bytes: int, *, listed: bool = False) -> bytes:
    """`fetch` for one of many: what befalls one picture is told from what befalls the storage of all.

    Args:
        root: the source.
        place: of the picture in it.
        max_bytes: see `fetch`.
        listed: the place was found by listing folders, so that its first two, often links to other disks,
            must be there. A list of files may name folders that never were.

    Raises:
        StorageError: whatever holds the source does not answer: this picture is not to blame.
        OSError: the picture is not there or cannot be read, while others can.
    """
    for left in range(TRIES - 1, -1, -1):
        try:
            return fetch(root, place, max_bytes)
        except OSError as error:
            check_alive(root, error, place if listed else "")
            # Storage answers: a file that is missing or forbidden stays so, anything else may have been a
            # hiccup.
            if not left or isinstance(
                error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
            ):
                raise
    raise AssertionError


def _read(filesystem: fs.FileSystem, path: str, offset: int | None, wanted: int | None) -> bytes:
    if isinstance(filesystem, fs.LocalFileSystem):
        with open(path, "rb") as stream:
            stream.seek(offset or 0)
            return stream.read(-1 if wanted is None else wanted)
    if offset is None:
        with filesystem.open_input_stream(path, compression=None) as stream:
            return bytes(stream.read(wanted))
    with filesystem.open_input_file(path) as stream:
        return bytes(stream.read_at(wanted, offset))


def check_alive(root: str, error: OSError, place: str = "") -> None:
    """Tells storage that fails from a file that fails, after `error`: whether the source itself can still be
    looked at.

    Of a folder on this machine also the first two folders of `place`, which may be links to other disks:
    splits and classes.

    Raises:
        StorageError: it cannot: a server that does not answer, credentials that have expired, a disk that is
            no longer mounted.
    """
    filesystem, path = resolve(root)
    try:
        if isinstance(filesystem, fs.LocalFileSystem):
            folders = unescaped(place).split("/")[:-1][:2]
            for folder in [path, *(os.path.join(path, *folders[: n + 1]) for n in range(len(folders)))]:
                with os.scandir(folder) as entries:
                    if next(entries, None) is None:
                        reason = f"is empty ({folder}): is it mounted?"
                        break
            else:
                return
        else:
            # The folder or one of its keys; a bucket alone may be forbidden to look at.
            if filesystem.get_file_info(path).type != fs.FileType.NotFound:
                return
            reason = "is not there any more"
    except NotADirectoryError:
        return  # the source is one file, and it is there
    except OSError as gone:
        reason = f"does not answer ({gone})"
    message = f"{root}: {reason}. First seen as: {error}"
    raise StorageError(message) from None


def check_writable(setting: str, folder: str) -> None:
    """Finds before any work that its result could not be written; an object store says so itself.

    Args:
        setting: its name, for the message.
        place: a folder that is there or is to be made.

    Raises:
        ValueError: it is a file or below one, or nothing can be made there.
    """
    if not is_local(folder):
        return
    path = resolve(folder)[1]
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".gpt4image-", dir=path))
    except OSError as error:
        flag = setting.replace("_", "-")
        message = (
            f"{setting}={folder}: nothing can be written there ({path}: {error.strerror}); pass another "
            f"--{flag}."
        )
        raise SettingsError(message) from None


def is_inside(uri: str, folder: str) -> bool:
    """Whether a path or address is a folder itself, or lies below it."""
    if is_local(uri) != is_local(folder):
        return False
    (there, inner), (here, outer) = resolve(uri), resolve(folder)
    return there.equals(here) and f"{inner}/".startswith(f"{outer.rstrip('/')}/")


def is_local(uri: str) -> bool:
    """Whether an address is a path of this machine."""
    return "://" not in uri or uri.startswith("file://")
