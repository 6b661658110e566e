"""A sweep's folder: what may be given again, what is exported, who may work in it. Trials are trained here,
without Ray."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import timm
import torch
from pyarrow import fs

from pipeline.store import locations, lock
from training import presets
from training.config import TrainConfig
from training.engine import checkpoint, loop
from training.objectives.settings.align import AlignGrid
from training.settings import flat
from training.tracking.journal import Journal, State
from tuning import checks, record, space
from tuning import config as tuning_config
from tuning.__main__ import main, parse_tune
from tuning.config import TuneConfig
from tuning.driver import Driver


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, make_store: Callable[..., Path]) -> Path:
    return make_store(tmp_path_factory.mktemp("sweeps") / "store", train=40, val=20)


@pytest.fixture(scope="module")
def weights(store: Path) -> Path:
    """The checkpoint of one epoch of a baseline."""
    (trial,) = trials_of(parse_tune(command(store, "sweep", "0")[1:]), "/sweep")
    taken: list[checkpoint.Snapshot] = []
    loop.fit(trial, torch.device("cpu"), 0, None, lambda metrics, take: taken.append(take()))
    taken[-1].write(str(store.parent / "checkpoint"))
    return store.parent / "checkpoint"


def trials_of(config: TuneConfig, sweep: str) -> list[TrainConfig]:
    """Every training of a grid."""
    return [
        space.settings(config, space.Configuration(0, arm, values), seed, sweep)
        for arm in space.arms(config)
        for values in arm.grid()
        for seed in config.seeds
    ]


def command(store: Path, sweep: object, *seeds: str) -> list[str]:
    """`tune` of baselines with these seeds."""
    flags = [
        "--preset",
        "smoke",
        "--batch-size",
        "20",
        "--threads",
        "1",
        "--tracking-uri",
        "none",
        "--alignment-weights",
        "0",
    ]
    return ["tune", "--store", str(store), "--sweep", str(sweep), *flags, "--seeds", *seeds]


def begun(command: list[str], weights: Path, sweep: Path, **ends: float | str) -> None:
    """Makes trials' folders as `train` leaves them: `s0=51.0` is a result, `s1="step 3: ..."` a
    divergence."""
    for trial in trials_of(parse_tune(command[1:]), str(sweep)):
        end = ends.get(trial.run.rpartition("-")[2])
        if end is None:
            continue
        run = Path(trial.run)
        shutil.copytree(weights, run / "checkpoint")
        (run / "config.json").write_text(json.dumps(flat(trial) | {"workers": 7}))
        last = {"epoch": 1, "top1": end, "top5": 90.0, "images_per_s": 9.0}
        result = {
            "run": trial.run,
            "run_id": "",
            "epochs": 1,
            "last": last,
            "best_epoch": 1,
            "best_top1": end,
            "history": [last],
        }
        file, content = (
            ("failure.json", {"message": end}) if isinstance(end, str) else ("result.json", result)
        )
        (run / file).write_text(json.dumps(content))


def content_of(sweep: Path) -> dict[str, Any]:
    return record.read(str(sweep))


def unknown_then(sweep: Path, *names: str) -> None:
    """Makes trials' records those of a release that did not know some settings."""
    for file in sweep.glob("*/config.json"):
        content = json.loads(file.read_text())
        file.write_text(json.dumps({n: v for n, v in content.items() if n not in names}))


