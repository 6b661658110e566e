"""The README.md of an exported model: what it is, how good, what it wants as input, how to load each format,
how it was made."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from pipeline.store import Store
from training.config import FOLDER, HUB, TrainConfig
from training.models.weights import source_of

# Settings that say how the model was trained, and not where or how fast.
_TOLD = (
    "backbone",
    "pretrained",
    "image_size",
    "patch_size",
    "small_stem",
    "drop_path",
    "epochs",
    "batch_size",
    "alignment_weight",
    "alignment",
    "projection_dim",
    "text_projection",
    "head",
    "temperature",
    "learn_temperature",
    "store_negatives",
    "optimizer",
    "lr",
    "weight_decay",
    "layer_decay",
    "ema",
    "ema_warmup",
    "loss",
    "label_smoothing",
    "crop_scale",
    "flip",
    "auto_augment",
    "color_jitter",
    "erase",
    "mixup",
    "cutmix",
    "repeats",
    "seed",
)


def model_card(
    config: TrainConfig, found: dict[str, Any], recipe: dict[str, Any], state: dict[str, Any], store: Store
) -> str:
    """The card as Markdown.

    Args:
        config: the run's settings.
        found: see `export.export`.
        recipe: see `export.preprocessing`.
        state: the checkpoint's.
        store: that the run was trained on.
    """
    aligned = config.alignment_weight > 0
    how = (
        f"cross entropy plus {config.alignment_weight:g} times an alignment to image descriptions"
        if aligned
        else "cross entropy"
    )
    parts = [
        "---\nlibrary_name: timm\npipeline_tag: image-classification\ntags:\n- timm\n- gpt4image-ray\n---",
        f"# {found['architecture']}, {len(recipe['labels'])} classes, {config.image_size} x "
        f"{config.image_size}",
        f"{found['parameters']:,} parameters, trained with {how} by gpt4image-ray. What served the alignment "
        f"is not in it: it has the size and speed of timm's `{found['architecture']}`.",
        "## Accuracy\n\n" + _accuracy(config, found["weights"], state),
        "## Input\n\n" + _input(recipe),
        "## Use\n\n" + "\n\n".join(_USE[name](config, found, recipe) for name in found["formats"]),
        "## Checked\n\n" + "\n".join(_checked(name, check) for name, check in found["checks"].items()),
        "## Training\n\n" + _training(config, found, store, aligned),
    ]
    return "\n\n".join(parts) + "\n"


def _accuracy(config: TrainConfig, weights: str, state: dict[str, Any]) -> str:
    if not state["history"]:
        return "Not evaluated: the checkpoint was written within the first epoch."
    last, prefix = state["history"][-1], "ema_" if weights == "ema" else ""
    top1, top5 = last.get(f"{prefix}top1"), last.get(f"{prefix}top5")
    if top1 is None or top5 is None:
        return "Not evaluated."
    images = f"{int(last['eval_images'])} images of the split `{config.eval_split}`"
    inside = ""
    if state.get("sums"):
        inside = (
            f" That was at the end of epoch {int(last['epoch'])}; these weights are from inside the next "
            "one, not evaluated."
        )
    return f"top-1 {top1:.2f} %, top-5 {top5:.2f} % on {images}, as timm's validation counts.{inside}"


def _input(recipe: dict[str, Any]) -> str:
    return (
        f"RGB; the shorter edge resized to {recipe['resize_shorter_edge']} ({recipe['interpolation']}, "
        f"antialiased), the central {recipe['center_crop']} x {recipe['center_crop']} cut out, divided by "
        f"255, minus mean {recipe['mean']}, divided by std {recipe['std']}. `preprocessing.json` says the "
        "same to programs; `labels.txt` has the classes in the logits' order."
    )


def _timm(config: TrainConfig, found: dict[str, Any], recipe: dict[str, Any]) -> str:
    if not config.small_stem:
        load = 'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()'
        return f"```python\nimport timm\n\n{load}\n```"
    return (
        "timm has no argument for this model's first convolution (3 x 3, stride 1, then no pooling); make "
        "that change first:\n\n```python\nimport timm\nfrom safetensors.torch import load_file\nfrom torch "
        "import nn\n\n"
        f'model = timm.create_model("{found["architecture"]}", num_classes={len(recipe["labels"])})\n'
        "model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, stride=1, padding=1, bias=False)\n"
        "model.maxpool = nn.Identity()\n"
        'model.load_state_dict(load_file("FOLDER/model.safetensors"))\nmodel.eval()\n```'
    )


def _onnx(config: TrainConfig, found: dict[str, Any], recipe: dict[str, Any]) -> str:
    return (
        '```python\nimport onnxruntime\n\nsession = onnxruntime.InferenceSession("FOLDER/model.onnx")\n'
        'logits = session.run(["logits"], {"images": images})[0]  # float32, any batch size\n```'
    )


def _torch(config: TrainConfig, found: dict[str, Any], recipe: dict[str, Any]) -> str:
    return (
        '```python\nimport torch\n\nmodel = torch.export.load("FOLDER/model.pt2").module()\n'
        "logits = model(images)  # float32, any batch size\n```"
    )


_USE = {"timm": _timm, "onnx": _onnx, "torch": _torch}


def _checked(name: str, check: dict[str, Any]) -> str:
    return (
        f"- {name}: loaded again and compared with the trained model on {check['random']} random and "
        f"{check['real']} real pictures: same top-1 on {check['same']}, largest difference of logits "
        f"{check['difference']:.1e}"
    )


def _training(config: TrainConfig, found: dict[str, Any], store: Store, aligned: bool) -> str:
    lines = [
        f"Epoch {found['epoch']} of {config.epochs}, {found['weights']} weights, split "
        f"`{config.train_split}`."
    ]
    # An early run does not name its embeddings, and there may be others by now: no reason to withhold the
    # model.
    if aligned and (config.embeddings or len(store.variants("embeddings")) == 1):
        embeddings = store.only_variant("embeddings", config.embeddings)
        encoder = store.variant("embeddings", embeddings)
        captions = store.variant("captions", str(encoder["captions"]))
        by = captions.get("model") or captions.get("engine", "unknown")
        # A model may be named by a path; its last part is enough here, the store's variant.json holds all of
        # it.
        lines.append(
            f"Descriptions by {os.path.basename(str(by))} (captions `{encoder['captions']}`), text encoder "
            f"{os.path.basename(str(encoder['encoder']))} (embeddings `{embeddings}`)."
        )
    settings = asdict(config) | {"backbone": _backbone(config)}
    shown = [name for name in _TOLD if aligned or name not in _ALIGNED]
    return (
        "\n".join(lines)
        + "\n\n| setting | value |\n|---|---|\n"
        + "\n".join(f"| {n} | {settings[n]} |" for n in shown)
    )


def _backbone(config: TrainConfig) -> str:
    """What training started from; of a folder its last part and the hash of its files, which say enough
    elsewhere."""
    source = source_of(config.backbone, config.architecture)
    if source is None or config.backbone.startswith(HUB):
        return config.backbone
    return f"{FOLDER}{os.path.basename(config.backbone)} ({source.revision})"


_ALIGNED = (
    "alignment",
    "projection_dim",
    "text_projection",
    "head",
    "temperature",
    "learn_temperature",
    "store_negatives",
)
