"""Runs that start from the backbone of another run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from pipeline.errors import OtherSettingsError, SettingsError
from tests import towers
from tests.runs import fitted
from training import preparation, run_folder
from training.config import TrainConfig
from training.models import backbones, chain
from training.models.weights import normalisation_of
from training.settings import flat


def settings(store: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {"backbone": "test_vit", "image_size": 32, "patch_size": 8, "epochs": 1}
    values |= {"batch_size": 12, "threads": 1, "lr": 1e-2, "warmup_epochs": 0.0}
    return TrainConfig.of(store=str(store), **values | changes)


def weights(run: Path, file: str = "model") -> dict[str, torch.Tensor]:
    tensors = load_file(run / "epoch-1" / f"{file}.safetensors")
    return {n.removeprefix("backbone."): v for n, v in tensors.items() if n.startswith("backbone.")}


def test_a_run_starts_from_another_method_s_backbone_and_then_needs_it_no_more(
    tmp_path: Path, make_store: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store(tmp_path / "store", train=30, val=12)
    first = fitted(settings(store, objective="tests.toy_objective"), tmp_path / "first")
    config = settings(store, alignment_weight=0.0, run=str(tmp_path / "second"), init_from=str(first))
    config, _ = preparation.prepare(config)
    assert f"starts from {first} (tests.toy_objective, 1 of 1 epochs)" in capsys.readouterr().err
    begun = backbones.of_run(config, 3).state_dict()
    for name, value in weights(first).items():
        assert torch.equal(begun[name], value), name  # as many classes: the classifier, too
    other = backbones.of_run(config, 5)
    assert other.get_classifier().out_features == 5  # type: ignore[operator]
    trained = fitted(config, tmp_path / "second")
    changed = [not torch.equal(value, begun[name]) for name, value in weights(trained).items()]
    assert sum(changed) > len(changed) / 2
    (first / "epoch-1" / "state.json").unlink()
    resumed, _ = preparation.prepare(config)
    again = fitted(resumed.but(epochs=2), tmp_path / "third", trained / "epoch-1")
    assert (again / "epoch-2" / "model.safetensors").is_file()


def test_the_average_is_started_from_and_positions_fit_another_size(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    store = make_store(tmp_path / "store", train=30, val=12)
    first = fitted(settings(store, alignment_weight=0.0, ema=0.9), tmp_path / "first")
    averaged = weights(first, "ema")
    assert not torch.equal(averaged["blocks.0.attn.qkv.weight"], weights(first)["blocks.0.attn.qkv.weight"])
    config = settings(store, alignment_weight=0.0, image_size=48, init_from=str(first))
    chain.check(config)
    model = backbones.of_run(config, 3)
    begun = model.state_dict()
    assert torch.equal(begun["blocks.0.attn.qkv.weight"], averaged["blocks.0.attn.qkv.weight"])
    assert begun["pos_embed"].shape[1] > averaged["pos_embed"].shape[1]
    plain = timm.create_model("test_vit", num_classes=3, img_size=32, patch_size=8)
    plain.load_state_dict(averaged)
    small = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        backbones.of_run(config.but(image_size=32), 3).eval()(small), plain.eval()(small)
    )


def test_runs_that_cannot_be_started_from_are_named_before_anything_starts(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    store = make_store(tmp_path / "store", train=30, val=12)
    first = fitted(settings(store, alignment_weight=0.0), tmp_path / "first")

    def told(**changes: Any) -> str:
        with pytest.raises(ValueError) as error:
            preparation.prepare(settings(store, alignment_weight=0.0, **changes))
        return str(error.value)

    assert "nothing" in told(init_from=str(tmp_path / "nothing"))
    assert "has backbone test_vit, patch_size 8; pass the same" in told(
        init_from=str(first), backbone="test_resnet", patch_size=0
    )
    nano = fitted(
        settings(store, alignment_weight=0.0, backbone="hiera_nano_64", patch_size=0), tmp_path / "nano"
    )
    assert "has backbone hiera_nano_64" in told(init_from=str(nano))
    full = {"backbone": "hiera_tiny_224", "patch_size": 0, "init_from": str(nano)}
    assert "its weights do not fit (blocks.0.attn" in told(**full), "one architecture, another width"
    assert "leave one out" in told(init_from=str(first), pretrained=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text((first / "config.json").read_text())
    assert "holds no checkpoint" in told(init_from=str(tmp_path / "empty"))


def test_a_run_without_a_checkpoint_goes_on_from_the_weights_that_it_began_with_or_not_at_all(
    tmp_path: Path, make_store: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store(tmp_path / "store", train=30, val=12)
    first = fitted(settings(store, alignment_weight=0.0), tmp_path / "first")
    asked = settings(store, alignment_weight=0.0, init_from=str(first), run=str(tmp_path / "second"))
    config, _ = preparation.prepare(asked)
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "config.json").write_text(json.dumps({"version": 1, **flat(config)}))
    assert preparation.prepare(asked)[0] == config
    before = {name: value for name, value in flat(config).items() if name != "init_state"}
    resumed = run_folder.resumed(config, {"version": 1, **before})
    assert resumed == config, "as an early release began it"
    state = first / "epoch-1" / "state.json"
    content = json.loads(state.read_text())
    content["history"][0]["loss"] += 1
    state.write_text(json.dumps(content))
    with pytest.raises(OtherSettingsError, match="has other weights than when it began"):
        preparation.prepare(asked)
    with pytest.raises(SettingsError, match="has other weights than when this run began"):
        backbones.of_run(config, 3)  # as a worker does, perhaps later
    capsys.readouterr()
    another, _ = preparation.prepare(config.but(run=str(tmp_path / "third")))
    assert "other weights than those on record" in capsys.readouterr().err
    assert another.model.init_state not in ("", config.model.init_state)
    shutil.copytree(first / "epoch-1", tmp_path / "second" / "epoch-1")
    assert preparation.prepare(asked)[0] == config, "it needs them no more"


def test_weights_that_do_not_fit_are_told_by_name_and_shape() -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    weights = dict(timm.create_model("test_resnet", num_classes=0).state_dict())
    chain.fill(model, weights, "init_from=x")
    assert torch.equal(model.state_dict()["conv1.0.weight"], weights["conv1.0.weight"])
    with pytest.raises(ValueError, match=r"init_from=x: .*conv1.0.weight: nothing in place of"):
        chain.fill(model, {n: v for n, v in weights.items() if n != "conv1.0.weight"}, "init_from=x")
    with pytest.raises(ValueError, match=r"extra: 1 in place of nothing"):
        chain.fill(model, weights | {"extra": torch.zeros(1)}, "init_from=x")


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "hiera_tiny_224"])
def test_a_file_of_timm_s_own_names_is_a_start_whatever_the_architecture(tmp_path: Path, name: str) -> None:
    torch.manual_seed(3)
    size = timm.get_pretrained_cfg(name).input_size[-1]
    theirs = timm.create_model(name, num_classes=3).state_dict()
    save_file(theirs, tmp_path / "weights.safetensors")
    config = TrainConfig.of(
        store="s", backbone=name, image_size=size, init_from=str(tmp_path / "weights.safetensors")
    )
    told, _ = chain.check(config)
    assert ("CC BY-NC" in told) == name.startswith("hiera")
    begun = backbones.of_run(config, 3).state_dict()
    assert begun.keys() == theirs.keys() and all(torch.equal(begun[key], theirs[key]) for key in begun)


def test_pictures_come_to_the_weights_normalised_as_they_were_trained_on(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    store = make_store(tmp_path / "store", train=30, val=12)
    towers.of_timm(tmp_path / "timm", img_size=32, patch_size=8)
    described = json.loads((tmp_path / "timm" / "config.json").read_text())
    described["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}
    (tmp_path / "timm" / "config.json").write_text(json.dumps(described))
    brought = f"local-dir:{tmp_path / 'timm'}"
    first = settings(store, alignment_weight=0.0, patch_size=0, backbone=brought)
    first = fitted(backbones.resolved(first), tmp_path / "first")
    second = settings(store, alignment_weight=0.0, patch_size=0, init_from=str(first))
    with pytest.raises(SettingsError) as error:
        chain.check(second)
    assert "mean (0.1, 0.2, 0.3) and deviation (1, 1, 1), --backbone test_vit with" in str(error.value)
    assert f"; pass --backbone {brought}." in str(error.value)
    chain.check(backbones.resolved(second.but(backbone=brought)))


def test_of_one_architecture_tags_differ_in_their_normalisation() -> None:
    def of(name: str) -> tuple[tuple[float, ...], ...]:
        return normalisation_of(TrainConfig.of(store="s", backbone=name))

    assert of("vit_small_patch16_224.dino") == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert of("vit_small_patch16_224") == ((0.5,) * 3, (0.5,) * 3)
    assert of("hiera_nano_64") == of("hiera_tiny_224")
