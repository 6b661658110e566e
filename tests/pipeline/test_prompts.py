"""Prompt templates and the settings of captioning."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.captioners import prompts
from pipeline.captioners.server import models_of
from pipeline.config import CaptionConfig, DescribeConfig, EmbedConfig, RetryConfig, SourceConfig
from pipeline.presets import CAPTION_PRESETS, ENCODER_PRESETS


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("n02088094_Afghan_hound", "Afghan hound"),
        ("same-shape-stacked", "same-shape-stacked"),
        ("größe_✓", "größe ✓"),
        ("n01", "n01"),
    ],
)
def test_a_class_name_is_the_folder_name_in_words(label: str, name: str) -> None:
    assert prompts.class_name(label) == name


def test_a_label_is_filled_in_and_braces_can_be_written() -> None:
    assert prompts.fill("Describe this {label}.", "a_b") == "Describe this a b."
    assert prompts.fill("Answer as {{json}}.", "x") == "Answer as {json}."


def test_a_prompt_with_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValueError, match=r"knows only \{label\}"):
        CaptionConfig(store="s", model="m", prompt="What is {this}?")


def test_presets_fill_what_flags_leave_open() -> None:
    toy = CaptionConfig(store="s", caption_preset="scenes")
    assert (toy.model, toy.caption_edge, toy.max_tokens, toy.context_length) == (
        "examples/scenes/captioner",
        128,
        64,
        256,
    )
    chosen = CaptionConfig(store="s", caption_preset="qwen2.5-vl-3b", max_tokens=7)
    assert (chosen.model, chosen.max_tokens, chosen.caption_edge) == ("Qwen/Qwen2.5-VL-3B-Instruct", 7, 448)
    assert EmbedConfig(store="s", encoder_preset="clip-vit-l14").pooling == "clip"
    for name in ENCODER_PRESETS:
        assert EmbedConfig(store="s", encoder_preset=name).encoder
    with pytest.raises(ValueError, match=r"caption_preset='x': unknown; choose one of scenes, smol"):
        CaptionConfig(store="s", caption_preset="x")


def test_describe_holds_the_settings_of_its_three_stages_and_tells_all_their_faults() -> None:
    whole = DescribeConfig(
        images="i", store="s", shard_rows=7, prompt="{label}?", caption_preset="scenes", encoder_batch=9
    )
    assert whole.part(SourceConfig).shard_rows == 7
    assert whole.part(CaptionConfig).prompt == "{label}?"
    assert whole.part(EmbedConfig).encoder_batch == 9
    with pytest.raises(ValueError) as error:
        DescribeConfig(
            images="i", store="s", model="m", shard_rows=0, prompt="{x}", encoder_batch=0, max_failure_rate=3
        )
    assert len(str(error.value).splitlines()) == 4


@pytest.mark.parametrize("verb", ["describe", "caption", "estimate"])
def test_no_captioner_is_the_default_and_the_presets_are_listed(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"describe": ("--images", "--store"), "caption": ("--store",), "estimate": ("--images",)}
    with pytest.raises(SystemExit) as stopped:
        main([verb, *(word for flag in places[verb] for word in (flag, str(tmp_path / "x")))])
    assert stopped.value.code == 2 and not list(tmp_path.iterdir())
    said = capsys.readouterr().err
    assert all(name in said for name in CAPTION_PRESETS) and "no captioner is named" in said
    assert "GPU of 24 GB" in said and "drawn shapes only" in said and "--captioner openai" in said


def test_a_model_without_a_preset_takes_nothing_from_the_toy() -> None:
    """LLaVA spends 576 tokens on a picture; the toy's context has room for 256."""
    named = CaptionConfig(store="s", model="llava-hf/llava-1.5-7b-hf")
    served = CaptionConfig(store="s", captioner="openai")
    assert (named.context_length, named.caption_edge, named.max_tokens) == (0, 448, 128)
    assert (served.model, served.context_length, served.caption_edge, served.max_tokens) == ("", 0, 448, 128)
    beside = CaptionConfig(store="s", captioner="openai", caption_preset="qwen3-vl-4b")
    assert (beside.model, beside.caption_edge) == ("", 512)


@pytest.mark.parametrize(
    "address",
    [
        "https://example.org/v1?api-key=hush-31415",
        "https://me:hush-31415@example.org/v1",
        "me:hush-31415@example.org/v1",
        "https://hush-31415@example.org/v1",
        "https://example.org/v1#hush-31415",
        "https://example.org/v1?hush-31415",
    ],
)
def test_an_address_that_holds_a_key_is_refused_and_not_repeated(address: str) -> None:
    for make in (
        lambda: CaptionConfig(store="s", captioner="openai", base_url=address),
        lambda: CaptionConfig(store="s", model="m", base_url=address),
        lambda: RetryConfig(store="s", base_url=address),
        lambda: models_of(address),
    ):
        with pytest.raises(ValueError, match="base_url: holds a user name, a password or a query") as caught:
            make()
        assert "hush" not in str(caught.value) and "OPENAI_API_KEY" in str(caught.value)
