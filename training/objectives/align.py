"""GPT4Image (arXiv 2306.00693): classification plus a weight times the alignment of image features to
description embeddings.

`L = L_CE + weight * L_align`. With weight 0 there is no head and no text: the plain baseline, step for step.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.errors import SettingsError
from pipeline.store import Store
from training.config import TrainConfig
from training.data.columns import Array
from training.data.loader import Batch
from training.data.mixing import text_targets as mixed_texts
from training.data.order import shares
from training.data.texts import classes as class_texts
from training.data.texts import targets as text_targets
from training.data.texts.negatives import Negatives
from training.data.views import Draw, Views
from training.engine.gradcache import frozen_statistics
from training.evaluation import measures
from training.losses import classification
from training.losses.alignment import Form, TextGather, Texts, alignment_loss
from training.losses.balance import gradient_ratio
from training.models import backbones
from training.models.heads import Kind, ProjectionHead, TextProjection
from training.objectives.metric import Metric
from training.objectives.protocol import Description, Facts, Gradient, Losses, Objective, Precision
from training.objectives.settings.align import AlignSettings
from training.settings import flat

COLDEST = 0.01
"""CLIP's bound of a learned temperature: logits of at most 100."""


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Settings of the loss's second part; `text_dim` is D where texts are mapped to `dim` by a learned
    projection, else 0."""

    weight: float
    dim: int
    head: Kind = "mlp"
    form: Form = "symmetric"
    temperature: float = 0.2
    learn_temperature: bool = False
    text_dim: int = 0
    balanced: bool = False
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    until: float = 1.0
    grading: float | None = None
    """Temperature of graded positives, if they are graded."""
    dropout: float = 0.0
    """Share of pictures that aim at no text in a step."""
    texts: int = 2
    """How many an image is told apart from, its own among them; what the sigmoid's bias starts from."""

    def weight_at(self, progress: float) -> float:
        """lambda when this share of the training is done."""
        if progress >= self.until:
            return 0.0
        left = 1 - progress / self.until
        shape = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
        return self.weight * shape[self.schedule]


@dataclass(frozen=True)
class Goal:
    """What a worker's images aim at: all texts of the global batch (on their way), and which of them with
    which weight."""

    gather: TextGather
    groups_bK: Tensor
    weights_bK: Tensor
    negatives: Texts | None = None


@dataclass(frozen=True)
class Inputs:
    """A worker's share of a batch. A part of it has no goal, but the gradient of the joint loss instead,
    where there is one."""

    images: Tensor
    """[b, 3, H, W]."""
    classes: Tensor
    """[b] class numbers, or [b, C] probabilities."""
    goal: Goal | None = None
    """What the features aim at; None for the baseline."""
    gradient: Gradient | None = None
    weight: float | None = None
    """lambda of this step; None: as at the beginning."""
    share: float = 1.0
    """See `protocol.Task`; of the whole."""

    def __len__(self) -> int:
        return len(self.images)

    def part(self, rows: slice, gradient: Gradient | None) -> Inputs:
        """See `protocol.Inputs`."""
        return replace(
            self, images=self.images[rows], classes=self.classes[rows], goal=None, gradient=gradient
        )


