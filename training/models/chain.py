"""Backbones that start from those of other runs (`--init-from`): pre-training, then fine-tuning."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from typing import Any

from timm.models.hiera import Hiera
from torch import Tensor, nn

from pipeline.errors import MissingError, SettingsError
from training import run_folder
from training.config import TrainConfig
from training.engine import checkpoint
from training.models import published_hiera
from training.models.weights import architecture_of, normalisation_of

_OF_BACKBONE = "backbone."


def check(config: TrainConfig) -> tuple[str, str]:
    """Whether a run can start from the one that it names.

    Returns:
        A line about that one, and a digest of the weights as they are now.

    Raises:
        SettingsError: there is no such run, it has no checkpoint, or its backbone is another one, or sees
            pictures normalised otherwise.
    """
    other = config.model.init_from
    if published_hiera.is_file(other):
        _fit(config)
        hiera = architecture_of(config).startswith("hiera_")
        told = f"the backbone starts from {other}" + f"; {published_hiera.LICENCE}" * hiera
        return told, _digest_of_file(other)
    try:
        before = run_folder.read(other)
        state = checkpoint.read_state(checkpoint.find(other))
    except MissingError as error:
        message = f"init_from={other}: {error}"
        raise SettingsError(message) from None
    flags = {
        "backbone": (_base(before), _base(config)),
        "patch_size": (before.model.patch_size, config.model.patch_size),
        "small_stem": (before.model.small_stem, config.model.small_stem),
    }
    differ = {name: theirs for name, (theirs, ours) in flags.items() if theirs != ours}
    if differ:
        is_so = ", ".join(
            f"{name} {before.model.backbone if name == 'backbone' else theirs}"
            for name, theirs in differ.items()
        )
        message = f"init_from={other}: that run has {is_so}; pass the same, or start from another run."
        raise SettingsError(message)
    _check_normalisation(config, before)
    _fit(config)
    epochs = len(state["history"])
    told = f"the backbone starts from {other} ({before.objective}, {epochs} of {before.optim.epochs} epochs)"
    return told, _digest(state)


def _fit(config: TrainConfig) -> None:
    """Raises SettingsError where the weights are none of this backbone's, before a worker tries."""
    import torch

    from training.models import backbones  # which start from here

    with torch.device("meta"):
        model = backbones.of_run(config.without_weights, 2)
    start(model, config.model.init_from)


def _digest(state: dict[str, Any]) -> str:
    """Of a checkpoint: what was measured and when, epoch by epoch, belongs to one training alone."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]


def _digest_of_file(file: str) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def _base(config: TrainConfig) -> str:
    """timm's architecture: a tag names weights, which are not asked for."""
    return architecture_of(config).partition(".")[0]


def _check_normalisation(config: TrainConfig, before: TrainConfig) -> None:
    """Raises SettingsError where pictures would come to the weights otherwise than they were trained on: of
    one architecture, timm's tags differ in mean and deviation."""
    theirs, ours = normalisation_of(before), normalisation_of(config)
    if theirs != ours:
        message = (
            f"init_from={config.model.init_from}: that run normalises pictures with mean {theirs[0]} and "
            f"deviation {theirs[1]}, --backbone {config.model.backbone} with {ours[0]} and {ours[1]}; pass "
            f"--backbone {before.model.backbone}."
        )
        raise SettingsError(message)


def start(model: nn.Module, run: str, state: str = "") -> None:
    """Fills a backbone from the last checkpoint of a run, from the average where it kept one; or from a file
    of weights with timm's names or those of Hiera's authors.

    The classifier stays new unless the run has one with as many classes. Another image size is timm's to
    adapt to, where the architecture can.

    Args:
        model: the backbone.
        run: folder or address of a run, or a file.
        state: digest that the weights must have (`check`): each worker reads them for itself, a restarted one
            later. Empty: any.

    Raises:
        SettingsError: the run's weights do not fit, or are others than when this one began.
    """
    if published_hiera.is_file(run):
        if state:
            _check_same(run, state, _digest_of_file(run))
        found = published_hiera.read(run)
        # The authors' names are other ones, and mean other things in other architectures: a ViT's last norm
        # is `norm` to timm.
        found = published_hiera.of_backbone(found) if isinstance(model, Hiera) else found
        fill(model, found, f"init_from={run}")
        return
    weights = {
        name.removeprefix(_OF_BACKBONE): value
        for name, value in _read(run, state).items()
        if name.startswith(_OF_BACKBONE)
    }
    fill(model, weights, f"init_from={run}")


def beside_backbone(run: str, state: str = "") -> dict[str, Tensor]:
    """What the last checkpoint of a run, or its average, has beside the backbone; see `start`."""
    tensors = _read(run, state)
    return {name: value for name, value in tensors.items() if not name.startswith(_OF_BACKBONE)}


def _read(run: str, state: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    with checkpoint.opened(run) as folder:
        if state:
            _check_same(run, state, _digest(checkpoint.read_state(folder)))
        average = os.path.join(folder, "ema.safetensors")
        return load_file(average if os.path.isfile(average) else os.path.join(folder, "model.safetensors"))


def _check_same(run: str, then: str, now: str) -> None:
    if then != now:
        message = (
            f"init_from={run}: has other weights than when this run began ({now}, not {then}); begin another "
            "run with those."
        )
        raise SettingsError(message)


def fill(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Loads all weights but those of a classifier of another size; see `start`. `source` begins the error."""
    timm_model: Any = model
    # What adapts position embeddings to another grid stands beside each of timm's architectures.
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is not None:
        weights = adapt(dict(weights), model)
    own = model.state_dict()
    if isinstance(model, Hiera) and "pos_embed" in weights:
        grid, window = model.tokens_spatial_shape, model.mask_unit_size
        weights |= {"pos_embed": published_hiera.resized_positions(weights["pos_embed"], grid, window)}
    classifier = timm_model.get_classifier()
    head = {name for name, module in model.named_modules() if module is classifier}
    new = {name for name in own if name.rpartition(".")[0] in head}
    if any(name not in weights or weights[name].shape != own[name].shape for name in new):
        weights = {name: value for name, value in weights.items() if name not in new}
    wrong = [
        f"{name}: {_shape(weights.get(name))} in place of {_shape(own.get(name))}"
        for name in sorted((own.keys() | weights.keys()) - (new - weights.keys()))
        if _shape(weights.get(name)) != _shape(own.get(name))
    ]
    if wrong:
        message = (
            f"{source}: its weights do not fit ({wrong[0]}{f' and {len(wrong) - 1} more' * (len(wrong) > 1)})"
            "; pass --backbone, --patch-size, --small-stem and --image-size as that run has them."
        )
        raise SettingsError(message)
    is_meta = any(value.is_meta for value in own.values())  # there is nothing to copy to
    model.load_state_dict(weights, strict=False, assign=is_meta)


def _shape(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else "x".join(map(str, tensor.shape)) or "a number"
