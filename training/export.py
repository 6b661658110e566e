"""`export`: the backbone of a run as a plain timm folder, as ONNX and as torch.export's program; the head stays behind.

Every file is loaded again, as its user would load it, and compared with the run's model on random and on real pictures before the
folder is filled. ONNX needs the packages onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline import locations
from pipeline.errors import RunStoppedError, SettingsError
from pipeline.prompts import class_name
from pipeline.store import Store
from training import backbones, checkpoint, evaluate, loop, record
from training.config import ExportConfig, TrainConfig
from training.data import Rows
from training.model_card import model_card

# What an export may consist of, config.json last: where it stands the folder is whole.
FILES = (
    "model.safetensors", "model.onnx", "model.onnx.data", "model.pt2", "labels.txt", "preprocessing.json", "README.md",
    "config.json",
)  # fmt: skip
LARGEST = 1e-5  # accepted difference of logits, of the largest logit (10 at least): ten times what float32 rounds there
REAL = 64  # pictures of the eval split that are compared
Batch = Any  # [b, 3, S, S] float32 tensor, normalised
Model = Callable[[Batch], Any]


def export(settings: ExportConfig) -> dict[str, Any]:
    """Writes the formats asked for, with labels.txt, preprocessing.json and README.md.

    Returns:
        Folder `to`, `architecture`, `parameters`, `epoch`, `weights`, `files`, `small_stem`, and for each format in `checks` the
        number of `random` and `real` pictures compared, the largest `difference` of logits and its `limit`, and how many of the
        answers were the `same`.

    Raises:
        ValueError: the folder is not empty, a package is missing, or what was written answers differently.
    """
    _check_folder(settings)
    if "onnx" in settings.formats:
        _check_packages()
    config = record.read(settings.run)
    store = Store(config.store)
    classes = store.dataset.classes
    with checkpoint.opened(settings.run, settings.checkpoint) as folder:
        loaded = evaluate.load(config, folder, len(classes), settings.weights)
    model: Any = loaded.task.backbone
    recipe = preprocessing(model, config, classes)
    batches = _batches(config, store, model)
    os.makedirs(os.path.dirname(os.path.abspath(settings.to)), exist_ok=True)
    # Beside the folder, so that moving is renaming: an export that fails leaves an earlier one as it was.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=os.path.dirname(os.path.abspath(settings.to))) as work:
        checks = {name: _compare(name, model, _WRITERS[name](model, config, recipe, work), batches) for name in settings.formats}
        _write_text(work, "labels.txt", "".join(f"{name}\n" for name in recipe["labels"]))
        _write_text(work, "preprocessing.json", json.dumps(recipe, indent=2, ensure_ascii=False) + "\n")
        found = {
            "to": settings.to, "architecture": backbones.architecture_of(config),
            "parameters": sum(p.numel() for p in model.parameters()),
            "epoch": int(loaded.state["epoch"]), "weights": loaded.weights, "formats": list(settings.formats),
            "small_stem": config.small_stem, "checks": checks, "files": [],
        }  # fmt: skip
        _write_text(work, "README.md", model_card(config, found, recipe, loaded.state, store))
        found["files"] = sorted(os.listdir(work))
        _move(work, settings.to)
    return found


def describe(found: dict[str, Any]) -> str:
    """What `export` returned, as lines for a terminal."""
    lines = [
        f"{found['to']}: {found['architecture']}, {found['parameters']:,} parameters, epoch {found['epoch']}, "
        f"{found['weights']} weights: {', '.join(found['files'])}"
    ]
    for name, check in found["checks"].items():
        lines.append(
            f"  {name}: loaded again; same top-1 on {check['same']} of {check['random'] + check['real']} pictures "
            f"({check['random']} random, {check['real']} real), largest difference of logits {check['difference']:.1e}"
        )
    if "timm" in found["formats"] and found["small_stem"]:
        lines.append("timm has no argument for the small stem: README.md in the folder shows how to load the weights")
    elif "timm" in found["formats"]:
        lines.append(f'load it with: timm.create_model("local-dir:{found["to"]}", pretrained=True)')
    return "\n".join(lines)


def preprocessing(model: Any, config: TrainConfig, classes: list[str]) -> dict[str, Any]:
    """What turns an RGB picture into the model's input, as the run did it: the content of preprocessing.json."""
    found = loop.data_config(model)
    size = config.image_size
    return {
        "input": {"name": "images", "shape": ["batch", 3, size, size], "dtype": "float32", "color": "RGB"},
        "output": {"name": "logits", "shape": ["batch", len(classes)], "dtype": "float32"},
        "resize_shorter_edge": int(size / float(found["crop_pct"])), "interpolation": str(found["interpolation"]),
        "antialias": True, "center_crop": size, "scale": 1 / 255, "mean": list(found["mean"]), "std": list(found["std"]),
        "crop_pct": float(found["crop_pct"]), "labels": [class_name(name) for name in classes],
    }  # fmt: skip


