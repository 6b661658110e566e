"""Masked autoencoding with Hiera (arXiv 2306.00989; MAE: arXiv 2111.06377): the encoder sees a part of a
picture's mask units, a light decoder predicts the pixels of the others; no labels and no captions.

`L = mean over removed patches of (prediction - pixels normalised within the patch)^2`. What the encoder does
not see it does not compute. The backbone is timm's Hiera with its last stage unpooled, which changes no
weight; fusion and decoder stay behind.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from pipeline.errors import MissingError, SettingsError
from pipeline.store import Store
from training.config import TrainConfig
from training.data import masking
from training.data.columns import Array
from training.data.loader import Batch
from training.data.views import Draw, Views
from training.evaluation import figures
from training.models import backbones, chain, masked_hiera, published_hiera
from training.objectives.protocol import Description, Facts, Gradient, Losses, Objective, Precision
from training.objectives.settings.mae import METRIC, MaeSettings
from training.settings import flat

POOLED, PRE_TRAINED = 3, 2
"""Stages that pool their queries: of the model that is exported, and while it is pre-trained."""


@dataclass(frozen=True)
class Inputs:
    """A worker's share of a batch."""

    images: Tensor
    """[b, 3, S, S]."""
    keep: Tensor
    """[b, U] bool, which mask units the encoder sees; equally many of each picture."""

    def __len__(self) -> int:
        return len(self.images)

    def part(self, rows: slice, gradient: Gradient | None) -> Inputs:
        """See `protocol.Inputs`; there is no joint loss."""
        return Inputs(self.images[rows], self.keep[rows])


class MaeTask(nn.Module):
    """The backbone without a classifier, fusion and decoder."""

    def __init__(self, backbone: nn.Module, settings: MaeSettings, name: str) -> None:
        super().__init__()
        hiera = masked_hiera.encoder_of(backbone, name)
        masked_hiera.set_pooling(hiera, PRE_TRAINED)
        self.backbone, self.settings = hiera, settings
        self.fusion = masked_hiera.Fusion(hiera)
        self.decoder = masked_hiera.Decoder(
            hiera,
            width=settings.decoder_width,
            depth=settings.decoder_depth,
            heads=settings.decoder_heads,
        )

    def prepare(self, batch: Batch, views: Views, draw: Draw) -> Inputs:
        """Masks are drawn by (seed, step, picture)."""
        return Inputs(views.norm(batch.images), self.seen(batch, (draw.seed, draw.step)))

    def seen(self, batch: Batch, seeds: tuple[int, ...] = ()) -> Tensor:
        """See the function `seen`, on the batch's device."""
        grid = self.backbone.mask_spatial_shape[0]
        keep = seen(grid, self.settings.mask_ratio, batch.samples, seeds)
        return torch.from_numpy(keep).to(batch.images.device, non_blocking=True)

    def predict(self, images: Tensor, keep: Tensor) -> Tensor:
        """[b, N, 3 P P] predicted pixels of [b, 3, S, S] images, whose other units the encoder does not
        see."""
        _, stages = self.backbone.forward_features(images, mask=keep, return_intermediates=True)
        predicted: Tensor = self.decoder(self.fusion(stages, self.backbone.head.norm), keep)
        return predicted

    def errors(self, images: Tensor, keep: Tensor) -> Tensor:
        """[b] mean squared errors over the removed patches; of all patches where none is removed."""
        predicted = self.predict(images, keep).float()
        pixels = masked_hiera.patches_of(images.float(), self.decoder.patch)
        if self.settings.norm_pix_loss:
            pixels, _, _ = masked_hiera.normalised(pixels)
        of_patches = (predicted - pixels).square().mean(-1)
        if not self.settings.mask_ratio:
            return of_patches.mean(1)
        # No indexing by masks: the device would have to tell the host how many there are.
        masked = self.decoder.masked(keep)
        return (of_patches * masked).sum(1) / masked.sum(1)

    def forward(self, inputs: Inputs, share: float = 1.0) -> Losses:
        """`loss` to differentiate, and for the log `reconstruction_loss` of [b] pictures."""
        errors = self.errors(inputs.images, inputs.keep)
        return {"loss": share * errors.mean(), "reconstruction_loss": errors.detach()}

    def compile(self) -> None:
        """Block by block: leaving units out has no fixed shape."""
        for block in (*self.backbone.blocks, *self.decoder.blocks):
            block.compile()

    def after_step(self) -> None:
        """Nothing."""

    def evaluator(self, device: torch.device) -> Evaluator:
        """See `protocol.Task`."""
        return Evaluator(self, device)


