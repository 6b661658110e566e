"""What a run's config.json promises: which settings a resumption may change, and how records of other
releases are read."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import typing
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.errors import OtherSettingsError
from pipeline.store import IMAGES, Store, embeddings_table
from training import preparation, run, run_folder
from training.__main__ import main, parse_train
from training.config import TrainConfig
from training.data.texts import targets as text_targets
from training.engine import checkpoint, loop
from training.presets import FORMER, preset
from training.settings import Deciding, Free, flat
from training.tracking import commit
from training.tracking.journal import Journal

BASE = TrainConfig.of(
    store="/store",
    run="/run",
    embeddings="first",
    init_state="0123456789abcdef",
    alignment_weight=0.5,
    batch_size=64,
    workers=1,
    ema=0.5,
)
GROUPS = TrainConfig.groups("align")
HINTS = {
    name: hint
    for kind in (TrainConfig, *GROUPS.values())
    for name, hint in typing.get_type_hints(kind).items()
}
PLAIN = TrainConfig.defaults("align")
DECIDING = sorted(BASE.deciding())
FREE = sorted(flat(BASE).keys() - BASE.deciding().keys())
OLD_RUN = Path(__file__).resolve().parent.parent / "golden" / "run-55880e0"


def another(name: str) -> Any:
    """A valid value that is not the one in BASE."""
    value = flat(BASE)[name]
    if typing.get_origin(HINTS[name]) is typing.Literal:
        return next(option for option in typing.get_args(HINTS[name]) if option != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return f"{value}x"
    if name == "betas":
        return (0.9, 0.95)
    return value + 1 if isinstance(value, int) else value / 2 or 0.25


def recorded(config: TrainConfig) -> run_folder.Recorded:
    """What config.json holds of it."""
    contents = Store(config.store).contents if Store.exists(config.store) else ""
    content: run_folder.Recorded = json.loads(json.dumps(run_folder.written(config, contents)))
    return content


def test_every_setting_is_declared_deciding_or_free() -> None:
    """By the type of its group; what stands in no group decides, but where the run lies."""
    for name, kind in GROUPS.items():
        assert issubclass(kind, Deciding) != issubclass(kind, Free), name
    own = {field.name for field in fields(TrainConfig)} - GROUPS.keys()
    assert own == {"store", "run", "preset", "objective", "seed"}, "a new setting belongs into a group"
    free = {name for kind in GROUPS.values() if issubclass(kind, Free) for name in flat(kind())}
    assert set(FREE) == free | {"run"} and {"lr", "precision", "crop_scale", "head"} <= set(DECIDING)


def test_no_two_groups_have_a_setting_of_one_name() -> None:
    names = [field.name for kind in (TrainConfig, *GROUPS.values()) for field in fields(kind)]
    assert len(names) == len(set(names))
    assert TrainConfig.of(**flat(BASE)) == BASE and BASE.but(lr=1.0).optim.lr == 1.0
    with pytest.raises(TypeError, match="warp_factor"):
        TrainConfig.of(store="s", warp_factor=9)


@pytest.mark.parametrize("name", [name for name in DECIDING if name != "objective"])
def test_a_run_does_not_go_on_with_a_deciding_setting_changed(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"(?s)begun with other settings; pass another --run.*\n  {name}: .* then, .* now"
    ):
        run_folder.resumed(BASE.but(**{name: another(name)}), recorded(BASE))


def test_a_run_does_not_go_on_with_another_method() -> None:
    """Whose settings are others."""
    other = TrainConfig.of(store="/store", run="/run", objective="tests.toy_objective")
    with pytest.raises(OtherSettingsError, match=r"objective: 'align' then, 'tests\.toy_objective' now"):
        run_folder.resumed(other, recorded(BASE))
    with pytest.raises(OtherSettingsError, match=r"objective: 'tests\.toy_objective' then, 'align' now"):
        run_folder.resumed(BASE, recorded(other))


@pytest.mark.parametrize("name", FREE)
def test_a_run_goes_on_with_a_free_setting_changed(name: str) -> None:
    now = BASE.but(**{name: another(name)})
    assert run_folder.resumed(now, recorded(BASE)) == now


@pytest.mark.parametrize("name", sorted(name for name, value in PLAIN.items() if value is not MISSING))
def test_a_record_without_a_setting_is_of_a_run_that_had_its_default(name: str) -> None:
    """As of a release before the setting: the run goes on with it as it was, and not with it switched on."""
    content = recorded(BASE.but(embeddings=""))
    before = run_folder._BEFORE.get(name, PLAIN[name])
    del content[name]
    config = BASE.but(**{"embeddings": "", name: PLAIN[name]})
    assert flat(run_folder.settings("/run", content))[name] == before
    assert flat(run_folder.resumed(config, content))[name] == before


def test_a_record_of_a_later_release_is_refused_with_what_is_unknown() -> None:
    with pytest.raises(
        ValueError, match=r"begun by another release.*settings unknown here: warp_factor. Use the release"
    ):
        run_folder.resumed(BASE, recorded(BASE) | {"warp_factor": 9})
    with pytest.raises(ValueError, match=r"version 99, this one reads up to \d"):
        run_folder.settings("/run", recorded(BASE) | {"version": 99})


def test_a_record_holds_no_secrets_and_its_version() -> None:
    content = run_folder.written(BASE.but(tracking_uri="https://me:secret@host"), "")
    assert content["version"] == run_folder.VERSION and "secret" not in json.dumps(content)


def test_a_new_run_takes_its_settings_from_a_file_and_flags_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over the recipe that the file names; help shows what it holds."""
    monkeypatch.chdir(tmp_path)
    values = {"preset": "smoke", "store": "pictures", "lr": 1, "epochs": 7, "run": "theirs", "commit": "c"}
    Path("mine.json").write_text(json.dumps(values))
    found = parse_train(["--config", "mine.json", "--epochs", "9"])
    assert found == TrainConfig.of(**preset("smoke") | {"store": "pictures", "lr": 1.0, "epochs": 9}), (
        "all but where the run lies"
    )
    other = parse_train(["--config=mine.json", "--preset", "scenes", "--store", "s3://b/s"])
    assert (other.preset, other.store, other.optim.epochs, other.data.flip) == ("scenes", "s3://b/s", 7, 0.0)
    with pytest.raises(SystemExit, match="0"):
        parse_train(["--config", "mine.json", "--help"])
    told = capsys.readouterr().out
    assert "default: pictures" in told and "default: 7)" in told and "default: 1.0)" in told


