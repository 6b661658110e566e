"""Training that is killed, loses workers or nodes, or meets a picture that breaks it."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.nodes import Driver, TwoNodes
from training.engine import checkpoint

pytestmark = pytest.mark.alone
# 57 rows in batches of 12: epochs end inside a batch, most checkpoints lie inside an epoch.
RECIPE = [
    "--preset",
    "smoke",
    "--projection-dim",
    "4",
    "--batch-size",
    "12",
    "--epochs",
    "12",
    "--drop-path",
    "0.1",
    "--mixup",
    "0.2",
    "--ema",
    "0.9",
    "--checkpoint-steps",
    "2",
    "--workers",
    "2",
    "--tracking-uri",
    "none",
    "--seed",
    "3",
]
STEPS = 57  # of 12 epochs of 57 samples
ENDS = [-(-epoch * 57 // 12) for epoch in range(13)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    """One CPU each, so that each holds one of two workers."""
    cluster = TwoNodes(head={"num_cpus": 1}, worker={"num_cpus": 1})
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, make_store: Callable[..., Path]) -> Path:
    return make_store(tmp_path_factory.mktemp("faults") / "store", train=57, val=12)


def training(store: Path, run: Path, *flags: str) -> list[str]:
    """Arguments of Python."""
    places = ["--store", str(store), "--run", str(run), "--device", "cpu"]
    return ["-m", "training", "train", *places, *RECIPE, *flags]


def start(nodes: TwoNodes, store: Path, run: Path, *flags: str) -> Driver:
    return nodes.run(training(store, run, *flags), RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.1")


@pytest.fixture(scope="module")
def uninterrupted(nodes: TwoNodes, store: Path) -> Path:
    run = store.parent / "uninterrupted"
    check_ended_well(start(nodes, store, run))
    return run


def epochs_done(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def history(run: Path) -> list[dict[str, float]]:
    """Of a run at work, too: the line that is being written is left out."""
    told = (run / "metrics.jsonl").read_text()
    return [json.loads(line) for line in told[: told.rfind("\n") + 1].splitlines()]


def wait_for(arrived: Callable[[], bool], driver: Driver) -> None:
    deadline = time.monotonic() + 400
    while not arrived():
        assert driver.poll() is None and time.monotonic() < deadline, driver.told()
        time.sleep(0.01)


def wait_for_epoch(run: Path, epoch: int, driver: Driver) -> None:
    wait_for(lambda: epochs_done(run) >= epoch, driver)


def check_ended_well(driver: Driver) -> None:
    assert driver.wait(500) == 0, driver.told()


def check_samples(run: Path, epochs: int = 12) -> None:
    """Every epoch counted its own samples, once each, whatever happened in it."""
    check_history(json.loads((run / "result.json").read_text())["history"], epochs)


def check_history(history: list[dict[str, float]], epochs: int) -> None:
    ends = [-(-epoch * 57 // 12) for epoch in range(epochs + 1)]
    assert [m["samples"] for m in history] == [12 * (end - begin) for begin, end in itertools.pairwise(ends)]
    assert history[-1]["step"] == ends[-1]


def check_same_weights(run: Path, other: Path) -> None:
    mine, others = (Path(checkpoint.find(str(folder))) for folder in (run, other))
    for file in ("model", "optimizer", "ema"):
        expected, found = load_file(others / f"{file}.safetensors"), load_file(mine / f"{file}.safetensors")
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert torch.equal(value, found[name]), (file, name)


def test_an_elastic_run_shrinks_when_a_node_is_lost_and_grows_when_one_comes(
    nodes: TwoNodes, store: Path
) -> None:
    """Two workers on two nodes, then one, then two again; the batches stay what they were.

    The first test: Ray keeps what a killed driver had reserved for three minutes, and an elastic run waits
    for that.
    """
    run = store.parent / "node"
    # Epochs without end: Ray looks for new nodes every 20 seconds, and one worker does ten epochs a second.
    driver = start(nodes, store, run, "--min-workers", "1", "--resize-seconds", "2", "--epochs", "9999")
    wait_for_epoch(run, 2, driver)
    assert (
        len(nodes.actors("RayTrainWorker")) == 2
        and len(nodes.actors("RayTrainWorker", worker_node=True)) == 1
    )
    nodes.kill_raylet(replace=False)
    wait_for_epoch(run, epochs_done(run) + 3, driver)
    assert len(nodes.actors("RayTrainWorker")) == 1
    nodes.add_worker_node()
    wait_for(lambda: len(nodes.actors("RayTrainWorker", worker_node=True)) == 1, driver)
    told = (run / "metrics.jsonl").read_text()
    wait_for(lambda: (run / "metrics.jsonl").read_text() != told, driver)
    wait_for_epoch(run, epochs_done(run) + 3, driver)
    assert len(nodes.actors("RayTrainWorker")) == 2
    wait_for(lambda: history(run)[-1]["top1"] > 60, driver)  # three classes by their colour
    os.killpg(driver.pid, signal.SIGINT)
    assert driver.wait(100) == 130, driver.told()
    check_history(history(run), len(history(run)))


def test_pictures_are_decoded_on_a_node_that_does_not_train(nodes: TwoNodes, store: Path) -> None:
    """A node has one CPU: where the worker is, its decoder is not."""
    run = store.parent / "elsewhere"
    flags = ["--workers", "1", "--loader", "actors", "--loader-workers", "1", "--epochs", "4"]
    driver = start(nodes, store, run, *flags)
    wait_for_epoch(run, 1, driver)
    on_worker_node = [
        len(nodes.actors(name, worker_node=True)) for name in ("RayTrainWorker", "_DecodingActor")
    ]
    assert [len(nodes.actors(name)) for name in ("RayTrainWorker", "_DecodingActor")] == [1, 1]
    assert sorted(on_worker_node) == [0, 1]
    check_ended_well(driver)
    check_samples(run, 4)


def test_a_run_killed_several_times_ends_with_the_very_same_weights(
    nodes: TwoNodes, store: Path, uninterrupted: Path
) -> None:
    """Driver and workers die at once, at random moments under a fixed seed; the same command goes on."""
    run = store.parent / "killed"
    rng = random.Random(1)
    stopped_at = []
    for epoch in (1, 4, 8):
        driver = start(nodes, store, run)
        wait_for_epoch(run, epoch, driver)
        time.sleep(rng.uniform(0, 1))
        workers = nodes.actors("RayTrainWorker")
        # The controller first: one that sees its workers die reserves CPUs anew. When Ray has taken note of
        # the driver's death before that, nobody frees them (its cleaner asks the dashboard, which does not
        # run here): the next run would wait.
        for process in [*nodes.actors("TrainController"), *workers]:
            process.kill()
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        assert len(workers) == 2
        stopped_at.append(checkpoint.read_state(checkpoint.find(str(run)))["step"])
        wait_until_gone(nodes)
    check_ended_well(start(nodes, store, run))
    assert stopped_at == sorted(stopped_at) and stopped_at[-1] < STEPS
    assert any(step not in ENDS for step in stopped_at), f"{stopped_at}: none inside an epoch"
    check_samples(run)
    check_same_weights(run, uninterrupted)


def wait_until_gone(nodes: TwoNodes) -> None:
    """Ray frees what a dead driver held."""
    deadline = time.monotonic() + 60
    while nodes.actors("RayTrainWorker") and time.monotonic() < deadline:
        time.sleep(0.2)


def test_a_worker_killed_inside_an_epoch_costs_some_steps_and_no_sample(
    nodes: TwoNodes, store: Path, uninterrupted: Path
) -> None:
    run = store.parent / "worker"
    driver = start(nodes, store, run)
    for epoch, place in ((1, 0), (6, 1)):
        wait_for_epoch(run, epoch, driver)
        before = nodes.actors("RayTrainWorker")
        assert len(before) == 2
        before[place].kill()
        deadline = time.monotonic() + 120
        while (
            not {p.pid for p in nodes.actors("RayTrainWorker")} - {p.pid for p in before}
            and time.monotonic() < deadline
        ):
            time.sleep(0.2)
    check_ended_well(driver)
    check_samples(run)
    check_same_weights(run, uninterrupted)


def test_a_broken_picture_ends_the_run_with_its_name_and_without_retries(
    nodes: TwoNodes, store: Path, tmp_path: Path
) -> None:
    run = tmp_path / "broken"
    command = [sys.executable, *training(store, run, "--lr", "1e25")]
    environment = {**os.environ, "RAY_ADDRESS": nodes.address}
    done = subprocess.run(
        [*command, "--workers", "1"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 1
    assert "the loss is no finite number. The batch: train/" in done.stderr and "lower --lr" in done.stderr
    assert "Traceback" not in done.stderr