def test_a_sweep_that_goes_on_sends_what_a_kill_kept_from_mlflow(
    store: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each trial, until the server takes nothing; what has arrived is left alone."""
    sweep = tmp_path / "sweep"
    again = [*command(store, sweep, "0", "1", "2"), "--no-export"]
    begun(again, weights, sweep, s0=51.0, s1=52.0, s2=53.0)
    assert main(again) == 0
    spools = [sweep / f"test_resnet-baseline-s{seed}" / "tracking" for seed in range(3)]
    for spool in spools[1:]:
        Journal(str(spool)).append({"kind": "points", "t": 0, "step": 1, "values": {"top1": 1.0}})
    arrived = Journal(str(spools[1]))
    arrived.save(State(run_id="r", points=arrived.size, files=arrived.size))
    asked: list[str] = []
    monkeypatch.setattr("training.tracking.send", lambda spool, uri, wait_s: asked.append(spool) or False)
    config = parse_tune([*again[1:], "--tracking-uri", "http://127.0.0.1:9"])
    driver = Driver(config, str(sweep), "", {})
    known = record.read(str(sweep))["trials"]
    driver._send_rest(known)
    assert asked == [str(spools[2])]
    Journal(str(spools[0])).append({"kind": "points", "t": 0, "step": 1, "values": {"top1": 1.0}})
    asked.clear()
    driver._send_rest(known)
    assert len(asked) == 1, "a server that takes nothing is asked once"


def test_a_better_trial_of_a_grown_grid_is_exported_anew_and_finished_trials_stay(
    store: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep"
    begun(command(store, sweep, "0", "1"), weights, sweep, s0=51.0, s1=63.0)
    assert main(command(store, sweep, "0")) == 0
    assert content_of(sweep)["exported_from"]["trial"] == "test_resnet-baseline-s0"
    assert main(command(store, sweep, "0", "1")) == 0
    assert "best model, of test_resnet-baseline-s1" in capsys.readouterr().out
    exported = sweep / "best" / "model.safetensors"
    before = exported.stat().st_mtime_ns
    assert main(command(store, sweep, "0")) == 0, "a smaller grid is served by what is there"
    content = content_of(sweep)
    assert [trial["result"]["last"]["top1"] for trial in content["trials"]] == [51.0, 63.0]
    assert (
        content["exported_from"]["trial"] == "test_resnet-baseline-s1"
        and exported.stat().st_mtime_ns == before
    )
    timm.create_model(f"local-dir:{content['exported']}", pretrained=True)


def test_what_an_earlier_grid_had_and_never_began_is_not_to_come_any_more(
    store: Path, weights: Path, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    again = command(store, sweep, "0")
    begun(again, weights, sweep, s0=51.0)
    assert main([*again, "--no-export"]) == 0
    content = json.loads((sweep / "sweep.json").read_text())
    never = content["trials"][0] | {"name": "test_resnet-baseline-s7", "seed": 7}
    (sweep / "sweep.json").write_text(json.dumps(content | {"trials": [*content["trials"], never]}))
    assert main([*again, "--no-export"]) == 0
    assert [trial["name"] for trial in content_of(sweep)["trials"]] == ["test_resnet-baseline-s0"]


def test_other_settings_are_refused_and_what_is_told_of_a_trial_is_its_own_record(
    store: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep"
    again = command(store, sweep, "0")
    begun(again, weights, sweep, s0=51.0)
    assert main([*again, "--no-export", "--workers", "3"]) == 0, "where it runs may differ"
    assert content_of(sweep)["trials"][0]["config"]["workers"] == 7
    before = (sweep / "sweep.json").read_bytes()
    assert main([*again, "--lr", "0.5", "--epochs", "9"]) == 2
    told = capsys.readouterr().err
    assert (
        "pass another --sweep" in told
        and "epochs: 1 then, 9 now" in told
        and "lr: 0.001 then, 0.5 now" in told
    )
    assert (sweep / "sweep.json").read_bytes() == before


def test_trials_of_an_earlier_grid_are_not_compared_with_ones_of_other_settings(
    store: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep"
    first = command(store, sweep, "0")
    begun(first, weights, sweep, s0=51.0)
    assert main([*first, "--no-export"]) == 0
    assert main([*command(store, sweep, "1"), "--no-export", "--epochs", "9"]) == 2
    told = capsys.readouterr().err
    assert (
        "its trial test_resnet-baseline-s0 was begun with other settings" in told
        and "epochs: 1 then, 9 now" in told
    )


def test_a_sweep_of_an_earlier_recipe_asks_for_what_that_said(
    store: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its trials would go on as they began, and new ones be trained otherwise beside them."""
    sweep = tmp_path / "sweep"
    again = [*command(store, sweep, "0"), "--no-export"]
    begun(again, weights, sweep, s0=51.0)
    assert main(again) == 0
    unknown_then(sweep, "min_epoch_steps")
    steps = ["--min-epoch-steps", "100"]
    with patch.dict(presets.PRESETS["smoke"], {"min_epoch_steps": 100}):
        assert main(again) == 2
        told = capsys.readouterr().err
        assert "min_epoch_steps: 0 then, 100 now" in told
        assert told.rstrip().endswith("the sweep goes on with --min-epoch-steps 0")
        assert main([*again, "--min-epoch-steps", "0"]) == 0
    assert main([*again, *steps]) == 2


def test_a_sweep_goes_on_over_settings_that_its_release_did_not_know(
    store: Path, weights: Path, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    again = [*command(store, sweep, "0"), "--no-export"]
    begun(again, weights, sweep, s0=51.0)
    assert main(again) == 0
    unknown_then(sweep, "class_target", "ema_warmup", "similar_labels")
    assert main(again) == 0, "no average, no warm-up of it"
    config = parse_tune([*again[1:], "--axis", "similar_labels=0.1,0.2"])
    checks.check_earlier(config, str(sweep))


def test_a_trial_is_named_by_its_folder_whatever_its_backbone_is_pinned_to() -> None:

    from training.config import TrainConfig
    from tuning import space
    from tuning.config import TuneConfig

    train = TrainConfig.of(store="s")
    config = TuneConfig(
        train=train,
        backbones=("local-dir:models/own",),
        grid=AlignGrid(alignment_weights=(0.1,), projection_dims=(0,)),
    )
    _, trial = trials_of(config, "s3://bucket/sweep?region=eu-west-1")
    pinned = trial.but(backbone="local-dir:/home/somebody/models/own")
    assert space.trial_name(pinned) == space.trial_name(trial)
    assert trial.run == f"s3://bucket/sweep/{space.trial_name(trial)}?region=eu-west-1"


def test_the_width_that_a_baseline_was_begun_with_decides_nothing(
    store: Path, weights: Path, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    again = command(store, sweep, "0")
    begun(again, weights, sweep, s0=51.0)
    file = sweep / "test_resnet-baseline-s0" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"projection_dim": 128}))
    assert main([*again, "--no-export", "--projection-dims", "4", "8"]) == 0


