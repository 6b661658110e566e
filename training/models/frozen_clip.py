"""A frozen CLIP of transformers: which one exactly, its two towers, its tokenizer, and what it wants as
pictures. What learns on it holds it as `Frozen`: moved along, in no checkpoint, shared by copies."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from pipeline.encoders import models, vision
from pipeline.encoders.cut import Cut
from pipeline.errors import SettingsError

TOGETHER = 256
"""Texts that go through the tower together."""


class Frozen:
    """Holds a module that does not learn beside those that do: its weights are in no state dict, in no
    optimizer and in no gradient, and a copy of its owner (the moving average) shares it."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class Owner(nn.Module):
    """A module with a `Frozen` one, which goes along to devices and memory formats."""

    def __init__(self, frozen: nn.Module) -> None:
        super().__init__()
        self._frozen = Frozen(frozen)

    @property
    def frozen(self) -> Any:
        """What does not learn."""
        return self._frozen.module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.frozen._apply(fn, recurse)
        own: Any = super()
        own._apply(fn, recurse)
        return self


@dataclass(frozen=True, kw_only=True)
class Words:
    """What a CLIP's tokenizer makes of texts."""

    tokenizer: Any
    start: tuple[int, ...]
    """Ids before every text."""
    stop: tuple[int, ...]
    """Ids behind every text; the text's feature is read at the first of them."""
    longest: int
    """Tokens that the text tower reads, those two included."""

    @classmethod
    def of(cls, tokenizer: Any, longest: int) -> Self:
        """Finds out what stands before and behind texts."""
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = tokenizer("a")["input_ids"]
        place = next(
            (n for n in range(len(whole) - len(bare) + 1) if whole[n : n + len(bare)] == bare), len(whole)
        )
        start, stop = whole[:place], whole[place + len(bare) :]
        # Where a folder has no tokenizer, transformers makes an empty one.
        if not stop or len(tokenizer) <= len(tokenizer.all_special_ids) + 1:
            message = "it has no tokenizer that puts a token behind a text, where a CLIP's feature is read"
            raise SettingsError(message)
        return cls(tokenizer=tokenizer, start=tuple(start), stop=tuple(stop[:1]), longest=longest)

    def ids(self, text: str, after: str = "") -> list[int]:
        """Of a text alone, or of one that follows a blank behind another: some tokenizers keep blanks."""
        plain: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not after:
            return plain
        before = self.tokenizer(after, add_special_tokens=False)["input_ids"]
        both: list[int] = self.tokenizer(f"{after} {text}", add_special_tokens=False)["input_ids"]
        return both[len(before) :] if both[: len(before)] == before else plain

    @functools.cached_property
    def readable(self) -> list[int]:
        """Tokens that are whole words to a person; a vocabulary of bytes has many others."""
        texts = [str(text) for text in self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))]
        whole = [text.endswith("</w>") or text.startswith(("Ġ", "▁")) for text in texts]
        return [
            token
            for token, is_whole in enumerate(whole)
            if (is_whole or not any(whole)) and (word := self.word(token)).isascii() and word.isalpha()
        ]

    def word(self, token: int) -> str:
        """As a person reads it."""
        text = str(self.tokenizer.convert_ids_to_tokens(token))
        return text.replace("</w>", "").replace("Ġ", "").replace("▁", "") or text


@dataclass(frozen=True, kw_only=True)
class FrozenClip:
    """A CLIP and how it is asked."""

    model: Any
    """transformers' CLIPModel."""
    words: Words
    pictures: dict[str, Any]
    """timm's words for what it wants as pictures: input_size, mean, std, crop_pct, interpolation."""
    cut: Cut
    """What of that timm has no words for: which pixel of an odd margin, and no floor of a quotient."""

    @property
    def size(self) -> int:
        """Edge of its pictures in pixels."""
        return int(self.model.config.vision_config.image_size)

    @property
    def width(self) -> int:
        """Of the space that pictures and texts share."""
        return int(self.model.visual_projection.out_features)