class Evaluator:
    """`reconstruction`, the loss, with a mask that is the same for a picture in every epoch and run."""

    def __init__(self, task: MaeTask, device: torch.device) -> None:
        self._task, self._sums = task, torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, batch: Batch, images: Tensor, precision: Precision) -> None:
        """See `protocol.Evaluator`."""
        with precision():
            errors = self._task.errors(images, self._task.seen(batch))
        self._sums += torch.stack([errors.double().sum(), errors.new_tensor(len(errors))])

    def sums(self) -> Tensor:
        """Losses, images."""
        return self._sums

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """See the class."""
        return {METRIC.name: sums[0] / sums[1], "eval_images": sums[1]}


def num_kept(units: int, ratio: float) -> int:
    """Mask units that are seen, as published."""
    return int(units * (1 - ratio))


def seen(grid: int, ratio: float, samples: Array, seeds: tuple[int, ...] = ()) -> Array:
    """[b, grid * grid] bool, which mask units of each picture the encoder sees.

    Args:
        grid: mask units along an edge.
        ratio: share that it does not see.
        samples: [b, 4], see `order`.
        seeds: see `masking.masks`; without any a picture has the same mask always.
    """
    removed = 1 - num_kept(grid**2, ratio) / grid**2
    if not seeds:
        return ~masking.fixed("random", grid, removed, samples)
    return ~masking.masks("random", grid, removed, seeds, samples)


