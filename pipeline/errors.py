"""Errors whose message is all that a user needs, each with the exit code of the command that it ends.

All others are faults of ours and end with their traceback and 1.

    UserError                     1
    ├── SettingsError             2   wrong settings or input, nothing was started; a ValueError
    │   ├── MissingError          2   a store, a run, a sweep that is not there; a FileNotFoundError
    │   ├── UnreachableError      2   a cluster or a server that does not answer; a ConnectionError
    │   └── OtherSettingsError    2   what is to be resumed was begun otherwise
    ├── TooManyFailuresError      3
    ├── RunStoppedError           1
    ├── NotFiniteError            1   a FloatingPointError
    └── TrialsFailedError         1
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED, UNREAD, TERMINATED = 130, 141, 143
"""Exit codes after Ctrl-C, where nobody reads what is printed, and after SIGTERM: those of any program that
such a signal ends."""


class UserError(Exception):
    """What went wrong, why, and the mend."""

    exit_code = 1


class SettingsError(UserError, ValueError):
    """Settings or input that do not fit; nothing was started."""

    exit_code = 2


class MissingError(SettingsError, FileNotFoundError):
    """No store, run or sweep where one is expected."""


class UnreachableError(SettingsError, ConnectionError):
    """A cluster or server that does not answer, or refuses."""


class OtherSettingsError(SettingsError):
    """What is to go on was begun with other settings; a line for each of them follows the first."""


class TooManyFailuresError(UserError, RuntimeError):
    """More rows failed than `max_failure_rate` allows; what is done stays done."""

    exit_code = 3


class RunStoppedError(UserError, RuntimeError):
    """Something other than the settings or the pictures stopped the run (disk, network, engine); what is done
    stays done."""


class NotFiniteError(UserError, FloatingPointError):
    """The loss is infinite or not a number; the text names the pictures. The same run would meet it again."""


class TrialsFailedError(UserError, RuntimeError):
    """Some trials have no result; the others are kept."""


def exit_code(error: Exception) -> int | None:
    """The exit code of an error that its message explains; None of one that needs its traceback.

    A worker's error, which Ray raises again in the driver as a subclass of its own class, is such a one: it
    comes long after the settings were accepted.
    """
    ray = sys.modules.get("ray.exceptions")  # where it is not loaded, no error is Ray's
    if not isinstance(error, UserError) or (ray is not None and isinstance(error, ray.RayTaskError)):
        return None
    return error.exit_code


def reported(name: str, work: Callable[[], int]) -> int:
    """What `work` returns; an error of ours becomes a message on standard error and its exit code, Ctrl-C a
    message and 130, SIGTERM the same message and 143."""
    kept = "What is finished is kept: the same command goes on from there."
    try:
        with _sigterm_exits():
            return work()
    except KeyboardInterrupt:
        print(f"\n{name}: stopped. {kept}", file=sys.stderr, flush=True)
        return INTERRUPTED
    except SystemExit as ended:
        if ended.code != signal.SIGTERM and not _terminated.is_set():
            raise
        print(f"{name}: ended by SIGTERM. {kept}", file=sys.stderr, flush=True)
        return TERMINATED
    except BrokenPipeError:  # of `gpt4image report SWEEP | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except UserError as error:
        code = exit_code(error)
        if code is None:
            raise
        print(f"{name}: {error}", file=sys.stderr)
        return code


_terminated = threading.Event()


def was_terminated() -> bool:
    """Whether SIGTERM has come: what ends the program then may be another SystemExit (Ray's has the code 1),
    or be taken for Ctrl-C."""
    return _terminated.is_set()


def leave(number: int, frame: Any) -> None:
    """Handler of SIGTERM: ends the program as `sys.exit` does, so that what is open is closed."""
    _terminated.set()
    raise SystemExit(number)


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is leave:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
