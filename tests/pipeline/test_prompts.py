"""Prompt templates and the settings of captioning."""

from __future__ import annotations

import pytest

from pipeline import prompts
from pipeline.config import CAPTION_PRESETS, ENCODER_PRESETS, CaptionConfig, DescribeConfig, EmbedConfig, SourceConfig


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
        CaptionConfig(store="s", prompt="What is {this}?")


def test_presets_fill_what_flags_leave_open() -> None:
    assert CaptionConfig(store="s").model == CAPTION_PRESETS["scenes"]["model"]
    chosen = CaptionConfig(store="s", caption_preset="qwen2.5-vl-3b", max_tokens=7)
    assert (chosen.model, chosen.max_tokens, chosen.caption_edge) == ("Qwen/Qwen2.5-VL-3B-Instruct", 7, 448)
    assert EmbedConfig(store="s", encoder_preset="clip-vit-l14").pooling == "clip"
    for name in ENCODER_PRESETS:
        assert EmbedConfig(store="s", encoder_preset=name).encoder
    with pytest.raises(ValueError, match=r"caption_preset='x': unknown; choose one of scenes, smol"):
        CaptionConfig(store="s", caption_preset="x")


def test_describe_holds_the_settings_of_its_three_stages_and_tells_all_their_faults() -> None:
    whole = DescribeConfig(images="i", store="s", shard_rows=7, prompt="{label}?", encoder_batch=9)
    assert whole.part(SourceConfig).shard_rows == 7
    assert whole.part(CaptionConfig).prompt == "{label}?"
    assert whole.part(EmbedConfig).encoder_batch == 9
    with pytest.raises(ValueError) as error:
        DescribeConfig(images="i", store="s", shard_rows=0, prompt="{x}", encoder_batch=0, max_failure_rate=3)
    assert len(str(error.value).splitlines()) == 4
