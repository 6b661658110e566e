"""`train`, `evaluate` and `export` through Ray Train with two workers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from safetensors.torch import load_file

from cluster import cli
from pipeline.errors import SettingsError
from pipeline.store import Store
from training import run_folder
from training.__main__ import main
from training.config import EvaluateConfig
from training.engine import checkpoint, loop
from training.evaluation.evaluate import evaluate
from training.evaluation.remote import evaluate_remote
from training.objectives import align
from training.tracking import commit

pytestmark = pytest.mark.alone
SMALL = ["--preset", "smoke", "--projection-dim", "4", "--batch-size", "12", "--workers", "2"]


@pytest.fixture(scope="module")
def trained(
    ray_session: None, tmp_path_factory: pytest.TempPathFactory, make_store: Callable[..., Path]
) -> Path:
    """Two epochs of an aligned run by two workers; the folder of the run."""
    root = tmp_path_factory.mktemp("trained")
    make_store(root / "store", train=60, val=30)
    run = root / "runs" / "aligned"
    assert main(["train", "--store", str(root / "store"), *SMALL, "--epochs", "2", "--run", str(run)]) == 0
    return run


def test_a_run_leaves_settings_metrics_and_checkpoints_without_pickles(trained: Path) -> None:
    result = json.loads((trained / "result.json").read_text())
    assert result["epochs"] == 2
    assert {"loss", "cross_entropy", "alignment", "top1", "top5", "images_per_s", "lr", "seconds"} <= result[
        "last"
    ].keys()
    assert len((trained / "metrics.jsonl").read_text().splitlines()) == 2
    assert run_folder.read(str(trained)).place.workers == 2
    folder = Path(checkpoint.find(str(trained)))
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    }


def test_two_workers_end_where_one_process_ends(trained: Path, tmp_path: Path) -> None:
    """Same order, same augmentation, exact loss: what differs is batch norm, whose statistics are each
    worker's own."""
    config = run_folder.read(str(trained))
    history = loop.fit(config, torch.device("cpu"), 0, None, lambda metrics, take: None)
    two = json.loads((trained / "result.json").read_text())["history"]
    assert history[0]["alignment"] == pytest.approx(two[0]["alignment"], rel=0.05)
    assert history[0]["cross_entropy"] == pytest.approx(two[0]["cross_entropy"], rel=0.15)


