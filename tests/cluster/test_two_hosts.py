"""Two hosts that share no file system: each has its own address, name and folders, and the store is on an S3
server on one of them.

They are network namespaces of this machine, joined by a cable and without a way to anywhere else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.nodes import ROOT, kill_node, ray_node

pytestmark = pytest.mark.alone
NAMES = ("host-a", "host-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
S3 = f"http://{ADDRESSES[0]}:5000"
# Debian's installer gives a host's own name an address of loopback: nobody else finds it there.
HOSTS = "127.0.0.1 localhost\n127.0.1.1 {name}\n"
# Beyond it all that the test and Ray write is this host's own: scratch, Ray's folder, shared memory. A host
# goes on when its node has ended.
ON_ITS_OWN = """
set -e
hostname "$1"
mount --bind "$2" /etc/hosts
for folder in "$3" "$4" /dev/shm; do mount -t tmpfs none "$folder"; done
mkdir "$3/tmp"
shift 4
"$@" || true
sleep 90
"""
UPLOAD = """
import sys
import boto3
from pyarrow import fs
boto3.client("s3").create_bucket(Bucket="pictures")
host = sys.argv[2].removeprefix("http://")
remote = fs.S3FileSystem(endpoint_override=host, scheme="http", region="us-east-1")
fs.copy_files(sys.argv[1], "pictures/images", destination_filesystem=remote)
"""


APART = ["unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc"]


class Host:
    """A network namespace; with a Ray node in it, a file system of its own, too."""

    def __init__(self, number: int, folder: Path) -> None:
        self.name, self.address = NAMES[number], ADDRESSES[number]
        self.space = f"gt{os.getpid()}{'ab'[number]}"
        self.node: subprocess.Popen[bytes] | None = None
        self.folder = folder
        self.ray_folder = Path(f"/tmp/rh{os.getpid()}")  # socket paths have a limit of 107 bytes
        self.environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
            "PYTHONFAULTHANDLER": "1",  # see `wait_until_told`
            "PYTHONPATH": str(ROOT),
            "HOME": str(folder),
            "TMPDIR": str(folder / "tmp"),
            "AWS_ENDPOINT_URL": S3,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def on_network(self, *command: str) -> list[str]:
        """The command with this host's network, and this machine's files."""
        return ["ip", "netns", "exec", self.space, *command]

    def alone(self, *command: str) -> list[str]:
        """The command that begins this host: nothing written outside is seen in it, nor the other way.

        Its processes are its own, too: a driver takes the address of the Ray daemon that it sees running, a
        head's first; with the other host's, workers wait for the driver's objects for ever.
        """
        names = self.folder.parent / f"{self.name}.hosts"
        names.write_text(HOSTS.format(name=self.name))
        shell = ["sh", "-c", ON_ITS_OWN, "sh", self.name, str(names), str(self.folder), str(self.ray_folder)]
        return self.on_network(*APART, *shell, *command)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """A driver on this host; what it prints goes to `log`."""
        assert self.node is not None
        (begun,) = psutil.Process(self.node.pid).children()
        inside = ["nsenter", f"--target={begun.pid}", "--mount", "--net", "--uts", "--pid", f"--wd={ROOT}"]
        command = [*inside, sys.executable, "-m", "cluster.cli", *arguments]
        with self.log.open("w") as stream:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment | {"RAY_ADDRESS": f"{ADDRESSES[0]}:6379"},
                stdout=stream,
                stderr=subprocess.STDOUT,
            )

    @property
    def log(self) -> Path:
        return self.folder.parent / f"{self.name}.log"

    def processes(self) -> dict[psutil.Process, str]:
        """Ray's actors that are at work here, with the names of their processes."""
        assert self.node is not None
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.node.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    found[process] = " ".join(process.cmdline())
        return {process: name for process, name in found.items() if name.startswith("ray::")}

    def actors(self) -> set[str]:
        return set(self.processes().values())


