"""One process at a time in a folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import lock
from pipeline.errors import SettingsError

HOLD = (
    "import sys, time; from pipeline import lock\nwith lock.held(sys.argv[1], 'sweep'): print('held', flush=True); time.sleep(99)"
)


def test_a_folder_is_held_by_one_process_until_it_ends_however_it_ends(tmp_path: Path) -> None:
    folder = str(tmp_path / "sweep")
    child = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    with pytest.raises(SettingsError, match=rf"sweep={folder}: process {child.pid} on .* pass another --sweep"):
        lock.held(folder, "sweep").__enter__()
    child.send_signal(signal.SIGKILL)
    child.wait()
    with lock.held(folder, "sweep"):
        assert json.loads((tmp_path / "sweep" / lock.FILE).read_text())["pid"] == os.getpid()
    with lock.held(folder, "sweep"):
        pass


def test_an_object_store_is_not_locked() -> None:
    with lock.held("s3://no-such-bucket/sweep", "sweep"):
        pass
