"""`submit`, `logs` and `stop`: a verb as a Ray job. The checkout is sent along and comes first on the path,
so what is submitted is what runs.

A job outlives the terminal that it was sent from: a lost connection is taken up again where the log broke
off, and a second job for the same place is refused while the first one runs.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from cluster import packing
from cluster.checks import Job, checked, has_password
from cluster.config import JobConfig, LogsConfig, StopConfig, SubmitConfig
from cluster.following import ANSWER_S, ENDED, follow, last_line, say, show, ways, within
from pipeline.errors import SettingsError, UnreachableError, UserError
from training.tracking.commit import VARIABLE, commit_of

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
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Variables by which Ray's client overrules the address that it is given."""
BEGINS_S = 10.0
"""In which a job begins where nothing is wrong."""
PLACE = "writes_to"
"""In a job's metadata: what it writes to."""
T = TypeVar("T")


def submit(config: SubmitConfig, verb: list[str]) -> int:
    """Submits, follows the log, and returns the job's own exit code; with --detach prints the job's id.

    Raises:
        SettingsError: see `checks.checked` and `packing.pack`; or a job for that place runs already.
        UnreachableError: no job server answers, or it refuses the token.
    """
    folder = packing.checkout(config.working_dir)
    names = packing.names_of(folder, config.exclude)
    variables = forwarded(config.env, os.environ)
    job = checked(verb, names, variables)
    client = _client(config)
    name = _free_name(client, job, config)
    with tempfile.TemporaryDirectory(prefix="gpt4image-submit-") as copy:
        packed = packing.pack(folder, copy, names)
        more = f", and {', '.join(variables)}" if variables else ""
        say(f"sends {packed} of {folder} to {client.get_address()}{more}")
        # The log is told as UTF-8 or not at all: a file name may hold any bytes.
        written = {"PYTHONIOENCODING": "utf-8:backslashreplace"}
        if found := commit_of(folder) or os.environ.get(VARIABLE):  # the repository stays here
            written[VARIABLE] = found
        environment = {"working_dir": copy, "env_vars": written | variables}
        name = _submitted(client, job, name, environment, config)
    say(f"{name} runs: {job.entrypoint}")
    if config.detach:
        say(ways(config, name))
        print(name)
        return 0
    return follow(client, name, config)


def logs(config: LogsConfig) -> int:
    """Follows a job's log to its end and returns its exit code; with --no-follow prints what there is, and
    without a job's id which jobs there are."""
    client = _client(config)
    if not config.job:
        for each in within(ANSWER_S, client.list_jobs):
            print(f"{each.submission_id or each.job_id:40} {each.status:10} {each.entrypoint}")
        return 0
    info = _asked(client, client.get_job_info, config.job)
    if config.follow:
        return follow(client, config.job, config)
    show(_asked(client, client.get_job_logs, config.job))
    say(f"{config.job}: {info.status}")
    return 0


def stop(config: StopConfig) -> int:
    """Ends a job; what it has finished is kept."""
    client = _client(config)
    begun = time.monotonic()
    before = _asked(client, client.get_job_info, config.job).status
    if before in ENDED:
        say(f"{config.job} had ended before: {before}")
        return 0
    _asked(client, client.stop_job, config.job)
    while (info := _asked(client, client.get_job_info, config.job)).status not in ENDED:
        waited = time.monotonic() - begun
        if info.status == "PENDING" and waited > min(BEGINS_S, config.patience):
            message = (
                f"{config.job}: is told to end, but has not begun yet ({info.message}), and Ray ends a job "
                "only once it has begun; one that does not begin Ray gives up after 15 minutes."
            )
            raise UserError(message)
        if waited > config.patience:
            message = f"{config.job}: still {info.status} after {waited:.0f} s; see `gpt4image logs`."
            raise UserError(message)
        time.sleep(0.5)
    say(f"{config.job} ended: {info.status}. The same command goes on with it")
    return 0


