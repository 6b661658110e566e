"""Recipes: a name, what it is for, and the settings that differ from the defaults of `TrainConfig`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from pipeline.errors import SettingsError
from pipeline.verbs import value_of as value_of
from training.objectives.registry import BUILT_IN, settings_of

_Settings = dict[str, Any]

# DeiT's augmentation and regularisation (arXiv 2012.12877), which GPT4Image's DeiT script and ConvNeXt use,
# too.
_DEIT: _Settings = {
    "image_size": 224,
    "epochs": 300,
    "batch_size": 1024,
    "optimizer": "adamw",
    "lr": 1e-3,
    "min_lr": 1e-5,
    "warmup_lr": 1e-6,
    "warmup_epochs": 5.0,
    "weight_decay": 0.05,
    "crop_scale": 0.08,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "color_jitter": 0.3,
    "erase": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
    "repeats": 3,
    "temperature": 0.05,
    "projection_dim": 0,
    "loader_workers": 12,
}

_FINE_TUNING: _Settings = {
    "image_size": 224,
    "pretrained": True,
    "min_lr": 0.0,
    "warmup_epochs": 0.0,
    "crop_scale": 0.08,
    "projection_dim": 0,
    "loader_workers": 4,
}

# What has paid where anything has (docs/evidence.md): the mean text of a class, its gradient as long as that
# of classification. A picture's own caption is far below it there, but where labels are wrong.
_TEXTS: _Settings = {
    "alignment_weight": 0.5,
    "balance": "gradients",
    "projection_dim": 0,
    "center_texts": True,
    "class_shrinkage": 1.0,
    "positives": "class",
}

_SMALL: _Settings = {
    **_TEXTS,
    "batch_size": 32,
    "lr": 1.5e-3,
    "epochs": 50,
    "crop_scale": 0.5,
    "min_epoch_steps": 100,
}


def _hiera(size: str, lr: float, epochs: int, layer_decay: float, drop_path: float = 0.1) -> _Settings:
    return {
        **_DEIT,
        "backbone": f"hiera_{size}_224.mae",
        "pretrained": True,
        "lr": lr,
        "epochs": epochs,
        "layer_decay": layer_decay,
        "drop_path": drop_path,
        "repeats": 1,
    }


PRESETS: dict[str, _Settings] = {
    # Small pictures from nothing, some thousand of them. Tuned as baselines (docs/evidence.md): what such
    # sets need is steps, some five thousand; of fewer pictures an epoch makes as many passes as that takes.
    "small-64": {**_SMALL},
    "small-32": {**_SMALL, "image_size": 32},
    "small-32-resnet": {**_SMALL, "image_size": 32, "small_stem": True},
    "small-64-vit": {
        **_SMALL,
        "backbone": "vit_tiny_patch16_224",
        "patch_size": 8,
        "batch_size": 64,
        "lr": 5e-4,
        "epochs": 60,
        "min_epoch_steps": 80,
        "temperature": 0.05,
        "warmup_epochs": 5.0,
        "clip_grad": 1.0,
    },
    "small-32-convnext": {
        **_SMALL,
        "backbone": "convnext_atto",
        "image_size": 32,
        "patch_size": 2,
        "batch_size": 64,
        "lr": 1e-3,
        "epochs": 60,
        "min_epoch_steps": 80,
        "warmup_epochs": 5.0,
        "mixup": 0.2,
        "cutmix": 0.5,
    },
    # One epoch of a tiny network: does everything fit together?
    "smoke": {
        "backbone": "test_resnet",
        "image_size": 32,
        "epochs": 1,
        "batch_size": 32,
        "warmup_epochs": 0.0,
    },
    # The embedded default: seven pictures a class. No flips: "left of" must stay true. Searched as a baseline
    # (docs/evidence.md); after every fourth pass it is evaluated, which takes as long as three passes train.
    "scenes": {
        "backbone": "test_resnet",
        "image_size": 48,
        "epochs": 30,
        "epoch_repeats": 4,
        "batch_size": 8,
        "lr": 1e-2,
        "label_smoothing": 0.1,
        "flip": 0.0,
        **_TEXTS,
        "head": "linear",
        "workers": 1,
    },
    # GPT4Image's released recipes: batch 1024, lr scaled to it. Their code says lambda 0.3 and keeps local
    # gradients only, so that it acts like 0.3 / GPUs: 0.075 for ResNet-50 on 4, 0.0375 for DeiT-B on 8. Here
    # the weight is what it says.
    "paper-resnet50": {
        "backbone": "resnet50",
        "image_size": 224,
        "epochs": 120,
        "batch_size": 1024,
        "optimizer": "momentum",
        "lr": 0.4,
        "min_lr": 1e-5,
        "weight_decay": 1e-4,
        "warmup_epochs": 0.0,
        "crop_scale": 0.08,
        "alignment_weight": 0.3 / 4,
        "temperature": 0.2,
        "projection_dim": 0,
        "loader_workers": 12,
    },
    "paper-deit-b": {
        **_DEIT,
        "backbone": "deit_base_patch16_224",
        "alignment_weight": 0.3 / 8,
        "drop_path": 0.1,
        "ema": 0.99996,
    },
    # DeiT-S and ConvNeXt-T as published (arXiv 2012.12877; 2201.03545: batch 4096, lr 4e-3, 20 warm-up
    # epochs, EMA 0.9999).
    "deit-s": {**_DEIT, "backbone": "deit_small_patch16_224", "drop_path": 0.1, "ema": 0.99996},
    "convnext-t": {
        **_DEIT,
        "backbone": "convnext_tiny",
        "batch_size": 4096,
        "lr": 4e-3,
        "min_lr": 1e-6,
        "warmup_lr": 0.0,
        "warmup_epochs": 20.0,
        "drop_path": 0.1,
        "repeats": 1,
        "ema": 0.9999,
    },
    # Hiera (arXiv 2306.00989): fine-tuning of MAE weights, timm's or with --no-pretrained --init-from those
    # of a run; lr, epochs, layer decay and drop path of its released fine-tuning.
    "hiera-t-finetune": _hiera("tiny", 2e-3, 300, 0.65),
    "hiera-s-finetune": _hiera("small", 2e-3, 200, 0.65),
    "hiera-b-finetune": _hiera("base", 2e-3, 100, 0.7),
    "hiera-b-plus-finetune": _hiera("base_plus", 1e-3, 100, 0.7),
    "hiera-l-finetune": _hiera("large", 1e-3, 50, 0.85),
    "hiera-h-finetune": _hiera("huge", 1e-3, 50, 0.85, drop_path=0.3),
    # Fine-tuning of supervised weights (network) on a thousand pictures or more; --backbone brings in others,
    # also one's own. Batches are smaller than published, so that small sets get the 500 steps and more that
    # BiT (arXiv 1912.11370) and ViT take. What most fine-tuning of ResNets uses: SGD, lr 0.01, momentum 0.9,
    # weight decay 1e-4 (arXiv 2002.11770), crop and flip.
    "resnet50-finetune": {
        **_FINE_TUNING,
        "backbone": "resnet50.a1_in1k",
        "batch_size": 64,
        "optimizer": "sgd",
        "lr": 0.01,
        "weight_decay": 1e-4,
        "epochs": 50,
        "temperature": 0.2,
    },
    # How to train your ViT (arXiv 2106.10270) as its code fine-tunes: SGD, gradients limited to 1, a short
    # warm-up, no weight decay and no regularisation; there at batch 512, for 500 steps and more.
    "vit-s-finetune": {
        **_FINE_TUNING,
        "backbone": "vit_small_patch16_224.augreg_in21k",
        "batch_size": 128,
        "optimizer": "momentum",
        "lr": 0.01,
        "weight_decay": 0.0,
        "clip_grad": 1.0,
        "warmup_epochs": 2.0,
        "epochs": 20,
        "temperature": 0.05,
    },
    # ConvNeXt (arXiv 2201.03545), its table for fine-tuning weights of ImageNet-22K; there at batch 512.
    "convnext-t-finetune": {
        **_FINE_TUNING,
        "backbone": "convnext_tiny.fb_in22k",
        "batch_size": 128,
        "lr": 5e-5,
        "min_lr": 1e-6,
        "weight_decay": 1e-8,
        "layer_decay": 0.8,
        "epochs": 30,
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "erase": 0.25,
        "label_smoothing": 0.1,
        "temperature": 0.05,
    },
}


RECIPES = 4
"""Counts the changes of recipes; a run's record has the number."""

