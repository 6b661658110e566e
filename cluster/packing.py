"""The checkout as it is sent to a cluster: what git would keep, without what a job does not need, and never
what looks like a secret, since every node gets a copy."""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.errors import SettingsError

NOT_NEEDED = (".git", ".venv", "runs", "docs", "tests", "benchmarks")
"""Folders of the checkout itself."""
LEFTOVERS = ("__pycache__", "*.pyc", "*.egg-info", ".mypy_cache", ".ruff_cache", ".pytest_cache")
# Ray leaves out what they name, though git may keep it.
IGNORE_FILES = (".gitignore", ".rayignore")
SECRETS = (
    ".env",
    ".env.*",
    "*.env",
    ".envrc",
    ".netrc",
    ".pgpass",
    ".pypirc",
    ".npmrc",
    ".s3cfg",
    ".git-credentials",
    ".aws",
    ".azure",
    ".docker",
    ".ssh",
    ".kube",
    ".config",
    ".databrickscfg",
    "*.pem",
    "*.key",
    "*.p12",
    "*.pfx",
    "*.jks",
    "*.kdbx",
    "id_rsa*",
    "id_dsa*",
    "id_ecdsa*",
    "id_ed25519*",
    "auth_token",
    "token",
    "kubeconfig*",
    "credentials",
    "secrets.y*ml",
    "*client_secret*.json",
    "*credentials*.json",
    "*service_account*.json",
    "*service-account*.json",
    "*.tfstate*",
)
NO_SECRETS = ("*.example", "*.sample", "*.template", "*.pub")
"""What they are called where they hold none."""
LIMIT = 100 * 2**20
"""Bytes that Ray's job server takes of one job (`DASHBOARD_CLIENT_MAX_SIZE` of Ray 2.60)."""


@dataclass(frozen=True)
class Packed:
    """What was copied."""

    files: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.files} files, {self.nbytes / 2**20:.1f} MiB"


def checkout(folder: str) -> str:
    """The folder itself, or where none is named the checkout that the current one lies in."""
    if folder:
        return os.path.abspath(folder)
    here = above = os.getcwd()
    while not os.path.isfile(os.path.join(above, "pipeline", "__main__.py")):
        if (parent := os.path.dirname(above)) == above:
            return here
        above = parent
    return above


def names_of(folder: str, leave_out: Sequence[str] = ()) -> list[str]:
    """Files of a checkout that a job needs, relative to it.

    Args:
        folder: the checkout.
        leave_out: patterns of further names, as of a shell; they go for any part of a path.

    Raises:
        SettingsError: no checkout of this program, another repository inside it, files that look like
            secrets, or more than Ray takes.
    """
    found = [name for name in _names(folder) if not _unneeded(name) and not _matches(name, leave_out)]
    if "pipeline/__main__.py" not in found:
        message = (
            f"working_dir={folder}: is no checkout of gpt4image-ray (no pipeline/__main__.py, or git ignores "
            "it); go to one, or pass --working-dir."
        )
        raise SettingsError(message)
    if inner := [name for name in found if os.path.isdir(os.path.join(folder, name))]:
        message = (
            f"working_dir={folder}: {', '.join(inner)} is a repository or a link to a folder, whose files "
            f"would stay behind; leave it out with --exclude {' '.join(map(os.path.basename, inner))}"
        )
        raise SettingsError(message)
    root = os.path.realpath(folder)
    outside = [
        name
        for name in found
        if not os.path.realpath(os.path.join(folder, name)).startswith(f"{root}{os.sep}")
    ]
    if secrets := [name for name in found if _secret(name)] + outside:
        more = f" and {len(secrets) - 5} more" if len(secrets) > 5 else ""
        parts = {_secret(name) or os.path.basename(name) for name in secrets}
        what = "lead out of the folder" if secrets == outside else "look like secrets"
        message = (
            f"working_dir={folder}: {', '.join(secrets[:5])}{more} {what}, and every node would get a copy; "
            f"move them out of the folder, or leave them out with --exclude {' '.join(sorted(parts))}"
        )
        raise SettingsError(message)
    sizes = {name: os.stat(os.path.join(folder, name)).st_size for name in found}
    if (total := sum(sizes.values())) > LIMIT:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        told = ", ".join(f"{name} ({sizes[name] / 2**20:.0f} MiB)" for name in largest)
        message = (
            f"working_dir={folder}: {total / 2**20:.0f} MiB, and Ray takes {LIMIT / 2**20:.0f}; the largest "
            f"are {told}: leave out with --exclude what is not needed."
        )
        raise SettingsError(message)
    return found


def pack(folder: str, to: str, names: Sequence[str]) -> Packed:
    """Copies the files of `names_of` to an empty folder."""
    total = 0
    for name in names:
        target = os.path.join(to, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copy2(os.path.join(folder, name), target)
        total += os.stat(target).st_size
    return Packed(len(names), total)


def _unneeded(name: str) -> bool:
    first, last = name.split("/", 1)[0], name.rsplit("/", 1)[-1]
    return first in NOT_NEEDED or last in IGNORE_FILES or bool(_matches(name, LEFTOVERS))


def _secret(name: str) -> str:
    """The part of a path that looks like a secret; empty: none does."""
    return "" if _matches(name.rsplit("/", 1)[-1], NO_SECRETS) else _matches(name, SECRETS)


def _matches(name: str, patterns: Sequence[str]) -> str:
    """The first part of the path that matches a pattern, large or small; empty: none."""
    lower = [pattern.lower() for pattern in patterns]
    parts = name.split("/")
    return next((part for part in parts if any(fnmatch.fnmatchcase(part.lower(), p) for p in lower)), "")


def _names(folder: str) -> Iterator[str]:
    """Files below a folder; of a git checkout those that are not ignored."""
    command = ["git", "-C", folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True).stdout
        found = [os.fsdecode(name).rstrip("/") for name in listed.split(b"\0") if name]
    except (OSError, subprocess.CalledProcessError):
        found = [
            os.path.relpath(os.path.join(root, name), folder)
            for root, _, files in os.walk(folder)
            for name in files
        ]
    for name in dict.fromkeys(found):
        if os.path.exists(os.path.join(folder, name)):  # git lists a deleted one, too, and links to nothing
            yield name
