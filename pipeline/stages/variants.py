"""What decides captions, vectors and features, as one object for each: the record beside them, the variant's
name and `retry` all use it.

A field added here changes the name of every variant there is, and a resumed run would pay for all of them
again: give it a default that says what was done before, and leave it out of `record` where it has that value.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from pipeline.captioners.settings import CaptionRuntime, CaptionSettings
from pipeline.config import CaptionConfig, EmbedConfig, FeatureConfig
from pipeline.encoders.models import ModelRef
from pipeline.encoders.settings import EmbedRuntime, EmbedSettings, FeatureRuntime, FeatureSettings
from pipeline.store import variant_name


@dataclass(frozen=True, kw_only=True)
class CaptionVariant:
    """Every setting that decides what a caption says. `revision`: of the model, `served` where a server holds
    it."""

    engine: Literal["vllm", "transformers", "openai"]
    model: str
    revision: str
    prompt: str
    caption_edge: int
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    context_length: int
    captions_per_image: int

    @classmethod
    def of(cls, config: CaptionConfig, model: ModelRef) -> CaptionVariant:
        """The variant that these settings make with this model."""
        return cls(
            engine=config.captioner,
            model=model.name,
            revision=model.revision,
            **_shared(cls, config, "model"),
        )

    @classmethod
    def recorded(cls, record: dict[str, Any]) -> CaptionVariant:
        """The variant of a variant.json."""
        return cls(**_named(cls, record))

    def config(self, runtime: CaptionRuntime) -> CaptionConfig:
        """Settings that make this variant, run as `runtime` says."""
        return CaptionConfig(
            captioner=self.engine, **_shared(CaptionSettings, self), **_shared(CaptionRuntime, runtime)
        )

    def record(self) -> dict[str, Any]:
        """What variant.json says of it."""
        return asdict(self)

    @property
    def name(self) -> str:
        """The variant's folder."""
        return variant_name(f"{self.engine}-{self.model.rstrip('/').rsplit('/', 1)[-1]}", self.record())


@dataclass(frozen=True, kw_only=True)
class EmbedVariant:
    """Every setting that decides what a vector is."""

    captions: str
    encoder: str
    revision: str
    pooling: Literal["", "mean", "cls", "clip", "siglip"]
    long_captions: Literal["cut", "split"] = "cut"  # the first stores do not name it
    each_caption: bool = False

    @classmethod
    def of(cls, config: EmbedConfig, model: ModelRef) -> EmbedVariant:
        """The variant that these settings make with this model; `config.captions` names the caption
        variant."""
        return cls(encoder=model.name, revision=model.revision, **_shared(cls, config, "encoder"))

    @classmethod
    def recorded(cls, record: dict[str, Any]) -> EmbedVariant:
        """The variant of a variant.json."""
        return cls(**_named(cls, record))

    def config(self, runtime: EmbedRuntime) -> EmbedConfig:
        """Settings that make this variant, run as `runtime` says."""
        return EmbedConfig(**_shared(EmbedSettings, self), **_shared(EmbedRuntime, runtime))

    def record(self) -> dict[str, Any]:
        """What variant.json says of it; `each_caption` where it is so, for the names of earlier variants."""
        record = asdict(self)
        if not self.each_caption:
            del record["each_caption"]
        return record

    @property
    def name(self) -> str:
        """The variant's folder."""
        return variant_name(self.encoder.rsplit("/", 1)[-1].removeprefix("package:"), self.record())


@dataclass(frozen=True, kw_only=True)
class FeatureVariant:
    """Every setting that decides what a vision feature is. `feature_size`: the edge that the tower sees,
    its own too."""

    tower: str
    revision: str
    feature_size: int
    tokens: bool

    @classmethod
    def of(cls, config: FeatureConfig, model: ModelRef, size: int) -> FeatureVariant:
        """The variant that these settings make with this model, which sees pictures of `size` pixels."""
        return cls(tower=model.name, revision=model.revision, feature_size=size, tokens=config.tokens)

    @classmethod
    def recorded(cls, record: dict[str, Any]) -> FeatureVariant:
        """The variant of a variant.json."""
        return cls(**_named(cls, record))

    def config(self, runtime: FeatureRuntime) -> FeatureConfig:
        """Settings that make this variant, run as `runtime` says."""
        return FeatureConfig(**_shared(FeatureSettings, self), **_shared(FeatureRuntime, runtime))

    def record(self) -> dict[str, Any]:
        """What variant.json says of it."""
        return asdict(self)

    @property
    def name(self) -> str:
        """The variant's folder."""
        return variant_name(self.tower.rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1], self.record())


def _shared(kind: type[Any], source: object, *but: str) -> dict[str, Any]:
    """Values of `source` for the fields of `kind` that it has too."""
    names = [field.name for field in fields(kind) if field.name not in but]
    return {name: getattr(source, name) for name in names if hasattr(source, name)}


def _named(kind: type[Any], record: dict[str, Any]) -> dict[str, Any]:
    return {field.name: record[field.name] for field in fields(kind) if field.name in record}