class AlignTask(nn.Module):
    """Everything that trains: the backbone, and for a weight above 0 the head and what of the loss is
    learned."""

    def __init__(self, backbone: nn.Module, alignment: Alignment, criterion: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.criterion = criterion
        self.alignment = alignment
        self.head: ProjectionHead | None = None
        self.text_projection: TextProjection | None = None
        self.log_temperature: Tensor | None
        self.bias: Tensor | None
        self.register_buffer("log_temperature", None, persistent=False)
        self.register_buffer("bias", None, persistent=False)
        self.negatives: Negatives | None = None
        # Of a step in parts: pooled features of the parts, and (alignment, lambda, balance) of the whole.
        self._pooled: list[Tensor] = []
        self._joint: tuple[Tensor, float, Tensor | None]
        self.features_and_logits: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]] = (
            backbones.features_and_logits
        )
        if alignment.weight > 0:
            width = backbones.num_features(backbone)
            self.head = ProjectionHead(
                width, alignment.dim, alignment.head, batch_norm=backbones.uses_batch_norm(backbone)
            )
            if alignment.text_dim:
                self.text_projection = TextProjection(alignment.text_dim, alignment.dim)
            start = torch.tensor(math.log(alignment.temperature))
            if alignment.learn_temperature:
                del self.log_temperature  # a buffer's name cannot become a parameter's
                self.log_temperature = nn.Parameter(start)
            else:
                self.log_temperature = start
            if alignment.form == "sigmoid":
                del self.bias
                # One of so many pairs is a match: the bias starts at the logit of that, so that negatives,
                # nearly all pairs, do not push everything apart first. SigLIP's -10 (arXiv 2303.15343) is
                # this for its batches of 32 k.
                self.bias = nn.Parameter(torch.tensor(-math.log(max(1, alignment.texts - 1))))

    def prepare(self, batch: Batch, views: Views, draw: Draw) -> Inputs:
        """Starts to gather all workers' texts, which runs under what follows; mixes texts as pictures and
        labels are mixed."""
        gather = None
        if self.head is not None:
            targets, groups, dropped = self._texts(batch, draw)
            gather = TextGather(targets, groups, draw.largest_share)
        draw.begin(0)
        viewed = views(batch.images, batch.labels, draw)
        goal = None
        if gather is not None:
            negatives = (
                self.negatives.draw(draw.step, viewed.images.device) if self.negatives is not None else None
            )
            groups_bK, weights_bK = mixed_texts(groups, viewed.partner, viewed.weights)
            if dropped is not None:  # of a mixture too: its other text is not the picture's
                groups_bK = groups_bK.masked_fill(dropped[:, None], -1)
            goal = Goal(gather, groups_bK, weights_bK, negatives)
        return Inputs(
            viewed.images,
            viewed.classes,
            goal,
            weight=self.alignment.weight_at(draw.progress),
            share=draw.world * len(viewed.images) / draw.batch_size,
        )

    def _texts(self, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor, Tensor | None]:
        """([b, d] targets, [b] groups) of a batch, of several captions one; and [b], which pictures aim at no
        text in this step, None where all do."""
        targets, groups = batch.columns["targets"], batch.columns["groups"]
        if "each_target" in batch.columns:
            drawn = shares(draw.seed, "caption", draw.step, batch.samples)
            targets, groups = one_of_several(batch.columns["each_target"], batch.columns["each_group"], drawn)
        if not self.alignment.dropout:
            return targets, groups, None
        dropped = shares(draw.seed, "dropout", draw.step, batch.samples) < self.alignment.dropout
        return targets, groups, torch.from_numpy(dropped).to(groups.device)

    def forward(self, inputs: Inputs, share: float = 1.0) -> Losses:
        """One step's losses, or those of a part of it.

        Args:
            inputs: pictures, classes, and what the features aim at; of a part the gradients of the joint
                alignment loss, whose products with the features have the gradient of that loss.
            share: factor on the classification loss, so that the mean over workers and parts is that of the
                whole batch.

        Returns:
            `loss` to differentiate, and for the log `cross_entropy`, `correct` ([b]) and with a goal
            `alignment` (over the global batch), and `balance` (its factor w) where gradients are balanced.
        """
        images, classes, gradient = inputs.images, inputs.classes, inputs.gradient
        features, logits = self.features_and_logits(self.backbone, images)
        entropy = self.criterion(logits.float(), classes)
        aimed = classes if classes.ndim == 1 else classes.argmax(1)
        balanced = self.alignment.balanced and self.head is not None
        weight = self._weight(inputs)
        losses = {
            "loss": share * (1 - weight if balanced else 1) * entropy,
            "cross_entropy": entropy.detach(),
            "correct": logits.detach().argmax(1) == aimed,
        }
        if self.head is None:
            return losses
        if balanced and not features.requires_grad:  # of a frozen backbone
            features = features.detach().requires_grad_()
        z = self.head(features)
        if gradient is not None:
            linear = (z * gradient.features).sum()
            if gradient.parameters is not None:
                linear = linear + sum(
                    (p * g).sum() for p, g in zip(self.loss_parameters(), gradient.parameters, strict=True)
                )
            else:  # every part uses every parameter, or DDP would wait for it
                linear = linear + sum((0 * p).sum() for p in self.loss_parameters())
            losses["loss"] = losses["loss"] + weight * linear
        else:
            assert inputs.goal is not None
            alignment = self.align(z, inputs.goal)
            losses["alignment"] = alignment.detach()
            if balanced:
                (of_texts,) = torch.autograd.grad(alignment, features, retain_graph=True)
                losses["balance"] = gradient_ratio(share * self._of_classes(features, classes), of_texts)
                alignment = losses["balance"] * alignment
            losses["loss"] = losses["loss"] + weight * alignment
        return losses

    def _weight(self, inputs: Inputs) -> float:
        return self.alignment.weight if inputs.weight is None else inputs.weight

    def _of_classes(self, features: Tensor, classes: Tensor) -> Tensor:
        """[b, F] gradient of the classification loss with respect to the features alone.

        By a pass of its own through the classifier, since a compiled backbone gives features and logits out
        of one graph.
        """
        features = features.detach().requires_grad_()
        with torch.enable_grad():
            entropy = self.criterion(backbones.classified(self.backbone, features).float(), classes)
            (gradient,) = torch.autograd.grad(entropy, features)
        return gradient

    def align(self, z_bd: Tensor, goal: Goal) -> Tensor:
        """The alignment loss of [b, d] projected features (see `losses.alignment.alignment_loss`)."""
        assert self.log_temperature is not None
        texts, negatives = goal.gather.wait(), goal.negatives
        if self.text_projection is not None:
            texts = replace(texts, targets_Bd=self.text_projection(texts.targets_Bd))
            if negatives is not None:
                negatives = replace(negatives, targets_Bd=self.text_projection(negatives.targets_Bd))
        temperature, form = self.log_temperature.exp(), self.alignment.form
        return alignment_loss(
            z_bd,
            texts,
            goal.groups_bK,
            goal.weights_bK,
            temperature,
            form=form,
            negatives=negatives,
            bias=self.bias,
            grading=self.alignment.grading,
        )

    @torch.no_grad()
    def after_step(self) -> None:
        """A learned temperature does not fall below its bound, and its gradient can bring it back.

        As CLIP does it. A clamp in the forward pass would have no gradient beyond the bound, where a step may
        have led.
        """
        if isinstance(self.log_temperature, nn.Parameter):
            self.log_temperature.clamp_(min=math.log(COLDEST))

    def features(self, inputs: Inputs) -> Tensor | None:
        """[b, d] unit-length projected features; None for the baseline."""
        if self.head is None:
            return None
        features, _ = self.features_and_logits(self.backbone, inputs.images)
        if self.alignment.balanced and self.training:
            self._pooled.append(features)
        projected: Tensor = self.head(features)
        return projected

    def contrast(self, features: Tensor, inputs: Inputs) -> Tensor:
        """See `align`; balanced where it is to be."""
        assert inputs.goal is not None
        alignment, balance = self.align(features, inputs.goal), None
        if self.alignment.balanced:
            (of_projected,) = torch.autograd.grad(alignment, features, retain_graph=True)
            balance = self._balance_of_parts(of_projected, inputs)
        self._joint = (alignment.detach(), self._weight(inputs), balance)
        return alignment if balance is None else balance * alignment

    def _balance_of_parts(self, of_projected: Tensor, inputs: Inputs) -> Tensor:
        """As in `forward`, from the pooled features of the parts, each with its own batch statistics."""
        assert self.head is not None
        pooled, self._pooled = [part.float() for part in self._pooled], []  # no autocast here
        of_classes: list[Tensor] = []
        of_texts: list[Tensor] = []
        sizes = [len(part) for part in pooled]
        rows = (torch.split(of_projected, sizes), torch.split(inputs.classes, sizes))
        split = zip(pooled, *rows, strict=True)
        for part, projected, classes in split:
            share = inputs.share * len(part) / len(inputs)
            of_classes.append(share * self._of_classes(part, classes))
            part = part.detach().requires_grad_()
            with frozen_statistics(self.head):
                of_texts += torch.autograd.grad(self.head(part), part, projected)
        return gradient_ratio(torch.cat(of_classes), torch.cat(of_texts))

    def joined(self, sums: Losses, contrast: Tensor) -> Losses:
        """The losses of a whole batch."""
        alignment, weight, balance = self._joint
        rest = 1 if balance is None else 1 - weight
        losses = {
            **sums,
            "alignment": alignment,
            "loss": rest * sums["cross_entropy"] + weight * contrast,
        }
        return losses if balance is None else {**losses, "balance": balance}

    def compile(self) -> None:
        """The backbone: the loss differs from step to step in what it is given, and takes little."""
        self.features_and_logits = torch.compile(backbones.features_and_logits)

    def evaluator(self, device: torch.device) -> Evaluator:
        """Of this module's weights, or, for the moving average's copy, of those."""
        return Evaluator(self, device)

    def loss_parameters(self) -> list[nn.Parameter]:
        """What the alignment loss itself learns: temperature, bias, text projection."""
        own = [part for part in (self.log_temperature, self.bias) if isinstance(part, nn.Parameter)]
        return own + (list(self.text_projection.parameters()) if self.text_projection is not None else [])


