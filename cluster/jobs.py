"""`submit`, `logs` and `stop`: a verb as a Ray job. The checkout is sent along and comes first on the path,
so what is submitted is what runs.

A job outlives the terminal that it was sent from: a lost connection is taken up again where the log broke
off, and the same command a second time is refused while the first job runs.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from cluster import packing
from cluster.checks import Job, checked
from cluster.config import JobConfig, LogsConfig, StopConfig, SubmitConfig
from pipeline.errors import SettingsError, UnreachableError, UserError

FORWARDED = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_S3_ENDPOINT_URL",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "GOOGLE_CLOUD_PROJECT",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
)
"""Variables that a job has where they are set here; none of them is a secret."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


def submit(config: SubmitConfig, verb: list[str]) -> int:
    """Submits, follows the log, and returns the job's own exit code; with --detach prints the job's id.

    Raises:
        SettingsError: see `checks.checked` and `packing.pack`; or a job of that name runs already.
        UnreachableError: no job server answers, or it refuses the token.
    """
    folder = os.path.abspath(config.working_dir)
    job = checked(verb, folder)
    variables = forwarded(config.env, os.environ)
    with tempfile.TemporaryDirectory(prefix="gpt4image-submit-") as copy:
        packed = packing.pack(folder, copy, config.exclude)
        client = _client(config)
        _say(f"sends {packed} of {folder}" + (f", and {', '.join(variables)}" if variables else ""))
        environment = {"working_dir": copy, "env_vars": variables}
        name = _submitted(client, job, config.job_id or job.name, environment)
    _say(f"{name} runs: {job.entrypoint}")
    if config.detach:
        _say(f"gpt4image logs {name} follows it, gpt4image stop {name} ends it")
        print(name)
        return 0
    return follow(client, name, config.patience)


def logs(config: LogsConfig) -> int:
    """Follows a job's log to its end and returns its exit code; with --no-follow prints what there is."""
    client = _client(config)
    if not config.follow:
        print(_asked(client.get_job_logs, config.job), end="")
        return 0
    _asked(client.get_job_info, config.job)
    return follow(client, config.job, config.patience)


def stop(config: StopConfig) -> int:
    """Ends a job; what it has finished is kept."""
    client = _client(config)
    if not _asked(client.stop_job, config.job):
        _say(f"{config.job} had ended before: {client.get_job_status(config.job)}")
        return 0
    while client.get_job_status(config.job) not in ENDED:
        time.sleep(0.5)
    _say(f"{config.job} ended: {client.get_job_status(config.job)}. The same command goes on with it")
    return 0


def follow(client: Any, name: str, patience: float) -> int:
    """Prints a job's log until it ends, and over interruptions; its exit code.

    Raises:
        UserError: the server did not answer for so many seconds.
    """
    printed, lost = 0, 0.0
    while True:
        try:
            printed = asyncio.run(_printed(client, name, printed))
            info = client.get_job_info(name)
            if info.status in ENDED:
                rest = client.get_job_logs(name)[printed:]  # what was written while the connection closed
                print(rest, end="", flush=True)
                break
            lost = 0.0
        except KeyboardInterrupt:
            _say(f"{name} goes on; gpt4image logs {name} follows it, gpt4image stop {name} ends it")
            return 130
        except _Broken as broken:
            printed, error = broken.printed, broken.__cause__
            lost = lost or time.monotonic()
            _wait(name, lost, patience, error)
        except Exception as error:  # whatever a connection breaks with: of requests, aiohttp, Ray's client
            lost = lost or time.monotonic()
            _wait(name, lost, patience, error)
        else:
            time.sleep(0.5)
    _say(f"{name} ended: {info.status}" + (f" ({info.message})" if info.status != "SUCCEEDED" else ""))
    if info.driver_exit_code is None:
        return 0 if info.status == "SUCCEEDED" else 1
    code = int(info.driver_exit_code)
    return code if code >= 0 else 128 - code  # of one that a signal ended, as shells have it