class Mae(Objective):
    """See the module."""

    settings = MaeSettings
    metric = METRIC

    def check(self, config: TrainConfig, store: Store) -> Facts:
        """Finds that the backbone can be masked, and that some units are seen and some are not."""
        faults = [
            f"{name}={getattr(config.data, name)}: changes the pixels that are to be predicted; leave it out "
            f"with --objective {config.objective}."
            for name in ("mixup", "cutmix", "erase")
            if getattr(config.data, name)
        ]
        if config.optim.loss == "bce" or config.optim.label_smoothing:
            faults.append("loss bce, label_smoothing: are of classifiers; leave them out.")
        if config.model.freeze_backbone:
            faults.append("freeze_backbone: is for a classifier on top; the backbone is what trains here.")
        if faults:
            raise SettingsError("\n".join(faults))
        with torch.device("meta"):
            hiera = masked_hiera.encoder_of(
                backbones.of_run(config.without_weights, 0), config.model.backbone
            )
        units, ratio = masked_hiera.num_units(hiera), config.method.mask_ratio
        kept = num_kept(units, ratio)
        if not kept or (kept == units and ratio):
            edge = masked_hiera.unit_pixels(hiera)
            message = (
                f"mask_ratio={ratio}: leaves {kept} of {units} mask units ({edge} x {edge} pixels each) of a "
                f"picture of {config.model.image_size}; at least one must be seen and one not: pass another "
                f"--mask-ratio, or --image-size {config.model.image_size + edge}."
            )
            raise SettingsError(message)
        return Facts()

    def build(self, config: TrainConfig, facts: Facts, classes: int) -> MaeTask:
        """See `protocol.Objective`."""
        torch.manual_seed(config.seed)
        task = MaeTask(backbones.of_run(config, 0), config.method, config.model.backbone)
        fresh = not (config.model.pretrained or config.model.init_from)
        masked_hiera.initialise(task.fusion, task.decoder, task.backbone if fresh else None)
        if config.model.init_from:
            _fill_decoder(task, config.model.init_from, config.model.init_state)
        return task

    def notes(self, config: TrainConfig, store: Store, facts: Facts) -> tuple[str, ...]:
        """Whether the decoder starts from a file or a run, too; a file's of another size is refused."""
        start = config.model.init_from
        if not start or (published_hiera.is_file(start) and not os.path.exists(start)):
            return ()  # a run that goes on needs it no more
        with torch.device("meta"):
            task = self.build(config.without_weights, facts, 0)
        try:
            missing = _fill_decoder(task, start)
        except MissingError:
            return ()
        return (f"fusion and decoder start from {f'nothing: {missing}' if missing else start}",)

    def rebuild(self, config: TrainConfig, weights: dict[str, Tensor], classes: int) -> MaeTask:
        """See `protocol.Objective`."""
        task = self.build(config.without_weights, Facts(), classes)
        task.load_state_dict(weights)
        return task

    def deployed(self, task: MaeTask) -> nn.Module:
        """The encoder with all its pooling, as timm builds it."""
        hiera: nn.Module = copy.deepcopy(task.backbone)
        masked_hiera.set_pooling(hiera, POOLED)
        return hiera

    def pictures(self, task: MaeTask, batch: Batch, images: Tensor) -> dict[str, Array]:
        """`reconstructions`: of each picture a row with itself, with what the encoder saw of it, and with
        what was predicted of the rest.

        Normalised patches say nothing of their brightness and contrast: those are lent by the picture.
        """
        keep, edge = task.seen(batch), task.decoder.patch
        masked = task.decoder.masked(keep)[..., None]
        pixels, predicted = masked_hiera.patches_of(images, edge), task.predict(images, keep).float()
        if task.settings.norm_pix_loss:
            _, mean, deviation = masked_hiera.normalised(pixels)
            predicted = predicted * deviation + mean
        shown = [pixels, pixels.masked_fill(masked, 0), torch.where(masked, predicted, pixels)]
        columns = [_as_bytes(masked_hiera.images_of(each, edge), task.backbone) for each in shown]
        rows = [list(row) for row in zip(*columns, strict=True)]
        return {"reconstructions": figures.side_by_side(rows)}

    def describe(self, config: TrainConfig, store: Store) -> Description:
        """See `protocol.Objective`."""
        how = f"masked autoencoding ({100 * config.method.mask_ratio:g} % of the mask units removed)"
        return Description(how=how, settings=flat(config.method))


def _fill_decoder(task: MaeTask, start: str, state: str = "") -> str:
    """Loads fusion and decoder from the file or the run that the encoder starts from (`state`: see
    `chain.start`); why not, where it has none that fit, and they stay as they are.

    Raises:
        MissingError: the run is not there any more.
        SettingsError: see `published_hiera.fill_decoder`.
    """
    if published_hiera.is_file(start):
        return "" if published_hiera.fill_decoder(task, start) else "the file has none"
    weights, own = chain.beside_backbone(start, state), task.state_dict()
    needed = {name: value.shape for name, value in own.items() if not name.startswith("backbone.")}
    if not needed.keys() & weights.keys():
        return "that run has none"
    if needed != {name: value.shape for name, value in weights.items()}:
        return "that run's are of another size"
    task.load_state_dict(weights, strict=False, assign=own["decoder.mask_token"].is_meta)
    return ""


def _as_bytes(images: Tensor, backbone: nn.Module) -> Array:
    """[b, S, S, 3] uint8 of normalised images."""
    told = resolve_model_data_config(backbone)
    mean, std = (torch.tensor(told[name], device=images.device).view(3, 1, 1) for name in ("mean", "std"))
    found: Array = (255 * (images * std + mean)).clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return found


OBJECTIVE = Mae()
