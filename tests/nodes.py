"""A real cluster of two nodes on loopback, and drivers in processes of their own, for tests that kill parts
of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
NODE = {"num_cpus": 6, "object_store_memory": 300 * 2**20, "include_dashboard": False}
# A dead node is known to be dead after 3 seconds, and not after 15 as by Ray's own settings; a slow one still
# has Ray's ten seconds for an answer.
HEALTH = {"health_check_period_ms": 600, "health_check_failure_threshold": 5}


class Driver(subprocess.Popen[bytes]):
    """`python ARGUMENTS` in a process group of its own; what it prints goes to a file."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115
        super().__init__(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            start_new_session=True,
            stderr=self._printed,
            stdout=self._printed,
        )

    def told(self, last: int = 6000) -> str:
        """Its state and the end of what it printed, for the message of a test that fails."""
        size = os.fstat(self._printed.fileno()).st_size
        end = os.pread(self._printed.fileno(), last, max(0, size - last))
        return f"the driver's state is {self.poll()}; it printed\n{end.decode(errors='replace')}"


class TwoNodes:
    """A head and a worker node; the worker's raylet can be killed and replaced. Everything killed was started
    here."""

    def __init__(self, head: dict[str, Any] | None = None, worker: dict[str, Any] | None = None) -> None:
        """Takes changes to the settings of a node, such as its number of CPUs."""
        from ray.cluster_utils import Cluster

        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # loopback only
        self._worker_settings = NODE | (worker or {})
        self._cluster = Cluster(
            initialize_head=True,
            connect=False,
            head_node_args=NODE | {"_system_config": HEALTH} | (head or {}),
        )
        self._worker = self._cluster.add_node(**self._worker_settings)
        self._drivers: list[Driver] = []

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def run(self, arguments: list[str], **settings: str) -> Driver:
        """`python ARGUMENTS` as a driver of this cluster."""
        driver = Driver(
            arguments, {**os.environ, "RAY_ADDRESS": self.address, "HF_HUB_OFFLINE": "1", **settings}
        )
        self._drivers.append(driver)
        return driver

    def raylets(self) -> list[int]:
        nodes: list[Any] = [self._cluster.head_node, self._worker]
        return [info.process.pid for node in nodes for info in node.all_processes.get("raylet", [])]

    def actors(self, name: str, *, worker_node: bool = False) -> list[psutil.Process]:
        """Processes of actors of that name, below our own raylets; an engine in a process of its own is below
        its actor."""
        found = []
        for pid in self.raylets()[1 if worker_node else 0 :]:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in psutil.Process(pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        if name in " ".join(process.cmdline()):
                            found.append(process)
        return found

    def kill_raylet(self, *, replace: bool = True) -> None:
        """The worker node dies at once; a new one takes its place, unless not."""
        os.kill(self._worker.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        time.sleep(1)
        with contextlib.suppress(Exception):  # what is left of a node whose raylet is gone
            self._cluster.remove_node(self._worker, allow_graceful=False)
        if replace:
            self.add_worker_node()

    def add_worker_node(self) -> None:
        """After one was lost."""
        self._worker = self._cluster.add_node(**self._worker_settings)

    def stop(self) -> None:
        for driver in self._drivers:
            if driver.poll() is None:  # of a test that failed
                os.killpg(driver.pid, signal.SIGKILL)
        self._cluster.shutdown()
