"""The grid, the statistics, the table and the page; one small sweep through Ray Tune."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm

from training.config import TrainConfig
from training.objectives.settings import AlignGrid
from tuning import page, report, space
from tuning.__main__ import main, parse_tune
from tuning.config import TuneConfig
from tuning.significance import paired


def trial(backbone: str, weight: float, dim: int, seed: int, top1: float) -> dict[str, Any]:
    config = {
        "backbone": backbone,
        "alignment_weight": weight,
        "projection_dim": dim,
        "seed": seed,
        "embeddings": "",
    }
    last = {"epoch": 1, "top1": top1, "top5": 100.0, "images_per_s": 50.0}
    result = {
        "last": last,
        "best_top1": top1 + 1,
        "best_epoch": 1,
        "history": [last],
        "run_id": "0123456789abcdef",
    }
    return {"name": "t", "config": config, "result": result}


def test_the_baseline_is_trained_once_whatever_the_dimensions() -> None:
    config = TuneConfig(
        train=TrainConfig(store="s"),
        grid=AlignGrid(alignment_weights=(0.0, 0.3, 1.0), projection_dims=(64, 128)),
        backbones=("a", "b"),
        seeds=(0, 1),
    )
    found = space.trials(config, "/sweep")
    assert len(found) == 2 * 2 * (1 + 2 * 2)
    assert len({t.run for t in found}) == len(found)
    assert {space.trial_name(t) for t in found if t.method.is_baseline} == {
        f"{b}-baseline-s{s}" for b in "ab" for s in (0, 1)
    }


def test_the_command_line_takes_the_recipes_flags_and_the_grids() -> None:
    settings = parse_tune(
        [
            "--store",
            "s",
            "--preset",
            "scenes",
            "--epochs",
            "3",
            "--alignment-weights",
            "0",
            "0.5",
            "--projection-dims",
            "8",
            "--seeds",
            "1",
            "2",
        ]
    )
    assert (settings.train.optim.epochs, settings.train.data.flip) == (3, 0.0)
    assert (settings.grid.alignment_weights, settings.seeds) == ((0.0, 0.5), (1, 2))


def test_the_interval_is_students_on_paired_differences() -> None:
    trials = [trial("r", 0, 9, seed, base) for seed, base in enumerate((50.0, 52.0, 54.0))]
    trials += [trial("r", 0.3, 64, seed, aligned) for seed, aligned in enumerate((51.0, 54.0, 57.0))]
    (found,) = paired(trials)
    # Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t(0.975, 2) = 4.303.
    assert found.mean == pytest.approx(2)
    assert (found.low, found.high) == (pytest.approx(2 - 2.484, abs=1e-3), pytest.approx(2 + 2.484, abs=1e-3))
    assert found.verdict == "no difference shown"
    assert "no difference shown" in report.sentence(found)


def test_a_gain_a_loss_and_too_few_seeds_are_named_so() -> None:
    base = [trial("r", 0, 9, seed, 50.0) for seed in range(3)]
    gain = [trial("r", 0.3, 64, seed, 55.0 + seed / 10) for seed in range(3)]
    loss = [trial("r", 1.0, 64, seed, 45.0 - seed / 10) for seed in range(3)]
    assert [found.verdict for found in paired(base + gain + loss)] == ["a gain", "a loss"]
    (single,) = paired([base[0], gain[0]])
    assert single.verdict == "too few seeds for an interval"
    assert "too few for an interval" in report.sentence(single)
    assert paired(gain) == [], "without a baseline there is nothing to compare with"


def test_the_page_is_self_contained_and_escapes_what_models_wrote(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    import pyarrow as pa

    from pipeline.store import CAPTIONS, Store

    store = Store(str(make_store(tmp_path / "store")))
    rows = store.read_shard("captions", "test", 0).to_pylist()
    rows[0]["caption"] = "<script>alert('caption')</script>"
    store.write_shard("captions", "test", 0, pa.Table.from_pylist(rows, schema=CAPTIONS), seconds=0)
    trials = [
        trial("resnet18", w, d, s, 50 + w + s)
        for w in (0, 0.3, 1.0)
        for d in (64, 0)
        for s in (1, 2, 3)
        if w or d
    ]
    content = {
        "sweep": str(tmp_path / "sweep"),
        "store": store.uri,
        "tracking_uri": "sqlite:///x.db",
        "parent_run": "parent",
        "exported": "",
        "trials": trials,
    }
    page.write(str(tmp_path / "report.html"), [content], pictures=6)
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text and "&lt;script&gt;" in text
    fetched = re.findall(r"""(?:src|href)=["'](?!data:|#)([^"']+)""", text)
    assert set(fetched) <= {"http://127.0.0.1:5000"}, fetched
    assert "@import" not in text and text.count("data:image/jpeg;base64") == 6
    assert text.count("<svg") >= 4, "caption lengths, curves, heat map, pairs"
    assert "95 % interval" in text or "95 % [" in text
    assert "mlflow ui --backend-store-uri sqlite:///x.db" in text


def test_a_folder_that_is_no_sweep_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "gpt4image tune" in capsys.readouterr().err


@pytest.mark.alone
def test_a_sweep_trains_tracks_exports_resumes_and_reports(
    ray_session: None, tmp_path: Path, make_store: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    make_store(tmp_path / "store", train=60, val=30)
    sweep = tmp_path / "runs" / "sweep"
    command = [
        "tune",
        "--store",
        str(tmp_path / "store"),
        "--preset",
        "smoke",
        "--batch-size",
        "12",
        "--workers",
        "1",
        "--alignment-weights",
        "0",
        "0.5",
        "--projection-dims",
        "4",
        "--sweep",
        str(sweep),
        "--concurrent",
        "2",
        "--checkpoint-steps",
        "2",
    ]
    assert main(command) == 0
    told = capsys.readouterr()
    assert "best model" in told.out and "on one seed" in told.out
    content = json.loads((sweep / "sweep.json").read_text())
    assert [t["name"] for t in content["trials"]] == ["test_resnet-baseline-s0", "test_resnet-w0.5-d4-s0"]
    assert all(t["result"]["epochs"] == 1 for t in content["trials"])
    timm.create_model(f"local-dir:{content['exported']}", pretrained=True)

    client = MlflowClient(tracking_uri=content["tracking_uri"])
    experiment = client.get_experiment_by_name("gpt4image")
    nested = client.search_runs(
        [experiment.experiment_id], f"tags.mlflow.parentRunId = '{content['parent_run']}'"
    )
    assert {run.info.run_id for run in nested} == {t["result"]["run_id"] for t in content["trials"]}
    assert all("top1" in run.data.metrics and run.info.status == "FINISHED" for run in nested)
    assert "model.safetensors" in {
        Path(item.path).name for item in client.list_artifacts(content["parent_run"], "best")
    }

    # MLflow's address may hold a password; where it stands it is masked, and Tune's own files know nothing of
    # it.
    files = [path for path in (sweep / "tune").rglob("*") if path.is_file()]
    assert len(files) > 4 and not [path for path in files if b"sqlite" in path.read_bytes()]

    before = {path: path.stat().st_mtime_ns for path in sweep.glob("test_resnet*/**/*") if path.is_file()}
    assert main(command) == 0
    assert "2 trials, 2 done before" in capsys.readouterr().err
    assert {
        path: path.stat().st_mtime_ns for path in sweep.glob("test_resnet*/**/*") if path.is_file()
    } == before

    assert main(["report", str(sweep), "--html", str(tmp_path / "report.html")]) == 0
    assert "test_resnet" in capsys.readouterr().out
    assert (tmp_path / "report.html").stat().st_size > 10_000


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
    ]
    assert main(command) == 1
    told = capsys.readouterr()
    assert f"best model, of test_resnet-baseline-s0: {sweep}/best" in told.out
    assert told.err.count("diverged  ") == 1, "and was not tried again"
    assert "Diverged: test_resnet-w1e+39-d4-s0" in told.err
    assert main(command) == 1
    again = capsys.readouterr()
    assert (
        "2 trials, 2 done before" in again.err
        and "test_resnet-w1e+39-d4-s0 diverged: step 1: the loss" in again.out
    )
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
