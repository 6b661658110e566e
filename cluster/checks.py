"""What is wrong with a verb as a job is said here, before anything is sent: it is parsed with its own
settings, and its paths must mean the same on every node."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Collection, Iterator, Mapping
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
        "more_runs",
        "init_from",
        "sweep",
        "sweeps",
        "html",
        "work_dir",
        "classes_file",
    }
)
"""Settings of any verb that are files or folders of the user's."""
MODELS = frozenset({"model", "encoder", "tower", "teacher", "teachers", "clip", "backbone", "backbones"})
"""Names on a hub, or folders; those of the checkout travel with it."""
URIS = frozenset({"tracking_uri"})
CONFIG = "--config"
"""Names a file of settings, which those that are parsed have taken in; the job reads it again."""
REQUIRED = {"train": "run", "tune": "sweep"}
"""What a verb writes to; here its default would lie in the job's own copy of the checkout."""
WRITES = {"train": "run", "tune": "sweep", "evaluate": "to", "export": "to", "inspect": "to"}
"""Of verbs that write elsewhere than to the store, which those that describe have to themselves in turn."""
READS_ONLY = frozenset({"status", "report", "estimate", "doctor"})
"""Verbs of which any number may run at a time."""


@dataclass(frozen=True)
class Job:
    """What is sent: a command line, and what jobs for the same place are called; empty: any number may
    run."""

    entrypoint: str
    name: str


def checked(command: list[str], sent: Collection[str], variables: Mapping[str, str]) -> Job:
    """The job of a verb's command line.

    Args:
        command: the verb and its flags.
        sent: files of the checkout that travel with the job.
        variables: of its environment.

    Raises:
        SettingsError: no verb, one that makes no sense as a job, a path that is not absolute, a password in
            an address, or nothing said of where to write.
        SystemExit: a flag that the verb does not have; said on stderr.
    """
    if not command or command[0] not in VERBS or not _makes_a_job(command[0]):
        known = ", ".join(filter(_makes_a_job, VERBS))
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
    if name in REQUIRED:
        _with_tracking(found, found[REQUIRED[name]][0], variables)
    faults = [
        f"{setting}: the address holds a password, which whoever may see the cluster's jobs could read; set "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and name them with --env."
        for setting, values in found.items()
        if setting in URIS and any(map(has_password, values))
    ]
    faults += [
        f"{setting}={value}: a job runs in a copy of this folder that is deleted later; pass an absolute "
        "path or URI on storage that every node of the cluster sees."
        for setting, values in found.items()
        for value in values
        if _stays_behind(setting, value, sent)
    ]
    file = verbs.value_of(CONFIG, command, "")
    if file and "://" not in file and not os.path.isabs(file) and os.path.normpath(file) not in sent:
        faults.append(
            f"config={file}: is not among the files that a job gets (none of runs/, docs/, tests/ and "
            "benchmarks/, and none that git ignores); copy it beside the others, or pass an absolute path or "
            "URI on storage that every node of the cluster sees."
        )
    if faults:
        raise SettingsError("\n".join(faults))
    return Job(shlex.join(["python", "-m", package, *command]), _name_of(name, found))


def _makes_a_job(verb: str) -> bool:
    """Those of `cluster` send jobs and are none, but for the doctor, who looks from inside."""
    return VERBS[verb][0] != "cluster" or verb == "doctor"


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


def _with_tracking(found: dict[str, list[str]], place: str, variables: Mapping[str, str]) -> None:
    """Puts in where the job will track: a flag, else a variable, else beside run or sweep.

    Raises:
        SettingsError: on an object store there is no place beside it.
    """
    if not found["tracking_uri"] and (uri := variables.get("MLFLOW_TRACKING_URI")):
        # One with a password was let through by name.
        found["tracking_uri"] = [] if has_password(uri) else [uri]
    elif not found["tracking_uri"] and "://" in place:
        message = (
            f"tracking_uri: with {place} its default is a file in the job's copy of this folder, which is "
            "deleted, and MLFLOW_TRACKING_URI is not set here; pass --tracking-uri with the address of the "
            "cluster's server, or none."
        )
        raise SettingsError(message)


def has_password(value: str) -> bool:
    """Whether an address names a user, a token or a password."""
    return "@" in value.partition("://")[2].partition("/")[0]


def _stays_behind(setting: str, value: str, sent: Collection[str]) -> bool:
    """Whether a path means nothing on another machine."""
    if setting in PATHS:
        scheme, separator, rest = value.partition("://")
        if separator:
            return scheme == "file" and not rest.startswith("/")
        return value != "-" and not os.path.isabs(value)
    if setting in MODELS:
        path = value.removeprefix("local-dir:")
        named = path != value or path.startswith((".", "~")) or os.path.exists(path)
        if not named or os.path.isabs(path):
            return False
        plain = os.path.normpath(path)
        return not any(name == plain or name.startswith(f"{plain}/") for name in sent)
    if setting in URIS and value not in ("none", "databricks"):
        scheme, separator, rest = value.partition("://")
        if not separator:
            return not os.path.isabs(value)
        return not rest.startswith({"sqlite": "//", "file": "/"}.get(scheme, ""))
    return False


def _name_of(verb: str, found: dict[str, list[str]]) -> str:
    """Of what the verb writes to: another command for that place is another try."""
    written = "" if verb in READS_ONLY else " ".join(found.get(WRITES.get(verb, "store"), []))
    if not written:
        return ""
    scheme, separator, rest = written.removeprefix("file://").rpartition("://")
    place = scheme + separator + os.path.normpath(rest)
    digest = hashlib.sha256(place.encode()).hexdigest()[:8]
    last = re.sub(r"[^A-Za-z0-9]+", "-", place.rsplit("/", 1)[-1])[:30].strip("-")
    return "-".join(part for part in (verb if verb in WRITES else "describe", last, digest) if part)
