"""Tracking against a real MLflow server that is there, down, killed, frozen or slow; what a caller's call
costs meanwhile."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mlflow_server import Server
from training import tracking
from training.tracking import sender
from training.tracking import tracker as tracker_module
from training.tracking.__main__ import main as send_by_hand
from training.tracking.client import connect, patience
from training.tracking.journal import Journal, State
from training.tracking.secrets import masked, recordable

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Up at the start of each test that asks for it."""
    started = Server(tmp_path_factory.mktemp("mlflow"))
    started.start()
    started.wait()
    yield started
    started.kill()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses between tries, a short wait for the run's id."""
    monkeypatch.setattr(sender, "_MAX_BACK_OFF_S", 0.5)
    monkeypatch.setattr(tracker_module, "_PATIENCE_SERVER_S", 2.0)


def client(uri: str) -> Any:
    return connect(uri)


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """(step, value) of every point that the server has, in the order of steps, doubles included."""
    return sorted((m.step, m.value) for m in client(uri).get_metric_history(run_id, key))


def start(uri: str, spool: Path, name: str = "run", **more: Any) -> str:
    params = more.pop("params", {"lr": 0.1})
    return tracking.start_run(uri, "tests", name, params, {"embeddings": "emb-1"}, spool=str(spool), **more)