def forwarded(asked: tuple[str, ...], environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of this process for the job.

    Raises:
        SettingsError: one that was asked for is not set, or one that is sent unasked holds a password.
    """
    if missing := [name for name in asked if name not in environment]:
        values = (
            " Names only: the values are taken from here." if any("=" in name for name in missing) else ""
        )
        message = f"env={' '.join(missing)}: not set here; export it, or leave it out.{values}"
        raise SettingsError(message)
    found = {name: environment[name] for name in FORWARDED if name in environment}
    if here := [name for name, value in found.items() if _is_here(value)]:
        say(f"note: {', '.join(here)} names this machine by a loopback address, which is another one there")
    if hidden := [name for name, value in found.items() if name not in asked and has_password(value)]:
        message = (
            f"env: {', '.join(hidden)} holds a password, which whoever may see the cluster's jobs could "
            f"read. Name it with --env {' '.join(hidden)} if that is meant, or give it to the cluster by a "
            "secret."
        )
        raise SettingsError(message)
    return found | {name: environment[name] for name in asked}


def _is_here(value: str) -> bool:
    return re.match(r"\w+://(localhost|127\.|\[::1\])", value) is not None


def _free_name(client: Any, job: Job, config: SubmitConfig) -> str:
    """The id that was asked for, or the next one for what the job writes to; each try has a log of its own.

    Raises:
        SettingsError: a job for that place runs.
    """
    numbers = [0]
    for other in within(ANSWER_S, client.list_jobs) if job.name else ():
        if (other.metadata or {}).get(PLACE) == job.name and other.status not in ENDED:
            raise _runs_already(other.submission_id, other.status, config)
        if found := re.fullmatch(rf"{re.escape(job.name)}-(\d+)", other.submission_id or ""):
            numbers.append(int(found[1]))
    return config.job_id or (f"{job.name}-{max(numbers) + 1}" if job.name else "")


def _submitted(client: Any, job: Job, name: str, environment: dict[str, Any], config: SubmitConfig) -> str:
    """Its id.

    Raises:
        SettingsError: another terminal was quicker since `_free_name` looked.
        UnreachableError: the server does not take it.
    """
    try:
        found: str = client.submit_job(
            entrypoint=job.entrypoint,
            runtime_env=environment,
            submission_id=name or None,
            metadata={PLACE: job.name},
        )
    except Exception as error:  # of requests, Ray's client, the server's own
        if name and f"{name} already exists" in str(error):
            raise _taken(client, job, name, config) from None
        raise _unreachable(str(client.get_address()), error) from None
    if first := _begun_before(client, job, found):
        client.stop_job(found)
        raise _runs_already(first.submission_id, first.status, config)
    return found


def _taken(client: Any, job: Job, name: str, config: SubmitConfig) -> SettingsError:
    """Why an id cannot be had: Ray's server gives each of them once."""
    other = within(ANSWER_S, lambda: client.get_job_info(name))
    if (other.metadata or {}).get(PLACE) == job.name and other.status not in ENDED:
        return _runs_already(name, other.status, config)
    mend = "pass another --job-id, or none" if config.job_id else "the same command takes the next one"
    return SettingsError(f"job_id={name}: another job has it ({other.status}); {mend}.")


def _begun_before(client: Any, job: Job, name: str) -> Any:
    """An unfinished job for the same place that the server was given before this one; None: there is none.

    Ids that are made of the place cannot be had twice at a time, those that users choose can.
    """
    found = within(ANSWER_S, client.list_jobs) if job.name else []
    ours = next((each.start_time for each in found if each.submission_id == name), 0)
    others = [
        each
        for each in found
        if (each.metadata or {}).get(PLACE) == job.name
        and each.status not in ENDED
        and (each.start_time, each.submission_id) < (ours, name)
    ]
    return min(others, key=lambda each: each.start_time, default=None)


def _runs_already(name: str, status: str, config: SubmitConfig) -> SettingsError:
    return SettingsError(
        f"job_id={name}: {status} already, and two at a time would write to one place: {ways(config, name)}."
    )


def _client(config: JobConfig) -> Any:
    from ray.job_submission import JobSubmissionClient

    before = {name: os.environ.pop(name) for name in ADDRESSES if name in os.environ}
    address = config.address or before.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS)
    address = address if "://" in address else f"http://{address}"
    for module in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env"):
        logging.getLogger(f"ray.{module}").setLevel(logging.WARNING)  # what they would say is said here
    try:
        client = JobSubmissionClient(address)
        within(ANSWER_S, client.list_jobs)  # a wrong token shows here, before anything is sent
    except Exception as error:  # of requests, Ray's client, a page that is no job server's
        raise _unreachable(address, error) from None
    finally:
        os.environ.update(before)
    return client


def _asked(client: Any, ask: Callable[[str], T], name: str) -> T:
    """The server's answer about a job.

    Raises:
        SettingsError: it knows none of that name, or does not answer.
    """
    try:
        return within(ANSWER_S, lambda: ask(name))
    except Exception as error:
        why = last_line(error)
        with contextlib.suppress(Exception):
            known = [each.submission_id for each in within(ANSWER_S, client.list_jobs) if each.submission_id]
            if name not in known:
                close = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
                why = "no job of that name" + (f"; did you mean {' or '.join(close)}?" if close else "")
        message = f"job={name}: {why} (`gpt4image logs` without a name shows what there is)."
        raise SettingsError(message) from None


def _unreachable(address: str, error: Exception) -> UnreachableError:
    return UnreachableError(
        f"address={address}: the job server does not answer or refuses ({last_line(error)}). Start one "
        "with `ray start --head` (after `ray get-auth-token --generate`, or it is open to all), or forward "
        "the cluster's port 8265. With token authentication set RAY_AUTH_MODE=token, and "
        "RAY_AUTH_TOKEN or ~/.ray/auth_token."
    )