def test_a_runs_record_is_a_file_of_settings(tmp_path: Path) -> None:
    """All but the run and its parent; addresses with passwords are not on record; what the release that wrote
    it did not know has the value of what that release did, and not the recipe's."""
    config = TrainConfig.of(
        **preset("scenes") | {"store": "/store", "run": "/run", "parent_run": "p", "embeddings": "first"}
    )
    file = tmp_path / "config.json"
    file.write_text(json.dumps(recorded(config)))
    assert parse_train(["--config", str(file)]) == config.but(run="", parent_run="")
    content = recorded(config.but(tracking_uri="https://me:secret@host"))
    del content["epoch_repeats"], content["ema_warmup"]
    file.write_text(json.dumps(content))
    found = parse_train(["--config", str(file), "--run", "new"])
    assert (found.run, found.track.tracking_uri, found.data.epoch_repeats) == ("new", "", 1)
    assert not found.optim.ema_warmup and found.optim.epochs == 30


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"epoch": 3}, "epoch: is no setting; did you mean epochs?"),
        (
            {"epochs": 3.5, "lr": "fast"},
            "(?s)epochs=3.5: must be a whole number.*lr=.fast.: must be a number",
        ),
        ({"pretrained": 1}, "pretrained=1: must be true or false"),
        ({"clip_mode": "all"}, 'clip_mode="all": must be one of "norm", "value", "agc"'),
        ({"preset": "nope"}, "preset='nope': unknown"),
        ({"mixup": -1}, "mixup=-1.0: must be 0 or more"),
        ({"version": 99}, "version=99: this release reads up to"),
        ([], "must hold an object"),
    ],
)
def test_what_is_wrong_in_a_file_of_settings_is_told_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, said: str
) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(content))
    try:
        code = main(["train", "--config", str(file), "--store", "s"])
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        code = stop.code
    told = capsys.readouterr().err
    assert code == 2 and f"config={file}" in told and re.search(said, told)


