"""A second training method in one file, to show what the seam takes: the mean colour of a picture, from its
own column and with a metric of its own, of which less is better. Nothing else in the project knows of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from pipeline.store import Store
from training.config import TrainConfig
from training.data.columns import Array
from training.data.loader import Batch
from training.data.views import Draw, Views
from training.models import backbones
from training.objectives.protocol import Facts, Gradient, Losses, Metric, Objective, Precision
from training.settings import Grid, MethodSettings


@dataclass(frozen=True)
class Heights:
    """Column `height` of the images stage."""

    def read(self, store: Store, shard: int, ids: pa.ChunkedArray) -> dict[str, Array]:
        heights = store.read_shard("images", "", shard, ["height"])["height"].to_numpy()
        return {"height": (np.nan_to_num(heights) / 100).astype(np.float32)}


@dataclass(frozen=True)
class Inputs:
    images: Tensor
    wanted: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def part(self, place: slice, gradient: Gradient | None) -> Inputs:
        assert gradient is None, "no joint loss"
        return Inputs(self.images[place], self.wanted[place])


class Colours(nn.Module):
    def __init__(self, backbone: nn.Module, noise: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.noise = noise
        self.colour = nn.Linear(backbones.num_features(backbone), 4)
        self.steps = nn.Parameter(torch.zeros(()), requires_grad=False)

    def prepare(self, batch: Batch, views: Views, draw: Draw) -> Inputs:
        draw.begin(0)
        return Inputs(views.norm(batch.images), wanted_of(batch))

    def forward(self, inputs: Inputs, share: float = 1.0) -> Losses:
        features, logits = backbones.features_and_logits(self.backbone, inputs.images)
        noise = torch.rand_like(features[:, :1])  # a draw, which a resumed run must draw again
        error = (
            self.colour(features + self.noise * noise).float() - inputs.wanted
        ).square().mean() + 0 * logits.sum()
        return {"loss": share * error, "squared_error": error.detach()}

    def after_step(self) -> None:
        self.steps += 1

    def compile(self) -> None:
        pass

    def evaluator(self, device: torch.device) -> Evaluator:
        return Evaluator(self, device)


class Evaluator:
    def __init__(self, task: Colours, device: torch.device) -> None:
        self._task, self._sums = task, torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, batch: Batch, images: Tensor, precision: Precision) -> None:
        with precision():
            features, _ = backbones.features_and_logits(self._task.backbone, images)
        error = (self._task.colour(features).float() - wanted_of(batch)).square().mean(1)
        self._sums += torch.stack([error.double().sum(), torch.tensor(len(error), dtype=torch.float64)])

    def sums(self) -> Tensor:
        return self._sums

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        return {"colour_error": sums[0] / sums[1], "eval_images": sums[1]}


def wanted_of(batch: Batch) -> Tensor:
    """[b, 4]: mean red, green and blue, and the height of the picture as it is stored."""
    return torch.cat([batch.images.float().mean((2, 3)) / 255, batch.columns["height"][:, None]], 1)


@dataclass(frozen=True, kw_only=True)
class ToyGrid(Grid):
    """How much noise."""

    noises: tuple[float, ...] = (0.01,)
    """Noises to try."""

    def cells(self) -> list[dict[str, Any]]:
        return [{"noise": noise} for noise in self.noises]


@dataclass(frozen=True, kw_only=True)
class ToySettings(MethodSettings):
    """A method of one's own."""

    axes: ClassVar = {"noise": "noise"}
    grid = ToyGrid

    noise: float = 0.01
    """Of the features."""

    @property
    def is_baseline(self) -> bool:
        return self.noise == 0

    def faults(self) -> list[str]:
        return [f"noise={self.noise}: must be 0 or more."] if self.noise < 0 else []

    def title(self) -> str:
        return f"toy-{self.noise:g}"


class Toy(Objective):
    settings = ToySettings
    metric = Metric(
        name="colour_error",
        title="error",
        digits=4,
        unit="",
        difference="of error",
        higher_is_better=False,
    )

    def check(self, config: TrainConfig, store: Store) -> Facts:
        return Facts(columns=(Heights(),))

    def build(self, config: TrainConfig, facts: Any, classes: int) -> Colours:
        torch.manual_seed(config.seed)
        backbone = backbones.of_run(config, classes)
        return Colours(backbone, config.method.noise)

    def rebuild(self, config: TrainConfig, weights: dict[str, Tensor], classes: int) -> Colours:
        task = self.build(config.without_weights, None, classes)
        task.load_state_dict(weights)
        return task


OBJECTIVE = Toy()