def test_a_run_on_an_object_store_with_decoding_actors_ends_with_the_same_weights(
    trained: Path, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where pictures are decoded and where a run is kept changes nothing; the same command there finds it
    complete."""
    command = [
        "train",
        "--store",
        run_folder.read(str(trained)).store,
        *SMALL,
        "--epochs",
        "2",
        "--run",
        f"{bucket}/runs/there",
    ]
    command += ["--loader", "actors", "--loader-workers", "1", "--tracking-uri", "none"]
    assert main(command) == 0
    weights = []
    for run in (str(trained), f"{bucket}/runs/there"):
        with checkpoint.opened(run) as folder:
            weights.append(load_file(Path(folder) / "model.safetensors"))
    here, there = weights
    assert here.keys() == there.keys()
    for name, value in here.items():
        assert torch.equal(value, there[name]), name
    assert main(command) == 0 and "complete; nothing to do" in capsys.readouterr().err
    assert main(["evaluate", f"{bucket}/runs/there", "--json"]) == 0
    last = json.loads((trained / "result.json").read_text())["last"]
    assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(last["top1"], abs=1e-3)


def test_a_training_in_pieces_from_anothers_record_ends_with_the_weights_of_the_other(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its epochs measure the same to the last bit, and it says how it goes on."""
    from mlflow import MlflowClient

    from training import run as training_run

    run = tmp_path / "pieces"
    command = ["train", "--config", str(trained / "config.json"), "--run", str(run)]
    whole = json.loads((trained / "result.json").read_text())
    timed = {"seconds", "images_per_s"}

    def measured(history: list[dict[str, float]]) -> list[dict[str, float]]:
        return [{name: m[name] for name in m.keys() - timed} for m in history]

    def status() -> str:
        recorded = json.loads((run / "mlflow.json").read_text())
        client = MlflowClient(tracking_uri=recorded["tracking_uri"])
        return str(client.get_run(recorded["run_id"]).info.status)

    assert main([*command, "--until-epoch", "1"]) == 0
    said = capsys.readouterr()
    assert "1 of 2 epochs" in said.out and "the same command with a larger " in said.err
    assert not (run / "result.json").exists() and status() == "KILLED"
    assert measured(epochs_of(run)) == measured(whole["history"][:1])
    assert checkpoint.read_state(checkpoint.find(str(run)))["epoch"] == 1
    with monkeypatch.context() as patched:  # nothing is started for what is done
        patched.setattr(training_run.session, "start_ray", None)
        again = training_run.train(run_folder.read(str(run)))
    assert (again["complete"], again["epochs"], again["best_epoch"]) == (False, 1, 1)
    assert again["last"] == again["history"][0] == epochs_of(run)[0]
    assert main(command) == 0
    result = json.loads((run / "result.json").read_text())
    assert measured(result["history"]) == measured(whole["history"])
    assert epochs_of(run) == result["history"] and status() == "FINISHED"
    here, there = (load_file(Path(checkpoint.find(str(r))) / "model.safetensors") for r in (trained, run))
    assert all(torch.equal(value, there[name]) for name, value in here.items())


def test_timms_augmentation_runs_in_actors_by_itself(trained: Path, tmp_path: Path) -> None:
    command = [
        "train",
        "--store",
        run_folder.read(str(trained)).store,
        *SMALL,
        "--run",
        str(tmp_path / "run"),
    ]
    assert (
        main(
            [
                *command,
                "--auto-augment",
                "rand-m9-mstd0.5-inc1",
                "--loader-workers",
                "1",
                "--tracking-uri",
                "none",
            ]
        )
        == 0
    )
    assert run_folder.read(str(tmp_path / "run")).place.loader == "actors"


def test_the_same_command_again_finds_the_run_complete(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_folder.read(str(trained))
    command = ["train", "--store", config.store, *SMALL, "--epochs", "2", "--run", str(trained)]
    assert main(command) == 0
    assert "complete; nothing to do" in capsys.readouterr().err
    assert main([*command, "--lr", "0.5"]) == 2
    assert "begun with other settings" in capsys.readouterr().err


def test_mlflow_has_the_parameters_and_the_metrics_of_every_epoch(trained: Path) -> None:
    from mlflow import MlflowClient

    recorded = json.loads((trained / "mlflow.json").read_text())
    client = MlflowClient(tracking_uri=recorded["tracking_uri"])
    run = client.get_run(recorded["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["backbone"] == "test_resnet"
    assert run.data.tags["embeddings"] == "test" and run.data.tags["captions"] == "test"
    assert run_folder.read(str(trained)).method.embeddings == "test"
    written, result = (json.loads((trained / f"{name}.json").read_text()) for name in ("config", "result"))
    assert written["variants"] == {"embeddings": "test", "captions": "test"}
    assert written["commit"] == result["commit"] == run.data.tags.get(commit.TAG, "") == commit.commit()
    # Early releases recorded an empty name; what MLflow was told stands in the run's folder, too.
    early = json.loads((trained / "config.json").read_text()) | {"embeddings": ""}
    assert run_folder.settings(str(trained), early).method.embeddings == "test"
    assert [m.step for m in client.get_metric_history(recorded["run_id"], "top1")] == [1, 2]


def test_evaluate_gives_what_training_measured(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(trained), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    last = json.loads((trained / "result.json").read_text())["last"]
    assert (found["top1"], found["top5"]) == (
        pytest.approx(last["top1"], abs=1e-3),
        pytest.approx(last["top5"], abs=1e-3),
    )
    assert found["images"] == 30 and found["epoch"] == 2


def test_a_task_elsewhere_finds_what_evaluate_finds_and_tells_of_each_picture(
    trained: Path, tmp_path: Path
) -> None:
    settings = EvaluateConfig(run=str(trained), to=str(tmp_path / "judged"))
    here, there = evaluate(EvaluateConfig(run=str(trained))), evaluate_remote(settings, threads=1)
    assert there.summary == here.summary
    assert there.outputs.correct.dtype == np.bool_ and len(there.outputs.correct) == 30
    assert np.array_equal(there.outputs.correct, here.outputs.correct)
    assert 100 * there.outputs.correct.mean() == pytest.approx(there.summary["top1"], abs=1e-3)
    rows = pq.read_table(tmp_path / "judged" / "predictions.parquet")
    assert (rows["label"].to_numpy() == rows["predicted"].to_numpy()).tolist() == (
        there.outputs.correct.tolist()
    ), "in the order of the files"
    with pytest.raises(SettingsError, match="the store has train, val"):
        evaluate_remote(EvaluateConfig(run=str(trained), split="test"), threads=1)
    with pytest.raises(SettingsError, match="threads=9999: no node of the cluster has so many CPUs"):
        evaluate_remote(settings, threads=9999)


def test_export_is_a_plain_timm_model_with_the_same_logits(trained: Path, tmp_path: Path) -> None:
    assert main(["export", str(trained), "--to", str(tmp_path / "model")]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    config = run_folder.read(str(trained))
    classes = Store(config.store).dataset.classes
    task = align.build_task(config, len(classes), 4)
    checkpoint.load(checkpoint.find(str(trained)), task)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), task.eval().backbone(images), rtol=0, atol=0)
    plain = timm.create_model("test_resnet", num_classes=len(classes))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["label_names"] == classes and written["num_classes"] == len(classes)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--backbone", "resnet81"], "did you mean"),
        (["--embeddings", "nope"], "no embeddings variant 'nope'"),
        (["--projection-dim", "4096"], "pass --projection-dim 8 or less"),
        (["--eval-split", "test"], "the store has train, val"),
        (["--batch-size", "1000"], "has 60 usable images"),
        (["--preset", "nope"], "choose one of"),
    ],
)
def test_wrong_settings_end_with_2_before_anything_starts(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], complaint: str
) -> None:
    command = [
        "train",
        "--store",
        run_folder.read(str(trained)).store,
        *SMALL,
        "--run",
        str(tmp_path / "run"),
        *flags,
    ]
    assert main(command) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    tmp_path: Path, make_store: Callable[..., Path], ray_session: None
) -> None:
    """Though Ray's record of the checkpoints is cut, or names one that is gone, and another one is cut."""
    make_store(tmp_path / "store", train=60, val=30)
    run = tmp_path / "run"
    record = run / "checkpoint_manager_snapshot.json"  # Ray's, written a moment after the checkpoint
    command = [
        "train",
        "--store",
        str(tmp_path / "store"),
        *SMALL,
        "--epochs",
        "24",
        "--run",
        str(run),
        "--tracking-uri",
        "none",
    ]
    before = killed_after(2, command, run)
    record.write_text(record.read_text()[:-20])
    shutil.copytree(checkpoint.find(str(run)), run / "checkpoint-cut")
    (run / "checkpoint-cut" / checkpoint.STATE).write_text("{")
    after = killed_after(len(before) + 2, command, run)
    # The kill may have come between an epoch's metrics and its checkpoint: that one is trained again.
    assert after[: len(before) - 1] == before[:-1], "no epoch but the last was trained again"
    named = '"checkpoint_dir_name":"checkpoint_'
    assert named in record.read_text()
    record.write_text(record.read_text().replace(named, named.replace("checkpoint_", "gone_"), 1))
    assert main(command) == 0
    history = epochs_of(run)
    assert [m["epoch"] for m in history] == list(range(1, 25))
    assert history[: len(after) - 1] == after[:-1]