def test_a_file_of_settings_that_cannot_be_read_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("epochs: 3")
    for name, said in (("none.json", "no such file"), ("mine.yaml", "is no JSON"), ("", "name a file")):
        assert main(["train", "--config", f"{tmp_path}/{name}".rstrip("/"), "--store", "s"]) == 2
        assert said in capsys.readouterr().err


def test_a_record_tells_the_code_and_the_variants_that_a_run_was_begun_with() -> None:
    """Which decide nothing: a run goes on with another commit, and keeps what it was begun with."""
    then = run_folder.written(BASE, "", commit="c0ffee", variants={"embeddings": "first", "captions": "of"})
    assert (then["commit"], then["variants"]) == ("c0ffee", {"embeddings": "first", "captions": "of"})
    assert run_folder.resumed(BASE, then) == BASE == run_folder.settings("/run", then)
    again = run_folder.written(BASE, "", then, commit="decade", variants={"embeddings": "other"})
    assert again == then
    early = {name: value for name, value in then.items() if name not in ("commit", "variants")}
    now = run_folder.written(BASE, "", early, commit="decade", variants=then["variants"])
    assert (now["commit"], now["variants"]) == ("", then["variants"]), "of which code is not known"


def test_the_commit_is_that_of_the_working_tree_and_says_when_files_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def found() -> str:
        commit.commit_of.cache_clear()
        return commit.commit_of(str(tmp_path))

    code = tmp_path / "pipeline" / "__main__.py"
    code.parent.mkdir()
    code.write_text("1\n")
    assert found() == "", "no repository"
    git("init", "-q")
    assert found() == "", "git does not know the files"
    git("add", ".")
    git("commit", "-qm", "one")
    git("tag", "-am", "v1", "v1")
    (tmp_path / "notes").write_text("not git's")
    assert found() == git("rev-parse", "HEAD") and len(found()) == 40
    code.write_text("2\n")
    assert found() == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setenv(commit.VARIABLE, "c0ffee")
    assert commit.commit() == "c0ffee", "as submit says it"
    commit.commit_of.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert commit.commit_of(str(tmp_path)) == "", "no git"


@pytest.fixture
def two_embeddings(tmp_path: Path, make_store: Callable[..., Path]) -> Path:
    """A store that got a second embedding variant."""
    store = make_store(tmp_path / "store")
    shutil.copytree(store / "embeddings" / "test", store / "embeddings" / "another")
    return store


def begun(config: TrainConfig, **changes: Any) -> Path:
    """The folder of a run with nothing but its record."""
    folder = Path(config.run)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(recorded(config) | changes))
    return folder


