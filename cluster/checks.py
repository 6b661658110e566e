"""What is wrong with a verb as a job is said here, before anything is sent: it is parsed with its own
settings, and its paths must mean the same on every node."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from cluster.cli import VERBS
from pipeline import verbs
from pipeline.errors import SettingsError

PATHS = frozenset(
    {
        "images",
        "store",
        "class_names",
        "file",
        "to",
        "run",
        "sweep",
        "sweeps",
        "html",
        "work_dir",
        "classes_file",
    }
)
"""Settings of any verb that are files or folders of the user's."""
MODELS = frozenset({"model", "encoder", "backbone", "backbones"})
"""Names on a hub, or folders; those of the checkout travel with it."""
URIS = frozenset({"tracking_uri"})
REQUIRED = {"train": "run", "tune": "sweep"}
"""What a verb writes to; here its default would lie in the job's own copy of the checkout."""
WRITES = {"train": "run", "tune": "sweep", "evaluate": "to", "export": "to", "inspect": "to"}
"""Of verbs that write elsewhere than to the store."""
READS_ONLY = frozenset({"status", "report", "estimate"})
"""Verbs of which any number may run at a time."""


@dataclass(frozen=True)
class Job:
    """What is sent: a command line, and the id by which a second one like it is known; empty: any number may
    run."""

    entrypoint: str
    name: str


def checked(command: list[str], folder: str) -> Job:
    """The job of a verb's command line.

    Args:
        command: the verb and its flags.
        folder: the checkout that travels with the job.

    Raises:
        SettingsError: no verb, one that makes no sense as a job, a path that is not absolute, or nothing said
            of where to write.
        SystemExit: a flag that the verb does not have; said on stderr.
    """
    if not command or command[0] not in VERBS or VERBS[command[0]][0] == "cluster":
        known = ", ".join(name for name, (package, _) in VERBS.items() if package != "cluster")
        message = f"verb={' '.join(command[:1])!r}: write gpt4image submit -- VERB FLAGS with one of {known}."
        raise SettingsError(message)
    name, (package, verb) = command[0], VERBS[command[0]]
    found = dict(_strings(verbs.parse(name, verb, command[1:])))
    if (needed := REQUIRED.get(name)) and not found[needed]:
        message = (
            f"{needed}: pass --{needed} with an absolute path or URI; its default would lie in the job's "
            "copy of this folder, which is deleted when the job ends."
        )
        raise SettingsError(message)
    faults = [
        f"{setting}={value}: a job runs in a copy of this folder that is deleted later; pass an absolute "
        "path or URI on storage that every node of the cluster sees."
        for setting, values in found.items()
        for value in values
        if _stays_behind(setting, value, folder)
    ]
    if faults:
        raise SettingsError("\n".join(faults))
    return Job(shlex.join(["python", "-m", package, *command]), _name_of(name, found))


def _strings(settings: Any) -> Iterator[tuple[str, list[str]]]:
    """Every setting that holds strings, those of nested groups, too, with what is not empty of them."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            yield from _strings(value)
        elif isinstance(value, str):
            yield field.name, [value] if value else []
        elif isinstance(value, (tuple, list)):
            yield field.name, [part for part in value if isinstance(part, str)]


def _stays_behind(setting: str, value: str, folder: str) -> bool:
    """Whether a path means nothing on another machine."""
    if setting in PATHS:
        return value != "-" and "://" not in value and not os.path.isabs(value)
    if setting in MODELS:
        path = value.removeprefix("local-dir:")
        named = path != value or path.startswith((".", "~")) or os.path.exists(path)
        return named and not os.path.isabs(path) and not os.path.exists(os.path.join(folder, path))
    if setting in URIS and value not in ("none", "databricks"):
        scheme, separator, rest = value.partition("://")
        if not separator:
            return not os.path.isabs(value)
        return not rest.startswith({"sqlite": "//", "file": "/"}.get(scheme, ""))
    return False


def _name_of(verb: str, found: dict[str, list[str]]) -> str:
    """Of verb and what it writes to: the same command from another terminal is the same job."""
    if verb in READS_ONLY:
        return ""
    written = " ".join(found.get(WRITES.get(verb, "store"), []))
    if not written:
        return ""
    digest = hashlib.sha256(written.rstrip("/").encode()).hexdigest()[:8]
    last = "".join(c if c.isalnum() else "-" for c in written.rstrip("/").rsplit("/", 1)[-1])[:30].strip("-")
    return f"{verb}-{last}-{digest}"
