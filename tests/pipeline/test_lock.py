"""One process at a time in a folder."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from pyarrow import fs

from pipeline.errors import SettingsError
from pipeline.store import locations, lock

HOLD = """
import sys, time
from pipeline.store import lock
with lock.held(sys.argv[1], "sweep"):
    print("held", flush=True)
    time.sleep(99)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_S", 0.3)


def test_who_was_told_to_end_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "PATIENCE_S", 60.0)
    folder = str(tmp_path / "sweep")
    child = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    threading.Timer(1, child.kill).start()
    begun = time.monotonic()
    with lock.held(folder, "sweep"):
        assert child.wait(5) == -signal.SIGKILL and time.monotonic() - begun < 30
    assert f"process {child.pid}" in (said := capsys.readouterr().err) and "waiting 60 s" in said, said


def test_a_folder_is_held_by_one_process_until_it_ends_however_it_ends(tmp_path: Path) -> None:
    folder = str(tmp_path / "sweep")
    child = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    with pytest.raises(
        SettingsError, match=rf"sweep={folder}: process {child.pid} on .* pass another --sweep"
    ):
        lock.held(folder, "sweep").__enter__()
    child.send_signal(signal.SIGKILL)
    child.wait()
    with lock.held(folder, "sweep"):
        assert json.loads((tmp_path / "sweep" / lock.FILE).read_text())["pid"] == os.getpid()
    with lock.held(folder, "sweep"):
        pass


def test_a_folder_of_an_object_store_is_held_too(bucket: str) -> None:
    folder = f"{bucket}/locked/sweep"
    child = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    with pytest.raises(
        SettingsError, match=rf"sweep={folder}: process {child.pid} on .* pass another --sweep"
    ):
        lock.held(folder, "sweep").__enter__()
    child.send_signal(signal.SIGKILL)
    child.wait()
    for _ in range(2):  # of this machine a dead process is known to be dead
        with lock.held(folder, "sweep"):
            pass
    filesystem, path = locations.resolve(folder)
    assert filesystem.get_file_info(fs.FileSelector(path)) == [], "nothing is left"


@pytest.mark.slow
def test_a_process_of_another_machine_is_dead_when_it_is_silent(
    bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.5)
    monkeypatch.setattr(lock, "SILENCE_S", 3.0)
    folder = f"{bucket}/locked/elsewhere"
    filesystem, path = locations.resolve(folder)

    def announce() -> None:
        with filesystem.open_output_stream(f"{path}/lock-some-host-7-abcdef01.json") as stream:
            stream.write(b"{}")

    announce()
    with lock.held(folder, "run"):
        assert "process 7 on some-host was at work in it less than 3 s ago" in capsys.readouterr().err
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(0.5):
            announce()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        time.sleep(1)
        with pytest.raises(SettingsError, match="process 7 on some-host is at work in it"):
            lock.held(folder, "run").__enter__()
    finally:
        ended.set()
        thread.join()


def test_a_container_that_is_started_again_is_not_kept_out_by_itself(bucket: str) -> None:
    """It has the name and the process number of the one before."""
    folder = f"{bucket}/locked/again"
    filesystem, path = locations.resolve(folder)
    with filesystem.open_output_stream(
        f"{path}/lock-{socket.gethostname()}-{os.getpid()}-abcdef01.json"
    ) as stream:
        stream.write(b"{}")
    with lock.held(folder, "run"), pytest.raises(SettingsError, match=f"process {os.getpid()} on"):
        lock.held(folder, "run").__enter__()