def epochs_of(run: Path) -> list[dict[str, float]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def killed_after(epochs: int, command: list[str], run: Path) -> list[dict[str, float]]:
    """The epochs of a run whose driver, with all that it started, is killed when so many are done, and Ray's
    record of them is written."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    child = subprocess.Popen(
        [sys.executable, "-m", "training", *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    record = run / "checkpoint_manager_snapshot.json"
    recorded = record.read_bytes() if record.exists() else b""
    deadline = time.monotonic() + 240
    while child.poll() is None and time.monotonic() < deadline:
        if len(epochs_of(run)) >= epochs and record.exists() and record.read_bytes() != recorded:
            break
        time.sleep(0.05)
    assert child.poll() is None, "killed while it trains"
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    found = epochs_of(run)
    assert epochs <= len(found) < 24
    return found


def test_a_picture_that_is_gone_ends_a_run_with_its_name_and_the_run_goes_on_when_it_is_back(
    ray_session: None, tmp_path: Path, picture_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """One worker meets it, and the others wait for that one; Ray Train's three further tries would meet it
    again."""
    images = picture_folder({"train/a": 12, "train/b": 12, "val/a": 2, "val/b": 2})
    store, run = str(tmp_path / "store"), str(tmp_path / "run")
    assert cli.main(["ingest", "--images", str(images), "--store", store, "--no-pack"]) == 0
    command = [
        "train",
        "--store",
        store,
        *SMALL,
        "--batch-size",
        "8",
        "--epochs",
        "1",
        "--run",
        run,
        "--alignment-weight",
        "0",
    ]
    os.rename(images / "train/a/005.jpg", tmp_path / "away.jpg")
    assert main([*command, "--tracking-uri", "none"]) == 1
    told = capsys.readouterr().err
    assert (
        "train: picture train/a/005.jpg cannot be read any more" in told
        and "Traceback" not in told.rpartition("train: ")[2]
    )
    assert (tmp_path / "run" / "stopped.json").exists()
    os.rename(tmp_path / "away.jpg", images / "train/a/005.jpg")
    assert main([*command, "--tracking-uri", "none"]) == 0
    assert not (tmp_path / "run" / "stopped.json").exists()
