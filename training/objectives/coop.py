"""CoOp (arXiv 2109.01134): context vectors in place of the words around a class's name, learned from a few
pictures of each class, with both towers of a CLIP frozen.

`p(y | x) = softmax_y(cos(f(x), g([v_1] ... [v_M] [name of y].)) / tau)`: f and g are CLIP's, tau CLIP's own;
what learns is v. Pictures' embeddings never change, so the store's are read where it has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.captioners.prompts import class_name
from pipeline.errors import SettingsError
from pipeline.store import Store
from training.config import TrainConfig
from training.data.few_shot import classes_of, rows_of
from training.data.loader import Batch
from training.data.views import Draw, Views
from training.data.vision_features import FeatureColumns, made_by
from training.evaluation.measures import harmonic_mean
from training.evaluation.outputs import Judge, Loaded, Outputs
from training.export import prompts as exporting
from training.losses import classification
from training.models import frozen_clip
from training.models.prompts import PromptedClip, PromptSettings, zero_shot
from training.objectives.metric import Metric
from training.objectives.protocol import Facts, Finding, Gradient, Losses, Objective, Precision
from training.objectives.settings.coop import CoOpSettings, PromptLearning

NONE = "none"
"""Of --image-features: each step anew."""
NOT_OF_CLIP = ("pretrained", "init_from", "patch_size", "small_stem", "drop_path", "freeze_backbone")


@dataclass(frozen=True)
class Inputs:
    """Pictures' embeddings, or the pictures, and their classes among those that take part."""

    classes: Tensor
    """[b] numbers, or [b, c] probabilities."""
    features: Tensor | None = None
    """[b, D] of unit length."""
    images: Tensor | None = None

    def __len__(self) -> int:
        return len(self.classes)

    def part(self, rows: slice, gradient: Gradient | None) -> Inputs:
        """See `protocol.Inputs`; there is no joint loss."""
        return Inputs(*(None if each is None else each[rows] for each in vars(self).values()))  # type: ignore[arg-type]


class PromptTask(nn.Module):
    """Prompts that learn on a frozen CLIP; what is learned is all that its state dict has."""

    def __init__(
        self, backbone: PromptedClip, criterion: nn.Module, classes: range, zero_shot_cD: Tensor
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.criterion = criterion
        self.classes = classes
        self.register_buffer("zero_shot", zero_shot_cD, persistent=False)
        self.zero_shot: Tensor

    def prepare(self, batch: Batch, views: Views, draw: Draw) -> Inputs:
        """Numbers the classes that take part from 0."""
        draw.begin(0)
        if (kept := _kept(batch)) is not None:
            return Inputs(batch.labels - self.classes.start, features=kept)
        viewed = views(batch.images, batch.labels, draw)
        numbers = viewed.classes
        numbers = (
            numbers - self.classes.start
            if numbers.ndim == 1
            else numbers[:, self.classes.start : self.classes.stop]
        )
        return Inputs(numbers, images=viewed.images)

    def forward(self, inputs: Inputs, share: float = 1.0) -> Losses:
        """Cross entropy over CLIP's scaled cosines, for the log `cross_entropy` and `correct`."""
        features = inputs.features
        if features is None:
            assert inputs.images is not None
            features = self.backbone.forward_features(inputs.images)
        logits = self.backbone.logits(features)
        entropy = self.criterion(logits.float(), inputs.classes)
        aimed = inputs.classes if inputs.classes.ndim == 1 else inputs.classes.argmax(1)
        return {
            "loss": share * entropy,
            "cross_entropy": entropy.detach(),
            "correct": logits.detach().argmax(1) == aimed,
        }

    def after_step(self) -> None:
        """Nothing."""

    def compile(self) -> None:
        """The tower of pictures, where they go through it in every step; prompts are few kernels of changing
        shape."""
        vision = self.backbone.frozen["clip"].vision_model
        vision.forward = torch.compile(vision.forward)

    def evaluator(self, device: torch.device) -> Evaluator:
        """See `protocol.Task`."""
        return Evaluator(self, device)


class Evaluator:
    """top-1 and top-5 in percent among the classes that take part, and `zero_shot_top1`, plain CLIP's."""

    def __init__(self, task: PromptTask, device: torch.device) -> None:
        self._task, self._hits = task, torch.zeros(4, device=device, dtype=torch.float64)
        backbone = task.backbone
        self._embeddings = None if backbone.generator is not None else backbone.class_embeddings()

    def add(self, batch: Batch, images: Tensor, precision: Precision) -> None:
        """See `protocol.Evaluator`."""
        task, labels = self._task, batch.labels - self._task.classes.start
        with precision():
            features = _kept(batch)
            features = task.backbone.forward_features(images) if features is None else features
            logits = task.backbone.logits(features, self._embeddings)
        seen = features.any(1)  # without an embedding all classes are alike, and the first would be a guess
        best = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]) & seen[:, None]
        plain = ((features.float() @ task.zero_shot.T).argmax(1) == labels) & seen
        counts = (best[:, 0].sum(), best.sum(), plain.sum(), torch.tensor(len(best), device=best.device))
        self._hits += torch.stack(counts)

    def sums(self) -> Tensor:
        """Hits among one and five, of plain CLIP; images."""
        return self._hits

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """See the class."""
        top1, top5, plain, count = sums
        shares = {"top1": top1, "top5": top5, "zero_shot_top1": plain}
        return {name: 100 * hits / count for name, hits in shares.items()} | {"eval_images": count}


