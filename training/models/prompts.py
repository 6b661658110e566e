"""Learned prompts for a frozen CLIP: context vectors instead of words (CoOp, arXiv 2109.01134), shifted by
what is seen where they are conditioned on the picture (CoCoOp, arXiv 2203.05557).

Text towers are causal, so a prompt's beginning does not know its end. What all classes have in common at the
beginning (start token and context) goes through the tower once a picture, and only what differs (the name)
once a picture and class, looking back at the kept keys and values; nothing behind the end of a prompt is
computed, and in the last layer nothing but its end. All of it is exact.

Letters: g pictures, or 1 where all share their prompts; c classes, M context vectors, P tokens that all
classes share, S others; d width of the text tower, D of the space that it shares with pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pipeline.errors import SettingsError
from training.models.frozen_clip import FrozenClip, Owner, image_embeddings, text_embeddings

Position = Literal["end", "middle", "front"]
Seen = list[tuple[Tensor, Tensor]]
"""Of each layer keys and values [g, heads, P, d / heads]."""
STD = 0.02
"""Of a random start."""


class TextTower(nn.Module):
    """The text tower of a CLIP for prompts that begin alike; a view of its weights."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.model: Any = clip.text_model
        self.projection = clip.get_submodule("text_projection")
        self.heads = clip.config.text_config.num_attention_heads

    def begin(self, prefix_gPd: Tensor) -> Seen:
        """What the rest of the prompts looks back at, of token embeddings [g, P, d]."""
        positions = self.model.embeddings.position_embedding.weight[: prefix_gPd.shape[1]]
        x, seen = prefix_gPd + positions, []
        layers = self.model.encoder.layers
        for layer in layers:
            attention, normed = layer.self_attn, layer.layer_norm1(x)
            keys, values = (self._split(part(normed)) for part in (attention.k_proj, attention.v_proj))
            seen.append((keys, values))
            if layer is not layers[-1]:
                queries = self._split(attention.q_proj(normed))
                told = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
                x = self._close(layer, x, told)
        return seen

    def end(self, rest_gcSd: Tensor, ends_c: Tensor, seen: Seen) -> Tensor:
        """[g, c, D] of token embeddings [g, c, S, d] that follow those of `begin` ([1, c, S, d]: equal for
        all g), read at the place `ends_c` of the S; not of unit length."""
        groups, before = seen[0][0].shape[0], seen[0][0].shape[2]
        classes, own = rest_gcSd.shape[1:3]
        positions = self.model.embeddings.position_embedding.weight[before : before + own]
        x = (rest_gcSd + positions).expand(groups, -1, -1, -1).flatten(0, 1)
        mask = torch.ones(own, before + own, dtype=torch.bool, device=x.device).tril(before)
        layers = self.model.encoder.layers
        rows = torch.arange(len(x), device=x.device)
        last = ends_c.repeat(groups)
        for layer, (keys, values) in zip(layers, seen, strict=True):
            attention, normed = layer.self_attn, layer.layer_norm1(x)
            keys = self._behind(keys, self._split(attention.k_proj(normed)), classes)
            values = self._behind(values, self._split(attention.v_proj(normed)), classes)
            looks = mask
            if layer is layers[-1]:
                x, normed = x[rows, last, None], normed[rows, last, None]
                looks = mask[last][:, None, None]
            queries = self._split(attention.q_proj(normed))
            told = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=looks)
            x = self._close(layer, x, told)
        pooled = self.model.final_layer_norm(x[:, 0])
        embeddings: Tensor = self.projection(pooled)
        return embeddings.view(groups, classes, -1)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    @staticmethod
    def _behind(shared: Tensor, own: Tensor, classes: int) -> Tensor:
        """[g c, heads, P + S, d / heads] of [g, ...] and [g c, ...]."""
        return torch.cat([shared[:, None].expand(-1, classes, -1, -1, -1).flatten(0, 1), own], 2)

    def _close(self, layer: Any, x: Tensor, told: Tensor) -> Tensor:
        x = x + layer.self_attn.out_proj(told.transpose(1, 2).flatten(2))
        closed: Tensor = x + layer.mlp(layer.layer_norm2(x))
        return closed


