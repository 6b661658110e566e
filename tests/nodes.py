"""A real cluster of two nodes on loopback, and drivers in processes of their own, for tests that kill parts
of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
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


_HEAD_ID = "f" * 51 + "00000"  # that Ray's provider of local nodes gives the head


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextlib.contextmanager
def growing(groups: dict[str, dict[str, Any]], folder: Path) -> Iterator[str]:
    """The address of a real cluster on loopback that Ray's autoscaler (v2) grows from a head without CPUs.

    `groups`: resources and `most` nodes of each group; they are processes on this machine, begun and ended by
    the autoscaler. (`ray.cluster_utils.AutoscalingCluster` needs a file that Ray's wheel does not have, and
    begins with `ray stop`.) A node that is idle for six seconds ends.
    """
    gcs, agent, client = free_ports(3)
    memory = 200 * 2**20
    kinds = {
        name: {
            "resources": {key: amount for key, amount in group.items() if key != "most"}
            | {"object_store_memory": memory},
            "node_config": {},
            "min_workers": 0,
            "max_workers": group["most"],
        }
        for name, group in groups.items()
    }
    settings: dict[str, Any] = {
        "cluster_name": "growing",
        "max_workers": sum(group["most"] for group in groups.values()),
        "head_node_type": "ray.head.default",
        "available_node_types": kinds
        | {"ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}},
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": f"127.0.0.1:{gcs}",
            "launch_multiple": True,
            "head_node_id": _HEAD_ID,
        },
        "auth": {"ssh_user": "none"},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "initialization_commands": [],
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 1.0,
    }
    for part in ("", "head_", "worker_"):
        settings[f"{part}setup_commands"] = []
    for part in ("head", "worker"):
        settings[f"{part}_start_ray_commands"] = []
    (folder / "autoscaling.json").write_text(json.dumps(settings))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    flags = {
        "--autoscaling-config": folder / "autoscaling.json",
        "--node-ip-address": "127.0.0.1",
        "--port": gcs,
        "--num-cpus": 0,
        "--object-store-memory": memory,
        "--dashboard-agent-listen-port": agent,
        "--ray-client-server-port": client,
        "--temp-dir": f"/tmp/rg{os.getpid()}",  # socket paths have a limit of 107 bytes
    }
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
    command += ["--include-dashboard=false", *(str(each) for pair in flags.items() for each in pair)]
    head = ray_node(command, environment, folder / "head.log")
    try:
        yield f"127.0.0.1:{gcs}"
    finally:
        kill_node(head)


def ray_node(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """`ray start --block ...` as a child process, once it is up; what it prints goes to `log`."""
    with log.open("w") as stream:
        node = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while "runtime started" not in log.read_text():
        if node.poll() is not None or time.monotonic() > deadline:
            kill_node(node)
            raise AssertionError(log.read_text())
        time.sleep(0.2)
    return node


def kill_node(node: subprocess.Popen[bytes]) -> None:
    """All of its processes at once, as when a machine loses its power; `ray start --block` would give each of
    them half a minute to end."""
    with contextlib.suppress(psutil.NoSuchProcess):  # it was killed before
        processes = psutil.Process(node.pid).children(recursive=True)
        node.kill()  # first, for it would end the others in its own way
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    node.wait(timeout=60)
