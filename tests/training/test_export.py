"""`export` of runs trained in this process; every format is read by the library that will read it: timm, ONNX
Runtime, torch."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.data
import torch
from safetensors.torch import load_file

from pipeline.errors import RunStoppedError
from pipeline.store import Store
from training import run_folder
from training.__main__ import main
from training.config import ExportConfig, TrainConfig
from training.engine import build, checkpoint, loop
from training.export import export, formats
from training.objectives import align
from training.settings import flat


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, make_store: Callable[..., Path]) -> Path:
    return make_store(tmp_path_factory.mktemp("export") / "store", train=40, val=20)


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch, aligned, with a moving average."""
    return trained(store, tmp_path_factory.mktemp("runs"), ema=0.5, projection_dim=4)


def trained(store: Path, run: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "backbone": "test_resnet",
        "image_size": 32,
        "epochs": 1,
        "batch_size": 20,
        "threads": 1,
    }
    config = TrainConfig.of(store=str(store), **values | changes)
    snapshots: list[checkpoint.Snapshot] = []
    loop.fit(config, torch.device("cpu"), 0, None, lambda metrics, take: snapshots.append(take()))
    snapshots[-1].write(str(run / "checkpoint"))
    (run / "config.json").write_text(json.dumps(flat(config)))
    return run


def fresh(store: Path, run: Path, **changes: Any) -> Path:
    """A run that was never trained: architectures too slow to train in a test export all the same."""
    config = TrainConfig.of(store=str(store), alignment_weight=0.0, **changes)
    task = align.build_task(config, len(Store(str(store)).dataset.classes), 0)
    torch.nn.init.normal_(task.backbone.get_classifier().weight)  # type: ignore[operator]  # some begin with zeros: no answer at all
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    checkpoint.Snapshot.take(task, optimizer, None, checkpoint.State()).write(str(run / "checkpoint"))
    (run / "config.json").write_text(json.dumps(flat(config)))
    return run


def logits_of(run: Path, weights: str, images: torch.Tensor) -> torch.Tensor:
    """By the training task."""
    config = run_folder.read(str(run))
    tensors = load_file(run / "checkpoint" / f"{weights}.safetensors")
    task = align.build_task(config, 3, 4 if config.method.alignment_weight else 0)
    task.load_state_dict(tensors)
    with torch.inference_mode():
        answers: torch.Tensor = task.eval().backbone(images)
    return answers