class Evaluator:
    """top-1 and top-5 in percent; of an aligned model also `retrieval_rank`.

    That is the mean rank, from 1, of a picture's own caption among the different captions of the pictures
    that it is evaluated with (`loop.EVALUATED`), by the cosine of projected feature and text.
    """

    def __init__(self, task: AlignTask, device: torch.device) -> None:
        self._task = task
        self._hits = torch.zeros(5, device=device, dtype=torch.float64)

    def add(self, batch: Batch, images: Tensor, precision: Precision) -> None:
        """See `protocol.Evaluator`."""
        task, hits = self._task, self._hits
        with precision():
            features, logits = backbones.features_and_logits(task.backbone, images)
        best = logits.topk(min(5, logits.shape[1])).indices == batch.labels[:, None]
        hits[:3] += torch.stack([best[:, 0].sum(), best.sum(), torch.tensor(len(best), device=hits.device)])
        if task.head is None or "targets" not in batch.columns:
            return
        with precision():
            z_bd = task.head(features)
        texts = batch.columns["targets"]
        texts = texts if task.text_projection is None else task.text_projection(texts)
        ranks = caption_ranks(z_bd, texts, batch.columns["groups"])
        hits[3:] += torch.stack([ranks.sum(), torch.tensor(len(ranks), device=hits.device)])

    def sums(self) -> Tensor:
        """Hits among one and five, images, ranks, ranked images."""
        return self._hits

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """See the class."""
        top1, top5, count, ranks, ranked = sums
        found = {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "eval_images": count}
        return found | ({"retrieval_rank": ranks / ranked} if ranked else {})


