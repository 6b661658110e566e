"""CLIP (arXiv 2103.00020): a tower for pictures and one for captions, trained together from nothing to tell
which caption belongs to which picture of a batch.

`L = (CE of pictures over captions + CE of captions over pictures) / 2` of cosines over a learned temperature,
over the global batch; pictures of equal captions are positives of each other. No labels are used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.captioners.prompts import class_name
from pipeline.errors import SettingsError
from pipeline.store import Store
from training.config import TrainConfig
from training.data.few_shot import classes_of
from training.data.loader import Batch
from training.data.order import ROW, SHARD, shares
from training.data.texts import tokens as caption_tokens
from training.data.texts.tokens import END, START, CaptionTokens
from training.data.views import Draw, Views
from training.evaluation import measures
from training.evaluation.outputs import Judge, Outputs
from training.export import clip_folder
from training.losses.contrast import contrastive_loss
from training.models.clip_towers import TOGETHER, ClipTowers
from training.objectives.protocol import (
    Description,
    Facts,
    Finding,
    Gradient,
    Losses,
    Objective,
    Precision,
)
from training.objectives.settings.clip import METRIC, ClipSettings
from training.settings import flat

COLDEST = 0.01
"""CLIP's bound of the temperature: logits of at most 100."""
NOT_OF_CLIP = ("pretrained", "init_from", "small_stem", "drop_path", "freeze_backbone")


@dataclass(frozen=True)
class Inputs:
    """A worker's share of a batch. A part of it has the gradient of the joint loss instead of a loss of its
    own."""

    images: Tensor
    """[b, 3, S, S]."""
    ids: Tensor
    """[b, L] token ids."""
    groups: Tensor
    """[b] equal for equal captions, -1 where there is none."""
    size: int
    """Rows of the worker that has most."""
    gradient: Gradient | None = None

    def __len__(self) -> int:
        return len(self.images)

    def part(self, rows: slice, gradient: Gradient | None) -> Inputs:
        """See `protocol.Inputs`."""
        own = (self.images[rows], self.ids[rows], self.groups[rows])
        return replace(self, images=own[0], ids=own[1], groups=own[2], gradient=gradient)


class ClipTask(nn.Module):
    """Both towers and the temperature."""

    def __init__(self, backbone: ClipTowers) -> None:
        super().__init__()
        self.backbone = backbone

    def prepare(self, batch: Batch, views: Views, draw: Draw) -> Inputs:
        """Of several captions a picture draws one."""
        draw.begin(0)
        viewed = views(batch.images, batch.labels, draw)
        every, groups = batch.columns["caption_ids"], batch.columns["caption_groups"]
        drawn = torch.from_numpy(shares(draw.seed, "caption", draw.step, batch.samples)).to(groups.device)
        rows = torch.arange(len(groups), device=groups.device)
        picked = (drawn * (groups >= 0).sum(1)).long()
        return Inputs(viewed.images, every[rows, picked], groups[rows, picked], draw.largest_share)

    def features(self, inputs: Inputs) -> Tensor:
        """[b, 2 d]: picture's and caption's, each of unit length."""
        return torch.cat([self.backbone.forward_features(inputs.images), self.backbone.texts(inputs.ids)], 1)

    def contrast(self, features: Tensor, inputs: Inputs) -> Tensor:
        """See `contrastive_loss`."""
        images, texts = features.chunk(2, 1)
        return contrastive_loss(images, texts, inputs.groups, self.backbone.scale, inputs.size)

    def forward(self, inputs: Inputs, share: float = 1.0) -> Losses:
        """`loss`; of a part what has the gradient of the joint one. `share` has no meaning for it: it is over
        the global batch."""
        features, gradient = self.features(inputs), inputs.gradient
        if gradient is None:
            return {"loss": self.contrast(features, inputs)}
        loss = (features * gradient.features).sum()
        # Every part uses every parameter, or DDP would wait for it.
        own = gradient.parameters or [torch.zeros_like(each) for each in self.loss_parameters()]
        loss = loss + sum((p * g).sum() for p, g in zip(self.loss_parameters(), own, strict=True))
        return {"loss": loss}

    def loss_parameters(self) -> list[nn.Parameter]:
        """The temperature."""
        return [self.backbone.model.logit_scale]

    def joined(self, sums: Losses, contrast: Tensor) -> Losses:
        """The joint loss is all."""
        return {**sums, "loss": contrast}

    @torch.no_grad()
    def after_step(self) -> None:
        """The temperature does not fall below its bound."""
        self.backbone.model.logit_scale.clamp_(max=-math.log(COLDEST))

    def compile(self) -> None:
        """The tower of pictures; texts differ in length from step to step."""
        vision = self.backbone.model.vision_model
        vision.forward = torch.compile(vision.forward)

    def evaluator(self, device: torch.device) -> Evaluator:
        """See `protocol.Task`."""
        return Evaluator(self, device)


