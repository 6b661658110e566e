"""Exit codes: errors of ours are told by their class, all others keep their traceback."""

from __future__ import annotations

import signal
import subprocess
import sys

import pyarrow as pa
import pytest
from ray.exceptions import RayTaskError

from pipeline import errors


def failing(error: Exception) -> int:
    def work() -> int:
        raise error

    return errors.reported("gpt4image verb", work)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.SettingsError("why"), 2),
        (errors.MissingError("why"), 2),
        (errors.UnreachableError("why"), 2),
        (errors.OtherSettingsError("why"), 2),
        (errors.TooManyFailuresError("why"), 3),
        (errors.RunStoppedError("why"), 1),
        (errors.NotFiniteError("why"), 1),
        (errors.TrialsFailedError("why"), 1),
    ],
)
def test_an_error_of_ours_is_its_message_and_its_exit_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing(error) == code
    assert capsys.readouterr().err == "gpt4image verb: why\n"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a fault of ours"),
        pa.ArrowInvalid("damaged"),
        FileNotFoundError("gone"),
        ConnectionError("lost"),
        KeyError("x"),
    ],
)
def test_any_other_error_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        failing(error)


def test_a_workers_own_error_is_none_of_the_settings() -> None:
    """Ray raises it in the driver as a subclass of its class, long after the settings were accepted."""
    error = RayTaskError("train", "traceback", errors.SettingsError("why")).as_instanceof_cause()
    assert isinstance(error, errors.SettingsError)
    with pytest.raises(errors.SettingsError):
        failing(error)


def test_ctrl_c_says_that_the_same_command_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        raise KeyboardInterrupt

    assert errors.reported("gpt4image ingest", work) == 130
    assert "gpt4image ingest: stopped. What is finished is kept" in capsys.readouterr().err


@pytest.mark.parametrize("before_ray", [True, False])
def test_sigterm_ends_a_verb_with_a_line_and_its_exit_code(before_ray: bool) -> None:
    """Also after Ray's driver has put its own handler in place, which exits with the signal's number."""
    code = "\n".join(
        [
            "import signal, sys, time",
            "from pipeline import errors",
            "def work():",
            "    try:",
            "" if before_ray else "        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))",
            "        print('begun', flush=True)",
            "        time.sleep(60)",
            "    finally:",
            "        print('closed', flush=True)",
            "raise SystemExit(errors.reported('gpt4image verb', work))",
        ]
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (143, "closed\n")
    assert err.startswith("gpt4image verb: ended by SIGTERM. What is finished is kept")
