"""The same stages through a real `ray start --head` on loopback, with token authentication on and an older
copy of the packages on its path."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.store import Store
from tests.nodes import free_ports, kill_node, ray_node
from training.tracking.commit import commit_of

pytestmark = pytest.mark.alone
ROOT = Path(__file__).resolve().parent.parent.parent


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
    for package in ("pipeline", "training", "cluster"):  # what is submitted comes before it
        (home / "older" / package).mkdir(parents=True)
        (home / "older" / package / "__init__.py").write_text("raise RuntimeError('an older copy')")
    environment["PYTHONPATH"] = str(home / "older")
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
    child = ray_node(command, environment, home / "head.log")
    yield {**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    kill_node(child)


def command(verb: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "cluster", verb, *arguments]


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


MAIN = "import sys; from cluster import __main__; sys.exit(__main__.main(sys.argv[1:]))"
# Goes on when another has looked which jobs there are, too, and found none.
AT_ONCE = """
import os, sys, time
from cluster import jobs
folder, real = sys.argv.pop(1), jobs._free_name
def free_name(*arguments):
    found = real(*arguments)
    open(os.path.join(folder, str(os.getpid())), "w").close()
    while len(os.listdir(folder)) < 2:
        time.sleep(0.001)
    return found
jobs._free_name = free_name
"""
# What Ray's server is asked for has another environment than it should.
SPOILED = """
import sys
from cluster import following
from ray.job_submission import JobSubmissionClient as Client
following.QUIET_S, real, (name, value) = 1, Client.submit_job, sys.argv.pop(1).split("=")
Client.submit_job = lambda self, **a: real(self, **a | {"runtime_env": a["runtime_env"] | {name: value}})
"""


def submit(environment: dict[str, str], *verb: str) -> subprocess.CompletedProcess[str]:
    return run(environment, "submit", "--", *verb)


def test_the_doctor_looks_from_inside(head: dict[str, str], tmp_path: Path) -> None:
    address = head["RAY_API_SERVER_ADDRESS"]
    done = run(head, "doctor", "--address", address, "--store", str(tmp_path), "--caption-preset", "scenes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nodes                    1 up (1 head), 0 GPUs" in done.stdout
    assert "model examples/scenes/captioner a folder on 1 nodes" in done.stdout
    done = run(head, "doctor", "--address", address, "--store", "/proc/store")
    assert done.returncode == 1 and "this process cannot write" in done.stdout


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
        "--device",
        "cpu",
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
    recorded = json.loads((run / "config.json").read_text())
    assert recorded["commit"] == commit_of(str(ROOT)), "which the job's copy of the code does not tell"

    done = submit(head, "train", "--store", str(store), *flags[:-1], f"{run}2", "--backbone", "resnet81")
    assert done.returncode == 2, "wrong settings are 2 through a job too"
    assert "did you mean" in done.stdout


@pytest.mark.parametrize("change", [{"RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_MODE": "disabled"}])
def test_a_wrong_token_and_none_are_refused_with_a_way_out(
    head: dict[str, str], change: dict[str, str]
) -> None:
    done = submit({**head, **change}, "status", "--store", "/nowhere")
    assert done.returncode == 2
    assert "RAY_AUTH_TOKEN" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("ids", [("", ""), ("mine", "yours")])
def test_of_two_that_are_sent_at_once_to_one_place_one_runs(
    head: dict[str, str], tmp_path: Path, picture_folder: Callable[..., Path], ids: tuple[str, str]
) -> None:
    images, store, meeting = picture_folder({"train/a": 4}), tmp_path / "store", tmp_path / "meeting"
    meeting.mkdir()
    children = []
    for own in ids:
        flags = ["submit", *(["--job-id", own] if own else []), "--", "ingest", "--images", str(images)]
        sent = [sys.executable, "-c", AT_ONCE + MAIN, str(meeting), *flags, "--store", str(store)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        children.append(subprocess.Popen(sent, cwd=ROOT, env=head, text=True, **pipes))  # type: ignore[call-overload]
    told = [child.communicate(timeout=120) for child in children]
    by_code = {child.returncode: "".join(said) for child, said in zip(children, told, strict=True)}
    assert by_code.keys() == {0, 2}, told
    assert "ended: SUCCEEDED" in by_code[0] and "ingest" in by_code[0]
    assert "already, and two at a time would write to one place" in by_code[2]
    assert "ingest: " not in by_code[2] and "Traceback" not in by_code[2]
    assert Store(str(store)).pending("images") == []


class Line:
    """A connection to the head that can be cut: a relay on loopback."""

    def __init__(self, target: str) -> None:
        self._target = int(target.rpartition(":")[2])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._cut = False
        self._flows = threading.Event()
        self._flows.set()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def freeze(self, seconds: float) -> None:
        """Lets nothing through for so long and ends no connection, as a sleeping laptop does; what was open
        stays dumb."""
        flows, self._flows = self._flows, threading.Event()
        flows.clear()
        time.sleep(seconds)
        self._flows.set()

    def cut(self, seconds: float) -> None:
        """Ends every connection, and answers nobody for so long."""
        self._cut = True
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        time.sleep(seconds)
        self._cut = False

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            if self._cut:
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self._target))
            self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                arguments = (source, sink, self._flows)
                threading.Thread(target=self._relay, args=arguments, daemon=True).start()

    @staticmethod
    def _relay(source: socket.socket, sink: socket.socket, flows: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                flows.wait()
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def wait_for_epoch(log: Path, number: int, child: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not re.search(rf"epoch +{number}/", log.read_text()):
        assert child.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def test_a_job_outlives_its_connection_its_terminal_and_its_driver(
    head: dict[str, str], tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    store, folder = make_store(tmp_path / "store", train=48, val=12), tmp_path / "runs" / "long"
    job = ["train", "--store", str(store), "--preset", "smoke", "--batch-size", "8", "--workers", "1"]
    job += ["--device", "cpu"]
    job += ["--projection-dim", "4", "--epochs", "9999", "--tracking-uri", "none", "--run", str(folder)]
    line, log, errors = Line(head["RAY_API_SERVER_ADDRESS"]), tmp_path / "log", tmp_path / "errors"
    through = {**head, "RAY_API_SERVER_ADDRESS": line.address, "MLFLOW_EXPERIMENT_NAME": "mine"}
    with log.open("wb") as out, errors.open("wb") as err:
        sent = command("submit", "--patience", "8", "--", *job)
        child = subprocess.Popen(sent, cwd=ROOT, env=through, stdout=out, stderr=err)
    wait_for_epoch(log, 3, child)
    told = errors.read_text()
    assert (
        re.search(r"sends \d+ files, \d+\.\d MiB of .*, and MLFLOW_EXPERIMENT_NAME", told)
        and "mine" not in told
    )
    name = re.search(r"gpt4image: (train-long-[\w-]+) runs: ", told)[1]  # type: ignore[index]

    for _ in range(2):  # the second long after the first: each loss has the patience to itself
        line.cut(3)
        seen = len(re.findall(r"epoch +\d+/", log.read_text()))
        wait_for_epoch(log, seen + 5, child)
        time.sleep(6)
    numbers = [int(n) for n in re.findall(r"epoch +(\d+)/", log.read_text())]
    assert numbers == list(range(1, len(numbers) + 1)), "every line once, and none lost"
    assert "the connection broke" in errors.read_text()

    second = submit(head, *job)
    assert second.returncode == 2 and "RUNNING already, and two at a time" in second.stderr
    assert name in second.stderr and "sends" not in second.stderr

    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 130
    assert f"{name} goes on" in errors.read_text() and "Traceback" not in errors.read_text()
    quick = f"from cluster import following; following.QUIET_S, following.ANSWER_S = 1, 2; {MAIN}"
    with log.open("wb") as out, errors.open("wb") as err:
        watching = [sys.executable, "-c", quick, "logs", name]
        child = subprocess.Popen(watching, cwd=ROOT, env=through, stdout=out, stderr=err)
    wait_for_epoch(log, 3, child)
    line.freeze(5)
    wait_for_epoch(log, len(re.findall(r"epoch +\d+/", log.read_text())) + 50, child)
    assert "the connection broke" in errors.read_text()
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 130

    there = run(head, "logs", name, "--no-follow")
    assert there.returncode == 0 and "epoch" in there.stdout

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[1:4] == ["-m", "training", "train"] and str(folder) in process.cmdline():
                process.kill()
    died = run(head, "logs", name)
    assert died.returncode not in (0, 2, 130) and "ended: FAILED" in died.stderr
    epochs = len((folder / "metrics.jsonl").read_text().splitlines())

    again = run(head, "submit", "--detach", "--", *job)
    assert again.returncode == 0 and again.stdout.strip() == f"{name[:-1]}2", again.stderr
    name = again.stdout.strip()
    deadline = time.monotonic() + 120
    while len((folder / "metrics.jsonl").read_text().splitlines()) <= epochs:
        assert time.monotonic() < deadline, run(head, "logs", name, "--no-follow").stdout
        time.sleep(0.5)
    stopped = run(head, "stop", name)
    assert stopped.returncode == 0 and "ended: STOPPED" in stopped.stderr, stopped.stderr
    assert "had ended before" in run(head, "stop", name).stderr
    unknown = run(head, "logs", "train-nobody")
    assert unknown.returncode == 2 and "did you mean" in unknown.stderr and name in unknown.stderr
    assert run(head, "logs", name).returncode == 130, "stopped"
    assert "STOPPED" in run(head, "logs").stdout


def test_a_log_that_cannot_be_told_costs_no_exit_code(head: dict[str, str], tmp_path: Path) -> None:
    """Ray's server reads logs as UTF-8, and a name in one may be anything else."""
    script = tmp_path / "odd.py"
    script.write_text("import sys; sys.stdout.buffer.write(bytes([233, 10])); sys.exit(3)")
    started = [
        str(Path(sys.executable).parent / "ray"),
        "job",
        "submit",
        "--no-wait",
        "--submission-id",
        "odd",
    ]
    started += ["--address", head["RAY_API_SERVER_ADDRESS"], "--", sys.executable, str(script)]
    subprocess.run(started, env=head, check=True, capture_output=True)
    done = run(head, "logs", "odd")
    assert done.returncode == 3, done.stderr
    assert "the log cannot be read" in done.stderr and "ended: FAILED" in done.stderr