@pytest.mark.slow
def test_parameters_tags_metrics_files_and_status_arrive(server: Server, tmp_path: Path) -> None:
    from mlflow.artifacts import download_artifacts

    params = {"lr": 0.1, "note": "x" * 9000, "hub_token": "hf_abcdefgh", "max_tokens": 77}
    run_id = start(server.uri, tmp_path / "spool", params=params | {f"p{n}": n for n in range(150)})
    assert not run_id.startswith("pending")
    tracker = tracking.Tracker(server.uri, run_id, spool=str(tmp_path / "spool"))
    before = time.time() * 1000
    for step in range(1200):
        tracker.metrics({"loss": 1 / (step + 1), "top1": step}, step)
    tracker.metrics({"odd": float("nan"), "odd name (%)": float("inf")}, 3)
    (tmp_path / "files" / "sub").mkdir(parents=True)
    (tmp_path / "files" / "sub" / "a.bin").write_bytes(b"weights" * 100_000)
    tracker.artifacts(str(tmp_path / "files"), "checkpoint")
    (tmp_path / "files" / "sub" / "a.bin").unlink()  # as when Ray removes an old checkpoint
    assert tracker.finish(wait_s=30)
    run = client(server.uri).get_run(run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.tags["embeddings"] == "emb-1"
    assert run.data.params["p149"] == "149" and run.data.params["max_tokens"] == "77"
    assert run.data.params["hub_token"] == "***" and len(run.data.params["note"]) == 6000
    assert history(server.uri, run_id, "loss") == [(step, 1 / (step + 1)) for step in range(1200)]
    assert all(
        before - 1 <= m.timestamp <= time.time() * 1000
        for m in client(server.uri).get_metric_history(run_id, "top1")
    )
    assert {"odd", "odd name ___"} <= run.data.metrics.keys()
    got = download_artifacts(
        run_id=run_id, artifact_path="checkpoint/sub/a.bin", tracking_uri=server.uri, dst_path=str(tmp_path)
    )
    assert Path(got).read_bytes() == b"weights" * 100_000
    assert (
        list((tmp_path / "spool" / "outbox").iterdir()) == []
        and not (tmp_path / "spool" / "rejected.jsonl").exists()
    )


@pytest.mark.slow
def test_what_is_sent_twice_is_there_once(server: Server, tmp_path: Path) -> None:
    """A lost state file is the worst case: everything goes again, the creation of the run included."""
    spool = tmp_path / "spool"
    run_id = start(server.uri, spool)
    tracker = tracking.Tracker(server.uri, run_id, spool=str(spool))
    for step in range(50):
        tracker.metrics({"loss": step / 7, "odd": float("nan")}, step)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    tracker.register("twice", str(tmp_path / "model"))
    assert tracker.finish(wait_s=30)
    Journal(str(spool)).save(State())
    assert tracking.send(str(spool), wait_s=30)
    assert (
        tracking.actual_run_id("", str(spool)) == ""
        and tracking.actual_run_id("pending-x", str(spool)) == run_id
    )
    assert history(server.uri, run_id, "loss") == [(step, step / 7) for step in range(50)]
    assert len(history(server.uri, run_id, "odd")) == 50
    assert len(client(server.uri).search_model_versions("name = 'twice'")) == 1
    run = client(server.uri).get_run(run_id)
    key = run.data.tags[sender.KEY]
    assert len(client(server.uri).search_runs([run.info.experiment_id], f"tags.{sender.KEY} = '{key}'")) == 1


@pytest.mark.slow
def test_an_exported_model_becomes_versions_of_a_registered_one(server: Server, tmp_path: Path) -> None:
    from mlflow.artifacts import download_artifacts

    run_id = start(server.uri, tmp_path / "spool")
    tracker = tracking.Tracker(server.uri, run_id, spool=str(tmp_path / "spool"))
    for number in (1, 2):
        folder = tmp_path / f"export-{number}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes([number]) * 1000)
        tracker.register("birds", str(folder), f"model-{number}")
    assert tracker.finish(wait_s=30)
    versions = client(server.uri).search_model_versions("name = 'birds'")
    assert {(str(v.version), v.run_id) for v in versions} == {("1", run_id), ("2", run_id)}
    source = client(server.uri).get_model_version_download_uri("birds", "2")
    got = download_artifacts(artifact_uri=source, tracking_uri=server.uri, dst_path=str(tmp_path))
    assert (Path(got) / "model.safetensors").read_bytes() == b"\x02" * 1000


@pytest.mark.slow
def test_system_metrics_arrive_under_the_names_that_the_page_of_mlflow_groups(
    server: Server, tmp_path: Path
) -> None:
    run_id = start(server.uri, tmp_path / "spool")
    for _ in range(2):  # the second goes on counting
        tracker = tracking.Tracker(server.uri, run_id, spool=str(tmp_path / "spool"), system_metrics_s=0.2)
        time.sleep(1.5)
        assert tracker.finish(wait_s=30)
    found = client(server.uri).get_run(run_id).data.metrics
    assert {
        "system/cpu_utilization_percentage",
        "system/system_memory_usage_percentage",
        "system/disk_usage_percentage",
    } <= found.keys()
    steps = [step for step, _ in history(server.uri, run_id, "system/system_memory_usage_megabytes")]
    assert steps == list(range(len(steps))) and len(steps) >= 4


@pytest.mark.slow
def test_a_restarted_training_goes_on_in_the_same_run(server: Server, tmp_path: Path) -> None:
    """The first process is killed right after it logged; what it had no time to send, the second one
    sends."""
    spool = str(tmp_path / "spool")
    run_id = start(server.uri, tmp_path / "spool")
    code = (
        "import os, sys; from training import tracking\n"
        "t = tracking.Tracker(sys.argv[1], sys.argv[2], spool=sys.argv[3])\n"
        "[t.metrics({'loss': 1.0}, step) for step in range(40)]\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, server.uri, run_id, spool], cwd=ROOT, check=False)
    assert done.returncode == -9 and history(server.uri, run_id, "loss") == []
    assert start(server.uri, tmp_path / "spool", "another name") == run_id
    tracker = tracking.Tracker(server.uri, run_id, spool=spool)
    for step in range(30, 60):  # the last checkpoint was at 30
        tracker.metrics({"loss": 1.0}, step, once=True)
    assert tracker.finish(wait_s=30) and tracker.run_id == run_id
    assert history(server.uri, run_id, "loss") == [(step, 1.0) for step in range(60)]
    again = tracking.Tracker(server.uri, run_id, spool=spool)
    deadline = time.monotonic() + 20
    while client(server.uri).get_run(run_id).info.status != "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert client(server.uri).get_run(run_id).info.status == "RUNNING"
    assert again.finish("FAILED", wait_s=30)
    assert client(server.uri).get_run(run_id).info.status == "FAILED"


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back_has_every_point_once(
    server: Server, tmp_path: Path, impatient: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Three outages: killed in the middle, down at the start of two nested runs, frozen. No call waits for
    any of them."""
    spool, parent_spool, child_spool = (tmp_path / name for name in ("spool", "parent", "child"))
    far_spool = tmp_path / "far"  # of a rank 0 on a machine that does not see the driver's folder
    run_id = start(server.uri, spool)
    tracker = tracking.Tracker(server.uri, run_id, spool=str(spool))
    slowest, steps = 0.0, 0

    def log(count: int) -> None:
        nonlocal slowest, steps
        for _ in range(count):
            before = time.monotonic()
            tracker.metrics({"loss": steps / 3}, steps)
            slowest = max(slowest, time.monotonic() - before)
            steps += 1
            time.sleep(0.01)

    log(100)
    server.kill()
    log(100)
    parent = start(server.uri, parent_spool, "parent")
    child = start(server.uri, child_spool, "child", parent=parent)
    assert parent.startswith("pending-") and child.startswith("pending-")
    nested = tracking.Tracker(server.uri, child, spool=str(child_spool))
    nested.metrics({"loss": 5.0}, 1)
    assert nested.run_id == child
    assert not nested.finish(wait_s=0.5)
    errors = capfd.readouterr().err
    assert "has not taken 1 metrics and 0 folders of files" in errors
    assert f"Nothing is lost; send them with: python -m training.tracking {child_spool}" in errors
    far = tracking.Tracker(server.uri, child, spool=str(far_spool))
    far.metrics({"far": 6.0}, 1)
    server.start()
    log(100)
    server.wait()
    log(50)
    server.signal(signal.SIGSTOP)
    log(100)
    server.signal(signal.SIGCONT)
    log(50)
    assert tracker.finish(wait_s=40)
    assert history(server.uri, run_id, "loss") == [(step, step / 3) for step in range(steps)]
    assert slowest < 0.1, f"a call took {slowest * 1000:.1f} ms"
    assert send_by_hand([str(child_spool)]) == 0
    assert far.finish(wait_s=20)
    child_id = tracking.actual_run_id(child, str(child_spool))
    assert history(server.uri, child_id, "loss") == [(1, 5.0)] and history(server.uri, child_id, "far") == [
        (1, 6.0)
    ]
    found = client(server.uri).get_run(child_id)
    assert found.data.params == {"lr": "0.1"} and far.run_id == child_id
    assert (
        len(client(server.uri).search_runs([found.info.experiment_id], "attributes.run_name = 'child'")) == 1
    )
    deadline = time.monotonic() + 20  # the parent is created by the thread that start_run left behind
    while (
        "mlflow.parentRunId" not in client(server.uri).get_run(child_id).data.tags
        and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    parent_id = client(server.uri).get_run(child_id).data.tags["mlflow.parentRunId"]
    assert parent_id == tracking.actual_run_id(parent, str(parent_spool))
    assert client(server.uri).get_run(parent_id).info.run_name == "parent"


class Proxy:
    """Passes connections on to a server and holds each answer back; without a server it takes them and never
    answers."""

    def __init__(self, port: int | None, delay_s: float) -> None:
        self._port, self._delay_s = port, delay_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._held: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        for held in self._held:
            held.close()

    def _accept(self) -> None:
        while True:
            try:
                near = self._listener.accept()[0]
            except OSError:
                return
            self._held.append(near)
            if self._port is not None:
                far = socket.create_connection(("127.0.0.1", self._port))
                self._held.append(far)
                asked = threading.Event()
                threading.Thread(target=self._pass, args=(near, far, asked, False), daemon=True).start()
                threading.Thread(target=self._pass, args=(far, near, asked, True), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, asked: threading.Event, back: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                if back and asked.is_set():  # the first bytes of an answer; the rest of it follows at once
                    time.sleep(self._delay_s)
                    asked.clear()
                elif not back:
                    asked.set()
                target.sendall(data)
        except OSError:
            return


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["slow", "silent"])
def test_a_slow_server_costs_the_caller_nothing(
    server: Server, tmp_path: Path, impatient: None, kind: str
) -> None:
    proxy = Proxy(server.port if kind == "slow" else None, 2.0)
    before = time.monotonic()
    run_id = start(proxy.uri, tmp_path / "spool")
    assert run_id.startswith("pending-") and time.monotonic() - before < 4
    tracker = tracking.Tracker(proxy.uri, run_id, spool=str(tmp_path / "spool"))
    time.sleep(0.5)  # so that the thread is in the middle of a request
    before = time.perf_counter()
    for step in range(200):
        tracker.metrics({"loss": step / 2, "cross_entropy": 1.0, "alignment": 2.0}, step)
    spent = time.perf_counter() - before
    print(f"{kind}: 200 calls took {spent * 1000:.1f} ms")
    assert spent < 0.05
    if kind == "slow":
        assert tracker.finish(wait_s=60)
    else:
        before = time.monotonic()
        assert not tracker.finish(wait_s=1) and time.monotonic() - before < 2
        proxy.close()
        assert tracking.send(str(tmp_path / "spool"), server.uri, wait_s=40)
    proxy.close()
    assert history(server.uri, tracker.run_id, "loss") == [(step, step / 2) for step in range(200)]


@pytest.mark.slow
def test_what_the_server_never_takes_is_put_aside_and_the_rest_goes_on(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_id = start(server.uri, tmp_path / "spool")
    tracker = tracking.Tracker(server.uri, run_id, spool=str(tmp_path / "spool"))
    tracker.metrics({"loss": 1.0}, 1)
    tracker.metrics({"a/../b": 1.0}, 2)  # a name that looks like a path out of somewhere
    tracker.metrics({"loss": 3.0}, 3)
    tracker.artifacts(str(tmp_path / "nowhere"), "model")
    tracker.register("never", str(tmp_path / "nowhere"))
    assert tracker.finish(wait_s=30)
    assert history(server.uri, run_id, "loss") == [(1, 1.0), (3, 3.0)]
    rejected = [json.loads(line) for line in (tmp_path / "spool" / "rejected.jsonl").read_text().splitlines()]
    assert [entry["record"]["values"] for entry in rejected] == [{"a/../b": 1.0}]
    errors = capfd.readouterr().err
    assert "not taken" in errors and "nowhere" in errors


@pytest.mark.slow
def test_processes_that_share_one_sqlite_file_all_get_through(tmp_path: Path) -> None:
    """As in a sweep, from a file that does not exist yet; the callers name no folder."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    code = (
        "import sys; from training import tracking\n"
        "run = tracking.start_run(sys.argv[1], 'sweep', sys.argv[2], {'n': sys.argv[2]}, {})\n"
        "t = tracking.Tracker(sys.argv[1], run)\n"
        "[t.metrics({'loss': float(step)}, step) for step in range(300)]\n"
        "t.artifacts(sys.argv[3], 'best')\n"
        "print(run if t.finish() else 'unsent')"
    )
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "a.txt").write_text("a")
    arguments = [sys.executable, "-c", code, uri]
    children = [
        subprocess.Popen(
            [*arguments, str(n), str(tmp_path / "best")], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for n in range(3)
    ]
    runs = [child.communicate(timeout=120)[0].split()[-1] for child in children]
    for number, run_id in enumerate(runs):
        assert history(uri, run_id, "loss") == [(step, float(step)) for step in range(300)]
        run = client(uri).get_run(run_id)
        assert run.info.status == "FINISHED" and run.data.params == {"n": str(number)}
        assert [entry.path for entry in client(uri).list_artifacts(run_id, "best")] == ["best/a.txt"]
    assert list((tmp_path / "tracking").iterdir()) == []  # nothing is left to send


@pytest.mark.slow
def test_a_run_in_pieces_goes_on_with_each_point_once_though_no_folder_is_named(tmp_path: Path) -> None:
    """As one on an object store."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_id = tracking.start_run(uri, "tests", "run", {}, {})
    for status, epochs in (("KILLED", 1), ("FINISHED", 2)):
        tracker = tracking.Tracker(uri, run_id, system_metrics_s=0)
        deadline = time.monotonic() + 30
        while client(uri).get_run(run_id).info.status != "RUNNING" and time.monotonic() < deadline:
            time.sleep(0.1)
        assert client(uri).get_run(run_id).info.status == "RUNNING"
        for epoch in range(1, epochs + 1):  # the history of a checkpoint, and what is new
            tracker.metrics({"loss": 1.0}, epoch, once=True)
        assert tracker.finish(status, wait_s=30)
        assert client(uri).get_run(run_id).info.status == status
    assert history(uri, run_id, "loss") == [(1, 1.0), (2, 1.0)]
    assert list((tmp_path / "tracking").iterdir()) == []


@pytest.mark.slow
def test_files_that_can_not_be_stored_do_not_hold_up_the_metrics(tmp_path: Path) -> None:
    uri, spool = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "spool"
    (tmp_path / "mlartifacts").write_text("a file where a folder should be")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.txt").write_text("a")
    run_id = start(uri, spool)
    tracker = tracking.Tracker(uri, run_id, spool=str(spool))
    tracker.artifacts(str(tmp_path / "files"), "files")
    tracker.register("later", str(tmp_path / "files"))
    tracker.metrics({"loss": 2.0}, 1)
    assert not tracker.finish(wait_s=3)
    assert history(uri, run_id, "loss") == [(1, 2.0)]
    assert client(uri).get_run(run_id).info.status == "RUNNING"  # not all of it is there
    assert client(uri).search_registered_models() == []
    (tmp_path / "mlartifacts").unlink()
    assert tracking.send(str(spool), wait_s=30)
    assert client(uri).get_run(run_id).info.status == "FINISHED"
    assert {entry.path for entry in client(uri).list_artifacts(run_id)} == {"files", "model"}
    assert [model.name for model in client(uri).search_registered_models()] == ["later"]


def test_tracking_that_is_off_does_nothing(tmp_path: Path) -> None:
    assert tracking.start_run("none", "e", "n", {}, {}, spool=str(tmp_path / "spool")) == ""
    tracker = tracking.Tracker("none", "", spool=str(tmp_path / "spool"))
    tracker.metrics({"loss": 1.0}, 1)
    tracker.artifacts(str(tmp_path), "all")
    assert tracker.finish() and tracker.run_id == "" and not (tmp_path / "spool").exists()


def test_a_line_cut_off_spoils_no_other(tmp_path: Path) -> None:
    Journal(str(tmp_path)).append({"kind": "points", "n": 1})
    with open(tmp_path / "journal.jsonl", "ab") as stream:
        stream.write(b'{"kind": "poi')  # the machine died here
    journal = Journal(str(tmp_path))
    assert [record for _, record in journal.read()] == [{"kind": "points", "n": 1}]
    journal.append({"kind": "points", "n": 2})
    records = list(journal.read())
    assert [record for _, record in records] == [{"kind": "points", "n": 1}, {}, {"kind": "points", "n": 2}]
    assert records[-1][0] == journal.size
    assert list(journal.read(records[0][0], records[1][0])) == [records[1]]


def test_the_time_limits_of_the_user_stand_and_ours_leave_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    before = dict(os.environ)
    with patience(0):
        assert (
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "10"
            and os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "3"
        )
    with patience(9):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "120"
    assert dict(os.environ) == before


def test_one_sender_at_a_time(tmp_path: Path) -> None:
    one, two = Journal(str(tmp_path)), Journal(str(tmp_path))
    with one.locked() as first, two.locked() as second:
        assert first and not second
    with two.locked() as second:
        assert second


def test_no_password_and_no_token_is_printed_or_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Down to every file of the journal's folder, with a server that is not there to provoke every
    message."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-thirteen-owls")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://ada:pass-w0rd@127.0.0.1:{probe.getsockname()[1]}"
    params = {
        "base_url": "https://eve:hidden-1@example.org/v1",
        "api_key": "abc-secret",
        "note": "with sk-thirteen-owls",
    }
    run_id = start(uri, tmp_path / "spool", params=params)
    tracker = tracking.Tracker(uri, run_id, spool=str(tmp_path / "spool"))
    tracker.metrics({"loss": 1.0}, 1)
    assert not tracker.finish(wait_s=1)
    with pytest.raises(ValueError, match="pass --uri"):
        tracking.send(str(tmp_path / "spool"), wait_s=1)
    with pytest.raises(ValueError, match="holds no journal"):
        tracking.send(str(tmp_path / "elsewhere"))
    printed = capfd.readouterr()
    files = "".join(path.read_text() for path in (tmp_path / "spool").rglob("*") if path.is_file())
    for secret in ("pass-w0rd", "hidden-1", "abc-secret", "sk-thirteen-owls"):
        assert secret not in printed.out + printed.err + files
    assert "http://***@127.0.0.1" in printed.err and "training goes on" in printed.err


def test_masking_leaves_the_rest_as_it_is() -> None:
    assert (
        masked("postgresql://u:p@ss@db/mlflow?sslmode=on&password=x1")
        == "postgresql://***@db/mlflow?sslmode=on&password=***"
    )
    assert masked("sqlite:////data/a@b/mlflow.db") == "sqlite:////data/a@b/mlflow.db"
    assert masked("mail me@example.org: http://h/a") == "mail me@example.org: http://h/a"
    kept = {"max_tokens": 5, "prompt_tokens": 3, "keyboard": "k", "hf_token": ""}
    assert recordable(kept, 100) == {name: str(value) for name, value in kept.items()}