class Prompts(nn.Module):
    """Where names and context vectors stand in the prompts of some classes; nothing in it learns.

    The classes are in order of length, so that those computed together are about equally long.
    """

    base: Tensor
    slots: Tensor
    ends: Tensor
    back: Tensor
    start: Tensor

    def __init__(
        self, clip: FrozenClip, names: Sequence[str], length: int, position: Position, *, of_class: bool
    ) -> None:
        """`length` is M; `of_class`: every class has context vectors of its own.

        Raises:
            SettingsError: a prompt is longer than the text tower reads.
        """
        super().__init__()
        words = clip.words
        first = {"end": length, "middle": length // 2, "front": 0}[position]
        self.shared = 0 if of_class else first
        """How many context vectors stand before the name of any class."""
        self.of_class = of_class
        rows: list[list[int]] = []
        for name in names:
            # A negative number n is context vector -1 - n.
            context = [-1 - place for place in range(length)]
            full, tail = words.ids(f"{name}.", "a"), words.ids(".")
            bare = words.ids(name, "a")
            if full[: len(bare)] == bare:
                tail = full[len(bare) :]
            row = [*context[self.shared : first], *bare, *context[first:], *tail, words.stop[0]]
            rows.append(row)
            if (whole := len(words.start) + self.shared + len(row)) > words.longest:
                message = (
                    f"context_length={length}: the prompt of class {name!r} has {whole} tokens then, and "
                    f"the text tower reads {words.longest}; pass a smaller --context-length."
                )
                raise SettingsError(message)
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
        longest = max(map(len, rows))
        embedding = clip.model.text_model.embeddings.token_embedding
        device = embedding.weight.device  # the CLIP is shared, and another model may have taken it there
        padded = [[*rows[n], *[words.stop[0]] * (longest - len(rows[n]))] for n in order]
        ids = torch.tensor(padded, device=device)
        with torch.no_grad():
            base = embedding(ids.clamp(min=0)) * (ids >= 0)[..., None]
            start = embedding(torch.tensor(words.start, dtype=torch.long, device=device))
        self.register_buffer("base", base, persistent=False)
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("slots", torch.where(ids < 0, -ids, 0), persistent=False)
        self.register_buffer("ends", torch.tensor([len(rows[n]) - 1 for n in order]), persistent=False)
        self.register_buffer("back", torch.tensor(order).argsort(), persistent=False)
        self.order = order

    def prefix(self, context: Tensor) -> Tensor:
        """[g, P, d] of context vectors [g, M, d]; of context of each class the start token alone."""
        groups = 1 if self.of_class else len(context)
        start = self.start.expand(groups, -1, -1)
        return start if self.of_class else torch.cat([start, context[:, : self.shared]], 1)

    def rest(self, context: Tensor, classes: slice) -> tuple[Tensor, Tensor]:
        """([g or 1, c, S, d], ends [c]) of some of the classes, in this module's order."""
        slots, ends = self.slots[classes], self.ends[classes]
        longest = int(ends.max()) + 1
        slots, base = slots[:, :longest], self.base[classes, :longest]
        if not bool((slots > 0).any()):
            return base[None], ends
        if self.of_class:
            own = context[self.order[classes]]
            padded = functional.pad(own, (0, 0, 1, 0))
            placed = padded.gather(1, slots[..., None].expand(-1, -1, padded.shape[-1]))[None]
        else:
            placed = functional.pad(context, (0, 0, 1, 0))[:, slots]
        return base + placed, ends


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """How prompts are made and computed."""

    length: int
    """M; 0: as many as the words have tokens."""
    words: str = ""
    """To start from; empty: at random."""
    position: Position = "end"
    of_class: bool = False
    conditioned: bool = False
    """On the picture, as CoCoOp's."""
    at_once: int = 1024
    """Prompts that go through the text tower together. Where there are more, activations are not kept but
    computed again in the backward pass: memory does not grow with pictures x classes."""


class PromptedClip(Owner):
    """A frozen CLIP that tells classes apart by learned prompts; shaped like a model of timm, whose feature
    is the picture's embedding and whose classifier is made of the prompts.

    Its state dict is what is learned: `context`, and of conditioned prompts `generator`.
    """

    def __init__(
        self,
        clip: FrozenClip,
        names: Sequence[str],
        settings: PromptSettings,
        *,
        of: range | None = None,
        total: int = 0,
    ) -> None:
        """`of`: which of `total` classes these are; as a classifier it gives all of them logits, minus
        infinity to the others.

        Raises:
            SettingsError: words and length do not fit each other, or prompts not the tower.
        """
        start = torch.empty(0, clip.model.config.text_config.hidden_size)
        if settings.words:
            embedding = clip.model.text_model.embeddings.token_embedding
            ids = torch.tensor(clip.words.ids(settings.words), device=embedding.weight.device)
            with torch.no_grad():
                start = embedding(ids.long()).clone()
            if settings.length not in (0, len(start)):
                message = (
                    f"context_length={settings.length}: {settings.words!r} has {len(start)} tokens; pass "
                    f"--context-length {len(start)}, or 0 for as many as the words have."
                )
                raise SettingsError(message)
        length = settings.length or len(start)
        prompts = Prompts(clip, names, length, settings.position, of_class=settings.of_class)
        tower = TextTower(clip.model)
        super().__init__(nn.ModuleDict({"clip": clip.model, "prompts": prompts, "tower": tower}))
        self.settings, self.names = settings, tuple(names)
        of = range(len(names)) if of is None else of
        self._others = (of.start, max(total, of.stop) - of.stop)
        self.pretrained_cfg, self.cut = clip.pictures, clip.cut
        self.checkpoints = False
        if not settings.words:
            start = STD * torch.randn(length, start.shape[1])
        self.context = nn.Parameter(
            start.expand(len(names), -1, -1).clone() if settings.of_class else start.clone()
        )
        self.generator: nn.Module | None = None
        if settings.conditioned:
            # CoCoOp: a bottleneck of a sixteenth of the feature's width.
            hidden = clip.width // 16
            self.generator = nn.Sequential(
                nn.Linear(clip.width, hidden), nn.ReLU(), nn.Linear(hidden, start.shape[1])
            )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Computes activations of prompts again in the backward pass, however few they are."""
        self.checkpoints = enable

    @torch.no_grad()
    def forward_features(self, images: Tensor) -> Tensor:
        """[b, D] of unit length, of normalised images [b, 3, S, S]."""
        return image_embeddings(self.frozen["clip"], images)

    def forward_head(self, features: Tensor, pre_logits: bool = True) -> Tensor:
        """The features as they are."""
        return features

    def get_classifier(self) -> Any:
        """What makes logits of features."""
        return self._of_all

    def _of_all(self, features_bD: Tensor) -> Tensor:
        return functional.pad(self.logits(features_bD), self._others, value=-torch.inf)

    def logits(self, features_bD: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """[b, c] cosines over CLIP's temperature, of features of unit length; `embeddings`: of the classes,
        where they are known already."""
        if embeddings is None:
            embeddings = self.class_embeddings(features_bD if self.generator is not None else None)
        # Cosines times a hundred: bfloat16's third digit would be whole logits.
        with torch.autocast(features_bD.device.type, enabled=False):
            features = self.frozen["clip"].logit_scale.exp() * features_bD.float()
            if self.generator is None:
                logits: Tensor = features @ embeddings[0].T
            else:
                logits = (embeddings @ features[..., None])[..., 0]
        return logits

    def class_embeddings(self, features_bD: Tensor | None = None) -> Tensor:
        """[g, c, D] of unit length: of every picture where prompts are conditioned on it, else g = 1."""
        context = self.context if self.settings.of_class else self.context[None]
        if self.generator is not None:
            assert features_bD is not None
            # v_m(x) = v_m + h(x), arXiv 2203.05557, section 3.2
            context = context + self.generator(features_bD)[:, None]
        groups = 1 if self.settings.of_class else len(context)
        at_once = self.settings.at_once
        prompts = self.frozen["prompts"]
        count = len(self.names)
        pictures = max(1, min(groups, at_once // min(count, at_once)))
        classes = max(1, min(count, at_once // pictures))
        again = self.checkpoints or groups * count > at_once
        found = []
        for first in range(0, groups, pictures):
            own = context if self.settings.of_class else context[first : first + pictures]
            seen = self.frozen["tower"].begin(prompts.prefix(own))
            cut = [slice(place, min(place + classes, count)) for place in range(0, count, classes)]
            parts = [self._part(own, each, seen, again) for each in cut]
            found.append(functional.normalize(torch.cat(parts, 1).float(), dim=-1))
        embeddings: Tensor = torch.cat(found)[:, prompts.back]
        return embeddings

    def _part(self, context: Tensor, classes: slice, seen: Seen, again: bool) -> Tensor:
        def run(context: Tensor, *seen: Tensor) -> Tensor:
            rest, ends = self.frozen["prompts"].rest(context, classes)
            embeddings: Tensor = self.frozen["tower"].end(
                rest, ends, list(zip(seen[::2], seen[1::2], strict=True))
            )
            return embeddings

        flat = [part for pair in seen for part in pair]
        if again and torch.is_grad_enabled():
            found: Tensor = checkpoint(run, context, *flat, use_reentrant=False, preserve_rng_state=False)
            return found
        return run(context, *flat)

    @torch.no_grad()
    def nearest_words(self, words: Any, count: int = 3) -> list[list[tuple[str, float]]]:
        """The words whose embeddings are nearest to each context vector, with their Euclidean distances (as
        the papers' authors interpret them); of each class's own context that of the first class."""
        readable = words.readable or list(range(len(words.tokenizer)))
        table = self.frozen["clip"].text_model.embeddings.token_embedding.weight[readable]
        context = self.context[0] if self.settings.of_class else self.context
        distances, ids = torch.cdist(context.float(), table.float()).topk(
            min(count, len(readable)), largest=False
        )
        return [
            [
                (words.word(readable[int(place)]), round(float(far), 4))
                for place, far in zip(row, fars, strict=True)
            ]
            for row, fars in zip(ids, distances, strict=True)
        ]


def zero_shot(clip: FrozenClip, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """[c, D] of unit length: plain CLIP's class embeddings, the mean over some prompts with `{label}`."""
    with torch.no_grad():
        return text_embeddings(clip, [[each.format(label=name) for each in templates] for name in names])