class Evaluator:
    """Among the pictures that are evaluated together (`loop.EVALUATED`) and their different captions, by
    cosine: `image_to_text_recall1` (a picture's own caption is the first) and `text_to_image_recall1` (a
    picture of the caption is the first), in percent; `retrieval_recall1`, their mean; `retrieval_rank`, the
    mean of both ranks, from 1. Of several captions the first counts."""

    def __init__(self, task: ClipTask, device: torch.device) -> None:
        self._task, self._sums = task, torch.zeros(7, dtype=torch.float64, device=device)

    def add(self, batch: Batch, images: Tensor, precision: Precision) -> None:
        """See `protocol.Evaluator`."""
        with precision():
            seen = self._task.backbone.forward_features(images)
            told = self._task.backbone.texts(batch.columns["caption_ids"][:, 0])
        groups = batch.columns["caption_groups"][:, 0]
        found = [torch.tensor([len(images)])]
        for ranks in measures.both_ranks(seen, told, groups):
            found.append(torch.stack([(ranks == 1).sum(), ranks.sum(), torch.tensor(len(ranks))]))
        self._sums += torch.cat([each.to(self._sums) for each in found])

    def sums(self) -> Tensor:
        """Pictures; firsts, ranks, number of pictures with a caption; the same of captions."""
        return self._sums

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """See the class."""
        count, hits, ranks, pictures, text_hits, text_ranks, captions = sums
        pictures, captions = max(pictures, 1), max(captions, 1)
        recalls = 100 * hits / pictures, 100 * text_hits / captions
        return {
            "retrieval_recall1": sum(recalls) / 2,
            "image_to_text_recall1": recalls[0],
            "text_to_image_recall1": recalls[1],
            "retrieval_rank": (ranks / pictures + text_ranks / captions) / 2,
            "eval_images": count,
        }


@dataclass(frozen=True, kw_only=True)
class ClipFacts(Facts):
    """The tokenizer's file in the store."""

    file: str


