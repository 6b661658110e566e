"""Sweeps through Ray Tune, Ray Train, an MLflow server and a browser: one that is killed and goes on, and one
of which trials crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm

from tests.browser import Page, browser
from tests.mlflow_server import Server
from tuning import record
from tuning.__main__ import main

ROOT = Path(__file__).resolve().parent.parent.parent
# So many trials are stopped early. Each piece starts seven processes of Ray's; twenty of them were fine, too.
STOPPED = int(os.environ.get("STOPPED_TRIALS", "4"))
RATES = [f"{rate}e-3" for rate in range(1, STOPPED // 2 + 2)]
SMOKE = ["--preset", "smoke", "--batch-size", "12", "--workers", "1", "--threads", "1"]


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    server.wait()
    yield server
    server.kill()


def untouched(store: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}


@pytest.mark.alone
def test_a_sweep_that_is_killed_goes_on_stops_most_trials_early_and_ends_in_a_comparison_on_fresh_seeds(
    ray_session: None,
    mlflow: Server,
    tmp_path: Path,
    make_store: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    import ray
    from mlflow import MlflowClient

    store = make_store(tmp_path / "store", train=60, val=30, test=30)
    sweep = tmp_path / "runs" / "sweep"
    space = ["--alignment-weights", "0", "0.5", "--projection-dims", "4", "--axis", f"lr={','.join(RATES)}"]
    search = [
        "--epochs",
        "2",
        "--scheduler",
        "asha",
        "--reduction-factor",
        str(len(RATES)),
        "--fresh-seeds",
        "1",
    ]
    places = ["--store", str(store), "--sweep", str(sweep), "--tracking-uri", mlflow.uri]
    final = ["--test-split", "test", "--register-as", "smallest", "--checkpoint-steps", "2"]
    command = ["tune", *places, *SMOKE, *space, *search, *final, "--concurrent", "4"]

    # Killed as soon as two trials have ended; the next start finds them, and computes no epoch again.
    with open(tmp_path / "driver.log", "wb") as log:
        driver = subprocess.Popen(
            [sys.executable, "-m", "tuning", *command],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
        )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and driver.poll() is None:
        done = (
            [trial for trial in record.read(str(sweep))["trials"] if trial["epochs"]]
            if (sweep / "sweep.json").exists()
            else []
        )
        if len(done) >= 2:
            assert record.read(str(sweep))["state"] == "running"
            break
        time.sleep(0.3)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    killed = record.read(str(sweep))
    assert killed["state"] == "interrupted", (tmp_path / "driver.log").read_text()[-3000:]
    first = {trial["name"]: trial["history"] for trial in killed["trials"] if trial["epochs"]}
    assert main(["report", str(sweep)]) == 0 and "Interrupted" in capsys.readouterr().out

    kept, free = untouched(store), ray.available_resources()["CPU"]
    assert (store / "embeddings" / "test" / "train" / "pca.safetensors") in kept or [
        path for path in kept if path.name == "pca.safetensors"
    ], "fitted by the first start, before any trial"
    assert main(command) == 0
    told = capsys.readouterr()
    assert "best model, of test_resnet" in told.out
    assert untouched(store) == kept, "nothing that a store holds is computed again"
    deadline = time.monotonic() + 20
    while (now := ray.available_resources()["CPU"]) != free and time.monotonic() < deadline:
        time.sleep(0.2)
    assert now == free, "what trials had is free again"

    content = record.read(str(sweep))
    assert content["state"] == "complete" and content["rungs"] == [1, 2]
    assert Counter((t["stage"], t["arm"], t["status"]) for t in content["trials"]) == {
        ("search", "baseline", "stopped"): STOPPED // 2,
        ("search", "method", "stopped"): STOPPED // 2,
        ("search", "baseline", "complete"): 1,
        ("search", "method", "complete"): 1,
        ("final", "baseline", "complete"): 1,
        ("final", "method", "complete"): 1,
    }
    by_name = {trial["name"]: trial for trial in content["trials"]}
    for name, history in first.items():
        assert by_name[name]["history"][: len(history)] == history
    for arm in ("baseline", "method"):
        ends = {
            t["name"]: t["history"][0]["top1"]
            for t in content["trials"]
            if t["arm"] == arm and t["seed"] == 0
        }
        (whole,) = (
            t for t in content["trials"] if (t["arm"], t["seed"], t["status"]) == (arm, 0, "complete")
        )
        assert ends[whole["name"]] == max(ends.values())
        finals = [t for t in content["trials"] if (t["stage"], t["arm"]) == ("final", arm)]
        assert {t["seed"] for t in finals} == {1} and {t["configuration"] for t in finals} == {
            whole["configuration"]
        }
        assert all(t["test"]["split"] == "test" and len(t["test"]["right"]) == 30 for t in finals)
        assert all(
            t["test"]["top1"] == pytest.approx(100 * t["test"]["right"].count("1") / 30) for t in finals
        )
    assert all(trial["config"]["commit"] and trial["config"]["variants"] for trial in content["trials"])

    client = MlflowClient(tracking_uri=mlflow.uri)
    parent = client.get_run(content["parent_run"])
    assert json.loads(parent.data.tags["space"])["lr"] == ",".join(str(float(rate)) for rate in RATES)
    assert parent.data.tags["store"] == str(store)
    experiment = client.get_experiment_by_name("gpt4image")
    nested = client.search_runs(
        [experiment.experiment_id], f"tags.mlflow.parentRunId = '{content['parent_run']}'"
    )
    tracked = {run.info.run_name: run for run in nested}
    assert tracked.keys() == by_name.keys()
    for name, trial in by_name.items():
        assert tracked[name].data.metrics["top1"] == pytest.approx(trial["history"][-1]["top1"]), name
        assert (tracked[name].info.status == "FINISHED") == (trial["status"] == "complete")
    (version,) = client.search_model_versions("name = 'smallest'")
    assert version.run_id == content["parent_run"]
    timm.create_model(f"local-dir:{content['exported']}", pretrained=True)
    # MLflow's address may hold a password; Tune's own files know nothing of it.
    files = [path for path in (sweep / "tune").rglob("*") if path.is_file()]
    assert len(files) > STOPPED and not [path for path in files if mlflow.uri.encode() in path.read_bytes()]

    # The page, as a browser has it, says what MLflow says.
    page = tmp_path / "report.html"
    assert main(["report", str(sweep), "--html", str(page), "--pictures", "2"]) == 0
    read = Page(browser(tmp_path)(page, "--dump-dom").stdout).of("trial")
    shown = {trial["trial"]: float(trial["metric"]) for trial in read}
    assert shown.keys() == by_name.keys()
    assert all(
        shown[name] == pytest.approx(run.data.metrics["top1"], abs=0.01) for name, run in tracked.items()
    )

    # The same again finds all done; best.json trains the winner anew, bit for bit.
    before = {path: path.stat().st_mtime_ns for path in sweep.glob("test_resnet*/**/*") if path.is_file()}
    assert main(command) == 0
    assert "chance), 2 done before" in capsys.readouterr().err
    after = {path: path.stat().st_mtime_ns for path in sweep.glob("test_resnet*/**/*") if path.is_file()}
    assert after == before
    from training.__main__ import main as training

    anew = tmp_path / "anew"
    again = ["train", "--config", str(sweep / "best.json"), "--run", str(anew), "--tracking-uri", "none"]
    assert training([*again, "--until-epoch", "1"]) == 0
    (epoch,) = map(json.loads, (anew / "metrics.jsonl").read_text().splitlines())
    winner = by_name[content["best"]["trial"]]["history"][0]
    measured = ("loss", "cross_entropy", "top1", "top5", "train_top1", "step", "lr")
    assert {name: epoch[name] for name in measured if name in epoch} == {
        name: winner[name] for name in measured if name in winner
    }


@pytest.mark.alone
def test_trials_that_crash_are_tried_again_then_marked_and_after_some_no_more_are_begun(
    ray_session: None, tmp_path: Path, make_store: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store(tmp_path / "store", train=24, val=9)
    sweep = tmp_path / "sweep"
    space = ["--alignment-weights", "0", "--axis", "lr=1e-3,2e-3,3e-3", "--fresh-seeds", "0"]
    command = ["tune", "--store", str(store), "--sweep", str(sweep), *SMOKE, *space, "--tracking-uri", "none"]
    # A folder in the place of a file that a start reads, of two trials.
    for rate in ("0.001", "0.002"):
        (sweep / f"test_resnet-baseline-lr{rate}-s0" / "stopped.json").mkdir(parents=True)
    assert main([*command, "--max-failed-trials", "1", "--no-export"]) == 1
    told = capsys.readouterr()
    content = record.read(str(sweep))
    assert [trial["status"] for trial in content["trials"]] == ["failed", "waiting", "waiting"]
    assert content["state"] == "too many failures"
    assert (
        "Failed: test_resnet-baseline-lr0.001-s0" in told.err
        and "crashed twice" in content["trials"][0]["failure"]
    )


@pytest.mark.alone
def test_a_sweep_on_an_object_store_with_a_trial_that_diverges_exports_the_best_of_the_others(
    ray_session: None,
    bucket: str,
    tmp_path: Path,
    make_store: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The store's path is relative to the working directory, which trials have another one of."""
    make_store(tmp_path / "store", train=24, val=9)
    monkeypatch.chdir(tmp_path)
    sweep = f"{bucket}/runs/diverging"
    command = [
        "tune",
        "--store",
        "store",
        "--preset",
        "smoke",
        "--batch-size",
        "12",
        "--workers",
        "1",
        "--tracking-uri",
        "none",
        "--alignment-weights",
        "0",
        "1e39",
        "--projection-dims",
        "4",
        "--sweep",
        sweep,
        "--concurrent",
        "2",
        "--fresh-seeds",
        "0",
    ]
    assert main(command) == 1
    told = capsys.readouterr()
    assert f"best model, of test_resnet-baseline-s0: {sweep}/best" in told.out
    assert told.err.count("diverged: step 1") == 1, "and was not tried again"
    assert "Diverged: test_resnet-w1e+39-d4-s0" in told.err
    assert main(command) == 1
    again = capsys.readouterr()
    assert (
        "2 trials, 2 done before" in again.err
        and "test_resnet-w1e+39-d4-s0 diverged: step 1: the loss" in again.out
    )
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
