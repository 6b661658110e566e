"""Captions as token ids, for methods that train a tower of texts; and the tokenizer, in CLIP's form, that is
made of the train split's captions once and kept in the store beside them."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import SettingsError
from pipeline.store import Store
from training.data.columns import Array

START, END = "<|startoftext|>", "<|endoftext|>"
"""CLIP's; the end also fills texts up and stands for what is in no vocabulary."""
_BYTES = 512
"""Tokens that there are in any case: each byte, inside a word and at its end."""


@dataclass(frozen=True, kw_only=True)
class CaptionTokens:
    """Columns `caption_ids` ([n, k, L] int32, of each of k captions) and `caption_groups` ([n, k] int64,
    equal for texts of equal tokens, -1 where there is none); see `columns.Columns`."""

    variant: str
    file: str
    """The tokenizer's, in the store."""
    several: int
    """k, captions that a picture has at most."""
    longest: int
    """L; what is longer is cut before its end."""

    def read(self, store: Store, shard: int, ids: pa.ChunkedArray) -> dict[str, Array]:
        """See the class.

        Raises:
            SettingsError: the captions are of other pictures.
        """
        table = store.read_shard("captions", self.variant, shard, ["id", "caption", "others"])
        if not ids.equals(table["id"]):
            message = f"shard {shard}: images and captions hold different rows; was the store copied in part?"
            raise SettingsError(message)
        tokens = np.zeros((len(table), self.several, self.longest), np.int32)
        groups = np.full((len(table), self.several), -1, np.int64)
        rows = [(row, place, text) for row, texts in enumerate(_texts(table)) for place, text in texts]
        if rows:
            made = encode(_loaded(store.uri, self.file), [text for _, _, text in rows], self.longest)
            where = tuple(np.array([(row, place) for row, place, _ in rows]).T)
            tokens[where] = made
            groups[where] = [_number(ids.tobytes()) for ids in made]
        return {"caption_ids": tokens, "caption_groups": groups}


def tokenizer_file(
    store: Store, variant: str, split: str, vocabulary: int, digest: str = ""
) -> tuple[str, str]:
    """(path in the store, digest) of the tokenizer of a split's captions, which is made where it is missing.

    Args:
        store: of the captions.
        variant: of them.
        split: that the tokenizer is made of.
        vocabulary: tokens that it has at most.
        digest: of one that a run began with; empty: of the captions as they are.

    Raises:
        SettingsError: no captions, or others than that one was made of and it is gone.
    """
    store.require_complete("captions", variant)
    now = _digest(store, variant, split, vocabulary)
    file = f"captions/{variant}/tokenizer-{digest or now}.json"
    if digest not in ("", now):
        print(
            f"note: the captions {variant} of {split} are others than when the run began; it keeps their "
            "tokenizer",
            file=sys.stderr,
        )
    if store.read_file(file) is None:
        if digest not in ("", now):
            message = (
                f"caption_variant={variant}: its captions are others than when the run began, and the "
                f"tokenizer of those ({file}) is gone; bring it back, or pass another --run."
            )
            raise SettingsError(message)
        store.write_file(file, make_tokenizer(_captions(store, variant, split), vocabulary).encode())
    return file, digest or now


def make_tokenizer(captions: Iterator[str], vocabulary: int) -> str:
    """A byte-level BPE with CLIP's normalisation and ends of words, as the JSON of a tokenizers.Tokenizer;
    the same captions make the same.

    Args:
        captions: that it is made of.
        vocabulary: tokens that it has at most, 515 or more.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    like: Any = CLIPTokenizer().backend_tokenizer
    core: Any = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    core.normalizer, core.pre_tokenizer = like.normalizer, like.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    core.train_from_iterator(captions, trainer)
    # Its numbers of tokens differ from time to time; the order of its merges does not.
    merges = [(pair[0], pair[1]) for pair in json.loads(core.to_str())["model"]["merges"]]
    merges = merges[: vocabulary - _BYTES - 2]
    pieces = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(pieces), START, END]
    made = as_transformers({token: number for number, token in enumerate(tokens)}, merges)
    text: str = made.backend_tokenizer.to_str()
    return text


def as_transformers(tokens: dict[str, int], merges: list[tuple[str, str]], **settings: Any) -> Any:
    """transformers' CLIPTokenizer."""
    from transformers import CLIPTokenizer

    pairs: Any = merges  # as it takes them, whatever it says
    return CLIPTokenizer(vocab=tokens, merges=pairs, **settings)


def encode(tokenizer: Any, texts: list[str], longest: int) -> Array:
    """[n, longest] int32 ids, from start to end and filled up with ends."""
    end = tokenizer.token_to_id(END)
    rows = np.full((len(texts), longest), end, np.int32)
    for row, text in zip(rows, tokenizer.encode_batch(texts), strict=True):
        kept = text.ids[: longest - 1]
        row[: len(kept)] = kept
    return rows


def cut(store: Store, variant: str, shard: int, file: str, longest: int) -> tuple[int, int]:
    """(captions of a shard that lose words to `longest`, all of its captions)."""
    table = store.read_shard("captions", variant, shard, ["caption", "others"])
    texts = [text for each in _texts(table) for _, text in each]
    lengths = [len(each.ids) for each in _loaded(store.uri, file).encode_batch(texts)]
    return sum(length > longest for length in lengths), len(texts)


def load_tokenizer(store: Store, file: str) -> Any:
    """A tokenizers.Tokenizer.

    Raises:
        SettingsError: it is gone.
    """
    from tokenizers import Tokenizer

    data = store.read_file(file)
    if data is None:
        message = f"the tokenizer {file} of the run is gone from {store.uri}; bring it back, or train again."
        raise SettingsError(message)
    return Tokenizer.from_str(data.decode())


@functools.lru_cache(maxsize=4)
def _loaded(uri: str, file: str) -> Any:
    return load_tokenizer(Store(uri), file)


def _texts(table: pa.Table) -> Iterator[list[tuple[int, str]]]:
    """Of each row its captions, numbered."""
    for first, others in zip(table["caption"].to_pylist(), table["others"].to_pylist(), strict=True):
        yield [] if first is None else list(enumerate([first, *(others or [])]))


def _captions(store: Store, variant: str, split: str) -> Iterator[str]:
    for shard in store.split_shards(split):
        table = store.read_shard("captions", variant, shard, ["caption", "others"])
        yield from (text for texts in _texts(table) for _, text in texts)


def _digest(store: Store, variant: str, split: str, vocabulary: int) -> str:
    receipts = store.receipts("captions", variant)
    parts = [str(vocabulary), *(receipts[shard].checksum for shard in store.split_shards(split))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _number(data: bytes) -> int:
    # 63 bits: never negative.
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1
