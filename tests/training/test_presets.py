"""The recipes against what was published, written out: a slip in a number would only show as a worse
model."""

from __future__ import annotations

from typing import Any

import pytest
import timm

from training.config import TrainConfig
from training.models import backbones
from training.presets import PRESETS, preset
from training.settings import flat

# GPT4Image's released code (github.com/huawei-noah/Efficient-Computing, GPT4Image). Its lambda of 0.3 acts
# like 0.3 / GPUs.
RESNET50 = {
    "backbone": "resnet50",
    "image_size": 224,
    "batch_size": 256 * 4,
    "epochs": 120,
    "optimizer": "momentum",
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "lr": 0.1 * 1024 / 256,
    "min_lr": 1e-5,
    "warmup_epochs": 0.0,
    "crop_scale": 0.08,
    "flip": 0.5,
    "auto_augment": "",
    "color_jitter": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "erase": 0.0,
    "label_smoothing": 0.0,
    "drop_path": 0.0,
    "repeats": 1,
    "ema": 0.0,
    "alignment_weight": 0.3 / 4,
    "temperature": 0.2,
    "head": "mlp",
    "alignment": "symmetric",
    "projection_dim": 0,
    "pretrained": False,
    "layer_decay": 1.0,
    "loss": "cross-entropy",
}
# What DeiT (arXiv 2012.12877), GPT4Image's DeiT script and ConvNeXt (arXiv 2201.03545) have in common.
COMMON = {
    "image_size": 224,
    "epochs": 300,
    "optimizer": "adamw",
    "weight_decay": 0.05,
    "crop_scale": 0.08,
    "flip": 0.5,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "mixup": 0.8,
    "cutmix": 1.0,
    "mix_switch_prob": 0.5,
    "mix_prob": 1.0,
    "erase": 0.25,
    "label_smoothing": 0.1,
    "drop_path": 0.1,
    "loss": "cross-entropy",
}
DEIT = COMMON | {
    "batch_size": 128 * 8,
    "lr": 5e-4 * 1024 / 512,
    "min_lr": 1e-5,
    "warmup_lr": 1e-6,
    "warmup_epochs": 5.0,
    "repeats": 3,
    "ema": 0.99996,
    "temperature": 0.05,
    "color_jitter": 0.3,
    "projection_dim": 0,
    "clip_grad": 0.0,
    "pretrained": False,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "paper-resnet50": RESNET50,
    "paper-deit-b": DEIT | {"backbone": "deit_base_patch16_224", "alignment_weight": 0.3 / 8},
    "deit-s": DEIT | {"backbone": "deit_small_patch16_224"},
    "convnext-t": COMMON
    | {
        "backbone": "convnext_tiny",
        "batch_size": 4096,
        "lr": 4e-3,
        "min_lr": 1e-6,
        "warmup_lr": 0.0,
        "warmup_epochs": 20.0,
        "repeats": 1,
        "ema": 0.9999,
        "layer_decay": 1.0,
        "pretrained": False,
    },
    # The fine-tuning of Hiera-T in the authors' code (github.com/dbolya/hiera, v0.2.0).
    "hiera-t-finetune": COMMON
    | {
        "backbone": "hiera_tiny_224.mae",
        "pretrained": True,
        "batch_size": 1024,
        "lr": 2e-3,
        "layer_decay": 0.65,
        "warmup_epochs": 5.0,
        "repeats": 1,
    },
    "hiera-s-finetune": {"backbone": "hiera_small_224.mae", "lr": 2e-3, "epochs": 200, "layer_decay": 0.65},
    "hiera-b-finetune": {"backbone": "hiera_base_224.mae", "lr": 2e-3, "epochs": 100, "layer_decay": 0.7},
    "hiera-b-plus-finetune": {
        "backbone": "hiera_base_plus_224.mae",
        "lr": 1e-3,
        "epochs": 100,
        "layer_decay": 0.7,
    },
    "hiera-l-finetune": {"lr": 1e-3, "epochs": 50, "layer_decay": 0.85, "drop_path": 0.1},
    "hiera-h-finetune": {"lr": 1e-3, "epochs": 50, "layer_decay": 0.85, "drop_path": 0.3},
    # arXiv 2002.11770: what many studies fine-tune ResNets with.
    "resnet50-finetune": {
        "backbone": "resnet50.a1_in1k",
        "pretrained": True,
        "optimizer": "sgd",
        "lr": 0.01,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "auto_augment": "",
        "mixup": 0.0,
        "flip": 0.5,
        "temperature": 0.2,
    },
    # github.com/google-research/vision_transformer, configs/augreg.py and common.py; lr as in its example for
    # Pets.
    "vit-s-finetune": {
        "backbone": "vit_small_patch16_224.augreg_in21k",
        "pretrained": True,
        "optimizer": "momentum",
        "lr": 0.01,
        "weight_decay": 0.0,
        "clip_grad": 1.0,
        "clip_mode": "norm",
        "drop_path": 0.0,
        "mixup": 0.0,
        "auto_augment": "",
        "temperature": 0.05,
    },
    # arXiv 2201.03545, fine-tuning of ImageNet-22K weights.
    "convnext-t-finetune": {
        "backbone": "convnext_tiny.fb_in22k",
        "pretrained": True,
        "optimizer": "adamw",
        "lr": 5e-5,
        "weight_decay": 1e-8,
        "epochs": 30,
        "layer_decay": 0.8,
        "warmup_epochs": 0.0,
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "mixup": 0.0,
        "cutmix": 0.0,
        "erase": 0.25,
        "label_smoothing": 0.1,
        "drop_path": 0.0,
        "ema": 0.0,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_the_published_one(name: str) -> None:
    config = TrainConfig.of(store="s", **preset(name))
    found = {key: flat(config)[key] for key in PUBLISHED[name]}
    assert found == pytest.approx(PUBLISHED[name])


def test_hieras_fine_tuning_takes_300_epochs_and_others_as_long_as_small_sets_need() -> None:
    """Steps on 3,000 pictures, Pets' and Flowers' size: BiT and ViT take 500 on the smallest sets."""
    assert TrainConfig.of(store="s", **preset("hiera-t-finetune")).optim.epochs == 300
    for name in ("resnet50-finetune", "vit-s-finetune", "convnext-t-finetune"):
        config = TrainConfig.of(store="s", **preset(name))
        assert 400 < config.optim.epochs * 3000 / config.optim.batch_size < 2500, name


def test_transformers_align_at_the_papers_temperature_for_them() -> None:
    for name in PRESETS:
        config = TrainConfig.of(store="s", **preset(name))
        if "vit" in config.model.backbone or "deit" in config.model.backbone:
            assert config.method.temperature == 0.05, name


def test_recipes_that_fine_tune_name_weights_that_timm_has() -> None:
    for name, settings in PRESETS.items():
        if settings.get("pretrained"):
            found = timm.get_pretrained_cfg(settings["backbone"])
            assert found is not None and found.has_weights and found.tag, name
            backbones.probe(settings["backbone"], settings["image_size"])
