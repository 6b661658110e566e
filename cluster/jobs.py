"""`submit`, `logs` and `stop`: a verb as a Ray job. The checkout is sent along and comes first on the path,
so what is submitted is what runs.

A job outlives the terminal that it was sent from: a lost connection is taken up again where the log broke
off, and a second job for the same place is refused while the first one runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import logging
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from cluster import packing
from cluster.checks import Job, checked, has_password
from cluster.config import JobConfig, LogsConfig, StopConfig, SubmitConfig
from pipeline.errors import INTERRUPTED, SettingsError, UnreachableError, UserError

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
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
ANSWER_S = 60.0
"""After which an unanswered question counts as a lost connection."""
QUIET_S = 60.0
"""After which a log's line that tells nothing is looked into."""
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
        _say(f"sends {packed} of {folder} to {client.get_address()}{more}")
        # The log is told as UTF-8 or not at all: a file name may hold any bytes.
        written = {"PYTHONIOENCODING": "utf-8:backslashreplace"}
        environment = {"working_dir": copy, "env_vars": written | variables}
        name = _submitted(client, job, name, environment, config)
    _say(f"{name} runs: {job.entrypoint}")
    if config.detach:
        _say(_ways(config, name))
        print(name)
        return 0
    return follow(client, name, config)


def logs(config: LogsConfig) -> int:
    """Follows a job's log to its end and returns its exit code; with --no-follow prints what there is, and
    without a job's id which jobs there are."""
    client = _client(config)
    if not config.job:
        for each in _within(ANSWER_S, client.list_jobs):
            print(f"{each.submission_id or each.job_id:40} {each.status:10} {each.entrypoint}")
        return 0
    info = _asked(client, client.get_job_info, config.job)
    if config.follow:
        return follow(client, config.job, config)
    _show(_asked(client, client.get_job_logs, config.job))
    _say(f"{config.job}: {info.status}")
    return 0


def stop(config: StopConfig) -> int:
    """Ends a job; what it has finished is kept."""
    client = _client(config)
    deadline = time.monotonic() + config.patience
    before = _asked(client, client.get_job_info, config.job).status
    if before in ENDED:
        _say(f"{config.job} had ended before: {before}")
        return 0
    _asked(client, client.stop_job, config.job)
    while (status := _asked(client, client.get_job_info, config.job).status) not in ENDED:
        if time.monotonic() > deadline:
            message = f"{config.job}: still {status} after {config.patience:.0f} s; see `gpt4image logs`."
            raise UserError(message)
        time.sleep(0.5)
    _say(f"{config.job} ended: {status}. The same command goes on with it")
    return 0


def follow(client: Any, name: str, config: JobConfig) -> int:
    """Prints a job's log until it ends, over interruptions; its exit code, 130 after Ctrl-C and for a job
    that was stopped.

    Raises:
        UserError: the server did not answer for so many seconds.
    """
    log = Log(client, name)
    try:
        info = _ended(client, name, log, config.patience)
    except KeyboardInterrupt:
        _say(f"{name} goes on; {_ways(config, name)}")
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the log has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    # Ray's message repeats the end of the log, which stands above.
    why = (info.message or "").partition(", last available logs")[0]
    _say(f"{name} ended: {info.status}" + (f" ({why})" if info.status != "SUCCEEDED" and why else ""))
    if info.status == "STOPPED":
        return INTERRUPTED
    if info.driver_exit_code is None:
        return 0 if info.status == "SUCCEEDED" else 1
    code = int(info.driver_exit_code)
    return code if code >= 0 else 128 - code  # of one that a signal ended, as shells have it


def _ended(client: Any, name: str, log: Log, patience: float) -> Any:
    """What the server knows of the job once it has ended and all of its log is printed."""
    lost: float | None = None
    told = False
    while True:
        broke: Exception | None = None
        try:
            asyncio.run(log.print_new())
        except Exception as error:  # whatever a line breaks with: of aiohttp, requests, Ray's client
            if isinstance(error, BrokenPipeError) and log.stuck:
                raise
            broke = error
            lost = None if log.heard else lost
        try:
            info = _within(ANSWER_S, lambda: client.get_job_info(name))
            if info.status in ENDED:
                log.print_rest()
                return info
            lost = None
        except Exception as error:
            if isinstance(error, BrokenPipeError) and log.stuck:
                raise
            lost = lost or time.monotonic()
            gone = time.monotonic() - lost
            if gone > patience:
                message = (
                    f"{name}: no connection for {gone:.0f} s ({_last_line(error)}). The job may go on: "
                    f"gpt4image logs {name} follows it again."
                )
                raise UserError(message) from None
            broke = broke or error
        if broke is not None and not told:
            _say(f"the connection broke ({_last_line(broke)}); trying again, the job goes on")
        told = broke is not None and not log.heard
        time.sleep(2.0 if broke is not None else 0.5)


