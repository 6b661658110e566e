"""The head of a cluster is lost, with all that runs on its machine, and a new one comes up at the same
address."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.store import Store
from tests.nodes import Driver, free_ports, kill_node, ray_node

pytestmark = pytest.mark.alone
GONE = "What is done is kept: the same command goes on when the cluster is up."


class Head:
    """A head on loopback as a child process, which can be lost and come up anew."""

    def __init__(self, folder: Path) -> None:
        self._folder, (self._gcs, *self._others) = folder, free_ports(3)
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "HF_HUB_OFFLINE": "1",
        }
        self.environment.pop("RAY_ADDRESS", None)
        self._node = self._up()

    def _up(self) -> subprocess.Popen[bytes]:
        flags = {
            "--node-ip-address": "127.0.0.1",
            "--port": self._gcs,
            "--dashboard-agent-listen-port": self._others[0],
            "--ray-client-server-port": self._others[1],
            "--num-cpus": 4,
            "--object-store-memory": 200 * 2**20,
            "--temp-dir": f"/tmp/rl{os.getpid()}",  # socket paths have a limit of 107 bytes
        }
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
        command += ["--include-dashboard=false", *(str(each) for pair in flags.items() for each in pair)]
        return ray_node(command, self.environment, self._folder / "head.log")

    def lose(self) -> None:
        kill_node(self._node)

    def come_up_anew(self) -> None:
        self._node = self._up()

    def start(self, *command: str) -> Driver:
        address = {"RAY_ADDRESS": f"127.0.0.1:{self._gcs}"}
        return Driver(["-m", "cluster.cli", *command], self.environment | address)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    started = Head(tmp_path_factory.mktemp("head"))
    yield started
    started.lose()


def wait_until(condition: Callable[[], bool], driver: Driver, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert driver.poll() is None and time.monotonic() < deadline, driver.told()
        time.sleep(0.02)


def test_captioning_goes_on_where_it_was_when_a_new_head_is_up(
    head: Head, tmp_path: Path, scenes: Path
) -> None:
    store = tmp_path / "store"
    command = ["describe", "--caption-preset", "scenes", "--device", "cpu", "--replicas", "1"]
    command += ["--engine-cores", "1", "--images", str(scenes), "--store", str(store), "--shard-rows", "4"]
    driver = head.start(*command)
    wait_until(lambda: len(receipts(store)) >= 3, driver, 150)
    check_says_that_it_is_gone(head, driver)
    before = receipts(store)
    head.come_up_anew()
    driver = head.start(*command)
    assert driver.wait(200) == 0, driver.told()
    after = receipts(store)
    assert 3 <= len(before) < len(after) == Store(str(store)).dataset.shards
    assert {name: after[name] for name in before} == before, "nothing is captioned twice"
    assert all(json.loads(text)["failed"] == 0 for text, _ in after.values())
    print(f"{len(before)} of {len(after)} shards were done")


def check_says_that_it_is_gone(head: Head, driver: Driver) -> None:
    head.lose()
    lost = time.monotonic()
    assert driver.wait(30) == 1, driver.told()
    print(f"the driver ended {time.monotonic() - lost:.1f} s after the head")
    assert GONE in driver.told() and "Traceback" not in driver.told(), driver.told()


def receipts(store: Path) -> dict[str, tuple[str, int]]:
    """Of captions, with the times of their files."""
    return {
        path.name: (path.read_text(), path.stat().st_mtime_ns)
        for path in store.glob("captions/*/receipts/part-*.json")
    }


def epochs(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_a_sweep_keeps_its_finished_training_and_the_other_goes_on_when_a_new_head_is_up(
    head: Head, tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    store, sweep = make_store(tmp_path / "store", train=57, val=12), tmp_path / "sweep"
    command = ["tune", "--store", str(store), "--sweep", str(sweep), "--preset", "smoke", "--device", "cpu"]
    command += ["--alignment-weights", "0", "--projection-dims", "0", "--seeds", "1", "2", "--epochs", "12"]
    command += ["--batch-size", "12", "--workers", "1", "--threads", "1", "--fresh-seeds", "0"]
    command += ["--tracking-uri", "none", "--no-export"]
    driver = head.start(*command)
    first, second = (sweep / f"test_resnet-baseline-s{seed}" for seed in (1, 2))
    wait_until(lambda: epochs(second) >= 2, driver, 150)
    check_says_that_it_is_gone(head, driver)
    whole = first / "result.json"
    before = whole.read_text(), whole.stat().st_mtime_ns
    told = (second / "metrics.jsonl").read_text().splitlines()
    assert 2 <= len(told) < 12
    head.come_up_anew()
    driver = head.start(*command)
    assert driver.wait(200) == 0, driver.told()
    assert (whole.read_text(), whole.stat().st_mtime_ns) == before, "nothing is trained twice"
    history = json.loads((second / "result.json").read_text())["history"]
    assert [metrics["epoch"] for metrics in history] == list(range(1, 13))
    assert "1 done before" in driver.told(99_999), driver.told()
    again = (second / "metrics.jsonl").read_text().splitlines()
    # The last may have been told before its checkpoint was whole; its times would differ.
    assert again[: len(told) - 1] == told[:-1], "no epoch is trained twice"