def test_a_job_whose_environment_fails_or_hangs_is_told_of(head: dict[str, str]) -> None:
    def sent(spoiled: str) -> subprocess.Popen[str]:
        submitted = ["submit", "--job-id", f"never-{spoiled[:2]}", "--", "status", "--store", "/nowhere"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        arguments = [sys.executable, "-c", SPOILED + MAIN, spoiled, *submitted]
        return subprocess.Popen(arguments, cwd=ROOT, env=head, text=True, **pipes)  # type: ignore[call-overload,no-any-return]

    gone = sent("working_dir=gcs://_ray_pkg_00000000000000aa.zip")
    _, told = gone.communicate(timeout=60)
    assert gone.returncode == 1 and "Traceback" not in told, told
    assert "ended: FAILED (what the job needs could not be set up on its node: OSError: Failed to" in told

    hangs = sent("py_executable=/nowhere/python")
    assert hangs.stderr is not None
    while "never-py has not begun yet (Job has not started yet. It may" not in (
        line := hangs.stderr.readline()
    ):
        assert line, "it ended"
    hangs.send_signal(signal.SIGINT)
    assert hangs.wait(60) == 130
    stopped = run(head, "stop", "never-py", "--patience", "1")
    assert stopped.returncode == 1 and "is told to end, but has not begun yet" in stopped.stderr
