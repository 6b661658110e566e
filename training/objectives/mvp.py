"""MVP (arXiv 2203.05175): masked image modelling towards the features that a frozen vision tower, such as
CLIP's, has of each patch; no labels and no captions.

`L = mean over masked patches of 2 - 2 cos(prediction, teacher's feature)`, where the teacher sees the whole
picture, in the very crop of the student. What trains beside the backbone predicts and stays behind.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, layer_norm, smooth_l1_loss

from pipeline.encoders import models, vision
from pipeline.errors import SettingsError
from pipeline.store import Store
from training.config import TrainConfig
from training.data import masking, vision_features
from training.data.loader import Batch
from training.data.views import Draw, Views
from training.models import backbones, masked_vit
from training.objectives.protocol import Description, Facts, Gradient, Losses, Objective, Precision
from training.objectives.settings.mvp import METRIC, MvpSettings
from training.settings import flat


@dataclass(frozen=True)
class Inputs:
    """A worker's share of a batch."""

    images: Tensor
    """[b, 3, S, S]."""
    masked: Tensor
    """[b, N] bool."""
    targets: Tensor
    """[b, N, D'] normalised features of the teacher."""

    def __len__(self) -> int:
        return len(self.images)

    def part(self, rows: slice, gradient: Gradient | None) -> Inputs:
        """See `protocol.Inputs`; there is no joint loss."""
        return Inputs(self.images[rows], self.masked[rows], self.targets[rows])


class MvpTask(nn.Module):
    """The backbone without a classifier, and what predicts; `teacher` is no module and is asked, not kept."""

    def __init__(
        self, backbone: nn.Module, predictor: nn.Module, settings: MvpSettings, *, grid: int, token_dim: int
    ) -> None:
        super().__init__()
        self.grid, self.dim = grid, token_dim
        self.backbone, self.predictor, self.settings = backbone, predictor, settings
        self.teacher: vision.VisionTower | None = None
        self.predict = predictor.forward

    def prepare(self, batch: Batch, views: Views, draw: Draw) -> Inputs:
        """Masks by (seed, step, sample), and what the teacher says of the same crops."""
        draw.begin(0)
        own = self.settings
        masked = masking.masks(
            own.mask_shape, self.grid, own.mask_ratio, (draw.seed, draw.step), batch.samples
        )
        images = views.norm(batch.images)
        return Inputs(images, torch.from_numpy(masked).to(images.device), self.targets(batch))

    def targets(self, batch: Batch) -> Tensor:
        """[b, N, D'] features of the teacher, each with mean 0 and deviation 1 over its components; from the
        store, or of the batch's crops."""
        if "tokens" in batch.columns:
            tokens = batch.columns["tokens"].float()
        else:
            assert self.teacher is not None, "a rebuilt task is for its backbone"
            tokens = self.teacher.to(batch.images.device)(batch.images).tokens
        return layer_norm(tokens, tokens.shape[-1:])

    def errors(self, predicted: Tensor, targets: Tensor) -> Tensor:
        """[b, N] losses of patches; 0 for those of a picture that has no stored features."""
        if self.settings.token_loss == "cosine":
            errors = 2 - 2 * cosine_similarity(predicted, targets, dim=-1)
        else:
            beta = self.settings.smooth_l1_beta
            errors = smooth_l1_loss(predicted, targets, beta=beta, reduction="none").mean(-1)
        return errors * targets.any(-1)

    def forward(self, inputs: Inputs, share: float = 1.0) -> Losses:
        """`loss` to differentiate, and for the log `token_loss` and the cosine to the teacher
        (`train_cosine`), of [b] pictures each: means over their patches."""
        predicted = self.predict(self.backbone, inputs.images, inputs.masked).float()
        errors = self.errors(predicted, inputs.targets)
        # No indexing by masks: the device would have to tell the host how many there are.
        masked = inputs.masked / inputs.masked.sum(1, keepdim=True)
        all_count = self.settings.supervised_patches == "all"
        of_pictures = errors.mean(1) if all_count else (errors * masked).sum(1)
        cosines = cosine_similarity(predicted.detach(), inputs.targets, dim=-1)
        # Pictures without features are among those of the mean: the gradient is the same for any number of
        # workers.
        return {
            "loss": share * of_pictures.mean(),
            "token_loss": of_pictures.detach(),
            "train_cosine": (cosines * masked).sum(1),
        }

    def compile(self) -> None:
        """The student; masks come from outside."""
        self.predict = torch.compile(self.predictor.forward)

    def after_step(self) -> None:
        """Nothing."""

    def evaluator(self, device: torch.device) -> Evaluator:
        """See `protocol.Task`."""
        return Evaluator(self, device)