class Log:
    """A job's log on its way to standard output: told from its beginning each time, printed once."""

    def __init__(self, client: Any, name: str) -> None:
        self._client, self._name, self._printed = client, name, 0
        self.heard = False
        """Whether the last try to follow it told anything."""
        self.stuck = False
        """Whether nobody reads standard output any more."""

    async def print_new(self) -> None:
        """Until the line ends or breaks. One that is quiet may be dumb, as after a laptop slept: now and then
        the server is asked whether there is more."""
        self.heard, seen = False, 0
        pieces = self._client.tail_job_logs(self._name)
        coming: asyncio.Future[str] | None = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(anext(pieces))
                if not (await asyncio.wait({coming}, timeout=QUIET_S))[0]:
                    printed = self._printed
                    status = _within(ANSWER_S, lambda: self._client.get_job_info(self._name)).status
                    self.print_rest()
                    if status in ENDED or self._printed > printed:
                        return
                    continue
                try:
                    piece = coming.result()
                except StopAsyncIteration:
                    return
                coming, self.heard = None, True
                self._show(piece[max(0, self._printed - seen) :])
                seen += len(piece)
                self._printed = max(self._printed, seen)
        finally:
            if coming is not None:
                coming.cancel()

    def print_rest(self) -> None:
        """What was written while the line was down; a log that cannot be told is no reason to lose the exit
        code."""
        try:
            whole = _within(ANSWER_S, lambda: self._client.get_job_logs(self._name))
        except Exception as error:
            _say(f"the log cannot be read ({_last_line(error)})")
            return
        self._show(whole[self._printed :])
        self._printed = len(whole)

    def _show(self, text: str) -> None:
        try:
            _show(text)
        except BrokenPipeError:
            self.stuck = True
            raise


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
        _say(f"note: {', '.join(here)} names this machine by a loopback address, which is another one there")
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
    for other in _within(ANSWER_S, client.list_jobs) if job.name else ():
        if (other.metadata or {}).get(PLACE) == job.name and other.status not in ENDED:
            raise _runs_already(other.submission_id, other.status, config)
        if found := re.fullmatch(rf"{re.escape(job.name)}-(\d+)", other.submission_id or ""):
            numbers.append(int(found[1]))
    return config.job_id or (f"{job.name}-{max(numbers) + 1}" if job.name else "")


def _submitted(client: Any, job: Job, name: str, environment: dict[str, Any], config: SubmitConfig) -> str:
    try:
        found: str = client.submit_job(
            entrypoint=job.entrypoint,
            runtime_env=environment,
            submission_id=name or None,
            metadata={PLACE: job.name},
        )
    except Exception as error:  # of requests, Ray's client, the server's own
        if name and "already" in str(error):  # another terminal was quicker
            raise _runs_already(name, "there", config) from None
        raise _unreachable(str(client.get_address()), error) from None
    return found


def _runs_already(name: str, status: str, config: SubmitConfig) -> SettingsError:
    return SettingsError(
        f"job_id={name}: {status} already, and two at a time would write to one place: {_ways(config, name)}."
    )


def _client(config: JobConfig) -> Any:
    from ray.job_submission import JobSubmissionClient

    before = {name: os.environ.pop(name) for name in ADDRESSES if name in os.environ}
    address = config.address or before.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS)
    address = address if "://" in address else f"http://{address}"
    for module in ("job.sdk", "dashboard_sdk"):  # what they would say is said here
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
    try:
        client = JobSubmissionClient(address)
        _within(ANSWER_S, client.list_jobs)  # a wrong token shows here, before anything is sent
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
        return _within(ANSWER_S, lambda: ask(name))
    except Exception as error:
        why = _last_line(error)
        with contextlib.suppress(Exception):
            known = [each.submission_id for each in _within(ANSWER_S, client.list_jobs) if each.submission_id]
            if name not in known:
                close = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
                why = "no job of that name" + (f"; did you mean {' or '.join(close)}?" if close else "")
        message = f"job={name}: {why} (`gpt4image logs` without a name shows what there is)."
        raise SettingsError(message) from None


def _within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` gives, or TimeoutError: Ray's client waits for an answer without end."""
    found: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not found:
        message = f"no answer for {seconds:.0f} s"
        raise TimeoutError(message)
    return found[0]


def _ways(config: JobConfig, name: str) -> str:
    """What can be done with a job from here."""
    there = f"--address {config.address} " if config.address else ""
    return f"gpt4image logs {there}{name} follows it, gpt4image stop {there}{name} ends it"


def _unreachable(address: str, error: Exception) -> UnreachableError:
    return UnreachableError(
        f"address={address}: the job server does not answer or refuses ({_last_line(error)}). Start one "
        "with `ray start --head` (after `ray get-auth-token --generate`, or it is open to all), or forward "
        "the cluster's port 8265. With token authentication set RAY_AUTH_MODE=token, and "
        "RAY_AUTH_TOKEN or ~/.ray/auth_token."
    )


def _last_line(error: BaseException) -> str:
    """What an error says; the server's answers may be whole tracebacks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (
        (lines[-1] if lines and lines[0].startswith("Traceback") else lines[0])
        if lines
        else type(error).__name__
    )


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _say(text: str) -> None:
    print(f"gpt4image: {text}", file=sys.stderr, flush=True)
