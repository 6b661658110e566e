"""The README.md of an exported model: what it is, how good, what it wants as input, how to load each format,
how it was made."""

from __future__ import annotations

import os
from typing import Any

from pipeline.store import Store
from training.config import TrainConfig
from training.models.settings import FOLDER
from training.models.weights import source_of
from training.objectives.protocol import Description, objective_of
from training.settings import flat


def model_card(
    config: TrainConfig, exported: dict[str, Any], recipe: dict[str, Any], state: dict[str, Any], store: Store
) -> str:
    """The card as Markdown.

    Args:
        config: the run's settings.
        exported: see `export.export`.
        recipe: see `export.preprocessing`.
        state: the checkpoint's.
        store: that the run was trained on.
    """
    description = objective_of(config).describe(config, store)
    classes, size = len(recipe["labels"]), config.model.image_size
    task = "image-classification" if classes else "image-feature-extraction"
    gives = f"{classes} classes" if classes else f"features of {recipe['output']['shape'][1]} numbers"
    parts = [
        f"---\nlibrary_name: timm\npipeline_tag: {task}\ntags:\n- timm\n- gpt4image-ray\n---",
        f"# {exported['name']}, {gives}, {size} x {size}",
        f"{exported['parameters']:,} parameters, trained with {description.how} by gpt4image-ray. What else "
        f"took part in training is not in it: {_like(config, exported['architecture'])}.",
        "## Accuracy\n\n" + _accuracy(config, exported["weights"], state),
        "## Input\n\n" + _input(recipe),
        "## Use\n\n" + "\n\n".join(_USE[name](config, exported, recipe) for name in exported["formats"]),
        "## Checked\n\n"
        + "\n".join(_checked(name, check, exported["output"]) for name, check in exported["checks"].items()),
        "## Training\n\n" + _training(config, exported, description),
    ]
    return "\n\n".join(parts) + "\n"


def _like(config: TrainConfig, architecture: str) -> str:
    source = source_of(config.model.backbone, config.model.architecture)
    if source is not None and source.arguments:
        given = ", ".join(f"{name} {value}" for name, value in source.arguments.items())
        return f"it is timm's `{architecture}` with {given}"
    return f"it has the size and speed of timm's `{architecture}`"


def _accuracy(config: TrainConfig, weights: str, state: dict[str, Any]) -> str:
    if not state["history"]:
        return "Not evaluated: the checkpoint was written within the first epoch."
    last, prefix = state["history"][-1], "ema_" if weights == "ema" else ""
    top1, top5 = last.get(f"{prefix}top1"), last.get(f"{prefix}top5")
    metric = objective_of(config).metric
    own = last.get(f"{prefix}{metric.name}")
    if own is None:
        return "Not evaluated."
    images = f"{int(last['eval_images'])} images of the split `{config.data.eval_split}`"
    inside = ""
    if state.get("sums"):
        inside = (
            f" That was at the end of epoch {int(last['epoch'])}; these weights are from inside the next "
            "one, not evaluated."
        )
    if top1 is None or top5 is None:
        return f"{metric.title} {metric.shown(own)} on {images}.{inside}"
    return f"top-1 {top1:.2f} %, top-5 {top5:.2f} % on {images}, as timm's validation counts.{inside}"


def _input(recipe: dict[str, Any]) -> str:
    labels = "; `labels.txt` has the classes in the logits' order" if recipe["labels"] else ""
    return (
        f"RGB; the shorter edge resized to {recipe['resize_shorter_edge']} ({recipe['interpolation']}, "
        f"antialiased), the central {recipe['center_crop']} x {recipe['center_crop']} cut out, divided by "
        f"255, minus mean {recipe['mean']}, divided by std {recipe['std']}. `preprocessing.json` says the "
        f"same to programs{labels}."
    )


def _timm(config: TrainConfig, exported: dict[str, Any], recipe: dict[str, Any]) -> str:
    if not config.model.small_stem:
        load = 'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()'
        return f"```python\nimport timm\n\n{load}\n```"
    return (
        "timm has no argument for this model's first convolution (3 x 3, stride 1, then no pooling); make "
        "that change first:\n\n```python\nimport timm\nfrom safetensors.torch import load_file\nfrom torch "
        "import nn\n\n"
        f'model = timm.create_model("{exported["architecture"]}", num_classes={len(recipe["labels"])})\n'
        "model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, stride=1, padding=1, bias=False)\n"
        "model.maxpool = nn.Identity()\n"
        'model.load_state_dict(load_file("FOLDER/model.safetensors"))\nmodel.eval()\n```'
    )


def _onnx(config: TrainConfig, exported: dict[str, Any], recipe: dict[str, Any]) -> str:
    output = exported["output"]
    return (
        '```python\nimport onnxruntime\n\nsession = onnxruntime.InferenceSession("FOLDER/model.onnx")\n'
        f'{output} = session.run(["{output}"], {{"images": images}})[0]  # float32, any batch size\n```'
    )


def _torch(config: TrainConfig, exported: dict[str, Any], recipe: dict[str, Any]) -> str:
    return (
        '```python\nimport torch\n\nmodel = torch.export.load("FOLDER/model.pt2").module()\n'
        f"{exported['output']} = model(images)  # float32, any batch size\n```"
    )


_USE = {"timm": _timm, "onnx": _onnx, "torch": _torch}


def _checked(name: str, check: dict[str, Any], output: str) -> str:
    same = f"same top-1 on {check['same']}, " if output == "logits" else ""
    return (
        f"- {name}: loaded again and compared with the trained model on {check['random']} random and "
        f"{check['real']} real pictures: {same}largest difference of {output} {check['difference']:.1e}"
    )


def _training(config: TrainConfig, exported: dict[str, Any], description: Description) -> str:
    lines = [
        f"Epoch {exported['epoch']} of {config.optim.epochs}, {exported['weights']} weights, split "
        f"`{config.data.train_split}`.",
        *description.lines,
    ]
    # How the model was trained, and not where or how fast.
    told = dict(description.settings)
    for group in (config.model, config.optim, config.data):
        told |= flat(group)
    del told["architecture"]
    told |= {"backbone": _backbone(config), "seed": config.seed}
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in told.items())
    return "\n".join(lines) + "\n\n| setting | value |\n|---|---|\n" + rows


def _backbone(config: TrainConfig) -> str:
    """What training started from; of a folder its last part and the hash of its files, which say enough
    elsewhere."""
    source = source_of(config.model.backbone, config.model.architecture)
    if source is None or not config.model.backbone.startswith(FOLDER):
        return config.model.backbone
    return f"{FOLDER}{os.path.basename(config.model.backbone)} ({source.revision})"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