def one_of_several(each_bkd: Tensor, groups_bk: Tensor, shares_b: Array) -> tuple[Tensor, Tensor]:
    """([b, d], [b]) of the caption that a draw in [0, 1) falls on, all of a picture's being equally likely; a
    picture without any keeps none."""
    count = (groups_bk >= 0).sum(1)
    drawn = (torch.from_numpy(shares_b).to(count.device) * count).long()
    rows = torch.arange(len(drawn), device=drawn.device)
    return each_bkd[rows, drawn].float(), groups_bk[rows, drawn]


def caption_ranks(z_bd: Tensor, texts_bd: Tensor, groups_b: Tensor) -> Tensor:
    """Rank, from 1, of each picture's own caption among the different captions of the batch; pictures without
    one have none."""
    kept = groups_b >= 0
    different, own = torch.unique(groups_b[kept], return_inverse=True)
    one_of = torch.zeros(len(different), dtype=torch.long, device=own.device)
    one_of[own] = torch.arange(len(own), device=own.device)
    cosines = z_bd[kept].float() @ texts_bd[kept][one_of].float().T
    return measures.ranks_of(cosines, own)


@dataclass(frozen=True, kw_only=True)
class AlignFacts(Facts):
    """The texts of a run; None for the baseline."""

    targets: text_targets.Targets | None = None
    similar: Array | None = None
    """[C, C] to which other classes each is how similar, where labels are spread."""