def joined(hosts: list[Host]) -> str:
    """Makes the namespaces and the cable; why not, where this machine does not allow it."""
    ends = [["name", "lan0", "netns", host.space] for host in hosts]
    commands = [["ip", "netns", "add", host.space] for host in hosts]
    commands += [["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]], ["nsenter", "--version"]]
    for host in hosts:
        commands += [
            ["ip", "-n", host.space, "address", "add", f"{host.address}/24", "dev", "lan0"],
            ["ip", "-n", host.space, "link", "set", "lan0", "up"],
            ["ip", "-n", host.space, "link", "set", "lo", "up"],
        ]
    commands += [host.on_network(*APART, "true") for host in hosts]
    for command in commands:
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True)
        except FileNotFoundError as missing:
            return str(missing)
        if done.returncode != 0:
            return f"{' '.join(command)}: {done.stderr.strip()}"
    return ""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Iterator[list[Host]]:
    """A Ray cluster of two hosts, with the pictures on the S3 server of the first."""
    folder = tmp_path_factory.mktemp("hosts") / "scratch"
    folder.mkdir()
    pair = [Host(number, folder) for number in (0, 1)]
    with contextlib.ExitStack() as stack:
        for host in pair:
            stack.callback(
                subprocess.run, ["ip", "netns", "delete", host.space], check=False, capture_output=True
            )
        if why := joined(pair):
            pytest.skip(f"no network namespaces can be made here: this test needs the right to (root): {why}")
        stack.callback(pair[0].ray_folder.rmdir)
        pair[0].ray_folder.mkdir()
        server = pair[0].on_network(sys.executable, "-m", "moto.server", "-H", ADDRESSES[0], "-p", "5000")
        s3 = subprocess.Popen(
            server,
            env=pair[0].environment | {"TMPDIR": ""},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(s3.wait)
        stack.callback(s3.kill)
        for host in pair:
            host.node = node(host, folder.parent / f"{host.name}-node.log")
            stack.callback(kill_node, host.node)
        upload = pair[0].on_network(sys.executable, "-c", UPLOAD, str(scenes), S3)
        environment = pair[0].environment | {"TMPDIR": str(folder.parent)}
        subprocess.run(upload, env=environment, check=True, capture_output=True)
        yield pair


def node(host: Host, log: Path) -> subprocess.Popen[bytes]:
    """Four CPUs: room for an engine with its decoder and writer, and not for two."""
    ray = str(Path(sys.executable).parent / "ray")
    flags = ["start", "--block", "--node-ip-address", host.address, "--num-cpus", "4"]
    flags += ["--object-store-memory", str(200 * 2**20)]
    if host.address == ADDRESSES[0]:
        flags += ["--head", "--port", "6379", "--include-dashboard=false", "--temp-dir", str(host.ray_folder)]
    else:
        flags += ["--address", f"{ADDRESSES[0]}:6379"]
    # For so long a node waits for a head that is gone; by Ray's own settings a minute.
    patience = {"RAY_gcs_rpc_server_reconnect_timeout_s": "10"}
    return ray_node(host.alone(ray, *flags), host.environment | patience, log)


def actors_until_done(driver: subprocess.Popen[bytes], hosts: list[Host], seconds: float) -> list[set[str]]:
    """Which actors each host had while the driver worked; the driver must end well."""
    seen: list[set[str]] = [set() for _ in hosts]
    deadline = time.monotonic() + seconds
    while driver.poll() is None and time.monotonic() < deadline:
        for host, names in zip(hosts, seen, strict=True):
            names |= host.actors()
        time.sleep(0.3)
    told = hosts[0].log.read_text()
    if driver.poll() is None:
        kill_node(driver)
    assert driver.wait() == 0, told[-5000:]
    return seen


@contextlib.contextmanager
def stopped(actor: str, hosts: list[Host]) -> Iterator[None]:
    """Actors of a name do nothing in the meantime."""
    held = [process for host in hosts for process, name in host.processes().items() if actor in name]
    assert held, f"no {actor}"
    for process in held:
        process.suspend()
    try:
        yield
    finally:
        for process in held:
            process.resume()


def has(names: set[str], actor: str) -> bool:
    return any(actor in name for name in names)


def test_a_store_is_described_and_a_model_trained_by_hosts_that_share_only_s3(hosts: list[Host]) -> None:
    first, second = hosts
    store = ["--store", "s3://pictures/store"]
    describe = ["describe", "--images", "s3://pictures/images", *store, "--limit", "96", "--shard-rows", "12"]
    describe += ["--caption-preset", "scenes", "--device", "cpu", "--replicas", "2", "--engine-cores", "1"]
    driver = first.start(*describe)
    seen = actors_until_done(driver, hosts, 150)
    assert all(has(names, "CaptionPictures") for names in seen), seen

    train = ["train", *store, "--run", "s3://pictures/run", "--preset", "smoke", "--device", "cpu"]
    train += ["--workers", "2", "--threads", "3", "--batch-size", "32", "--epochs", "12"]
    train += ["--tracking-uri", "none"]
    driver = first.start(*train)
    wait_until_told(first, "epoch   1/", driver, 120)
    with stopped("RayTrainWorker", hosts):  # it holds the run for as long as the other asks, 15 s
        other = second.start(*train)
        assert other.wait(90) == 2, second.log.read_text()
    seen = actors_until_done(driver, hosts, 150)
    assert all(has(names, "RayTrainWorker") for names in seen), seen
    assert "on host-a is at work in it" in second.log.read_text()

    again = second.start(*train)
    assert again.wait(60) == 0, second.log.read_text()
    assert "s3://pictures/run is complete; nothing to do" in second.log.read_text()
    for folder in (first.folder, first.ray_folder, Path("/dev/shm")):
        systems = [Path(f"/proc/{host.node.pid}/root{folder}") for host in hosts if host.node is not None]
        assert len({path.stat().st_dev for path in (folder, *systems)}) == 3, (
            "each to a file system of its own"
        )


def test_a_driver_on_another_host_than_the_heads_says_that_the_head_is_lost(hosts: list[Host]) -> None:
    """The last test here: the first host does not come back."""
    first, second = hosts
    train = ["train", "--store", "s3://pictures/store", "--run", "s3://pictures/long", "--preset", "smoke"]
    train += ["--device", "cpu", "--workers", "1", "--threads", "1", "--batch-size", "32", "--epochs", "9999"]
    driver = second.start(*train, "--tracking-uri", "none")
    wait_until_told(second, "epoch   1/", driver, 120)
    assert first.node is not None
    kill_node(first.node)
    lost = time.monotonic()
    try:
        code = driver.wait(60)
        assert code == 1, f"{code}: {second.log.read_text()[-5000:]}"
    finally:
        kill_node(driver)
    print(f"the driver ended {time.monotonic() - lost:.1f} s after the head")
    assert "What is done is kept: the same command goes on" in second.log.read_text()
    assert "Traceback" not in second.log.read_text(), second.log.read_text()[-5000:]


def wait_until_told(host: Host, words: str, driver: subprocess.Popen[bytes], seconds: float) -> None:
    """One that does not say them says where it stands: a signal makes it print its threads' stacks."""
    deadline = time.monotonic() + seconds
    while words not in host.log.read_text():
        if driver.poll() is not None or time.monotonic() > deadline:
            for process in psutil.Process(driver.pid).children():
                process.send_signal(signal.SIGABRT)
                process.wait(10)
            kill_node(driver)
            raise AssertionError(host.log.read_text()[-5000:])
        time.sleep(0.1)