def test_a_trial_that_diverged_is_told_not_run_again_and_the_best_of_the_others_exported(
    store: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep"
    again = command(store, sweep, "0", "1")
    begun(again, weights, sweep, s0=51.0, s1="step 3: the loss is no finite number.")
    assert main(again) == 1
    told = capsys.readouterr()
    assert "best model, of test_resnet-baseline-s0" in told.out
    assert "test_resnet-baseline-s1 diverged: step 3" in told.out
    assert "1 of 2 trials failed" in told.err and f"delete {sweep}/test_resnet-baseline-s1" in told.err
    assert content_of(sweep)["exported"] == str(sweep / "best")
    assert main(["report", str(sweep), "--html", str(tmp_path / "report.html")]) == 0
    assert "diverged: step 3" in (tmp_path / "report.html").read_text()


def test_a_second_sweep_in_the_same_folder_is_refused(
    store: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep"
    again = command(store, sweep, "0")
    begun(again, weights, sweep, s0=51.0)
    with lock.held(str(sweep), "sweep"):
        assert main(again) == 2
    assert f"sweep={sweep}: process " in capsys.readouterr().err
    assert main([*again, "--no-export"]) == 0


def test_a_sweep_that_starts_from_a_run_goes_on(store: Path, weights: Path, tmp_path: Path) -> None:
    """Its trials have on record which weights those were; nobody gives them again."""
    sweep = tmp_path / "sweep"
    again = [*command(store, sweep, "0"), "--init-from", str(tmp_path / "before")]
    begun(again, weights, sweep, s0=51.0)
    for file in sweep.glob("*/config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"init_state": "0123456789abcdef"}))
    assert main([*again, "--no-export"]) == 0
    assert content_of(sweep)["state"] == "complete"


def test_a_trial_that_was_killed_before_its_result_is_ended_and_no_early_stop(
    store: Path, weights: Path, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    again = command(store, sweep, "0", "1")
    begun(again, weights, sweep, s0=51.0, s1=52.0)
    (killed,) = sweep.glob("*-s1")
    (killed / "result.json").unlink()
    config = parse_tune(again[1:])
    epochs = [{"epoch": n + 1, "top1": 50.0 + n} for n in range(config.train.optim.epochs)]
    (killed / "metrics.jsonl").write_text("".join(f"{json.dumps(epoch)}\n" for epoch in epochs))
    left = Driver(config, str(sweep), "", {}).begin()
    assert left is not None and left["name"] == killed.name


def test_every_trial_computes_on_what_the_cluster_gives_it_the_first_one_too(
    store: Path, weights: Path, tmp_path: Path
) -> None:
    """Other threads round otherwise: seeds would differ by more than the method."""
    sweep = tmp_path / "sweep"
    again = [*command(store, sweep, "0", "1", "2"), "--threads", "0"]
    begun(again, weights, sweep, s0=51.0)
    given: list[tuple[int, float]] = []

    def run(driver: Driver) -> None:
        driver.place(3, 0.5)
        while (piece := driver.begin()) is not None:
            gpus = driver.record.trials[piece["name"]]["gpus"]
            given.append((json.loads(piece["settings"])["threads"], gpus))

    Driver(parse_tune(again[1:]), str(sweep), "", {}).work(run)
    assert given == [(3, 0.5), (3, 0.5)], "the finished one is not given"


def test_a_sweep_on_an_object_store_is_served_from_there(
    store: Path,
    weights: Path,
    tmp_path: Path,
    bucket: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sweep, there = tmp_path / "sweep", f"{bucket}/sweeps/first"
    begun(command(store, sweep, "0"), weights, sweep, s0=51.0)
    filesystem, path = locations.resolve(there)
    fs.copy_files(str(sweep), path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=filesystem)
    monkeypatch.chdir(tmp_path)
    assert main(command(store, there, "0")) == 0
    assert f"{there}/best (copy it here, then timm" in capsys.readouterr().out
    (tmp_path / "best").mkdir()
    fs.copy_files(f"{path}/best", str(tmp_path / "best"), source_filesystem=filesystem)
    timm.create_model(f"local-dir:{tmp_path / 'best'}", pretrained=True)
    assert main(["report", there]) == 0
    assert "test_resnet" in capsys.readouterr().out
    assert {each.name for each in tmp_path.iterdir()} == {"sweep", "best"}, (
        "nothing is written into a folder named s3:"
    )


def test_every_setting_of_a_sweep_says_whether_it_may_differ_when_the_sweep_goes_on() -> None:
    """What decides the results of trials that are there already; axes, which may have other values; and the
    rest, which changes no result."""
    axes = {"backbones", "seeds", "grid", "axis"}
    which = {"search", "trials", "search_seed", "hours", "gpu_hours", "fresh_seeds", "max_failed_trials"}
    how_long = {"scheduler", "reduction_factor", "grace_epochs"}
    free = {"sweep", "concurrent", "trials_per_gpu", "export", "test_split"}
    assert {"train"} | axes | which | how_long | free == {field.name for field in fields(TuneConfig)}


def test_what_the_sweep_sets_is_no_flag_of_it_and_is_refused_with_the_flag_that_is_meant(
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {
        "run": "x",
        "backbone": "b",
        "alignment_weight": 9,
        "projection_dim": 9,
        "seed": 9,
        "log_artifacts": "all",
    }
    shared = tuning_config.shared("align").of(store="s", **given)
    grid = AlignGrid(alignment_weights=(1,), projection_dims=(3,))
    _, trial = trials_of(TuneConfig(train=shared, grid=grid, backbones=("a",), seeds=(2,)), "/sweep")
    assert {name for name, value in flat(trial).items() if value != flat(shared)[name]} == set(given)
    refused = [f"--{name.replace('_', '-')}" for name in (*given, "parent_run")]
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    assert set(capsys.readouterr().out.split()).isdisjoint(refused)
    for flag in refused:
        for wrong in ([flag, "1"], [f"{flag}=1"], [flag.replace("-", "_").replace("__", "--", 1), "1"]):
            assert main(["tune", "--store", "s", *wrong]) == 2
            assert f"{flag}: a sweep sets this" in capsys.readouterr().err


def test_a_trial_is_a_plain_training_run() -> None:
    (trial,) = trials_of(
        TuneConfig(
            train=TrainConfig(store="s"),
            grid=AlignGrid(alignment_weights=(0,), projection_dims=(3, 4)),
            seeds=(0,),
        ),
        "/sweep",
    )
    assert type(trial) is TrainConfig and trial == trial.but(projection_dim=0)


def test_trials_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"backbones=.*each once"):
        TuneConfig(train=TrainConfig(store="s"), backbones=("a", "a"))
    near = TuneConfig(
        train=TrainConfig(store="s"), grid=AlignGrid(alignment_weights=(0.3, 0.3000001), projection_dims=(8,))
    )
    assert [space.trial_name(trial) for trial in trials_of(near, "/sweep")] == [
        "resnet18-baseline-s0",
        "resnet18-w0.3-d8-s0",
        "resnet18-w0.3000001-d8-s0",
    ]


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


def test_a_folder_that_is_no_sweep_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "gpt4image tune" in capsys.readouterr().err