def _kept(batch: Batch) -> Tensor | None:
    """[b, D] of unit length from the store; None where it is not asked."""
    pooled = batch.columns.get("pooled")
    return None if pooled is None else nn.functional.normalize(pooled.float(), dim=-1)


class CoOp(Objective):
    """See the module."""

    settings: type[PromptLearning] = CoOpSettings
    metric = Metric()
    conditioned = False

    def check(self, config: TrainConfig, store: Store) -> Facts:
        """Finds the CLIP and the store's features of it; makes every prompt once."""
        method = config.method
        given = [name for name in NOT_OF_CLIP if getattr(config.model, name)]
        faults = [f"{name}: is for models of timm; leave it out." for name in given]
        if config.optim.layer_decay != 1:
            faults.append("layer_decay: prompts have no layers; leave it out.")
        model = frozen_clip.pinned(method.clip, method.clip_revision)
        clip = frozen_clip.load(model)
        named = "" if method.image_features == NONE else method.image_features
        variant = "" if method.image_features == NONE else made_by(store, model.revision, clip.size, named)
        data = config.data
        if variant and (data.mixes or data.erase):
            faults.append(
                "image_features: pictures that are mixed or erased have no embedding in the store; pass "
                "--image-features none."
            )
        if config.model.image_size != clip.size:
            faults.append(
                f"image_size={config.model.image_size}: {method.clip} sees {clip.size} pixels; pass "
                f"--image-size {clip.size}."
            )
        names = self._names(config, store.dataset.classes)
        if len(names) < 2:
            faults.append(
                f"class_half={data.class_half}: has {len(names)} of the classes, and that is "
                "nothing to tell apart."
            )
        if faults:
            raise SettingsError("\n".join(faults))
        PromptedClip(clip, names, self._prompts(config))
        zero_shot(clip, [max(names, key=lambda name: len(clip.words.ids(name)))], method.zero_shot_templates)
        return Facts(
            variants={"features": variant} if variant else {},
            found={"clip_revision": model.revision, "image_features": variant or NONE},
            columns=(FeatureColumns(variant=variant),) if variant else (),
            pictures=not variant,
        )

    def build(self, config: TrainConfig, facts: Any, classes: int) -> PromptTask:
        """Random contexts depend on the seed alone."""
        method = config.method
        torch.manual_seed(config.seed)
        clip = frozen_clip.load(frozen_clip.pinned(method.clip, method.clip_revision))
        names = self._names(config, Store(config.store).dataset.classes)
        return PromptTask(
            PromptedClip(
                clip, names, self._prompts(config), of=self._classes(config, classes), total=classes
            ),
            classification.criterion(config.optim.loss, config.optim.label_smoothing),
            self._classes(config, classes),
            zero_shot(clip, names, method.zero_shot_templates),
        )

    def rebuild(self, config: TrainConfig, weights: dict[str, Tensor], classes: int) -> PromptTask:
        """Bound to the names that the store has now, of the classes that take part.

        Raises:
            SettingsError: contexts of each class's own, and the classes are others.
        """
        task = self.build(config, None, classes)
        own = task.backbone.context
        if weights["backbone.context"].shape != own.shape and own.ndim == 3:
            message = (
                f"class_half={config.data.class_half}: {len(weights['backbone.context'])} classes have "
                f"contexts of their own, and these are {len(own)} others; train with common ones to use "
                "them so."
            )
            raise SettingsError(message)
        task.load_state_dict(weights)
        return task

    def _prompts(self, config: TrainConfig) -> PromptSettings:
        method = config.method
        return PromptSettings(
            length=method.context_length,
            words=method.context_words,
            position=method.class_position,
            of_class=not self.conditioned and method.context_per_class,
            conditioned=self.conditioned,
            at_once=method.prompts_at_once,
        )

    def _classes(self, config: TrainConfig, count: int) -> range:
        return classes_of(config.data.class_half, count)

    def _names(self, config: TrainConfig, classes: Sequence[str]) -> list[str]:
        """As words: blue-ring is a "blue ring" to a text tower."""
        own = self._classes(config, len(classes))
        return [class_name(classes[number]).replace("-", " ") for number in own]

    def notes(self, config: TrainConfig, store: Store, facts: Facts) -> tuple[str, ...]:
        """Classes of one name; where pictures' embeddings come from, and which have none."""
        names, told = self._names(config, store.dataset.classes), []
        if alike := sorted({name for name in names if names.count(name) > 1}):
            told.append(
                f"several classes are called {', '.join(alike[:3])}, and nothing tells them apart; "
                "`gpt4image ingest --class-names` gives others"
            )
        variant = facts.variants.get("features")
        if not variant:
            return tuple(told)
        told += [f"embeddings of pictures are read from the store ({variant}): no crop, no flip"]
        receipts = store.receipts("features", variant)
        for split in dict.fromkeys((config.data.train_split, config.data.eval_split)):
            if without := sum(receipts[shard].failed for shard in store.split_shards(split)):
                told.append(f"{without} pictures of {split} have none: they teach nothing and count as wrong")
        return tuple(told)

    def findings(
        self, config: TrainConfig, judge: Judge, split: str, outputs: Outputs, templates: Sequence[str]
    ) -> list[Finding]:
        """Plain CLIP beside it; of prompts learned on base classes also what they are worth on new ones, and
        both together; the words nearest to the context."""
        method, half = config.method, config.data.class_half
        templates = templates or method.zero_shot_templates
        names = f"{half} classes" if half != "all" else "classes"
        asked = f"among {len(judge.task.classes)} {names}; {', '.join(templates)}"
        plain = self._zero_shot(config, outputs, templates)
        found = [Finding(name="zero-shot top-1", value=plain, note=asked)]
        other, count = config.but(class_half="new"), len(judge.store.dataset.classes)
        if half == "base" and not _has_pictures(other, judge.store, split):
            found.append(Finding(name="new top-1", note=f"{split} has no usable picture of the new classes"))
        elif half == "base" and judge.task.backbone.context.ndim == 2:
            task = self.rebuild(other, judge.task.state_dict(), count).eval()
            new = Judge(other, Loaded(task=task, weights="", state={})).outputs(split, features=True)
            pairs = {
                "": (100 * float(outputs.correct.mean()), 100 * float(new.correct.mean())),
                "zero-shot ": (plain, self._zero_shot(other, new, templates)),
            }
            for kind, (base, unseen) in pairs.items():
                note = f"among {len(task.classes)} classes that it was not trained on"
                found += [
                    Finding(name=f"{kind}new top-1", value=unseen, note=note),
                    Finding(
                        name=f"{kind}H", value=harmonic_mean(base, unseen), note="harmonic mean, base and new"
                    ),
                ]
        clip = frozen_clip.load(frozen_clip.pinned(method.clip, method.clip_revision))
        nearest = judge.task.backbone.nearest_words(clip.words)
        words = [", ".join(f"{word} {distance:.2f}" for word, distance in each) for each in nearest]
        return [*found, Finding(name="nearest words", note="; ".join(words))]

    def _zero_shot(self, config: TrainConfig, outputs: Outputs, templates: Sequence[str]) -> float:
        """Top-1 of plain CLIP, in percent, among the classes that take part."""
        method, classes = config.method, Store(config.store).dataset.classes
        clip = frozen_clip.load(frozen_clip.pinned(method.clip, method.clip_revision))
        embeddings = zero_shot(clip, self._names(config, classes), templates).cpu().numpy()
        assert outputs.features is not None
        best = (outputs.features @ embeddings.T).argmax(1) + self._classes(config, len(classes)).start
        return 100 * float((best == outputs.labels).mean())

    def export(self, config: TrainConfig, task: PromptTask, folder: str) -> dict[str, Any]:
        """See `exporting.write`."""
        return exporting.write(config, task.backbone, folder)


def _has_pictures(config: TrainConfig, store: Store, split: str) -> bool:
    try:
        return len(rows_of(config, store, split)) > 0
    except SettingsError:
        return False


OBJECTIVE = CoOp()