def test_a_run_records_which_embeddings_it_found_and_goes_on_with_them(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    store = make_store(tmp_path / "store")
    flags = [
        "--store",
        str(store),
        "--run",
        str(tmp_path / "run"),
        "--preset",
        "smoke",
        "--batch-size",
        "12",
        "--projection-dim",
        "4",
    ]
    config, variants = preparation.prepare(parse_train(flags))
    assert variants == {"embeddings": "test", "captions": "test"}
    assert config.method.embeddings == "test"
    begun(config)
    shutil.copytree(store / "embeddings" / "test", store / "embeddings" / "another")
    again, _ = preparation.prepare(parse_train(flags))
    assert again == config
    with pytest.raises(ValueError, match="embeddings: 'test' then, 'another' now"):
        preparation.prepare(parse_train([*flags, "--embeddings", "another"]))


@pytest.mark.parametrize("recipe", ["small-64", "small-64-vit", "small-32-convnext"])
def test_a_run_begun_before_an_epoch_had_its_steps_goes_on_without(tmp_path: Path, recipe: str) -> None:
    flags = ["--store", str(tmp_path), "--run", str(tmp_path / "run"), "--alignment-weight", "0"]
    now = parse_train(["--preset", recipe, *flags])
    assert now.data.min_epoch_steps > 0
    then = now.but(min_epoch_steps=0)
    record = run_folder.written(then, "contents")
    with pytest.raises(ValueError, match="min_epoch_steps: 0 then, "):
        run_folder.resumed(now, record)  # begun with this release
    early = {n: v for n, v in record.items() if n != "min_epoch_steps"} | {"recipes": 2}
    assert run_folder.resumed(now, early) == then
    assert run_folder.resumed(now, run_folder.written(then, "contents", early)) == then, "and once more"
    with pytest.raises(ValueError, match="min_epoch_steps: 0 then, 7 now"):
        run_folder.resumed(now.but(min_epoch_steps=7), early)


def test_a_run_begun_with_a_recipe_that_says_something_else_now_goes_on_with_it(tmp_path: Path) -> None:
    now = parse_train(["--store", str(tmp_path), "--run", str(tmp_path / "run"), "--alignment-weight", "0"])
    then = now.but(**FORMER["small-64"][0][1], min_epoch_steps=0).but(**FORMER["small-64"][2][1])
    now, then = now.but(alignment_weight=0.0), then.but(alignment_weight=0.0)

    def early(config: TrainConfig) -> dict[str, Any]:
        content = run_folder.written(config, "contents")
        return {name: value for name, value in content.items() if name not in ("epoch_repeats", "recipes")}

    assert run_folder.resumed(now, early(then)) == then != now
    with pytest.raises(ValueError, match=r"lr: 0\.001 then, 0\.002 now"):
        run_folder.resumed(now.but(lr=2e-3), early(then))
    with pytest.raises(ValueError, match="epochs: 41 then, 50 now"):
        run_folder.resumed(now, early(then.but(epochs=41)))
    with pytest.raises(ValueError, match=r"lr: 0\.001 then, 0\.0015 now"):  # begun with this release
        run_folder.resumed(now, run_folder.written(then, "contents"))


@pytest.mark.parametrize(
    ("recipe", "change"), [(name, n) for name in sorted(FORMER) for n in range(len(FORMER[name]))]
)
def test_a_run_goes_on_with_each_recipe_that_has_changed(tmp_path: Path, recipe: str, change: int) -> None:
    flags = ["--store", str(tmp_path), "--run", str(tmp_path / "run")]
    now = parse_train(["--preset", recipe, *flags])
    last, former = FORMER[recipe][change]
    then = now
    for until, said in reversed(FORMER[recipe]):  # what was said last before the change, too
        if until >= last:
            then = then.but(**said)
    record = run_folder.written(then, "contents")
    assert run_folder.resumed(now, record | {"recipes": last}) == then != now
    again = run_folder.written(then, "contents", record | {"recipes": last})
    assert run_folder.resumed(now, again) == then, "and once more, after it has gone on"
    with pytest.raises(ValueError, match=f"{next(iter(former))}: "):
        run_folder.resumed(now, record | {"recipes": last + 1})


@pytest.mark.parametrize("objective", ["mae", "clip", "tests.toy_objective"])
def test_a_run_of_another_method_goes_on_after_recipes_have_changed_settings_of_align(
    tmp_path: Path, objective: str
) -> None:
    flags = ["--store", str(tmp_path), "--run", str(tmp_path / "run"), "--objective", objective]
    now = parse_train([*flags, "--preset", "small-64"])
    record = run_folder.written(now, "contents")
    assert run_folder.resumed(now, record | {"recipes": 3}) == now
    with pytest.raises(ValueError, match="lr: "):
        run_folder.resumed(now.but(lr=0.3), record | {"recipes": 3})


@pytest.mark.parametrize("few", [{"shots": 3}, {"class_half": "base"}])
def test_a_run_whose_class_means_were_of_more_pictures_does_not_go_on(
    tmp_path: Path, few: dict[str, Any]
) -> None:
    now = BASE.but(class_shrinkage=0.5, run=str(tmp_path), **few)
    record = run_folder.written(now, "contents")
    assert run_folder.resumed(now, record) == now
    del record["min_epoch_steps"]  # by the release that did so
    with pytest.raises(ValueError, match="means of classes were those of the whole split"):
        run_folder.resumed(now, record)
    for other in ({"class_shrinkage": 0.0}, {"alignment_weight": 0.0}):  # which look at no class's texts
        assert run_folder.resumed(now.but(**other), record | other) == now.but(**other)


def test_an_early_run_finds_its_embeddings_in_what_it_told_mlflow(
    tmp_path: Path, two_embeddings: Path
) -> None:
    config = TrainConfig.of(
        store=str(two_embeddings), run=str(tmp_path / "run"), batch_size=12, projection_dim=4
    )
    folder = begun(config)
    Journal(str(folder / "tracking")).append(
        {"kind": "create", "tags": {"embeddings": "test", "captions": "test"}}
    )
    assert preparation.prepare(config)[0].method.embeddings == "test"
    assert run_folder.read(str(folder)).method.embeddings == "test"


def test_an_early_run_that_told_nobody_is_given_its_embeddings(tmp_path: Path, two_embeddings: Path) -> None:
    config = TrainConfig.of(
        store=str(two_embeddings), run=str(tmp_path / "run"), batch_size=12, projection_dim=4
    )
    begun(config)
    with pytest.raises(ValueError, match=r"one of: another \(of captions test\), test \("):
        preparation.prepare(config)
    assert preparation.prepare(config.but(embeddings="test"))[0].method.embeddings == "test"


def test_paths_are_recorded_whole(
    tmp_path: Path, make_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers have working directories of their own."""
    make_store(tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    config, _ = preparation.prepare(TrainConfig.of(store="store", run="run", batch_size=12, projection_dim=4))
    assert (config.store, config.run) == (str(tmp_path / "store"), str(tmp_path / "run"))


def old_run(tmp_path: Path, make_store: Callable[..., Path], **changes: Any) -> tuple[Path, list[str]]:
    """A copy of the kept run beside its store, and the command that it was begun with."""
    store, folder = make_store(tmp_path / "store"), tmp_path / "run"
    shutil.copytree(OLD_RUN, folder)
    content = json.loads((OLD_RUN / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(content | {"store": str(store), "run": str(folder)} | changes)
    )
    return folder, [
        "--store",
        str(store),
        "--run",
        str(folder),
        "--preset",
        "smoke",
        "--backbone",
        "test_efficientnet",
        "--epochs",
        "40",
        "--batch-size",
        "12",
        "--projection-dim",
        "4",
        "--head",
        "linear",
        "--optimizer",
        "momentum",
        "--workers",
        "1",
        "--tracking-uri",
        "none",
    ]


def test_a_run_that_an_early_release_began_goes_on(
    tmp_path: Path, make_store: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its settings, its checkpoint, and what evaluation makes of it; two more epochs in this process, without
    Ray."""
    folder, flags = old_run(tmp_path, make_store)
    config, _ = preparation.prepare(parse_train(flags))
    latest = checkpoint.find(str(folder))
    before = checkpoint.read_state(latest)["history"]
    history = loop.fit(config.but(epochs=3), torch.device("cpu"), 0, latest, lambda metrics, take: None)
    assert history[:1] == before and [metrics["epoch"] for metrics in history] == [1, 2, 3]
    assert main(["evaluate", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(before[-1]["top1"], abs=1e-3)


def test_an_early_run_is_exported_whatever_the_store_holds_by_now(
    tmp_path: Path, make_store: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = old_run(tmp_path, make_store)
    shutil.copytree(tmp_path / "store" / "embeddings" / "test", tmp_path / "store" / "embeddings" / "another")
    assert main(["export", str(folder), "--to", str(tmp_path / "model")]) == 0
    assert main(["evaluate", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "several: another, test; write the name into" in said and "pass --no-retrieval" in said
    assert main(["evaluate", str(folder), "--no-retrieval"]) == 0


@pytest.mark.alone
def test_the_command_of_an_early_release_ends_its_run(
    tmp_path: Path, make_store: Callable[..., Path], ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 39 epochs of two steps, each waiting for its report.
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.05")
    folder, flags = old_run(tmp_path, make_store)
    first = (folder / "metrics.jsonl").read_text()
    assert main(["train", *flags]) == 0
    assert (folder / "metrics.jsonl").read_text().startswith(first), "the first epoch was not trained again"
    assert json.loads((folder / "result.json").read_text())["epochs"] == 40
    assert set(json.loads((folder / "config.json").read_text())) == {
        "version",
        "recipes",
        "store_contents",
        "commit",
        "variants",
        *flat(BASE),
    }


def test_a_second_driver_of_a_run_is_refused_while_the_first_is_at_work(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    from pipeline.errors import SettingsError
    from pipeline.store import lock

    config = TrainConfig.of(
        store=str(make_store(tmp_path / "store")),
        run=str(tmp_path / "run"),
        alignment_weight=0.0,
        image_size=32,
        backbone="test_resnet",
        batch_size=8,
    )
    with (
        lock.held(config.run, "run"),
        pytest.raises(SettingsError, match=r"process \d+ on .* is at work in it"),
    ):
        run.train(config)
    assert not (tmp_path / "run" / "config.json").exists(), "nothing was written"


def test_a_run_does_not_go_on_with_a_store_that_was_made_anew(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    make_store(tmp_path / "store")
    config, _ = preparation.prepare(
        TrainConfig.of(
            store=str(tmp_path / "store"), run=str(tmp_path / "run"), batch_size=12, projection_dim=4
        )
    )
    begun(config)
    assert preparation.prepare(config)[0] == config
    shutil.rmtree(tmp_path / "store")
    make_store(tmp_path / "store", train=36)
    with pytest.raises(
        OtherSettingsError, match="other pictures, classes, splits or shards now than when the run began"
    ):
        preparation.prepare(config)
    with pytest.raises(OtherSettingsError, match="was begun on another store"):
        run_folder.read(config.run)
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    del content["store_contents"]  # as early releases wrote it
    (tmp_path / "run" / "config.json").write_text(json.dumps(content))
    assert preparation.prepare(config)[0] == config


def test_texts_are_reduced_by_what_the_split_that_is_trained_on_holds(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    store = Store(str(make_store(tmp_path / "store", train=40, val=20)))
    fresh = {
        split: text_targets.load(store, embeddings="test", dim=3, split=split).basis
        for split in ("train", "val")
    }
    assert (
        fresh["train"] is not None
        and fresh["val"] is not None
        and not np.array_equal(fresh["train"], fresh["val"])
    )
    for split in ("val", "train"):
        assert np.array_equal(
            text_targets.load(store, embeddings="test", dim=3, split=split).basis, fresh[split]
        )
    table = store.read_shard("embeddings", "test", 0)
    rows = [row | {"embedding": np.roll(row["embedding"], n)} for n, row in enumerate(table.to_pylist())]
    store.write_shard("embeddings", "test", 0, embeddings_table(rows, 8), seconds=0)
    again = text_targets.load(store, embeddings="test", dim=3, split="train").basis
    assert not np.array_equal(again, fresh["train"]), "vectors that were made anew"
    assert np.array_equal(text_targets.load(store, embeddings="test", dim=3, split="val").basis, fresh["val"])


def test_a_val_split_without_a_usable_picture_is_found_before_training(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    store = Store(str(make_store(tmp_path / "store", val=4)))
    (shard,) = store.split_shards("val")
    rows = [row | {"error": "damaged"} for row in store.read_shard("images", "", shard).to_pylist()]
    store.write_shard("images", "", shard, pa.Table.from_pylist(rows, schema=IMAGES), seconds=0)
    with pytest.raises(ValueError, match="eval_split=val: none of its pictures can be used"):
        preparation.prepare(
            TrainConfig.of(store=store.uri, run=str(tmp_path / "run"), batch_size=12, projection_dim=4)
        )
