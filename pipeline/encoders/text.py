"""Frozen text encoders: descriptions to unit-length vectors, by transformers, on a GPU or on CPU cores.

Sentence encoders pool the last layer (mean, or first token); CLIP and SigLIP text towers give their own text
feature. Captions are tokenised once and encoded in order of length, so little is padding; tokens are counted
before any cut.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.encoders.models import ModelRef

Pooling = Literal["mean", "cls", "clip", "siglip"]
LongTexts = Literal["cut", "split"]
# Tokens, padding included, of one forward pass. On cores, activations of 32 MiB and more are mapped afresh
# for every layer, and filling those pages took three quarters of the time (MiniLM, batches of 256); below it,
# 1,024 to 4,096 tokens are equally fast.
_BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}
# What one more call costs, in tokens: on cores measured (6 ms at 8,000 tokens a second), on a GPU assumed.
_CALL_TOKENS = {"cpu": 48, "cuda": 4096}
SENTENCE_END = re.compile(r"(?<=[.!?;])\s+")


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """embeddings: [N, D] float16 of unit length; each: [N] of [texts, D], the vectors of a list's texts
    alone; tokens: [N] before any cut; truncated: [N], whether some of it was left out."""

    embeddings: npt.NDArray[np.float16]
    each: list[npt.NDArray[np.float16]]
    tokens: list[int]
    truncated: list[bool]


class TextEncoder:
    """A text encoder; `dim` is D, `max_tokens` the longest input that it reads whole."""

    def __init__(
        self,
        model: ModelRef,
        pooling: Pooling,
        *,
        batch: int = 256,
        long_texts: LongTexts = "cut",
        device: str = "auto",
    ) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer, CLIPTextModelWithProjection, SiglipTextModel

        location = model.here()
        self._pooling = pooling
        self._batch = batch
        self._long_texts = long_texts
        self._device = "cuda" if torch.cuda.is_available() and device != "cpu" else "cpu"
        towers: dict[str, Any] = {"clip": CLIPTextModelWithProjection, "siglip": SiglipTextModel}
        loader: Any = towers.get(pooling, AutoModel)
        self._model: Any = loader.from_pretrained(
            location, revision=model.hub_revision, use_safetensors=True, trust_remote_code=False
        )
        self._model.to(self._device).eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(
            location, revision=model.hub_revision, trust_remote_code=False
        )
        config = self._model.config
        width = {"clip": "projection_dim", "siglip": "projection_size"}.get(pooling, "hidden_size")
        self.dim = int(getattr(config, width))
        self.max_tokens = _max_tokens(model, location, config, self._tokenizer)

    def __call__(self, texts: list[str]) -> Encoded:
        """Encodes any number of texts; the order of the results is the order of the texts."""
        return self.averaged([[text] for text in texts])

    def averaged(self, text_lists: list[list[str]]) -> Encoded:
        """One embedding for each list of texts, the normalised mean of the embeddings of its texts; tokens
        are the list's sum.

        With `long_texts="split"` a text beyond the limit becomes several: sentences, packed into pieces that
        fit.
        """
        inputs: list[list[int]] = []
        owners: list[int] = []
        places: list[int] = []  # of an input among all texts
        tokens, truncated = [0] * len(text_lists), [False] * len(text_lists)
        all_texts = [text for own in text_lists for text in own]
        owner_of = [owner for owner, own in enumerate(text_lists) for _ in own]
        texts = zip(owner_of, all_texts, self._ids(all_texts), strict=True)
        for place, (owner, text, ids) in enumerate(texts):
            tokens[owner] += len(ids)
            fitting = [ids]
            if len(ids) > self.max_tokens:
                pieces = self._pieces(text) if self._long_texts == "split" else [text]
                lengths = [len(piece) for piece in self._ids(pieces)]
                truncated[owner] |= max(lengths) > self.max_tokens
                fitting = self._ids(pieces, cut=True)
            inputs += fitting
            owners += [owner] * len(fitting)
            places += [place] * len(fitting)
        vectors = self._embeddings(inputs)
        ends = np.cumsum([len(own) for own in text_lists])[:-1]
        return Encoded(
            embeddings=_means(vectors, owners, len(text_lists)),
            each=np.split(_means(vectors, places, len(all_texts)), ends) if text_lists else [],
            tokens=tokens,
            truncated=truncated,
        )

    def _ids(self, texts: list[str], *, cut: bool = False) -> list[list[int]]:
        if not texts:
            return []
        limit = {"truncation": True, "max_length": self.max_tokens} if cut else {"truncation": False}
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=True, verbose=False, **limit)[
            "input_ids"
        ]
        return ids

    def _pieces(self, text: str) -> list[str]:
        """Sentences, packed in order into as few pieces as fit; a sentence that is too long by itself
        stays one piece."""
        pieces: list[str] = []
        for sentence in SENTENCE_END.split(text.strip()):
            joined = f"{pieces[-1]} {sentence}" if pieces else sentence
            if pieces and len(self._ids([joined])[0]) <= self.max_tokens:
                pieces[-1] = joined
            else:
                pieces.append(sentence)
        return pieces

    def _embeddings(self, ids: list[list[int]]) -> npt.NDArray[np.float32]:
        import torch

        embeddings = np.zeros((len(ids), self.dim), dtype=np.float32)
        # The largest batch first: what does not fit into memory fails at once and not in the end.
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]), reverse=True)
        with torch.inference_mode():
            for start, stop in _batches([len(ids[index]) for index in order], self._batch, self._device):
                indices = order[start:stop]
                embeddings[indices] = self._encode([ids[index] for index in indices])
        return embeddings

    def _encode(self, ids: list[list[int]]) -> npt.NDArray[np.float32]:
        import torch

        # SigLIP was trained on texts padded to its full length, without a mask: its feature is that of the
        # last position.
        inputs = self._padded(ids, self.max_tokens if self._pooling == "siglip" else max(map(len, ids)))
        mask = inputs["attention_mask"].unsqueeze(-1)
        if self._pooling == "siglip":
            del inputs["attention_mask"]
        with torch.autocast(self._device, dtype=torch.bfloat16, enabled=self._device == "cuda"):
            output = self._model(**inputs)
        if self._pooling == "clip":
            pooled = output.text_embeds.float()
        elif self._pooling == "siglip":
            pooled = output.pooler_output.float()
        elif self._pooling == "cls":
            pooled = output.last_hidden_state[:, 0].float()
        else:
            pooled = (output.last_hidden_state.float() * mask).sum(1) / mask.sum(1)
        array: npt.NDArray[np.float32] = torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()
        return array

    def _padded(self, ids: list[list[int]], width: int) -> dict[str, Any]:
        """Token ids and mask, [N, width]; what the tokenizer's own `pad` gives, twenty times sooner."""
        import torch

        left = self._tokenizer.padding_side == "left"
        tokens = np.full((len(ids), width), self._tokenizer.pad_token_id or 0, dtype=np.int64)
        mask = np.zeros_like(tokens)
        for row, text in enumerate(ids):
            columns = slice(width - len(text), width) if left else slice(0, len(text))
            tokens[row, columns], mask[row, columns] = text, 1
        return {
            "input_ids": torch.from_numpy(tokens).to(self._device),
            "attention_mask": torch.from_numpy(mask).to(self._device),
        }