class Align(Objective):
    """See the module."""

    settings = AlignSettings
    metric = Metric()

    def check(self, config: TrainConfig, store: Store) -> AlignFacts:
        """Finds the embeddings; fits and keeps the PCA, once for all workers."""
        if config.method.is_baseline:
            return AlignFacts(variants={"embeddings": "", "captions": ""})
        method, targets, similar = config.method, None, None
        if method.alignment_weight:
            targets = text_targets.of_config(config, store)
        if method.similar_labels:
            if config.optim.label_smoothing:
                message = (
                    f"similar_labels={method.similar_labels}: takes the place of label smoothing, which is "
                    f"{config.optim.label_smoothing}; add --label-smoothing 0."
                )
                raise SettingsError(message)
            described = text_targets.of_classes(config, store)
            similar = class_texts.similar(described, method.similarity_temperature)
        name = store.only_variant("embeddings", method.embeddings) if targets is None else targets.embeddings
        store.require_complete("embeddings", name)
        return AlignFacts(
            variants={"embeddings": name, "captions": str(store.variant("embeddings", name)["captions"])},
            found={"embeddings": name},
            columns=(text_targets.TextColumns(targets),) if targets is not None else (),
            targets=targets,
            similar=similar,
        )

    def build(self, config: TrainConfig, facts: AlignFacts, classes: int) -> AlignTask:
        """Baseline and aligned start from the same backbone."""
        targets = facts.targets
        wide = targets.dim if targets is not None and config.method.text_projection == "learned" else 0
        dim = (config.method.projection_dim or wide) if wide else (targets.dim if targets is not None else 0)
        task = build_task(config, classes, dim, wide)
        if facts.similar is not None:
            task.criterion = classification.SimilarLabels(
                task.criterion, torch.from_numpy(facts.similar), config.method.similar_labels
            )
        if targets is not None and config.method.store_negatives:
            store = Store(config.store)
            task.negatives = Negatives(
                store, targets, config.data.train_split, config.method.store_negatives, config.seed
            )
        return task

    def rebuild(self, config: TrainConfig, weights: dict[str, Tensor], classes: int) -> AlignTask:
        """Its widths are those of the weights."""
        last = "head.layers.weight" if config.method.head == "linear" else "head.layers.3.weight"
        dim = len(weights[last]) if last in weights else 0
        text = weights.get("text_projection.weight")
        task = build_task(config.without_weights, classes, dim, 0 if text is None else text.shape[1])
        task.load_state_dict(weights)
        return task

    def notes(self, config: TrainConfig, store: Store, facts: AlignFacts) -> tuple[str, ...]:
        """Of pictures that have no text, and of what was found in those of classes."""
        targets = facts.targets
        if targets is None:
            return ()
        found: tuple[str, ...] = ()
        if config.method.aims_at_class_means and config.method.several_captions == "draw":
            found += (
                "--several-captions draw changes nothing where the mean text of a class is the target; "
                "pass a --class-shrinkage below 1, such as 0.5",
            )
        if config.method.aims_at_class_means and targets.tells_no_classes_apart:
            found += (
                "the texts of all classes are the same and teach nothing; gpt4image inspect shows captions",
            )
        if config.model.freeze_backbone:
            found += ("the backbone is frozen: texts reach the projection head alone, which is not exported",)
        if config.method.class_target == "estimated":
            found += (f"targets are drawn by {targets.shrinkage:.2f} towards the mean of their class",)
        elif targets.between is not None:
            width = len(targets.between)
            found += (f"classes differ in {targets.directions} of the texts' {width} directions",)
            if targets.directions == width:
                found += ("--class-target projected leaves nothing out here",)
        embeddings, split = targets.embeddings, config.data.train_split
        receipts = store.receipts("embeddings", embeddings)
        without = sum(receipts[shard].failed for shard in store.split_shards(split))
        if not without:
            return found
        counted = f"{without} of {store.dataset.splits[split].rows} pictures of the split {split}"
        return (
            *found,
            f"{counted} have no embedding in {embeddings}: they count for classification only",
        )

    def text_space(self, config: TrainConfig, store: Store, task: AlignTask) -> AlignSpace | None:
        """See `protocol.Objective`."""
        if not config.method.alignment_weight:
            return None
        names = store.variants("embeddings")
        if not config.method.embeddings and len(names) > 1:
            message = (
                f"run={config.run}: does not say which embeddings it was trained on, and the store has "
                "several: "
                f'{", ".join(names)}; write the name into "embeddings" of its config.json, or pass '
                "--no-retrieval."
            )
            raise SettingsError(message)
        return AlignSpace(task, text_targets.of_judging(config, store))

    def describe(self, config: TrainConfig, store: Store) -> Description:
        """See `protocol.Objective`."""
        if config.method.is_baseline:
            return Description(how="cross entropy", settings={"alignment_weight": 0.0})
        weight, spread = config.method.alignment_weight, config.method.similar_labels
        how = "cross entropy"
        if spread:
            how += f" (a share of {spread:g} of each label spread over classes of similar descriptions)"
        to = (
            "the mean description of each class"
            if config.method.aims_at_class_means
            else "image descriptions"
        )
        if weight and config.method.balance == "gradients":
            how = f"{1 - weight:g} times {how} plus {weight:g} times an alignment to {to}, gradients balanced"
        elif weight:
            how += f" plus {weight:g} times an alignment to {to}"
        settings = flat(config.method)
        if config.method.class_target != "shrunk":
            del settings["class_shrinkage"]  # plays no part
        if not weight:  # the others are of an alignment
            names = ("alignment_weight", "similar_labels", "similarity_temperature", "embeddings")
            settings = {name: settings[name] for name in names}
        # An early run does not name its embeddings, and there may be others by now: no reason to withhold the
        # model.
        if not config.method.embeddings and len(store.variants("embeddings")) != 1:
            return Description(how=how, settings=settings)
        embeddings = store.only_variant("embeddings", config.method.embeddings)
        encoder = store.variant("embeddings", embeddings)
        captions = store.variant("captions", str(encoder["captions"]))
        by = captions.get("model") or captions.get("engine", "unknown")
        # A model may be named by a path; its last part is enough here, the store's variant.json holds all.
        line = (
            f"Descriptions by {os.path.basename(str(by))} (captions `{encoder['captions']}`), text encoder "
            f"{os.path.basename(str(encoder['encoder']))} (embeddings `{embeddings}`)."
        )
        return Description(how=how, lines=(line,), settings=settings)


