"""What Prometheus hears of a real run on a real head node, and the dashboard that asks for it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.inspect import metrics
from pipeline.store import Store
from tests.nodes import ROOT, free_ports, kill_node, ray_node
from training.tracking.progress import label

DASHBOARD = ROOT / "cluster" / "grafana" / "gpt4image.json"
# Ray exports it on nodes that have a GPU, and on no other.
OF_GPUS = {"ray_node_gpus_utilization"}
SECRET = "sk-nobody-may-see-this"
Labels = tuple[tuple[str, str], ...]


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def queries() -> list[str]:
    """Of the panels, and of the variables at the top."""
    asked = [target["expr"] for panel in panels() for target in panel["targets"]]
    return asked + [v["query"]["query"] for v in dashboard()["templating"]["list"] if v["type"] == "query"]


def asked() -> set[str]:
    """Metrics in those queries."""
    return {name for query in queries() for name in re.findall(r"\bray_\w+", query)}


def exported(name: str) -> str:
    """As Ray calls a metric of ours."""
    return f"ray_gpt4image_{name}" + "_total" * (name in metrics.COUNTERS)


class Prometheus:
    """Asks a node for its metrics as Prometheus does, and keeps the latest of every series."""

    def __init__(self, port: int) -> None:
        self._address = f"http://127.0.0.1:{port}/metrics"
        self.series: dict[tuple[str, Labels], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask_again, daemon=True)

    def __enter__(self) -> Prometheus:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def names(self) -> set[str]:
        return {name for name, _ in list(self.series)}

    def ask(self) -> None:
        with urllib.request.urlopen(self._address, timeout=10) as answer:
            text = answer.read().decode()
        for name, labels, value in re.findall(r"^(\w+)(?:\{(.*)\})? (\S+)$", text, re.MULTILINE):
            found = tuple(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels))
            self.series[name, found] = float(value)

    def total(self, name: str, **labels: str) -> float:
        """Sum of the series of a metric of ours that have these labels."""
        return sum(
            value
            for (found, series), value in self.series.items()
            if found == exported(name) and labels.items() <= dict(series).items()
        )

    def _ask_again(self) -> None:
        while not self._stop.wait(0.5):
            with contextlib.suppress(OSError):
                self.ask()


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, str], int]]:
    """A head node as a child process; yields the environment that joins it, and its port for metrics."""
    folder = tmp_path_factory.mktemp("head")
    gcs, agent, client, port = free_ports(4)
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # An engine ends with a kill: one that was up for less than this has not been heard of.
        "RAY_metrics_report_interval_ms": "1000",
        "OPENAI_API_KEY": SECRET,
    }
    environment.pop("RAY_ADDRESS", None)
    flags = {
        "--node-ip-address": "127.0.0.1",
        "--port": gcs,
        "--num-cpus": 8,
        "--dashboard-agent-listen-port": agent,
        "--ray-client-server-port": client,
        "--metrics-export-port": port,
        "--object-store-memory": 2**30,
        "--temp-dir": f"/tmp/rw{os.getpid()}",  # socket paths have a limit of 107 bytes
    }
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
    command += ["--include-dashboard=false", *(str(each) for pair in flags.items() for each in pair)]
    child = ray_node(command, environment, folder / "head.log")
    yield {**environment, "RAY_ADDRESS": f"127.0.0.1:{gcs}"}, port
    kill_node(child)


def work(environment: dict[str, str], *command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.alone
def test_every_query_of_the_dashboard_finds_what_a_run_exported(
    head: tuple[dict[str, str], int], tmp_path: Path, picture_folder: Callable[..., Path]
) -> None:
    environment, port = head
    images = picture_folder({"train/a": 48, "train/b": 48, "val/a": 8, "val/b": 8})
    (images / "train" / "a" / "000.jpg").write_bytes(b"no picture")
    where, run = str(tmp_path / "store"), tmp_path / "runs" / "watched"
    # The engine that loads soonest; `--replicas`: one of it, whatever the machine.
    describe = ["--caption-preset", "scenes", "--captioner", "transformers", "--replicas", "1"]
    describe += ["--device", "cpu", "--shard-rows", "32", "--max-failure-rate", "0.5"]
    smoke = ["--preset", "smoke", "--device", "cpu", "--workers", "1", "--batch-size", "32"]
    smoke += ["--epochs", "2", "--tracking-uri", "none", "--run", str(run)]
    with Prometheus(port) as heard:
        work(environment, "describe", "--images", str(images), "--store", where, *describe)
        work(environment, "train", "--store", where, *smoke)
        time.sleep(2)

    assert asked() - heard.names == OF_GPUS
    ours = {exported(name) for name in (*metrics.COUNTERS, *metrics.GAUGES)}
    assert {name for name in heard.names if "gpt4image" in name} == ours

    store = Store(where)
    captions, embeddings = store.only_variant("captions"), store.only_variant("embeddings")
    tokens = {"images": "", "captions": "output_tokens", "embeddings": "tokens"}
    for stage, variant in (("images", ""), ("captions", captions), ("embeddings", embeddings)):
        receipts = store.receipts(stage, variant).values()
        assert heard.total("images", stage=stage, variant=variant) == sum(r.rows for r in receipts) == 112
        assert heard.total("failures", stage=stage, variant=variant) == sum(r.failed for r in receipts) == 1
        if column := tokens[stage]:
            read = [
                store.read_shard(stage, variant, s, [column])[column] for s in range(store.dataset.shards)
            ]
            there = sum(each or 0 for shard in read for each in shard.to_pylist())
            assert heard.total("tokens", stage=stage, variant=variant) == there > 0
        if stage != "images":
            assert heard.total("engines_wanted", stage=stage, variant=variant) == 1
    assert heard.total("engines_up", stage="captions", variant=captions) == 1
    assert heard.total("engines_up", stage="embeddings") <= 1, "it may have taken less than a second"

    result = json.loads((run / "result.json").read_text())
    last = result["last"]
    assert heard.total("training_epoch", run=label(str(run))) == result["epochs"] == 2
    assert heard.total("training_step", run=label(str(run))) == last["step"]
    assert heard.total("training_score", run=label(str(run)), metric="top1") == pytest.approx(last["top1"])
    for part in ("loss", "cross_entropy", "alignment"):
        assert heard.total("training_loss", run=label(str(run)), part=part) == pytest.approx(last[part])

    told = {value for (name, series) in heard.series if name in ours for _, value in series}
    assert not [value for value in told if "/" in value or SECRET in value or str(tmp_path) in value]


def test_panels_have_words_units_and_a_source_that_can_be_chosen() -> None:
    numbers = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(numbers)) == len(numbers)
    for panel in panels():
        assert panel["title"] and panel["fieldConfig"]["defaults"]["unit"], panel
        for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"])):
            assert source == {"type": "prometheus", "uid": "${datasource}"}
    assert {exported(name) for name in (*metrics.COUNTERS, *metrics.GAUGES)} <= asked()
    known = {variable["name"] for variable in dashboard()["templating"]["list"]}
    assert {name for query in queries() for name in re.findall(r"\$(\w+)", query)} <= known
    for query in queries():
        assert all(query.count(pair[0]) == query.count(pair[1]) for pair in ("()", "{}", "[]")), query


def test_a_fault_of_metrics_ends_them_and_not_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str) -> Any:
        message = f"no {name}"
        raise RuntimeError(message)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not metrics.on(), "nobody looks at a machine's own Ray"
    monkeypatch.setattr(metrics, "_counter", broken)
    monkeypatch.setattr(metrics, "_gauge", broken)
    with metrics.Watched(False, stage="images", variant="") as unwatched:
        unwatched.count("images", 1)
        unwatched.show("engines_up", 1)
    assert capsys.readouterr().err == ""
    with metrics.Watched(True, stage="images", variant="") as watched:
        watched.count("images", 1)
        watched.count("tokens", 1)
        watched.show("engines_up", 1)
    assert capsys.readouterr().err == "metrics: none from here on: RuntimeError: no images\n"
