"""Training that starts from a model of the hub or of a folder: pinned, from safetensors alone, and needed for
the start only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import nn

from tests.runs import fitted
from training import preparation, run_folder
from training.__main__ import main
from training.config import ExportConfig, TrainConfig
from training.engine import build, checkpoint
from training.evaluation import outputs
from training.export import export
from training.models import backbones
from training.models.settings import short_name
from training.models.weights import architecture_of
from training.objectives import align
from training.settings import flat

COMMIT, LATER = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"


def saved(folder: Path, name: str = "test_resnet", **arguments: Any) -> nn.Module:
    """A model with weights of its own and a normalisation that no other has, as timm writes it."""
    torch.manual_seed(5)
    model: nn.Module = timm.create_model(name, num_classes=7, **arguments)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    data: dict[str, Any] = {
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "crop_pct": 0.5,
        "interpolation": "bilinear",
    }
    save_for_hf(model, str(folder), safe_serialization=True, model_args=arguments or None, data_config=data)
    return model


def settings(store: Path | str, backbone: str, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "image_size": 32,
        "epochs": 2,
        "batch_size": 12,
        "projection_dim": 4,
        "threads": 1,
    }
    return TrainConfig.of(store=str(store), backbone=backbone, **values | changes)


def same_but_for_the_classifier(model: nn.Module, other: nn.Module) -> None:
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        if not name.startswith(("fc.", "head.")):
            assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("test_resnet", {}, 32),
        ("test_vit", {"img_size": 48, "patch_size": 8}, 48),
        ("test_convnext", {"patch_size": 2}, 32),
    ],
)
def test_a_run_starts_from_the_weights_and_the_normalisation_of_a_folder(
    tmp_path: Path, name: str, arguments: dict[str, Any], size: int
) -> None:
    model = saved(tmp_path / "mine", name, **arguments)
    config = backbones.resolved(settings("s", f"local-dir:{tmp_path / 'mine'}", image_size=size))
    assert config.model.pretrained and architecture_of(config) == name
    task = align.build_task(config, 3, 4)
    same_but_for_the_classifier(task.backbone, model)
    norm = build.make_norm(task.backbone, torch.device("cpu"))
    torch.testing.assert_close(norm.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    assert (
        build.data_config(task.backbone)["crop_pct"] == 0.5
        and build.data_config(task.backbone)["interpolation"] == "bilinear"
    )


def test_a_transformer_is_taken_to_another_size(tmp_path: Path) -> None:
    """timm resamples positions; the exported arguments are those of the new size."""
    saved(tmp_path / "mine", "test_vit", img_size=48, patch_size=8)
    config = backbones.resolved(settings("s", f"local-dir:{tmp_path / 'mine'}", image_size=32))
    task = align.build_task(config, 3, 4)
    assert task.backbone(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    arguments = backbones.model_args(config.model.backbone, 32, 0, config.model.architecture)
    assert arguments["img_size"] == 32 and arguments["patch_size"] == 8


def test_after_its_start_a_run_needs_the_folder_no_more(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    """It resumes, is evaluated and is exported as if the folder were still there."""
    saved(tmp_path / "mine")
    store = make_store(tmp_path / "store", train=30, val=12)
    config = backbones.resolved(settings(store, f"local-dir:{tmp_path / 'mine'}"))
    straight = fitted(config, tmp_path / "straight")
    shutil.rmtree(tmp_path / "mine")
    assert backbones.resolved(config.but(architecture="", pretrained=False), flat(config)) == config
    resumed = fitted(config, tmp_path / "resumed", straight / "epoch-1")
    expected, found = (load_file(folder / "epoch-2" / "model.safetensors") for folder in (straight, resumed))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert main(["evaluate", str(straight), "--json"]) == 0
    export.export(ExportConfig(run=str(straight), to=str(tmp_path / "model")))
    model = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[f"backbone.{name}"]), name
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["architecture"] == "test_resnet" and written["pretrained_cfg"]["mean"] == [0.1, 0.2, 0.3]
    card = (tmp_path / "model" / "README.md").read_text()
    assert (
        "# test_resnet, 3 classes" in card
        and "| backbone | local-dir:mine (files-" in card
        and str(tmp_path) not in card
    )


@pytest.mark.parametrize("small_stem", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_export_of_ours_is_where_the_next_run_starts(
    tmp_path: Path, make_store: Callable[..., Path], small_stem: bool
) -> None:
    store = make_store(tmp_path / "store", train=24, val=9)
    first = settings(store, "resnet18" if small_stem else "test_resnet", epochs=1, small_stem=small_stem)
    export.export(ExportConfig(run=str(fitted(first, tmp_path / "first")), to=str(tmp_path / "model")))
    config = backbones.resolved(settings(store, f"local-dir:{tmp_path / 'model'}", small_stem=small_stem))
    task, weights = (
        align.build_task(config, 5, 4),
        load_file(tmp_path / "first" / "epoch-1" / "model.safetensors"),
    )
    for name, value in task.backbone.state_dict().items():
        assert name.startswith("fc.") or torch.equal(value, weights[f"backbone.{name}"]), name
    again = outputs.load(config, str(tmp_path / "first" / "epoch-1"), 3)
    assert again.task.backbone(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_a_small_stem_that_is_not_told_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = backbones.build("resnet18", num_classes=3, image_size=32, small_stem=True)
    save_for_hf(model, str(tmp_path / "mine"), safe_serialization=True)
    with pytest.raises(
        ValueError, match=r"weights do not fit .*conv1\.weight.*give --patch-size and --small-stem"
    ):
        backbones.resolved(settings("s", f"local-dir:{tmp_path / 'mine'}"))


def test_files_that_changed_before_the_first_checkpoint_are_refused(tmp_path: Path) -> None:
    """A run that was killed so early must not begin anew with other weights; a finished step makes the folder
    needless."""
    model = saved(tmp_path / "mine")
    config = backbones.resolved(settings("s", f"local-dir:{tmp_path / 'mine'}"))
    nn.init.zeros_(model.get_classifier().weight)  # type: ignore[operator]
    save_for_hf(model, str(tmp_path / "mine"), safe_serialization=True)
    with pytest.raises(ValueError, match="its files on this node differ"):
        align.build_task(config, 3, 4)
    align.build_task(config.but(pretrained=False), 3, 4)


def test_what_is_no_model_of_timms_in_safetensors_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved(tmp_path / "mine")
    refused = tmp_path / "refused"

    def told() -> str:
        with pytest.raises(ValueError) as error:
            backbones.resolved(settings("s", f"local-dir:{refused}"))
        return str(error.value)

    assert "no such folder" in told()
    refused.mkdir()
    shutil.copy(tmp_path / "mine" / "config.json", refused)
    torch.save(model.state_dict(), refused / "pytorch_model.bin")
    assert "no pickles" in told()
    shutil.copy(tmp_path / "mine" / "model.safetensors", refused)
    (refused / "config.json").write_text('{"model_type": "vit", "hidden_size": 64}')
    assert "describes no model of timm" in told() and "`gpt4image export`" in told()
    (refused / "config.json").write_text('{"architecture": "resnet_of_mine", "pretrained_cfg": {}}')
    assert "describes no model of timm" in told()
    with pytest.raises(ValueError, match="not found on the hub"):
        backbones.resolved(settings("s", "hf-hub:acme/nothing"))
    assert main(["train", "--store", str(tmp_path), "--backbone", f"local-dir:{tmp_path / 'nothing'}"]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with acme/tiny in it; without a network it is all there is."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _cache_manager

    root = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(_cache_manager, "HF_HUB_CACHE", str(root))
    repository = root / "models--acme--tiny"
    saved(repository / "snapshots" / COMMIT)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return repository


def test_a_model_of_the_hub_is_pinned_to_its_commit(hub: Path) -> None:
    config = backbones.resolved(settings("s", "hf-hub:acme/tiny"))
    assert config.model.backbone == f"hf-hub:acme/tiny@{COMMIT}" and architecture_of(config) == "test_resnet"
    task = align.build_task(config, 3, 4)
    same_but_for_the_classifier(
        task.backbone, timm.create_model(f"local-dir:{hub / 'snapshots' / COMMIT}", pretrained=True)
    )
    # The model moves on; a run that was begun keeps what it was begun with, whichever way the same model is
    # named.
    saved(hub / "snapshots" / LATER, "test_convnext")
    (hub / "refs" / "main").write_text(LATER)
    for name in ("acme/tiny", "acme/tiny@main", f"acme/tiny@{COMMIT}"):
        assert backbones.resolved(settings("s", f"hf-hub:{name}"), flat(config)) == config
    assert backbones.resolved(settings("s", "hf-hub:acme/tiny")).model.backbone.endswith(LATER)
    other = backbones.resolved(settings("s", f"hf-hub:acme/tiny@{LATER}"), flat(config))
    assert other.model.backbone.endswith(LATER), "another commit is another run"


def test_a_model_of_the_hub_without_safetensors_is_refused(hub: Path) -> None:
    weights = hub / "snapshots" / COMMIT / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(ValueError, match=r"has no weights as \*\.safetensors"):
        backbones.resolved(settings("s", "hf-hub:acme/tiny"))


def test_names_of_runs_have_no_slashes_and_stay_apart() -> None:
    assert short_name("resnet50.a1_in1k") == "resnet50.a1_in1k"
    names = [short_name(f"local-dir:{folder}") for folder in ("/a/best", "/b/best", "/a/my model/")]
    assert len(set(names)) == 3 and names[0].startswith("best-") and names[2].startswith("my_model-")
    assert short_name(f"hf-hub:timm/resnet50.a1_in1k@{COMMIT}").startswith("resnet50.a1_in1k-")
    folder = preparation.default_run(settings("s", "local-dir:/a/best"))
    assert folder.startswith(f"runs/{names[0]}-w0.3-d4-s0-") and folder.count("/") == 1


@pytest.mark.alone
def test_train_records_what_it_started_from_and_goes_on_without_it(
    tmp_path: Path, make_store: Callable[..., Path], ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved(tmp_path / "mine")
    store = make_store(tmp_path / "store", train=24, val=9)
    command = [
        "train",
        "--store",
        str(store),
        "--preset",
        "smoke",
        "--projection-dim",
        "4",
        "--batch-size",
        "12",
        "--workers",
    ]
    command += ["1", "--tracking-uri", "none", "--lr", "1e-9", "--min-lr", "0", "--weight-decay", "0"]
    command += ["--backbone", f"local-dir:{tmp_path / 'mine'}", "--run", str(tmp_path / "run")]
    assert main(command) == 0
    trained = outputs.load(
        run_folder.read(str(tmp_path / "run")), checkpoint.find(str(tmp_path / "run")), 3
    ).task.backbone
    for (name, value), start in zip(trained.named_parameters(), model.parameters(), strict=True):
        assert name.startswith("fc.") or torch.allclose(value, start, atol=1e-6), name
    shutil.rmtree(tmp_path / "mine")
    assert main(command) == 0 and "complete; nothing to do" in capsys.readouterr().err


def test_pre_trained_weights_that_are_not_to_be_had_end_a_run_before_it_begins(
    tmp_path: Path, make_store: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    store = str(make_store(tmp_path / "store"))
    command = [
        "train",
        "--store",
        store,
        "--preset",
        "smoke",
        "--batch-size",
        "12",
        "--pretrained",
        "--run",
        str(tmp_path / "r"),
    ]
    assert main([*command, "--backbone", "resnet18", "--alignment-weight", "0"]) == 2
    assert "pretrained: the weights of resnet18 (timm/resnet18" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