def _timm(model: Any, config: TrainConfig, recipe: dict[str, Any], folder: str) -> Model:
    """timm's config.json and model.safetensors; returns the model as timm loads it."""
    import timm
    from timm.models import save_for_hf

    size = config.image_size
    # Of the weights that training started from, which these are not.
    foreign = (
        "url", "hf_hub_id", "hf_hub_filename", "file", "source", "tag", "origin_url", "paper_ids", "paper_name", "notes",
        "license",
    )  # fmt: skip
    before = model.pretrained_cfg
    kept = {name: value for name, value in before.items() if name not in foreign}
    model.pretrained_cfg = {**kept, "input_size": (3, size, size), "num_classes": len(recipe["labels"])}
    try:
        save_for_hf(
            model, folder, model_config={"label_names": recipe["labels"]}, safe_serialization=True,
            model_args=backbones.model_args(config.backbone, size, config.patch_size, config.architecture) or None,
            data_config={
                "input_size": (3, size, size), "mean": recipe["mean"], "std": recipe["std"], "crop_pct": recipe["crop_pct"],
                "interpolation": recipe["interpolation"], "crop_mode": "center",
            },
        )  # fmt: skip
    finally:
        model.pretrained_cfg = before
    if not config.small_stem:
        loaded: Model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        return loaded
    from safetensors.torch import load_file

    name = backbones.architecture_of(config)
    small = backbones.shrink_stem(name, timm.create_model(name, num_classes=len(recipe["labels"])))
    small.load_state_dict(load_file(os.path.join(folder, "model.safetensors")))
    return small.eval()


def _onnx(model: Any, config: TrainConfig, recipe: dict[str, Any], folder: str) -> Model:
    """model.onnx with any batch size, weights inside; returns it as ONNX Runtime runs it."""
    import onnxruntime
    import torch

    plain = copy.deepcopy(model)
    for module in plain.modules():
        if hasattr(module, "fused_attn"):  # the exporter knows fused attention for 4 axes only, and Hiera's has 5
            module.fused_attn = False
    path = os.path.join(folder, "model.onnx")
    size = config.image_size
    # A file beside the weights is needed from 2 GiB (protobuf's limit) on; below it one file is easier to carry.
    outside = sum(p.numel() * p.element_size() for p in plain.parameters()) > 1.9e9
    with torch.no_grad():
        torch.onnx.export(
            plain, (torch.randn(2, 3, size, size),), path, dynamo=True, verbose=False, external_data=outside,
            input_names=["images"], output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _torch(model: Any, config: TrainConfig, recipe: dict[str, Any], folder: str) -> Model:
    """model.pt2 with any batch size; returns it as torch loads it."""
    import torch

    size, path = config.image_size, os.path.join(folder, "model.pt2")
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 3, size, size),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)
    loaded: Model = torch.export.load(path).module()
    return loaded


_WRITERS: dict[str, Callable[[Any, TrainConfig, dict[str, Any], str], Model]] = {"timm": _timm, "onnx": _onnx, "torch": _torch}


def _batches(config: TrainConfig, store: Store, model: Any) -> dict[str, list[Batch]]:
    """Random pictures in batches of several sizes (one of 1: exporters like to fix it), and the first of the eval split."""
    import torch

    generator = torch.Generator().manual_seed(0)
    size = config.image_size
    random = [torch.randn(count, 3, size, size, generator=generator) for count in (1, 2, 5, 16)]
    norm = loop.make_norm(model, torch.device("cpu"))
    samples = Rows(store, config.eval_split).in_order()
    samples = samples[np.linspace(0, len(samples) - 1, min(REAL, len(samples))).astype(int)]
    loader = loop.make_loader(config, store, None, model)
    return {"random": random, "real": [norm(batch.images) for batch in loader.evaluate(samples, 16, 0, 1)]}


def _compare(name: str, model: Any, written: Model, batches: dict[str, list[Batch]]) -> dict[str, Any]:
    """The largest difference of logits, and equal answers, over all batches.

    Raises:
        ValueError: too different.
    """
    import torch

    found: dict[str, Any] = {kind: sum(len(batch) for batch in several) for kind, several in batches.items()}
    same, difference, largest = 0, 0.0, 10.0
    with torch.no_grad():
        for batch in [batch for several in batches.values() for batch in several]:
            ours, theirs = model(batch), written(batch)
            difference = max(difference, float((ours - theirs).abs().max()))
            largest = max(largest, float(ours.abs().max()))
            same += int((ours.argmax(1) == theirs.argmax(1)).sum())
    images = found["random"] + found["real"]
    limit = LARGEST * largest
    if not difference < limit or same < images:
        message = (
            f"format={name}: what was written answers otherwise than the run's model: same top-1 on {same} of {images} pictures, "
            f"largest difference of logits {difference:.1e} (limit {limit:.0e}); export another format."
        )
        raise RunStoppedError(message)
    return found | {"same": same, "difference": difference, "limit": limit}


def _check_folder(settings: ExportConfig) -> None:
    if os.path.exists(settings.to) and not os.path.isdir(settings.to):
        message = f"to={settings.to}: is a file; pass a folder."
        raise SettingsError(message)
    locations.check_writable("to", settings.to)
    if not settings.overwrite and os.path.isdir(settings.to) and os.listdir(settings.to):
        message = f"to={settings.to}: the folder is not empty; pass another, or --overwrite to replace an earlier export in it."
        raise SettingsError(message)


def _check_packages() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        message = f"format=onnx: needs {', '.join(missing)}: pip install {' '.join(missing)}, or leave onnx out of --format."
        raise SettingsError(message)


def _move(work: str, to: str) -> None:
    """Takes away an earlier export, config.json first, and puts the new files in its place, config.json last."""
    os.makedirs(to, exist_ok=True)
    for name in reversed(FILES):
        if os.path.lexists(os.path.join(to, name)):
            os.unlink(os.path.join(to, name))
    last = "config.json"
    for name in sorted(os.listdir(work), key=lambda name: (name == last, name)):
        shutil.move(os.path.join(work, name), os.path.join(to, name))


def _write_text(folder: str, name: str, text: str) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as stream:
        stream.write(text)
