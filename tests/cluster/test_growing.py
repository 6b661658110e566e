"""A real cluster that Ray's autoscaler grows from nothing and shrinks again, without Kubernetes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.store import Store
from tests.nodes import ROOT, growing

pytestmark = pytest.mark.alone
GROUPS = {"captioning": {"CPU": 2, "GPU": 1, "most": 2}, "plain": {"CPU": 2, "most": 2}}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with growing(GROUPS, tmp_path_factory.mktemp("cluster")) as found:
        yield found


def nodes(address: str) -> dict[str, dict[str, float]]:
    """Resources of the nodes that are up, the head's aside, by their ids, as another driver sees them."""
    code = (
        "import json, ray; ray.init(log_to_driver=False, logging_level='ERROR');"
        "up = {n['NodeID']: n['Resources'] for n in ray.nodes() if n['Alive']};"
        "print('nodes', json.dumps({n: r for n, r in up.items() if 'node:__internal_head__' not in r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(address),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found: dict[str, dict[str, float]] = json.loads(done.stdout.partition("nodes ")[2].splitlines()[0])
    return found


def environment(address: str) -> dict[str, str]:
    return {
        **os.environ,
        "RAY_ADDRESS": address,
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "HF_HUB_OFFLINE": "1",
    }


def start(address: str, log: Path, *command: str) -> subprocess.Popen[bytes]:
    with log.open("w") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", *command],
            cwd=ROOT,
            env=environment(address),
            stdout=stream,
            stderr=subprocess.STDOUT,
        )


def captioning(address: str) -> list[str]:
    return [node for node, resources in nodes(address).items() if resources.get("GPU")]


def wait_until(condition: Callable[[], object], seconds: float) -> float:
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds
        time.sleep(0.5)
    return time.monotonic() - begun


def test_an_estimate_waits_for_its_engines_as_describing_would(
    address: str, tmp_path: Path, picture_folder: Callable[..., Path]
) -> None:
    images, work = picture_folder({"train/a": 60, "train/b": 60}), tmp_path / "work"
    work.mkdir()
    log = tmp_path / "log"
    flags = ["--images", str(images), "--caption-preset", "scenes", "--captioner", "transformers", "--json"]
    flags += ["--sample", "24", "--shard-rows", "8", "--replicas", "1", "--work-dir", str(work)]
    driver = start(address, log, "estimate", *flags)
    assert driver.wait(150) == 0, log.read_text()[-3000:]
    told = log.read_text()
    assert "estimate: waits for 1 readers of 1 CPU each, 60 min at most; the cluster has 0 GPUs" in told
    assert "estimate: waits for 1 engines of 1 GPU and 1 CPU each, 60 min at most" in told
    found = json.loads(told.splitlines()[-1])
    assert (found["sampled"], found["failed"], found["engines"], found["gpus"]) == (24, 0, 1, 1)
    assert list(work.iterdir()) == []


def test_describing_grows_from_nothing_survives_a_spot_node_and_lets_go(
    address: str, tmp_path: Path, picture_folder: Callable[..., Path]
) -> None:
    images = picture_folder({"train/a": 60, "train/b": 60, "val/a": 12, "val/b": 12})
    store = tmp_path / "store"
    flags = ["--images", str(images), "--store", str(store), "--shard-rows", "4"]
    flags += ["--caption-preset", "scenes", "--temperature", "0.3", "--captions-per-image", "8"]
    wait_until(lambda: not captioning(address), 90)  # nodes that the test before asked for
    refused = start(address, tmp_path / "refused", "describe", *flags)
    assert refused.wait(120) == 2
    assert "pass --replicas" in (tmp_path / "refused").read_text()
    assert not store.exists()  # before anything is read or paid for

    begun = time.monotonic()
    log = tmp_path / "log"
    driver = start(address, log, "describe", *flags, "--replicas", "3")  # one more than there can be
    wait_until(lambda: len(captioning(address)) == 2, 90)
    full = time.monotonic() - begun
    (variant,) = wait_for_variant(Store(str(store)))
    wait_until(lambda: Store(str(store)).receipts("captions", variant), 90)
    drained = captioning(address)[0]
    ray = str(Path(sys.executable).parent / "ray")
    notice = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    notice += ["--deadline-remaining-seconds", "2", "--node-id", drained, "--address", address]
    subprocess.run([ray, "drain-node", *notice], env=environment(address), check=True, capture_output=True)
    assert len(Store(str(store)).pending("captions", variant)) > 2  # there is work left for which it matters
    assert driver.wait(300) == 0, log.read_text()[-3000:]

    told = log.read_text()
    assert "caption: waits for 3 engines of 1 GPU and 1 CPU each, 60 min at most" in told
    assert "it grows; begins with 1" in told
    receipts = Store(str(store)).receipts("captions", variant)
    assert sum(each.rows for each in receipts.values()) == 144
    assert sum(each.failed for each in receipts.values()) == 0
    gone = wait_until(lambda: not nodes(address), 90)
    print(f"both engines' nodes after {full:.0f} s; all nodes gone {gone:.0f} s after the end")


def wait_for_variant(store: Store) -> list[str]:
    wait_until(lambda: store.variants("captions"), 60)
    return store.variants("captions")


def test_training_begins_when_there_is_room_for_all_of_its_workers(
    address: str, tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    store = make_store(tmp_path / "store", train=24, val=8)
    log, run = tmp_path / "log", tmp_path / "run"
    flags = ["--store", str(store), "--run", str(run), "--preset", "smoke", "--batch-size", "8"]
    flags += ["--device", "cpu", "--alignment-weight", "0"]
    refused = start(address, tmp_path / "refused", "train", *flags)
    assert refused.wait(120) == 2
    assert "pass --workers" in (tmp_path / "refused").read_text()
    flags += ["--loader", "actors", "--loader-workers", "1"]
    driver = start(address, log, "train", *flags, "--workers", "2", "--threads", "2")
    assert driver.wait(200) == 0, log.read_text()[-3000:]
    assert "waits for 2 workers of 2 CPUs each, with 1 of 1 CPU beside each" in log.read_text()
    assert "2 of 2 workers have room after" in log.read_text()

    log = tmp_path / "too many"
    many = [
        "--batch-size",
        "10",
        "--run",
        f"{run}3",
        "--workers",
        "3",
        "--threads",
        "2",
        "--wait-minutes",
        "0.3",
    ]
    driver = start(address, log, "train", *flags, *many)
    assert driver.wait(120) == 1
    assert "no room for 3 workers of 2 CPUs each, with 1 of 1 CPU beside each after" in log.read_text()
    assert re.search(r"no group of nodes gives \d CPUs? now", log.read_text()), "eight CPUs are the most"


def test_the_doctor_looks_at_every_node(address: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    flags = ["--store", str(tmp_path / "store"), "--encoder-preset", "minilm", "--json"]
    assert start(address, log, "doctor", "--address", address, *flags).wait(120) == 0, log.read_text()
    told = json.loads(log.read_text().splitlines()[-1])
    details = {finding["name"]: finding["detail"] for finding in told["findings"]}
    assert told["healthy"] and "it grows" in details["nodes"]
    assert "every node writes it and sees the same" in details["store"]
    assert not (tmp_path / "store").exists(), "what was made for the question"