@dataclass(frozen=True)
class AlignSpace:
    """See `protocol.TextSpace`."""

    task: AlignTask
    targets: text_targets.Targets

    @property
    def embeddings(self) -> str:
        """See `protocol.TextSpace`."""
        return self.targets.embeddings

    @property
    def columns(self) -> text_targets.TextColumns:
        """See `protocol.TextSpace`."""
        return text_targets.TextColumns(self.targets)

    def images(self, features: Tensor) -> Tensor:
        """See `protocol.TextSpace`."""
        assert self.task.head is not None
        projected: Tensor = self.task.head(features)
        return projected

    def texts(self, targets: Array) -> Array:
        """As the loss compares them: through the text projection, where the run has learned one."""
        projection = self.task.text_projection
        if projection is None:
            return targets
        with torch.inference_mode():
            projected: Array = (
                projection(torch.from_numpy(targets).to(projection.weight.device)).cpu().numpy()
            )
        return projected

    def prompts(self, vectors: Array) -> Array:
        """The way of the captions."""
        return self.texts(self.targets.project(vectors))


def build_task(config: TrainConfig, classes: int, dim: int, text_dim: int = 0) -> AlignTask:
    """The model of a run, with weights that depend on the seed alone."""
    torch.manual_seed(config.seed)
    backbone = backbones.of_run(config, classes)
    alignment = Alignment(
        weight=config.method.alignment_weight,
        dim=dim,
        head=config.method.head,
        form=config.method.alignment,
        temperature=config.method.temperature,
        learn_temperature=config.method.learn_temperature,
        balanced=config.method.balance == "gradients",
        schedule=config.method.alignment_schedule,
        until=config.method.alignment_until,
        grading=config.method.similarity_temperature if config.method.positives == "similar" else None,
        dropout=config.method.caption_dropout,
        text_dim=text_dim,
        texts=config.optim.batch_size + config.method.store_negatives,
    )
    return AlignTask(
        backbone, alignment, classification.criterion(config.optim.loss, config.optim.label_smoothing)
    )


OBJECTIVE = Align()