@pytest.mark.slow
def test_all_formats_answer_as_the_run_does_at_any_batch_size(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    to = tmp_path / "model"
    assert main(["export", str(run), "--to", str(to), "--format", "timm,onnx,torch"]) == 0
    told = capsys.readouterr().out
    for name in ("timm", "onnx", "torch"):
        assert re.search(
            rf"{name}: loaded again; same top-1 on 44 of 44 pictures \(24 random, 20 real\).* \d\.\de[-+]\d+",
            told,
        )
    assert {path.name for path in to.iterdir()} == {
        "config.json",
        "model.safetensors",
        "model.onnx",
        "model.pt2",
        "labels.txt",
        "preprocessing.json",
        "README.md",
    }
    session = onnxruntime.InferenceSession(to / "model.onnx", providers=["CPUExecutionProvider"])
    program = torch.export.load(to / "model.pt2").module()
    plain = timm.create_model(f"local-dir:{to}", pretrained=True).eval()
    for count in (1, 3, 8):
        images = torch.randn(count, 3, 32, 32)
        wanted = logits_of(run, "ema", images)
        with torch.no_grad():
            torch.testing.assert_close(plain(images), wanted, rtol=0, atol=0)
            torch.testing.assert_close(program(images), wanted, rtol=0, atol=1e-5)
        found = session.run(["logits"], {"images": images.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-5)
    assert not [name for name in session.get_modelmeta().custom_metadata_map if "/" in name], (
        "no paths of this machine"
    )


def test_preprocessing_and_labels_say_what_timm_does(run: Path, store: Path, tmp_path: Path) -> None:
    """A picture prepared by hand from preprocessing.json alone is the one that timm's transform gives."""
    import io

    from PIL import Image

    export.export(ExportConfig(run=str(run), to=str(tmp_path / "model")))
    recipe = json.loads((tmp_path / "model" / "preprocessing.json").read_text())
    picture = Image.open(
        io.BytesIO(Store(str(store)).read_shard("images", "", 4)["image"][5].as_py())
    ).convert("RGB")
    edge, size = recipe["resize_shorter_edge"], recipe["center_crop"]
    wide = (int(edge * picture.width / picture.height), edge)
    resized = picture.resize(wide, getattr(Image.Resampling, recipe["interpolation"].upper()))
    left, upper = round((wide[0] - size) / 2), round((edge - size) / 2)
    cut = np.asarray(resized.crop((left, upper, left + size, upper + size)), np.float32)
    by_hand = (cut * recipe["scale"] - np.array(recipe["mean"])) / np.array(recipe["std"])
    model = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    assert picture.width > picture.height and transform(picture).shape == (3, 32, 32)
    assert np.allclose(transform(picture).numpy(), by_hand.transpose(2, 0, 1), atol=1e-5)
    assert (tmp_path / "model" / "labels.txt").read_text().splitlines() == ["class 0", "class 1", "class 2"]


def test_the_weights_are_the_average_unless_told_otherwise(run: Path, tmp_path: Path) -> None:
    images = torch.randn(2, 3, 32, 32)
    for weights, file in (("auto", "ema"), ("raw", "model")):
        to = tmp_path / weights
        found = export.export(ExportConfig(run=str(run), to=str(to), weights=weights))  # type: ignore[arg-type]
        assert found["weights"] == {"ema": "ema", "model": "raw"}[file]
        with torch.no_grad():
            answers = timm.create_model(f"local-dir:{to}", pretrained=True).eval()(images)
        torch.testing.assert_close(answers, logits_of(run, file, images), rtol=0, atol=0)


def test_a_recommended_test_size_of_other_weights_is_not_exported(store: Path, tmp_path: Path) -> None:
    """timm's validation would otherwise use 288 pixels for a ResNet-18 trained at 32."""
    assert timm.get_pretrained_cfg("resnet18").test_input_size[-1] == 288
    folder = fresh(store, tmp_path / "run", backbone="resnet18", image_size=32)
    export.export(ExportConfig(run=str(folder), to=str(tmp_path / "model")))
    model = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    resolved = timm.data.resolve_data_config({}, model=model, use_test_size=True)
    assert resolved["input_size"] == (3, 32, 32) and resolved["crop_mode"] == "center"
    assert resolved["crop_pct"] == build.data_config(model)["crop_pct"]
    text = (tmp_path / "model" / "config.json").read_text()
    assert "hf_hub_id" not in text and "http" not in text, "addresses of weights that these are not"


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"backbone": "vit_tiny_patch16_224", "image_size": 48, "patch_size": 8},
        {"backbone": "test_convnext", "image_size": 64, "patch_size": 2},
        {"backbone": "resnet18", "image_size": 32, "small_stem": True},
        {"backbone": "hiera_tiny_224", "image_size": 64},
    ],
    ids=lambda settings: settings["backbone"],
)
def test_every_family_exports_to_every_format(store: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = fresh(store, tmp_path / "run", **settings)
    found = export.export(
        ExportConfig(run=str(folder), to=str(tmp_path / "model"), format="torch, onnx,timm")
    )
    assert list(found["checks"]) == ["timm", "onnx", "torch"]
    for check in found["checks"].values():
        assert check["same"] == check["random"] + check["real"] == 44
        # Heads of unit weights: logits of 60, which float32 rounds by 5e-5 (Hiera, against float64).
        assert check["difference"] < check["limit"] < 1e-3
    assert found["checks"]["timm"]["difference"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("small_stem", [False, True])
def test_the_card_loads_the_model_as_it_says(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], small_stem: bool
) -> None:
    backbone = "resnet18" if small_stem else "test_resnet"
    folder = trained(store, tmp_path / "run", backbone=backbone, small_stem=small_stem, alignment_weight=0.0)
    to = tmp_path / "model"
    assert main(["export", str(folder), "--to", str(to), "--format", "timm"]) == 0
    assert ("no argument for the small stem" in capsys.readouterr().out) == small_stem
    card = (to / "README.md").read_text()
    last = checkpoint.read_state(str(folder / "checkpoint"))["history"][-1]
    assert f"top-1 {last['top1']:.2f} %" in card and "20 images of the split `val`" in card
    assert str(tmp_path) not in card and str(store) not in card, "no paths of this machine"
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(code) == 1
    program = (
        code[0].replace("FOLDER", str(to))
        + "\nimport torch; print(float(model(torch.ones(1, 3, 32, 32)).sum()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(
        float(logits_of(folder, "model", torch.ones(1, 3, 32, 32)).sum()), abs=1e-5
    )


def test_the_card_of_an_aligned_run_leads_back_to_its_descriptions(run: Path, tmp_path: Path) -> None:
    export.export(ExportConfig(run=str(run), to=str(tmp_path / "model")))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "Descriptions by imported (captions `test`), text encoder none (embeddings `test`)" in card
    assert "| alignment_weight | 0.3 |" in card and "| projection_dim | 4 |" in card
    last = checkpoint.read_state(str(run / "checkpoint"))["history"][-1]
    assert f"top-1 {last['ema_top1']:.2f} %" in card, "the accuracy of the weights that are exported"


def test_a_full_folder_is_left_alone_unless_told_otherwise(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "model"
    to.mkdir()
    (to / "notes.txt").write_text("mine")
    command = ["export", str(run), "--to", str(to)]
    assert main(command) == 2
    assert "the folder is not empty" in capsys.readouterr().err
    assert [path.name for path in to.iterdir()] == ["notes.txt"]
    (to / "model.onnx").write_text("of another run")
    assert main([*command, "--overwrite"]) == 0
    assert (to / "notes.txt").read_text() == "mine" and (to / "config.json").exists()
    assert not (to / "model.onnx").exists(), "nothing of an earlier export stays beside the new one"
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "no temporary folder is left"


def test_what_answers_otherwise_is_not_delivered(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that loses a weight on the way is found by the comparison, and the folder stays empty."""
    from training.export.formats import _timm

    def broken(model: Any, *arguments: Any) -> Any:
        written: Any = _timm(model, *arguments)
        written.get_classifier().bias.data[0] += 0.01
        return written

    monkeypatch.setitem(formats.WRITERS, "timm", broken)
    with pytest.raises(RunStoppedError, match=r"format=timm: .*difference of logits 1\.0e-02"):
        export.export(ExportConfig(run=str(run), to=str(tmp_path / "model")))
    assert not (tmp_path / "model").exists()


def test_without_its_packages_onnx_is_refused_before_anything_is_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else found(name, *rest)
    )
    assert main(["export", str(run), "--to", str(tmp_path / "model"), "--format", "timm,onnx"]) == 2
    assert "onnxruntime: pip install" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_wrong_settings_are_told_together() -> None:
    with pytest.raises(ValueError, match="'tflite' is unknown; choose from timm, onnx, torch") as found:
        ExportConfig(run="run", to="s3://bucket/model", format="timm,tflite")
    assert "must be a folder of this machine" in str(found.value)
    assert ExportConfig(run="run", to="model", format="torch,timm").formats == ("timm", "torch")
