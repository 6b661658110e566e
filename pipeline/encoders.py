"""Frozen text encoders: descriptions to unit-length vectors, by transformers, on a GPU or on CPU cores.

Sentence encoders pool the last layer (mean, or first token); CLIP text towers give their projected end-of-text feature.
Captions are encoded in order of length, so little is padding; tokens are counted before the cut, so truncation is known.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.models import ModelRef

Pooling = Literal["mean", "cls", "clip"]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """vectors: [N, D] float16 of unit length; tokens: [N] before the cut; truncated: [N]."""

    vectors: npt.NDArray[np.float16]
    tokens: list[int]
    truncated: list[bool]


class TextEncoder:
    """A text encoder; `dim` is D, `max_tokens` the longest input that it reads whole."""

    def __init__(self, model: ModelRef, pooling: Pooling, *, batch: int = 256) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer, CLIPTextModelWithProjection

        location = model.here()
        self._pooling = pooling
        self._batch = batch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        loader: Any = CLIPTextModelWithProjection if pooling == "clip" else AutoModel
        self._model: Any = loader.from_pretrained(location, revision=model.hub_revision, use_safetensors=True)
        self._model.to(self._device).eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(location, revision=model.hub_revision)
        config = self._model.config
        self.dim = int(config.projection_dim if pooling == "clip" else config.hidden_size)
        self.max_tokens = _max_tokens(model, location, config, self._tokenizer)

    def __call__(self, texts: list[str]) -> Encoded:
        """Encodes any number of texts; the order of the results is the order of the texts."""
        import torch

        ids = self._tokenizer(texts, add_special_tokens=True, truncation=False, verbose=False)["input_ids"] if texts else []
        tokens = [len(row) for row in ids]
        vectors = np.zeros((len(texts), self.dim), dtype=np.float16)
        order = sorted(range(len(texts)), key=tokens.__getitem__, reverse=True)  # the largest batch first: fails early if at all
        with torch.inference_mode():
            for start in range(0, len(order), self._batch):
                part = order[start : start + self._batch]
                vectors[part] = self._encode([texts[place] for place in part])
        return Encoded(vectors=vectors, tokens=tokens, truncated=[count > self.max_tokens for count in tokens])

    def _encode(self, texts: list[str]) -> npt.NDArray[np.float16]:
        import torch

        batch = self._tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        batch = batch.to(self._device)
        with torch.autocast(self._device, dtype=torch.bfloat16, enabled=self._device == "cuda"):
            output = self._model(**batch)
        if self._pooling == "clip":
            pooled = output.text_embeds.float()
        elif self._pooling == "cls":
            pooled = output.last_hidden_state[:, 0].float()
        else:
            mask = batch["attention_mask"].unsqueeze(-1).float()
            pooled = (output.last_hidden_state.float() * mask).sum(1) / mask.sum(1)
        unit = torch.nn.functional.normalize(pooled, dim=-1)
        array: npt.NDArray[np.float16] = unit.to(torch.float16).cpu().numpy()
        return array


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