def _means(vectors: npt.NDArray[np.float32], owners: list[int], count: int) -> npt.NDArray[np.float16]:
    """[count, D] normalised means of the vectors that each owns."""
    sums = np.zeros((count, vectors.shape[1]), dtype=np.float32)
    np.add.at(sums, owners, vectors)
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    means: npt.NDArray[np.float16] = (sums / np.maximum(norms, 1e-12)).astype(np.float16)
    return means


def _batches(lengths: list[int], most: int, device: str) -> list[tuple[int, int]]:
    """Cuts descending lengths where the tokens computed, padding and the cost of each call included, are
    fewest.

    By dynamic programming: the cheapest way to cut the first j texts ends with a batch i..j after the
    cheapest way to cut i.
    """
    longest = np.asarray(lengths)
    cost, start = np.zeros(len(lengths) + 1), np.zeros(len(lengths) + 1, dtype=int)
    for stop in range(1, len(lengths) + 1):
        begins = np.arange(max(0, stop - most), stop)
        tokens = (stop - begins) * longest[begins]
        whole = cost[begins] + tokens + _CALL_TOKENS[device]
        whole[:-1][tokens[:-1] > _BATCH_TOKENS[device]] = np.inf  # one text alone is always allowed
        best = int(whole.argmin())
        cost[stop], start[stop] = whole[best], begins[best]
    batches, stop = [], len(lengths)
    while stop:
        batches.append((int(start[stop]), stop))
        stop = batches[-1][0]
    return batches[::-1]


def _max_tokens(model: ModelRef, location: str, config: Any, tokenizer: Any) -> int:
    """The smallest of what the sentence-transformers file, the tokenizer and the position table allow."""
    from transformers.utils.hub import cached_file

    limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    path = cached_file(
        location,
        "sentence_bert_config.json",
        revision=model.hub_revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is not None:
        with open(path, encoding="utf-8") as stream:
            limits.append(json.load(stream).get("max_seq_length"))
    return min(int(limit) for limit in limits if limit and limit < 10**6)