class Evaluator:
    """`cosine` and `token_error` (the loss) at masked patches, whose masks are the same for a picture in
    every epoch and run; and `constant_cosine`, what the best constant prediction would reach."""

    def __init__(self, task: MvpTask, device: torch.device) -> None:
        self._task, self._device = task, device
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._units = torch.zeros(task.dim, dtype=torch.float64, device=device)

    def add(self, batch: Batch, images: Tensor, precision: Precision) -> None:
        """See `protocol.Evaluator`."""
        task, own = self._task, self._task.settings
        found = masking.fixed(own.mask_shape, task.grid, own.mask_ratio, batch.samples)
        masked = torch.from_numpy(found).to(self._device)
        with precision():
            predicted = task.predictor(task.backbone, images, masked)
        predicted, targets = predicted.float()[masked], task.targets(batch)[masked]
        cosines, errors = cosine_similarity(predicted, targets, dim=-1), task.errors(predicted, targets)
        taught = targets.any(-1).sum()
        counts = torch.stack([taught, torch.tensor(len(images), device=self._device)])
        self._sums += torch.cat([torch.stack([cosines.double().sum(), errors.double().sum()]), counts])
        self._units += (targets / targets.norm(dim=-1, keepdim=True).clamp_min(1e-12)).double().sum(0)

    def sums(self) -> Tensor:
        """Cosines, losses, patches, images, and the sum of the teacher's unit-length features."""
        return torch.cat([self._sums, self._units])

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """See the class."""
        cosine, error, patches, images, *units = sums
        # The mean cosine to the mean direction is the length of the mean unit vector.
        constant = sum(value**2 for value in units) ** 0.5 / max(1, patches)
        return {
            "cosine": cosine / max(1, patches),
            "token_error": error / max(1, patches),
            "constant_cosine": constant,
            "eval_images": images,
        }


@dataclass(frozen=True, kw_only=True)
class MvpFacts(Facts):
    """The teacher, which no step asks where its features are stored."""

    teacher: models.ModelRef | None
    token_dim: int


class Mvp(Objective):
    """See the module."""

    settings = MvpSettings
    metric = METRIC

    def check(self, config: TrainConfig, store: Store) -> MvpFacts:
        """Finds the teacher or its features, and that its patches are the student's."""
        own, data = config.method, config.data
        faults = [
            f"{name}={getattr(data, name)}: changes the student's picture after the teacher has seen it; "
            f"leave it out with --objective {config.objective}."
            for name in ("mixup", "cutmix", "erase")
            if getattr(data, name)
        ]
        if own.stored_features:
            faults += [
                f"{flag}: stored features are of pictures as they are evaluated; pass {mend}."
                for flag, mend, wrong in (
                    (f"flip={data.flip}", "--flip 0", data.flip > 0),
                    (f"crop_scale={data.crop_scale}", "--crop-scale 1", data.crop_scale < 1),
                    (
                        "auto_augment, color_jitter",
                        "neither",
                        bool(data.auto_augment or data.color_jitter),
                    ),
                )
                if wrong
            ]
        if config.optim.loss == "bce" or config.optim.label_smoothing:
            faults.append("loss bce, label_smoothing: are of classifiers; leave them out.")
        if config.model.freeze_backbone:
            faults.append("freeze_backbone: is for a classifier on top; the backbone is what trains here.")
        if faults:
            raise SettingsError("\n".join(faults))
        found = self._stored(config, store) if own.stored_features else self._asked(config)
        return found

    def _asked(self, config: TrainConfig) -> MvpFacts:
        own = config.method
        if own.teacher_revision:
            teacher = models.recorded(own.teacher, own.teacher_revision)
        else:
            teacher = models.resolve(own.teacher)
        try:
            told = vision.describe(teacher, own.teacher_size)
        except SettingsError as error:
            message = f"teacher={own.teacher}, teacher_size={own.teacher_size}: {error}"
            raise SettingsError(message) from None
        _check_grids(config, told.grid, told.size, own.teacher)
        return MvpFacts(
            found={"teacher_revision": teacher.revision}, teacher=teacher, token_dim=told.token_dim
        )

    def _stored(self, config: TrainConfig, store: Store) -> MvpFacts:
        name, record = vision_features.found(store, config.method.feature_variant, tokens=True)
        if config.method.teacher not in ("", record["tower"]):
            message = (
                f"teacher={config.method.teacher}: the features {name} are of {record['tower']}; leave "
                "--teacher out, or pass --feature-variant with features of that teacher."
            )
            raise SettingsError(message)
        if not record["resize"]:
            message = (
                f"feature_variant={name}: {record['tower']} squashes pictures, which a student's views are "
                "not; ask it at every step (without --stored-features)."
            )
            raise SettingsError(message)
        _check_grids(config, record["grid"], record["feature_size"], name)
        columns = vision_features.FeatureColumns(
            variant=name, names=("tokens",), token_dim=record["token_dim"]
        )
        return MvpFacts(
            variants={"features": name},
            found={"feature_variant": name, "teacher": record["tower"]},
            columns=(columns,),
            fixed_cut=vision_features.cut_of(record),
            teacher=None,
            token_dim=record["token_dim"],
        )

    def build(self, config: TrainConfig, facts: MvpFacts, classes: int) -> MvpTask:
        """See `protocol.Objective`."""
        return self._with_teacher(build_task(config, facts.token_dim), config, facts)

    def _with_teacher(self, task: MvpTask, config: TrainConfig, facts: MvpFacts) -> MvpTask:
        if facts.teacher is not None:
            # It follows the pictures to their device.
            task.teacher = vision.VisionTower(facts.teacher, size=config.method.teacher_size, device="cpu")
        return task

    def rebuild(self, config: TrainConfig, weights: dict[str, Tensor], classes: int) -> MvpTask:
        """Without the teacher."""
        task = build_task(config.without_weights, len(weights["predictor.linear.weight"]))
        task.load_state_dict(weights)
        return task

    def for_evaluation(self, config: TrainConfig, store: Store, task: MvpTask) -> MvpFacts:
        """The teacher again, or its features."""
        facts = self.check(config, store)
        self._with_teacher(task, config, facts)
        return facts

    def notes(self, config: TrainConfig, store: Store, facts: MvpFacts) -> tuple[str, ...]:
        """What the result owes to others' data, and pictures without features."""
        of = config.method.teacher or facts.found["teacher"]
        told = [f"the teacher is {of}; what that was trained on is part of what this run learns from"]
        if name := facts.variants.get("features", ""):
            receipts = store.receipts("features", name)
            for split in dict.fromkeys((config.data.train_split, config.data.eval_split)):
                if without := sum(receipts[shard].failed for shard in store.split_shards(split)):
                    told.append(
                        f"{without} pictures of {split} have no features in {name}: they do not count"
                    )
        return tuple(told)

    def describe(self, config: TrainConfig, store: Store) -> Description:
        """See `protocol.Objective`."""
        own = config.method
        # A folder's path is no one else's business; its last part and the hash of its files are.
        is_file = own.stored_features or own.teacher_revision.startswith("files-")
        teacher = os.path.basename(own.teacher.rstrip("/")) if is_file else own.teacher
        line = (
            f"Teacher: {teacher} ({own.teacher_revision or 'features ' + own.feature_variant}); what it "
            "was trained on is part of what this model was trained on."
        )
        how = (
            f"masked image modelling towards the features of a frozen vision tower ({100 * own.mask_ratio:g} "
        )
        return Description(
            how=how + "% of the patches masked)", lines=(line,), settings=flat(own) | {"teacher": teacher}
        )