class _Broken(Exception):
    """The log broke off after so many characters."""

    def __init__(self, printed: int) -> None:
        super().__init__(printed)
        self.printed = printed


async def _printed(client: Any, name: str, printed: int) -> int:
    """Prints what comes behind the first characters, since a log is told from its beginning each time."""
    seen = 0
    try:
        async for piece in client.tail_job_logs(name):
            print(piece[max(0, printed - seen) :], end="", flush=True)
            seen += len(piece)
            printed = max(printed, seen)
    except Exception as error:
        raise _Broken(printed) from error
    return printed


def _wait(name: str, lost: float, patience: float, error: BaseException | None) -> None:
    """Before the next try."""
    gone = time.monotonic() - lost
    if gone > patience:
        message = (
            f"{name}: no connection for {gone:.0f} s ({_first_line(error)}). The job may go on: gpt4image "
            f"logs {name} follows it again."
        )
        raise UserError(message) from None
    if gone < 1:
        _say(f"the connection broke ({_first_line(error)}); trying again, the job goes on")
    time.sleep(min(5.0, 0.5 + gone / 4))


def forwarded(asked: tuple[str, ...], environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of this process for the job.

    Raises:
        SettingsError: one that was asked for is not set, or one that is sent unasked holds a password.
    """
    if missing := [name for name in asked if name not in environment]:
        message = f"env={' '.join(missing)}: not set here; export it, or leave it out."
        raise SettingsError(message)
    found = {name: environment[name] for name in FORWARDED if name in environment}
    if hidden := [name for name, value in found.items() if name not in asked and urlsplit(value).password]:
        message = (
            f"env: {', '.join(hidden)} holds a password, which whoever may see the cluster's jobs could "
            f"read. Name it with --env {' '.join(hidden)} if that is meant, or give it to the cluster by a "
            "secret."
        )
        raise SettingsError(message)
    return found | {name: environment[name] for name in asked}


def _submitted(client: Any, job: Job, name: str, environment: dict[str, Any]) -> str:
    """The id of the new job; one of that name that has ended makes room for it."""
    for _ in range(2):
        try:
            found: str = client.submit_job(
                entrypoint=job.entrypoint, runtime_env=environment, submission_id=name or None
            )
            return found
        except RuntimeError as error:
            if not name or "already" not in str(error):
                raise _unreachable(client.get_address(), error) from None
            status = client.get_job_status(name)
        if status not in ENDED:
            break
        client.delete_job(name)
    message = (
        f"job_id={name}: {status} already, and two at a time would write to one place. gpt4image logs {name} "
        f"follows it, gpt4image stop {name} ends it."
    )
    raise SettingsError(message)


def _client(config: JobConfig) -> Any:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    address = os.environ.get("RAY_API_SERVER_ADDRESS", config.address)
    try:
        client = JobSubmissionClient(address)
        client.list_jobs()  # a wrong token shows here, before anything is packed
    except (ConnectionError, RuntimeError, AuthenticationError) as error:
        raise _unreachable(address, error) from None
    return client


def _asked(ask: Any, name: str) -> Any:
    """The server's answer about a job.

    Raises:
        SettingsError: it knows none of that name.
    """
    try:
        return ask(name)
    except RuntimeError as error:
        message = f"job={name}: {_first_line(error)}; `ray job list` shows what there is."
        raise SettingsError(message) from None


def _unreachable(address: str, error: Exception) -> UnreachableError:
    return UnreachableError(
        f"address={address}: the job server does not answer or refuses ({_first_line(error)}). Start one "
        "with `ray start --head`, or forward the cluster's port 8265. With token authentication set "
        "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token."
    )


def _first_line(error: BaseException | None) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _say(text: str) -> None:
    print(f"submit: {text}", file=sys.stderr, flush=True)