_NO_STEPS: tuple[int, _Settings] = (2, {"min_epoch_steps": 0})
_OWN_CAPTION: tuple[int, _Settings] = (
    3,
    {
        "alignment_weight": 0.3,
        "balance": "none",
        "projection_dim": 256,
        "center_texts": False,
        "class_shrinkage": 0.0,
        "positives": "caption",
    },
)
FORMER: dict[str, tuple[tuple[int, _Settings], ...]] = {
    "small-64": (
        (0, {"batch_size": 128, "lr": 1e-3, "epochs": 40, "crop_scale": 0.35}),
        _NO_STEPS,
        _OWN_CAPTION,
    ),
    "small-32": ((0, {"batch_size": 128, "lr": 1e-3, "epochs": 40}), _NO_STEPS, _OWN_CAPTION),
    "small-32-resnet": ((0, {"batch_size": 128, "lr": 1e-3, "epochs": 40}), _NO_STEPS, _OWN_CAPTION),
    "small-64-vit": (
        (1, {"batch_size": 128, "lr": 1e-3, "epochs": 40, "crop_scale": 0.35, "drop_path": 0.05}),
        _NO_STEPS,
        _OWN_CAPTION,
    ),
    "small-32-convnext": (
        (1, {"batch_size": 128, "epochs": 40, "mixup": 0.0, "cutmix": 0.0}),
        _NO_STEPS,
        _OWN_CAPTION,
    ),
    "scenes": ((3, {"head": "mlp"}),),
}
"""What recipes said before, each with the last of `RECIPES` that it stood in: a run that was begun with them
goes on with them."""


