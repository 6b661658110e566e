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

NOT_NEEDED = (".git", ".venv", "runs", "docs", "tests", "benchmarks", "__pycache__", "*.pyc", "*.egg-info")
SECRETS = (
    ".env",
    ".env.*",
    ".envrc",
    ".netrc",
    ".pypirc",
    ".npmrc",
    ".aws",
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
    "*credentials*.json",
    "*service_account*.json",
    "*service-account*.json",
    "*.tfstate*",
)
LIMIT = 500 * 2**20
"""Bytes that Ray's head keeps of one job."""


@dataclass(frozen=True)
class Packed:
    """What was copied."""

    files: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.files} files, {self.nbytes / 2**20:.1f} MiB"


def pack(folder: str, to: str, leave_out: Sequence[str] = ()) -> Packed:
    """Copies what a job needs of a checkout.

    Args:
        folder: the checkout.
        to: an empty folder.
        leave_out: patterns of further names, as of a shell; they go for any part of a path.

    Raises:
        SettingsError: no checkout of this program, files that look like secrets, or more than Ray takes.
    """
    if not os.path.isfile(os.path.join(folder, "pipeline", "__main__.py")):
        message = f"working_dir={folder}: is no checkout of gpt4image-ray (it has no pipeline/__main__.py)."
        raise SettingsError(message)
    names = [name for name in _names(folder) if not _matches(name, (*NOT_NEEDED, *leave_out))]
    if secrets := [name for name in names if _matches(name, SECRETS)]:
        more = f" and {len(secrets) - 5} more" if len(secrets) > 5 else ""
        message = (
            f"working_dir={folder}: {', '.join(secrets[:5])}{more} look like secrets, and every node would "
            "get a copy; move them out of the folder, or leave them out with --exclude "
            + " ".join(sorted({_matches(name, SECRETS) for name in secrets}))
        )
        raise SettingsError(message)
    sizes = {name: os.stat(os.path.join(folder, name)).st_size for name in names}
    if (total := sum(sizes.values())) > LIMIT:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        told = ", ".join(f"{name} ({sizes[name] / 2**20:.0f} MiB)" for name in largest)
        message = (
            f"working_dir={folder}: {total / 2**20:.0f} MiB, and Ray takes {LIMIT / 2**20:.0f}; the largest "
            f"are {told}: leave out with --exclude what is not needed."
        )
        raise SettingsError(message)
    for name in names:
        target = os.path.join(to, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copy2(os.path.join(folder, name), target)
    return Packed(len(names), total)


def _matches(name: str, patterns: Sequence[str]) -> str:
    """The first pattern that a part of the path matches; empty: none."""
    parts = name.split("/")
    return next((p for p in patterns if any(fnmatch.fnmatchcase(part, p) for part in parts)), "")


def _names(folder: str) -> Iterator[str]:
    """Files below a folder; of a git checkout those that are not ignored."""
    command = ["git", "-C", folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True).stdout
        found = [os.fsdecode(name) for name in listed.split(b"\0") if name]
    except (OSError, subprocess.CalledProcessError):
        found = [
            os.path.relpath(os.path.join(root, name), folder)
            for root, _, files in os.walk(folder)
            for name in files
        ]
    for name in dict.fromkeys(found):
        if os.path.isfile(
            os.path.join(folder, name)
        ):  # a deleted one is listed, and so is a link to a folder
            yield name
