"""The same stages through a real `ray start --head` on loopback, with token authentication on."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.store import Store

pytestmark = pytest.mark.alone
ROOT = Path(__file__).resolve().parent.parent.parent


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head node as a child process; yields the environment in which it answers."""
    home = tmp_path_factory.mktemp("home")
    gcs, dashboard, agent, client = free_ports(4)
    environment = {
        **os.environ,
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    environment.pop("RAY_ADDRESS", None)
    ray = str(Path(sys.executable).parent / "ray")
    subprocess.run([ray, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    temporary = f"/tmp/rt{os.getpid()}"  # socket paths have a limit of 107 bytes
    command = [
        ray,
        "start",
        "--head",
        "--block",
        "--node-ip-address",
        "127.0.0.1",
        "--port",
        str(gcs),
        "--num-cpus",
        "8",
        "--dashboard-host",
        "127.0.0.1",
        "--dashboard-port",
        str(dashboard),
        "--dashboard-agent-listen-port",
        str(agent),
        "--ray-client-server-port",
        str(client),
        "--object-store-memory",
        str(2**30),
        "--temp-dir",
        temporary,
    ]
    log = home / "head.log"
    with log.open("w") as stream:
        child = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while "runtime started" not in log.read_text():
            assert child.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield {**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        # `ray start --block` gives each of its processes half a minute to end.
        for process in psutil.Process(child.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        child.kill()
        child.wait(timeout=60)


def submit(environment: dict[str, str], *verb: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster", "submit", "--working-dir", str(ROOT), "--", *verb]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_stages_run_as_jobs_and_hand_back_their_exit_codes(
    head: dict[str, str], tmp_path: Path, picture_folder: Callable[..., Path]
) -> None:
    images = picture_folder({"train/a": 12, "train/b": 12, "val/a": 4, "val/b": 4})
    store = tmp_path / "store"
    done = submit(head, "ingest", "--images", str(images), "--store", str(store))
    assert done.returncode == 0, done.stdout + done.stderr
    assert Store(str(store)).pending("images") == []
    assert "ended: SUCCEEDED" in done.stderr

    run = tmp_path / "runs" / "baseline"
    flags = [
        "--preset",
        "smoke",
        "--batch-size",
        "8",
        "--workers",
        "2",
        "--alignment-weight",
        "0",
        "--run",
        str(run),
    ]
    done = submit(head, "train", "--store", str(store), *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "result.json").exists() and "top-1" in done.stdout

    done = submit(head, "train", "--store", str(store), *flags[:-1], f"{run}2", "--backbone", "resnet81")
    assert done.returncode == 2, "wrong settings are 2 through a job too"
    assert "did you mean" in done.stdout


def test_a_wrong_token_is_refused_with_a_way_out(head: dict[str, str]) -> None:
    done = submit({**head, "RAY_AUTH_TOKEN": "0" * 64}, "status", "--store", "/nowhere")
    assert done.returncode == 2
    assert "RAY_AUTH_TOKEN" in done.stderr and "Traceback" not in done.stderr
