"""A job as it is followed from here: its log to the end, over interruptions, and its exit code."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from cluster.config import JobConfig
from pipeline.errors import INTERRUPTED, UserError

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
ANSWER_S = 60.0
"""After which an unanswered question counts as a lost connection."""
QUIET_S = 60.0
"""After which a log's line that tells nothing is looked into."""
T = TypeVar("T")


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
        say(f"{name} goes on; {ways(config, name)}")
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the log has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    why = _why(info)
    say(f"{name} ended: {info.status}" + (f" ({why})" if info.status != "SUCCEEDED" and why else ""))
    if info.status == "STOPPED":
        return INTERRUPTED
    if info.driver_exit_code is None:
        return 0 if info.status == "SUCCEEDED" else 1
    code = int(info.driver_exit_code)
    return code if code >= 0 else 128 - code  # of one that a signal ended, as shells have it


def _why(info: Any) -> str:
    """Ray's reason in a line; that of an environment which could not be made is a traceback."""
    # It repeats the end of the log, which stands above.
    why = (info.message or "").partition(", last available logs")[0].strip()
    if why.startswith("runtime_env setup failed"):
        last = [line.strip() for line in why.splitlines() if line.strip()][-1]
        return (
            f"what the job needs could not be set up on its node: {last} More is in the node's log "
            "runtime_env_setup-*.log; the same command sends it anew"
        )
    return why


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
            info = within(ANSWER_S, lambda: client.get_job_info(name))
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
                    f"{name}: no connection for {gone:.0f} s ({last_line(error)}). The job may go on: "
                    f"gpt4image logs {name} follows it again."
                )
                raise UserError(message) from None
            broke = broke or error
        if broke is not None and not told:
            say(f"the connection broke ({last_line(broke)}); trying again, the job goes on")
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
                    info = within(ANSWER_S, lambda: self._client.get_job_info(self._name))
                    self.print_rest()
                    if info.status == "PENDING":
                        say(f"{self._name} has not begun yet ({info.message})")
                    elif info.status in ENDED or self._printed > printed:
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
            whole = within(ANSWER_S, lambda: self._client.get_job_logs(self._name))
        except Exception as error:
            say(f"the log cannot be read ({last_line(error)})")
            return
        self._show(whole[self._printed :])
        self._printed = len(whole)

    def _show(self, text: str) -> None:
        try:
            show(text)
        except BrokenPipeError:
            self.stuck = True
            raise


def within(seconds: float, work: Callable[[], T]) -> T:
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


def ways(config: JobConfig, name: str) -> str:
    """What can be done with a job from here."""
    there = f"--address {config.address} " if config.address else ""
    return f"gpt4image logs {there}{name} follows it, gpt4image stop {there}{name} ends it"


def last_line(error: BaseException) -> str:
    """What an error says; the server's answers may be whole tracebacks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (
        (lines[-1] if lines and lines[0].startswith("Traceback") else lines[0])
        if lines
        else type(error).__name__
    )


def show(text: str) -> None:
    print(text, end="", flush=True)


def say(text: str) -> None:
    print(f"gpt4image: {text}", file=sys.stderr, flush=True)
