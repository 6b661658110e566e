"""`export`: the backbone of a run as a plain timm folder, as ONNX and as torch.export's program; the head
stays behind.

Every file is loaded again, as its user would load it, and compared with the run's model on random and on real
pictures before the folder is filled. ONNX needs the packages onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from typing import Any

import numpy as np

from pipeline.captioners.prompts import class_name
from pipeline.errors import RunStoppedError, SettingsError
from pipeline.store import Store, locations
from training import run_folder
from training.config import ExportConfig, TrainConfig
from training.data.order import Rows
from training.engine import build, checkpoint
from training.evaluation import outputs
from training.export.formats import WRITERS, Batch, Model
from training.export.model_card import model_card
from training.models import backbones, weights
from training.objectives.protocol import objective_of

# What an export may consist of, config.json last: where it stands the folder is whole.
FILES = (
    "model.safetensors",
    "model.onnx",
    "model.onnx.data",
    "model.pt2",
    "labels.txt",
    "preprocessing.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
    "config.json",
)
# Accepted difference, relative to the largest logit (10 at least): ten times float32's rounding.
LARGEST = 1e-5
REAL = 64  # pictures of the eval split that are compared


def export(settings: ExportConfig) -> dict[str, Any]:
    """Writes the formats asked for, with labels.txt, preprocessing.json and README.md.

    Returns:
        Folder `to`, `architecture`, `parameters`, `epoch`, `weights`, `files`, `small_stem`, and for each
        format in `checks` the number of `random` and `real` pictures compared, the largest `difference` of
        the `output` (logits, or features of a model without classifier) and its `limit`, and how many of the
        answers were the `same`.

    Raises:
        ValueError: the folder is not empty, a package is missing, or what was written answers differently.
    """
    _check_folder(settings)
    if "onnx" in settings.formats:
        _check_packages()
    config = run_folder.read(settings.run)
    store = Store(config.store)
    classes = store.dataset.classes
    with checkpoint.opened(settings.run, settings.checkpoint) as folder:
        loaded = outputs.load(config, folder, len(classes), settings.weights)
    if config.method.own_model:
        return _own(settings, config, loaded)
    model: Any = objective_of(config).deployed(loaded.task).eval()
    classes = classes if backbones.classifies(model) else []
    recipe = preprocessing(model, config, classes)
    batches = _batches(config, store, model)
    os.makedirs(os.path.dirname(os.path.abspath(settings.to)), exist_ok=True)
    # Beside the folder, so that moving is renaming: an export that fails leaves an earlier one as it was.
    with tempfile.TemporaryDirectory(
        prefix=".export-", dir=os.path.dirname(os.path.abspath(settings.to))
    ) as work:
        checks = {
            name: _compare(name, model, WRITERS[name](model, config, recipe, work), batches, bool(classes))
            for name in settings.formats
        }
        if classes:
            _write_text(work, "labels.txt", "".join(f"{name}\n" for name in recipe["labels"]))
        _write_text(work, "preprocessing.json", json.dumps(recipe, indent=2, ensure_ascii=False) + "\n")
        exported = {
            "to": settings.to,
            "architecture": weights.architecture_of(config),
            "name": name
            if (name := config.model.backbone) in weights.OWN
            else weights.architecture_of(config),
            "parameters": sum(p.numel() for p in model.parameters()),
            "epoch": int(loaded.state["epoch"]),
            "weights": loaded.weights,
            "formats": list(settings.formats),
            "small_stem": config.model.small_stem,
            "output": recipe["output"]["name"],
            "checks": checks,
            "files": [],
        }
        _write_text(work, "README.md", model_card(config, exported, recipe, loaded.state, store))
        exported["files"] = sorted(os.listdir(work))
        _move(work, settings.to)
    return exported


def _own(settings: ExportConfig, config: TrainConfig, loaded: outputs.Loaded) -> dict[str, Any]:
    """Of a method with a model of its own: what that writes."""
    if settings.formats != ("timm",):
        message = (
            f"format={settings.format}: {config.objective} has no model of timm, of ONNX or of torch.export; "
            "leave the flag out for what it has."
        )
        raise SettingsError(message)
    os.makedirs(os.path.dirname(os.path.abspath(settings.to)), exist_ok=True)
    beside = os.path.dirname(os.path.abspath(settings.to))
    with tempfile.TemporaryDirectory(prefix=".export-", dir=beside) as work:
        told = objective_of(config).export(config, loaded.task, work)
        files = sorted(os.listdir(work))
        _move(work, settings.to)
    state = {"epoch": int(loaded.state["epoch"]), "weights": loaded.weights}
    empty = {"formats": [], "small_stem": False, "checks": {}}
    return {"to": settings.to, **told, **state, **empty, "files": files}


def describe(exported: dict[str, Any]) -> str:
    """What `export` returned, as lines for a terminal."""
    name = exported.get("name", exported["architecture"])
    lines = [
        f"{exported['to']}: {name}, {exported['parameters']:,} parameters, epoch "
        f"{exported['epoch']}, {exported['weights']} weights: {', '.join(exported['files'])}"
    ]
    for name, check in exported["checks"].items():
        images = check["random"] + check["real"]
        same = f"same top-1 on {check['same']} of {images}" if exported["output"] == "logits" else images
        lines.append(
            f"  {name}: loaded again; {same} pictures ({check['random']} random, {check['real']} real), "
            f"largest difference of {exported['output']} {check['difference']:.1e}"
        )
    if "timm" in exported["formats"] and exported["small_stem"]:
        lines.append(
            "timm has no argument for the small stem: README.md in the folder shows how to load the weights"
        )
    elif "timm" in exported["formats"]:
        lines.append(f'load it with: timm.create_model("local-dir:{exported["to"]}", pretrained=True)')
    return "\n".join(lines)


def preprocessing(model: Any, config: TrainConfig, classes: list[str]) -> dict[str, Any]:
    """What turns an RGB picture into the model's input, as the run did it: the content of
    preprocessing.json."""
    timm_data = build.data_config(model)
    size = config.model.image_size
    output = ("logits", len(classes)) if classes else ("features", int(model.num_features))
    return {
        "input": {"name": "images", "shape": ["batch", 3, size, size], "dtype": "float32", "color": "RGB"},
        "output": {"name": output[0], "shape": ["batch", output[1]], "dtype": "float32"},
        "resize_shorter_edge": int(size / float(timm_data["crop_pct"])),
        "interpolation": str(timm_data["interpolation"]),
        "antialias": True,
        "center_crop": size,
        "scale": 1 / 255,
        "mean": list(timm_data["mean"]),
        "std": list(timm_data["std"]),
        "crop_pct": float(timm_data["crop_pct"]),
        "labels": [class_name(name) for name in classes],
    }


def _batches(config: TrainConfig, store: Store, model: Any) -> dict[str, list[Batch]]:
    """Random pictures in batches of several sizes (one of 1: exporters like to fix it), and the first of the
    eval split."""
    import torch

    generator = torch.Generator().manual_seed(0)
    size = config.model.image_size
    random = [torch.randn(count, 3, size, size, generator=generator) for count in (1, 2, 5, 16)]
    norm = build.make_norm(model, torch.device("cpu"))
    samples = Rows(store, config.data.eval_split).in_order()
    samples = samples[np.linspace(0, len(samples) - 1, min(REAL, len(samples))).astype(int)]
    loader = build.make_loader(config, (), model)
    return {"random": random, "real": [norm(batch.images) for batch in loader.evaluate(samples, 16, 0, 1)]}


def _compare(
    name: str, model: Any, written: Model, batches: dict[str, list[Batch]], classifies: bool
) -> dict[str, Any]:
    """The largest difference of logits or features, and equal answers of what classifies, over all batches.

    Raises:
        ValueError: too different.
    """
    import torch

    counts: dict[str, Any] = {kind: sum(len(batch) for batch in several) for kind, several in batches.items()}
    same, difference, largest = 0, 0.0, 10.0
    with torch.no_grad():
        for batch in [batch for several in batches.values() for batch in several]:
            ours, theirs = model(batch), written(batch)
            difference = max(difference, float((ours - theirs).abs().max()))
            largest = max(largest, float(ours.abs().max()))
            same += int((ours.argmax(1) == theirs.argmax(1)).sum()) if classifies else len(ours)
    images = counts["random"] + counts["real"]
    limit = LARGEST * largest
    if not difference < limit or same < images:
        message = (
            f"format={name}: what was written answers otherwise than the run's model: same top-1 on {same} "
            f"of {images} pictures, largest difference of {'logits' if classifies else 'features'} "
            f"{difference:.1e} (limit {limit:.0e}); "
            "export another format."
        )
        raise RunStoppedError(message)
    return counts | {"same": same, "difference": difference, "limit": limit}


def _check_folder(settings: ExportConfig) -> None:
    if os.path.exists(settings.to) and not os.path.isdir(settings.to):
        message = f"to={settings.to}: is a file; pass a folder."
        raise SettingsError(message)
    locations.check_writable("to", settings.to)
    if not settings.overwrite and os.path.isdir(settings.to) and os.listdir(settings.to):
        message = (
            f"to={settings.to}: the folder is not empty; pass another, or --overwrite to replace an earlier "
            "export in it."
        )
        raise SettingsError(message)


def _check_packages() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        message = (
            f"format=onnx: needs {', '.join(missing)}: pip install {' '.join(missing)}, or leave onnx out of "
            "--format."
        )
        raise SettingsError(message)


def _move(work: str, to: str) -> None:
    """Takes away an earlier export, config.json first, and puts the new files in its place, config.json
    last."""
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
