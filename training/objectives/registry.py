"""Training methods by name, with what command lines and reports must know of them before torch is loaded:
their settings, what they are judged by, their recipes. A method of one's own has the first two in its
file."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from pipeline.errors import SettingsError
from training.objectives.metric import Metric
from training.objectives.settings import clip, cocoop, coop, mae, mvp
from training.objectives.settings.align import AlignSettings
from training.settings import MethodSettings, flaws


@dataclass(frozen=True)
class BuiltIn:
    """A method of this package."""

    settings: type[MethodSettings]
    metric: Metric = field(default_factory=Metric)
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Its recipes by name; those of `training/presets.py` are for methods that classify."""
    preset: str = "small-64"
    """The recipe where none is named."""


BUILT_IN = {
    "align": BuiltIn(AlignSettings),
    "mae": BuiltIn(mae.MaeSettings, mae.METRIC, presets=mae.PRESETS, preset="hiera-t-mae"),
    "mvp": BuiltIn(mvp.MvpSettings, mvp.METRIC, presets=mvp.PRESETS, preset="mvp-vit-b"),
    "coop": BuiltIn(coop.CoOpSettings, presets=coop.PRESETS, preset="coop"),
    "cocoop": BuiltIn(cocoop.CoCoOpSettings, presets=cocoop.PRESETS, preset="cocoop"),
    "clip": BuiltIn(clip.ClipSettings, clip.METRIC, presets=clip.PRESETS, preset="clip-vit-b32"),
}
"""By name, which is that of the file in this folder; a test holds that settings and metric are those of the
modules."""


def module_of(name: str) -> Any:
    """The OBJECTIVE of a method by its name or import path; loads torch.

    Raises:
        SettingsError: there is no such module, or it has no OBJECTIVE.
    """
    # A command that is installed does not look where it is given.
    if name not in BUILT_IN and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return import_module(f"training.objectives.{name}" if name in BUILT_IN else name).OBJECTIVE
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        message = (
            f"objective={name!r}: {error}; known are {', '.join(BUILT_IN)}, or the import path of a module "
            "with an OBJECTIVE (training/objectives/protocol.py)."
        )
        raise SettingsError(message) from None


def settings_of(name: str) -> type[MethodSettings]:
    """The type of a method's settings.

    Raises:
        SettingsError: there is no such method, or its settings cannot be flags and records.
    """
    if name in BUILT_IN:
        return BUILT_IN[name].settings
    kind: type[MethodSettings] = getattr(module_of(name), "settings", MethodSettings)
    if found := flaws(kind):
        message = f"objective={name}: {'; '.join(found)}."
        raise SettingsError(message)
    return kind


def metric_named(name: str) -> Metric:
    """What a method is judged by."""
    if name in BUILT_IN:
        return BUILT_IN[name].metric
    found: Metric = getattr(module_of(name), "metric", Metric())
    return found


RIVALS = {"zero_shot_top1": "zero-shot", "constant_cosine": "of a constant"}
"""What a method's figure is to be held against, where its evaluator tells it, and how an epoch's line calls
it."""
SHORT_LOSSES = {"cross_entropy": "ce", "alignment": "align"}
"""How parts of the loss are called in an epoch's line; a method without any of them shows its loss."""
