"""A method of one file outside the project: trained, resumed, in parts, swept and exported, without a change
elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from training import preparation, run_folder
from training.__main__ import main, parse_train
from training.config import ExportConfig, TrainConfig
from training.engine import checkpoint, loop
from training.export.export import export
from training.objectives.settings import BUILT_IN, module_of
from training.settings import flat
from tuning import plots, report
from tuning.significance import paired

NAME = "tests.toy_objective"


def settings(store: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "store": str(store),
        "objective": NAME,
        "backbone": "test_resnet",
        "image_size": 32,
        "epochs": 3,
        "batch_size": 12,
        "warmup_epochs": 0,
        "threads": 1,
        "ema": 0.5,
    }
    return TrainConfig.of(**values | changes)


def trained(config: TrainConfig, folder: Path, resume_from: str | None = None) -> list[dict[str, float]]:
    def report(metrics: Any, take: Callable[[], checkpoint.Snapshot]) -> None:
        snapshot = take()
        snapshot.write(str(folder / f"checkpoint_{snapshot.content['step']}"))

    (folder / "config.json").write_text(json.dumps(flat(config)))
    return loop.fit(config, torch.device("cpu"), 0, resume_from, report)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_learns_and_goes_on_bit_for_bit(
    tmp_path: Path, make_store: Callable[..., Path], accumulate: int
) -> None:
    config = settings(make_store(tmp_path / "store"), accumulate=accumulate)
    for name in ("straight", "resumed"):
        (tmp_path / name).mkdir()
    straight = trained(config, tmp_path / "straight")
    assert {"loss", "squared_error", "colour_error", "ema_colour_error", "epoch"} <= straight[-1].keys()
    assert not {"top1", "train_top1", "cross_entropy"} & straight[-1].keys(), "nothing of another method"
    assert straight[-1]["colour_error"] < straight[0]["colour_error"]
    first = str(tmp_path / "straight" / "checkpoint_2")
    assert trained(config, tmp_path / "resumed", first)[-1]["colour_error"] == straight[-1]["colour_error"]
    ends = [
        load_file(tmp_path / name / "checkpoint_6" / "model.safetensors") for name in ("straight", "resumed")
    ]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert float(ends[0]["steps"]) == 6


def test_its_metric_says_what_is_best_and_its_backbone_is_exported(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    config = settings(make_store(tmp_path / "store"))
    (tmp_path / "run").mkdir()
    history = trained(config, tmp_path / "run")
    best = min(history, key=lambda epoch: epoch["ema_colour_error"])
    assert checkpoint.find(str(tmp_path / "run"), "best").endswith(f"checkpoint_{int(best['step'])}")
    found = export(ExportConfig(run=str(tmp_path / "run"), to=str(tmp_path / "model")))
    model = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    weights = load_file(tmp_path / "run" / "checkpoint_6" / "ema.safetensors")
    assert found["weights"] == "ema" and all(
        torch.equal(v, weights[f"backbone.{k}"]) for k, v in model.state_dict().items()
    )


def test_what_is_told_of_built_in_methods_is_theirs() -> None:
    for name, told in BUILT_IN.items():
        assert module_of(name).metric == told.metric and module_of(name).settings is told.settings
    with pytest.raises(
        ValueError, match=r"objective='nothing\.there': No module named 'nothing'; known are align"
    ):
        module_of("nothing.there")


def test_its_settings_are_flags_and_those_of_other_methods_are_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--store", "s", "--objective", NAME, "--preset", "paper-resnet50"]
    config = parse_train([*flags, "--noise", "0.5"])
    assert (config.method.noise, config.model.backbone, config.optim.lr) == (0.5, "resnet50", 0.4)
    assert "alignment_weight" not in config.deciding() and config.deciding()["noise"] == 0.5
    with pytest.raises(SystemExit):
        main(["train", *flags, "--noise", "-1"])
    assert "noise=-1.0: must be 0 or more." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_train([*flags, "--alignment-weight", "1"])
    with pytest.raises(SystemExit):
        parse_train([*flags, "--help"])
    told = capsys.readouterr()
    assert "--noise" in told.out and "--temperature" not in told.out and "--alignment-weight" in told.err


def test_sweeps_compare_it_in_its_own_units_and_less_is_a_gain() -> None:
    def trial(noise: float, seed: int, error: float) -> dict[str, Any]:
        last = {"colour_error": error, "images_per_s": 9.0, "epoch": 1.0}
        config = {"objective": NAME, "backbone": "r", "noise": noise, "seed": seed}
        result = {"last": last, "best_top1": error, "best_epoch": 1, "run_id": "", "history": [last]}
        return {"name": "t", "config": config, "result": result}

    trials = [trial(0, seed, 0.004 + seed / 10000) for seed in range(3)]
    trials += [trial(0.5, seed, 0.001 + seed / 9000) for seed in range(3)]
    (compared,) = paired(trials)
    assert compared.baseline == [0.004, 0.0041, 0.0042] and compared.mean < 0
    assert report.sentence(compared).startswith("r, noise 0.5: -0.0030 of error over the baseline, 95 %")
    assert report.sentence(compared).endswith("3 seeds: a gain")
    table = report.table({"trials": trials})
    assert table.index("0.0010") < table.index("0.0040") and "nan" not in table and "noise" in table
    assert "error" in plots.curves_plot(trials) and plots.heat_maps(trials) == []


@pytest.mark.slow
def test_it_is_trained_by_several_workers_and_swept(
    ray_session: None, tmp_path: Path, make_store: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from tuning.__main__ import main

    store, sweep = make_store(tmp_path / "store", train=36), tmp_path / "sweep"
    command = [
        "tune",
        "--store",
        str(store),
        "--preset",
        "smoke",
        "--objective",
        NAME,
        "--batch-size",
        "12",
        "--workers",
        "2",
        "--tracking-uri",
        "none",
        "--noises",
        "0.01",
        "0.5",
        "--sweep",
        str(sweep),
        "--concurrent",
        "1",
    ]
    assert main(command) == 0
    told = capsys.readouterr()
    assert "error" in told.out and "toy-0.5-s0" in told.err and "noise" in told.out
    content = json.loads((sweep / "sweep.json").read_text())
    scores = {
        trial["name"]: run_folder.headline(trial["result"]["last"], "colour_error")
        for trial in content["trials"]
    }
    assert len(scores) == 2 and content["exported_from"]["trial"] == min(
        scores, key=lambda name: scores[name]
    )
    assert preparation.prepare(settings(store, run=str(sweep / "new"), workers=1))[1] == {}
