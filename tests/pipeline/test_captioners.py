"""The shipped model through both engines."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from pipeline.captioners.prompts import fill
from pipeline.captioners.protocol import Caption
from pipeline.captioners.transformers import TransformersCaptioner
from pipeline.config import CaptionConfig
from pipeline.encoders.models import resolve
from pipeline.sources import images
from pipeline.store import Store

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def captioner() -> TransformersCaptioner:
    config = CaptionConfig(store="unused", caption_preset="scenes")
    return TransformersCaptioner(config, resolve(config.model))


def truth(scenes: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (scenes / "truth.jsonl").read_text().splitlines()]
    return {row["path"]: row["caption"] for row in rows}


def test_vllm_and_transformers_say_the_same(
    described: Path, scenes: Path, captioner: TransformersCaptioner
) -> None:
    store = Store(str(described))
    variant = store.only_variant("captions")
    rows = store.read_shard("captions", variant, 0).to_pylist()[:32]
    edge = CaptionConfig(store="unused", caption_preset="scenes").caption_edge
    pictures = [images.decode_to_fit((scenes / row["id"]).read_bytes(), edge) for row in rows]
    found = captioner(
        pictures, [fill("Describe this image in detail.", "x")] * len(rows), [row["id"] for row in rows]
    )
    same = sum(mine.caption == row["caption"] for mine, row in zip(found, rows, strict=True))
    assert same >= 0.9 * len(rows), [
        (mine.caption, row["caption"]) for mine, row in zip(found, rows, strict=True)
    ]
    agreed = [(m, r) for m, r in zip(found, rows, strict=True) if m.caption == r["caption"]]
    for mine, row in agreed:
        assert (mine.prompt_tokens, mine.output_tokens) == (row["prompt_tokens"], row["output_tokens"])
        assert mine.finish_reason == row["finish_reason"] == "stop"


def words_right(described: Path, scenes: Path, shift: int) -> float:
    """Share of the true captions' words that are said, of each picture itself or of another one `shift` rows
    on."""
    store = Store(str(described))
    variant = store.only_variant("captions")
    shards = [
        store.read_shard("captions", variant, shard, ["id", "caption"]) for shard in store.split_shards("val")
    ]
    rows = [row for shard in shards for row in shard.to_pylist()]
    right = total = 0
    for place, row in enumerate(rows):
        words = set(re.findall(r"[a-z]+", truth(scenes)[row["id"]]))
        right += len(words & set(re.findall(r"[a-z]+", rows[(place + shift) % len(rows)]["caption"])))
        total += len(words)
    return right / total


def test_captions_describe_their_own_pictures_and_not_others(described: Path, scenes: Path) -> None:
    own, other = words_right(described, scenes, 0), words_right(described, scenes, 17)
    assert own > other + 0.15, (own, other)


def test_captions_name_what_is_in_the_picture(described: Path, scenes: Path) -> None:
    assert words_right(described, scenes, 0) > 0.8


def test_the_picture_reaches_the_model(captioner: TransformersCaptioner) -> None:
    prompt = ["Describe this image in detail."]
    red, blue = (
        captioner([Image.new("RGB", (90, 70), colour)], prompt, ["a"])[0] for colour in ("red", "blue")
    )
    assert red.prompt_tokens == blue.prompt_tokens and red.prompt_tokens > 60, (
        "64 picture patches and the words"
    )


def test_a_caption_cut_at_the_limit_says_so(captioner: TransformersCaptioner) -> None:
    config = CaptionConfig(store="unused", caption_preset="scenes", max_tokens=5)
    short = TransformersCaptioner(config, resolve(config.model))
    found: Caption = short([Image.new("RGB", (64, 64))], ["Describe the image."], ["a"])[0]
    assert (found.output_tokens, found.finish_reason) == (5, "length")