class Clip(Objective):
    """See the module."""

    settings = ClipSettings
    metric = METRIC

    def check(self, config: TrainConfig, store: Store) -> ClipFacts:
        """Finds the captions and makes their tokenizer, where the store has none."""
        method, model = config.method, config.model
        faults = [
            f"{name}: is for models of timm; leave it out." for name in NOT_OF_CLIP if getattr(model, name)
        ]
        if config.optim.layer_decay != 1:
            faults.append("layer_decay: both towers start from nothing; leave it out.")
        if config.data.mixes:
            faults.append("mixup, cutmix: a mixture of pictures has no caption; leave them out.")
        if config.optim.loss == "bce" or config.optim.label_smoothing:
            faults.append("loss bce, label_smoothing: are of classifiers; leave them out.")
        if not model.patch_size or model.image_size % model.patch_size:
            faults.append(
                f"patch_size={model.patch_size}: must divide --image-size {model.image_size}, such as "
                f"{max(1, model.image_size // 7)}."
                if not model.patch_size
                else f"image_size={model.image_size}: must be a multiple of --patch-size {model.patch_size}."
            )
        if faults:
            raise SettingsError("\n".join(faults))
        variant = store.only_variant("captions", method.caption_variant)
        store.require_complete("captions", variant)
        receipts = store.receipts("captions", variant)
        for split in (config.data.train_split, config.data.eval_split):
            if all(receipts[shard].failed == receipts[shard].rows for shard in store.split_shards(split)):
                message = f"caption_variant={variant}: no picture of the split {split} has a caption."
                raise SettingsError(message)
        file, digest = caption_tokens.tokenizer_file(
            store, variant, config.data.train_split, method.vocabulary, method.tokenizer_digest
        )
        several = int(store.variant("captions", variant).get("captions_per_image", 1))
        column = CaptionTokens(variant=variant, file=file, several=several, longest=method.context_tokens)
        return ClipFacts(
            variants={"captions": variant},
            found={"caption_variant": variant, "tokenizer_digest": digest},
            columns=(column,),
            file=file,
        )

    def build(self, config: TrainConfig, facts: ClipFacts, classes: int) -> ClipTask:
        """See `protocol.Objective`."""
        return build_task(config, Store(config.store), facts.file)

    def rebuild(self, config: TrainConfig, weights: dict[str, Tensor], classes: int) -> ClipTask:
        """With the tokenizer that it was trained with, and the classes that the store has now."""
        task = build_task(config, Store(config.store), file_of(config))
        task.load_state_dict(weights)
        return task

    def notes(self, config: TrainConfig, store: Store, facts: ClipFacts) -> tuple[str, ...]:
        """Of pictures that have no caption, and of captions that are longer than what is read of them."""
        variant, split = facts.variants["captions"], config.data.train_split
        receipts, shards = store.receipts("captions", variant), store.split_shards(split)
        told = []
        if without := sum(receipts[shard].failed for shard in shards):
            told.append(f"{without} pictures of {split} have no caption: they teach nothing")
        longest = config.method.context_tokens
        some, of = caption_tokens.cut(store, variant, shards[0], facts.file, longest)
        if some:
            told.append(f"the end is cut of {some} of the first {of} captions: --context-tokens {longest}")
        return tuple(told)

    def findings(
        self, config: TrainConfig, judge: Judge, split: str, outputs: Outputs, templates: Sequence[str]
    ) -> list[Finding]:
        """Retrieval among all pictures of the split, and, with `templates`, the accuracy of other prompts of
        classes."""
        store, backbone, method = judge.store, judge.task.backbone, config.method
        assert outputs.features is not None
        columns = CaptionTokens(
            variant=method.caption_variant, file=file_of(config), several=1, longest=method.context_tokens
        )
        found: dict[str, list[Any]] = {"caption_ids": [], "caption_groups": []}
        for shard in dict.fromkeys(outputs.samples[:, SHARD].tolist()):
            rows = outputs.samples[outputs.samples[:, SHARD] == shard][:, ROW]
            ids = store.read_shard("images", "", shard, ["id"])["id"]
            for name, column in columns.read(store, shard, ids).items():
                found[name].append(column[rows, 0])
        tokens, groups = (torch.from_numpy(np.concatenate(each)).to(judge.device) for each in found.values())
        with torch.inference_mode():
            texts = torch.cat([backbone.texts(part) for part in torch.split(tokens, TOGETHER)])
            features = torch.from_numpy(outputs.features).to(judge.device)
            ranks = measures.both_ranks(features, texts, groups)
            told = [
                Finding(
                    name=f"{name} R@1",
                    value=100 * float((each == 1).double().mean()),
                    note=f"R@5 {100 * float((each <= 5).double().mean()):.2f} %, median rank "
                    f"{float(each.double().median()):g}; {len(ranks[0])} pictures, {len(ranks[1])} captions",
                )
                for name, each in zip(("image to text", "text to image"), ranks, strict=True)
                if len(each)
            ]
            if templates:
                tokenizer = caption_tokens.load_tokenizer(store, file_of(config))
                prompts = prompts_of(tokenizer, store.dataset.classes, templates, method.context_tokens)
                classes = backbone.class_embeddings(prompts.to(judge.device))
                of = classes_of(config.data.class_half, len(classes))
                best = (features @ classes[of.start : of.stop].T).argmax(1).cpu().numpy() + of.start
                share = 100 * float((best == outputs.labels).mean())
                told.append(Finding(name="zero-shot top-1", value=share, note=", ".join(templates)))
        return told

    def export(self, config: TrainConfig, task: ClipTask, folder: str) -> dict[str, Any]:
        """See `clip_folder.write`."""
        tokenizer = caption_tokens.load_tokenizer(Store(config.store), file_of(config))
        return clip_folder.write(config, task.backbone, tokenizer, folder, config.method.caption_variant)

    def describe(self, config: TrainConfig, store: Store) -> Description:
        """See `protocol.Objective`."""
        line = f"Captions: `{config.method.caption_variant}`."
        return Description(
            how="CLIP's contrast of pictures and captions", lines=(line,), settings=flat(config.method)
        )


def file_of(config: TrainConfig) -> str:
    """Where the store has the tokenizer of a run that was begun."""
    return f"captions/{config.method.caption_variant}/tokenizer-{config.method.tokenizer_digest}.json"


def build_task(config: TrainConfig, store: Store, file: str) -> ClipTask:
    """The model of a run, with weights that depend on the seed alone."""
    method, tokenizer = config.method, caption_tokens.load_tokenizer(store, file)
    torch.manual_seed(config.seed)
    towers = ClipTowers(
        image_size=config.model.image_size,
        patch_size=config.model.patch_size,
        vision={
            "width": method.vision_width,
            "layers": method.vision_layers,
            "heads": method.vision_width // method.head_width,
        },
        text={
            "width": method.text_width,
            "layers": method.text_layers,
            "heads": method.text_width // method.head_width,
            "tokens": method.context_tokens,
            "vocabulary": tokenizer.get_vocab_size(),
            "start": tokenizer.token_to_id(START),
            "end": tokenizer.token_to_id(END),
        },
        shared_width=method.shared_width,
        temperature=method.initial_temperature,
        prompts_CTL=prompts_of(
            tokenizer, store.dataset.classes, method.zero_shot_templates, method.context_tokens
        ),
    )
    return ClipTask(towers)


def prompts_of(tokenizer: Any, classes: Sequence[str], templates: Sequence[str], longest: int) -> Tensor:
    """[C, T, L] token ids of each class's prompts."""
    texts = [each.format(label=class_name(name)) for name in classes for each in templates]
    ids = caption_tokens.encode(tokenizer, texts, longest)
    return torch.from_numpy(ids).view(len(classes), len(templates), longest)


OBJECTIVE = Clip()