def build_task(config: TrainConfig, token_dim: int) -> MvpTask:
    """The model of a run, with weights that depend on the seed alone."""
    torch.manual_seed(config.seed)
    own, backbone = config.method, backbones.of_run(config, 0)
    grid, _ = masked_vit.grid_of(backbone, config.model.backbone, config.model.image_size)
    width = int(backbone.num_features)  # type: ignore[arg-type]
    predictor: nn.Module
    if own.masked_patches == "replaced":
        predictor = masked_vit.MaskTokens(width, token_dim)
    else:
        predictor = masked_vit.Decoder(
            width,
            token_dim,
            grid,
            grid**2 - masking.num_masked(grid, own.mask_ratio),
            narrow=own.regressor_width,
            depth=own.regressor_depth,
        )
    return MvpTask(backbone, predictor, own, grid=grid, token_dim=token_dim)


def _check_grids(config: TrainConfig, grid: int, size: int, teacher: str) -> None:
    """Raises SettingsError where student and teacher differ in patches, or none or all would be masked."""
    with torch.device("meta"):
        student = backbones.of_run(config.without_weights, 0)
    mine, patch = masked_vit.grid_of(student, config.model.backbone, config.model.image_size)
    if mine != grid:
        message = (
            f"image_size={config.model.image_size}: the student has {mine} x {mine} patches of {patch} "
            f"pixels, {teacher} has {grid} x {grid} of {size // grid}; pass --image-size {grid * patch}"
        )
        if config.model.image_size % grid == 0:
            message += f", or --patch-size {config.model.image_size // grid}"
        if config.method.stored_features:
            message += f", or make features with --feature-size {mine * (size // grid)}."
        else:
            message += f", or --teacher-size {mine * (size // grid)}."
        raise SettingsError(message)
    count = masking.num_masked(mine, config.method.mask_ratio)
    if not 0 < count < mine**2:
        message = (
            f"mask_ratio={config.method.mask_ratio}: masks {count} of {mine**2} patches; at least one must "
            "be masked and one seen."
        )
        raise SettingsError(message)


OBJECTIVE = Mvp()
