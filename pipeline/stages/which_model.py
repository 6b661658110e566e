"""Which model exactly captions, encodes and looks, found before anything starts."""

from __future__ import annotations

import sys

from pipeline.config import CaptionConfig, EmbedConfig, FeatureConfig
from pipeline.encoders import models
from pipeline.errors import SettingsError
from pipeline.presets import ENCODER_PRESETS


def captioner_model(config: CaptionConfig) -> models.ModelRef:
    """Which model captions: the one that a server holds, or files by their hash or the hub's commit."""
    return (
        served_model(config)
        if config.captioner == "openai"
        else models.resolve(config.model, config.model_revision)
    )


def encoder_model(config: EmbedConfig) -> models.ModelRef:
    """Which model encodes. A preset's package that is not installed (on a GPU machine) gives way to the same
    model on the hub."""
    preset = ENCODER_PRESETS[config.encoder_preset]
    if preset.twin and config.encoder == preset.encoder and not models.is_installed(config.encoder):
        print(
            f"note: {config.encoder} is not installed; taking {preset.twin} from the hub, which makes a "
            "variant of its own",
            file=sys.stderr,
        )
        return models.resolve(preset.twin, preset.twin_revision)
    return models.resolve(config.encoder, config.encoder_revision)


def tower_model(config: FeatureConfig) -> models.ModelRef:
    """Which vision tower looks at the pictures."""
    return models.resolve(config.tower, config.tower_revision)


def served_model(config: CaptionConfig) -> models.ModelRef:
    """The model that a server holds, asked before anything starts."""
    from pipeline.captioners.server import models_of

    offered = models_of(config.base_url)
    if (config.model and config.model not in offered) or (not config.model and len(offered) != 1):
        message = (
            f"model={config.model!r}: {config.base_url} serves {', '.join(offered)}; pass --model with one "
            "of these."
        )
        raise SettingsError(message)
    return models.ModelRef(name=config.model or offered[0], location=config.base_url, revision="served")