def pinned(name: str, revision: str = "") -> models.ModelRef:
    """A CLIP by its folder or its name on the hub (ORG/NAME or ORG/NAME@REVISION).

    Args:
        name: as the setting has it.
        revision: what it was resolved to before; empty: not yet. A folder must hold the same files still.

    Raises:
        SettingsError: it is not to be had, is another one by now, or holds no safetensors.
    """
    repository, _, wanted = (name, "", "") if os.path.isdir(os.path.expanduser(name)) else name.partition("@")
    if revision and not revision.startswith("files-"):
        return models.ModelRef(name=name, location=repository, revision=revision)
    try:
        model = models.resolve(repository, wanted)
    except ValueError as error:
        message = f"clip={name!r}: {error}"
        raise SettingsError(message) from None
    if revision and model.revision != revision:
        message = (
            f"clip={name!r}: its files are others ({model.revision}) than when the run began ({revision}); "
            "bring those back, or pass another --run."
        )
        raise SettingsError(message)
    return model


@functools.lru_cache(maxsize=1)
def load(model: models.ModelRef) -> FrozenClip:
    """Loads it, in float32; once, since nothing of it changes.

    Raises:
        SettingsError: it is no CLIP of transformers, or not to be had.
    """
    from transformers import AutoConfig, AutoTokenizer, CLIPModel

    where: dict[str, Any] = {"revision": model.hub_revision, "trust_remote_code": False}
    location = model.here()
    try:
        kind = AutoConfig.from_pretrained(location, **where)
        if kind.model_type != "clip":
            message = f"clip={model.name!r}: is a {kind.model_type}; pass a CLIPModel of transformers."
            raise SettingsError(message)
        with vision.quiet():
            clip: Any = CLIPModel.from_pretrained(
                location, use_safetensors=True, dtype=torch.float32, **where
            )
        tokenizer = AutoTokenizer.from_pretrained(location, **where)
    except SettingsError:
        raise
    except (OSError, ValueError, KeyError) as error:
        message = (
            f"clip={model.name!r}: cannot be loaded ({str(error).splitlines()[0]}); it needs config.json, "
            "model.safetensors, a tokenizer and preprocessor_config.json, as transformers saves them. On a "
            "machine without a network copy the folder there and pass its path."
        )
        raise SettingsError(message) from None
    try:
        words = Words.of(tokenizer, int(clip.config.text_config.max_position_embeddings))
    except SettingsError as error:
        message = f"clip={model.name!r}: {error}; pass another CLIP."
        raise SettingsError(message) from None
    seen = vision.describe(model)
    pictures = {
        "input_size": (3, seen.size, seen.size),
        "mean": seen.mean,
        "std": seen.std,
        "crop_pct": seen.size / (seen.resize or seen.size),
        "interpolation": seen.interpolation,
    }
    return FrozenClip(model=clip, words=words, pictures=pictures, cut=seen.cut)


def image_embeddings(model: Any, images: Tensor) -> Tensor:
    """[b, D] of unit length, of normalised images [b, 3, S, S]."""
    pooled = model.vision_model(pixel_values=images).pooler_output
    return nn.functional.normalize(model.visual_projection(pooled).float(), dim=-1)


def text_embeddings(clip: FrozenClip, texts: Sequence[Sequence[str]]) -> Tensor:
    """[n, D] of unit length, each the mean over some texts' own (an ensemble of prompts).

    Raises:
        SettingsError: a text is longer than the tower reads.
    """
    words, tower = clip.words, clip.model.text_model
    project = clip.model.get_submodule("text_projection")
    device = clip.model.logit_scale.device
    ids = [[*words.start, *words.ids(text), *words.stop] for several in texts for text in several]
    if (longest := max(map(len, ids))) > words.longest:
        text = [text for several in texts for text in several][list(map(len, ids)).index(longest)]
        message = (
            f"the prompt {text!r} has {longest} tokens, the text tower reads {words.longest}; shorten it."
        )
        raise SettingsError(message)
    found = []
    for first in range(0, len(ids), TOGETHER):
        part = ids[first : first + TOGETHER]
        width = max(map(len, part))
        # What stands behind a text's end is never looked at: attention is causal.
        rows = torch.tensor([[*row, *[0] * (width - len(row))] for row in part], device=device)
        ends = torch.tensor([len(row) - 1 for row in part], device=device)
        hidden = tower(input_ids=rows).last_hidden_state[torch.arange(len(part), device=device), ends]
        found.append(nn.functional.normalize(project(hidden).float(), dim=-1))
    each = torch.split(torch.cat(found), [len(several) for several in texts])
    return nn.functional.normalize(torch.stack([own.mean(0) for own in each]), dim=-1)