def known() -> dict[str, _Settings]:
    """Every recipe by name, those of single training methods too."""
    return PRESETS | {name: values for method in BUILT_IN.values() for name, values in method.presets.items()}


ABOUT = "Recipes: {}; each is shown by --preset NAME --help.".format(
    "; ".join(
        [", ".join(PRESETS)]
        + [f"{name}: {', '.join(method.presets)}" for name, method in BUILT_IN.items() if method.presets]
    )
)


def owner(name: str) -> str:
    """The training method that a recipe is for.

    Raises:
        SettingsError: unknown name.
    """
    if name not in known():
        message = f"preset={name!r}: unknown; choose one of {', '.join(known())}."
        raise SettingsError(message)
    return next((method for method, told in BUILT_IN.items() if name in told.presets), "align")


def preset(name: str, objective: str = "align") -> dict[str, Any]:
    """The settings of a recipe for a training method; what it says of the method that it is for is for no
    other.

    Raises:
        SettingsError: unknown name.
    """
    foreign: set[str] = set()
    own = settings_of(owner(name))
    if not issubclass(settings_of(objective), own):
        foreign = {each.name for each in fields(own)}
    values = {key: value for key, value in known()[name].items() if key not in foreign}
    return {"preset": name, **values}


def chosen(name: str, objective: str) -> dict[str, Any]:
    """The settings of what is named: of a recipe alone also the method that it is for, of a method alone also
    its own recipe; empty: not named.

    Raises:
        SettingsError: unknown recipe or method.
    """
    objective = objective or (owner(name) if name else "align")
    name = name or (BUILT_IN[objective].preset if objective in BUILT_IN else "small-64")
    return {**preset(name, objective), "objective": objective}
