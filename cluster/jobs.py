"""`submit`: a verb as a Ray job. The checkout is uploaded and put first on the path, so what is submitted is
what runs.

A job runs in a copy of the folder that is deleted later: paths of data must be absolute, on storage that the
cluster sees.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from typing import Any

from cluster.cli import VERBS
from cluster.config import SubmitConfig
from pipeline.errors import SettingsError, UnreachableError

PATH_FLAGS = ("--store", "--images", "--run", "--sweep", "--to", "--html")
EXCLUDES = [".git", ".venv", "runs", "docs", "tests", "benchmarks", "*.pyc"]
# What often lies in a folder and is nobody else's business: every node of the cluster gets a copy of what is
# uploaded.
SECRETS = [
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
    "*credentials*.json",
    "*service_account*.json",
    "*service-account*.json",
    "*.tfstate*",
]


def submit(config: SubmitConfig, verb: list[str]) -> int:
    """Submits, follows the log, and returns 0 when the job succeeded; with --no-wait prints the job's id.

    Raises:
        ValueError: no verb, one that makes no sense as a job, or a relative path in its flags.
        ConnectionError: no job server answers, or it refuses the token.
    """
    entrypoint = entrypoint_of(verb)
    folder = os.path.abspath(config.working_dir)
    client, job = _start(os.environ.get("RAY_API_SERVER_ADDRESS", config.address), entrypoint, folder)
    print(f"submit: {job} runs: {entrypoint}", file=sys.stderr)
    if not config.wait:
        print(job)
        return 0
    asyncio.run(_follow(client, job))
    info = client.get_job_info(job)
    print(f"submit: {job} ended: {info.status}", file=sys.stderr)
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code)
    return 0 if info.status == "SUCCEEDED" else 1


def entrypoint_of(verb: list[str]) -> str:
    """The command line of the job: python -m PACKAGE VERB FLAGS.

    Raises:
        ValueError: as `submit`.
    """
    if not verb or verb[0] not in VERBS or VERBS[verb[0]][0] == "cluster":
        known = ", ".join(name for name, (package, _) in VERBS.items() if package != "cluster")
        message = f"verb={' '.join(verb[:1])!r}: write gpt4image submit -- VERB FLAGS with one of {known}."
        raise SettingsError(message)
    for flag, value in zip(verb, [*verb[1:], ""], strict=True):
        name, _, inline = flag.partition("=")
        path = inline or value
        if name in PATH_FLAGS and "://" not in path and not os.path.isabs(path):
            message = (
                f"{name} {path}: a job runs in a copy of this folder that is deleted later; "
                "pass an absolute path or URI on storage that every node of the cluster sees."
            )
            raise SettingsError(message)
    return shlex.join(["python", "-m", VERBS[verb[0]][0], *verb])


def _start(address: str, entrypoint: str, folder: str) -> tuple[Any, str]:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(
            entrypoint=entrypoint, runtime_env={"working_dir": folder, "excludes": EXCLUDES + SECRETS}
        )
    except (ConnectionError, RuntimeError, AuthenticationError) as error:
        reason = str(error).splitlines()[0]
        message = (
            f"address={address}: the job server does not answer or refuses ({reason}). Start one with `ray "
            "start --head`, or forward the cluster's port 8265. With token authentication set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token."
        )
        raise UnreachableError(message) from None
    return client, str(job)


async def _follow(client: Any, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)
