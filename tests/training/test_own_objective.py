"""A method of one file outside the project: trained, resumed, in parts, swept and exported, without a change
elsewhere."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from pipeline.errors import SettingsError
from tests.tuning import contents
from training import preparation, run_folder
from training.__main__ import main, parse_train
from training.config import ExportConfig, TrainConfig
from training.engine import checkpoint, loop
from training.export.export import export
from training.objectives.protocol import Objective
from training.objectives.registry import BUILT_IN, module_of
from training.settings import MethodSettings, flat
from tuning.cells import cell_of
from tuning.report import landscape, plots, words
from tuning.report.comparison import comparisons
from tuning.report.configurations import configurations
from tuning.report.table import table

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
        values = {"noise": noise} if noise else {}
        made = contents.trial(
            "t",
            [error],
            arm="method" if noise else "baseline",
            configuration=int(noise > 0),
            seed=seed,
            values=values,
            backbone="r",
            objective=NAME,
            metric="colour_error",
        )
        made["config"] |= {"noise": noise}
        return made

    trials = [trial(0, seed, 0.004 + seed / 10000) for seed in range(3)]
    trials += [trial(0.5, seed, 0.001 + seed / 9000) for seed in range(3)]
    content = contents.content(trials, objective=NAME)
    (compared,) = comparisons([content])
    assert compared.befores == (0.004, 0.0041, 0.0042) and compared.mean < 0
    assert words.sentence(compared).startswith("r, noise 0.5: -0.0030 of error over the baseline, 95 %")
    assert words.sentence(compared).endswith(" 3 seeds, p < 0.0001: a gain")
    told = table(content)
    assert told.index("0.0010") < told.index("0.0040") and "nan" not in told and "noise" in told
    found = configurations(content)
    assert "error" in plots.curves_plot(found) and landscape.heat_map(found) == ""


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Makes a module of a method with such settings, and returns its name."""

    def make(settings: Any, name: str = "own_method") -> str:
        module = types.ModuleType(name)
        module.OBJECTIVE = type("Own", (Objective,), {"settings": settings})()  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
        return name

    return make


def settings_with(axes: dict[str, str] | None = None, **values: Any) -> Any:
    kind = dataclasses.make_dataclass(
        "Own",
        [(name, type(value), value) for name, value in values.items()],
        bases=(MethodSettings,),
        frozen=True,
        kw_only=True,
    )
    kind.axes = axes or {}
    return kind


def test_a_required_setting_is_asked_for_and_a_recipe_says_nothing_of_another_methods(
    method: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Distilled(MethodSettings):
        teacher: str
        """Whom it learns from."""
        temperature: float = 4.0
        """Of the teacher's answers."""

        def faults(self) -> list[str]:
            return ["temperature: at least 1."] if self.temperature < 1 else []

    flags = ["--store", "s", "--objective", method(Distilled), "--preset", "paper-deit-b"]
    config = parse_train([*flags, "--teacher", "t"])
    assert (config.method.teacher, config.method.temperature, config.model.drop_path) == ("t", 4.0, 0.1)
    for given in (flags, [*flags, "--teacher", "t", "--temperature", "0.5"], [*flags, "--help"]):
        with pytest.raises(SystemExit):
            parse_train(given)
    told = capsys.readouterr()
    assert "Whom it learns from" in told.out and "--teacher" in told.err and "at least 1" in told.err


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (settings_with(lr=0.5, seed=3), "its settings lr, seed are names of training's own"),
        (
            settings_with({"alpah": "a"}, alpha=1.0),
            "axes, legend or baseline name alpah, which is no setting",
        ),
        (dict, "no subclass of MethodSettings"),
        (
            type("Bare", (MethodSettings,), {"__annotations__": {"alpha": "float"}}),
            "is @dataclass missing on Bare",
        ),
    ],
)
def test_settings_that_cannot_be_flags_are_refused_in_words(
    method: Callable[..., str], kind: Any, said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        TrainConfig.of(store="s", objective=method(kind))


@pytest.mark.parametrize("name", ["./x.py", ".x", "", "no.such.module"])
def test_what_is_no_module_is_refused_in_words(name: str) -> None:
    with pytest.raises(SettingsError, match="objective="):
        TrainConfig.of(store="s", objective=name)


def test_tuples_come_back_from_records_and_what_does_not_is_refused(method: Callable[..., str]) -> None:
    name = method(settings_with(widths=(3, 4), word="a"))
    config = TrainConfig.of(store="/s", run="/r", objective=name, widths=(5, 6))
    recorded = json.loads(json.dumps(run_folder.written(config, "")))
    assert run_folder.resumed(config, recorded) == config
    with pytest.raises(SettingsError, match="which a record can hold"):
        config.but(word=Path("x"))


def test_a_baseline_is_one_whatever_its_axes(method: Callable[..., str]) -> None:
    kind = settings_with({"alpha": "alpha", "beta": "beta"}, alpha=0.0, beta=0.0)
    kind.is_baseline = property(lambda self: self.alpha == 0)
    name = method(kind)

    def trial(alpha: float, beta: float, seed: int, top1: float) -> dict[str, Any]:
        own = {"alpha": alpha, "beta": beta}
        values, arm = (own, "method") if alpha else ({}, "baseline")
        told: dict[str, Any] = {"configuration": int(alpha), "seed": seed, "backbone": "r", "objective": name}
        made = contents.trial("t", [top1], arm=arm, values=values, **told)
        made["config"] |= own
        return made

    trials = [trial(0, 0, 0, 10), trial(0, 0, 1, 11), trial(0, 1, 2, 12)]
    trials += [trial(1, -2, seed, 20 + seed) for seed in range(3)]
    (compared,) = comparisons([contents.content(trials, objective=name)])
    assert compared.befores == (10, 11, 12) and compared.mean == 10
    assert compared.method.words == "alpha 1, beta -2"
    assert compared.verdict == "no difference shown", "three equal differences: by signs one in four"
    assert {cell_of(each["config"]) for each in trials[:3]} == {cell_of(trials[0]["config"])}
    assert TrainConfig.of(store="s", objective=name, alpha=2.0).method.title() == "alpha2.0-beta0.0"
    odd = method(settings_with({"word": "w"}, word="a"), "odd_method")
    assert TrainConfig.of(store="s", objective=odd, word="../a b").method.title() == "w.._a_b"


@pytest.mark.alone
def test_it_is_trained_by_several_workers_and_swept(
    ray_session: None, tmp_path: Path, make_store: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from tuning import record
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
    content = record.read(str(sweep))
    scores = {
        trial["name"]: run_folder.headline(trial["result"]["last"], "colour_error")
        for trial in content["trials"]
    }
    assert len(scores) == 2 and content["exported_from"]["trial"] == min(
        scores, key=lambda name: scores[name]
    )
    assert preparation.prepare(settings(store, run=str(sweep / "new"), workers=1))[1] == {}
