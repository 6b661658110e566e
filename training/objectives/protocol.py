"""What a training method is: one file that has an `OBJECTIVE`. Loop, loader, checkpoints and tracking know
these names only.

    facts = objective.check(config, store)             # on the driver, and again on every worker
    task = objective.build(config, facts, classes)
    inputs = task.prepare(batch, views, draw)          # a step: of the store's pictures what forward takes
    losses = task(inputs, share)                       # under DDP
    evaluator = task.evaluator(device)                 # after an epoch: batches in, sums over workers

A method reads columns of the store beside pictures and labels (`Columns`), and says by which metric "best" is
meant.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from pipeline.errors import SettingsError
from training.config import BUILT_IN, TrainConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from pipeline.store import Store
    from training.data.columns import Columns
    from training.data.loader import Batch
    from training.data.views import Draw, Views

Losses = dict[str, "Tensor"]
"""`loss` to differentiate, and what else is logged: scalars, or [b] values whose mean is meant; `correct`
becomes train_top1."""
Precision = Callable[[], AbstractContextManager[Any]]
"""Makes the context that a forward pass runs in: torch's autocast, or none."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What an epoch is judged by: a name of the evaluator's metrics, how it is written, and its direction."""

    name: str = "top1"
    title: str = "top-1"
    digits: int = 1
    """Behind the point, in the line of an epoch."""
    higher_is_better: bool = True


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a method found in the store before training; a method's own has more fields."""

    variants: dict[str, str] = field(default_factory=dict)
    """Stages of the store and which variant of each is trained on, for the record."""
    columns: tuple[Columns, ...] = ()
    """What is read beside pictures and labels; sent to decoders of other processes."""


class Inputs(Protocol):
    """What `Task.forward` takes: a worker's share of a batch, on the device."""

    def __len__(self) -> int: ...

    def part(self, place: slice, gradient: Gradient | None) -> Inputs:
        """Some of its rows, for a step in parts; `gradient` of the joint loss, where there is one (see
        `Contrastive`)."""
        ...


@dataclass(frozen=True)
class Gradient:
    """Of a joint loss with respect to some rows of features, and, for one of the parts, to the loss's own
    parameters."""

    features: Tensor
    parameters: list[Tensor] | None = None


class Evaluator(Protocol):
    """Collects a split on one worker. Metrics come from sums over workers, so that they are exact for any
    number of them."""

    def add(self, batch: Batch, images: Tensor, precision: Precision) -> None:
        """Takes in a batch; `images` are its pictures, normalised."""
        ...

    def sums(self) -> Tensor:
        """[n] float64; added up over workers."""
        ...

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Of the sums over all workers."""
        ...


class Task(Protocol):
    """Everything that trains, as a module: what DDP, the moving average, the optimizer and checkpoints see.

    Called with inputs and `share`, a factor on losses that are means over the inputs, so that the mean over
    workers and parts is that of the whole batch.
    """

    backbone: nn.Module
    """What is exported; its normalisation is the data's, layer decay goes by its layers."""

    def __call__(self, inputs: Any, share: float = 1.0) -> Losses: ...

    def prepare(self, batch: Batch, views: Views, draw: Draw) -> Inputs:
        """From a batch on the device to inputs; what other workers have is asked for here, to run under the
        forward pass."""
        ...

    def compile(self) -> None:
        """Compiles what is worth it."""
        ...

    def after_step(self) -> None:
        """After each step of the optimizer, such as to keep a parameter within bounds."""
        ...

    def evaluator(self, device: torch.device) -> Evaluator:
        """A new one."""
        ...


class Contrastive(Task, Protocol):
    """A task with a loss over the joint batch, which steps in parts need (GradCache, arXiv 2101.06983)."""

    def features(self, inputs: Any) -> Tensor | None:
        """[b, d] features of some rows that the joint loss compares; None where there is no joint loss after
        all."""
        ...

    def contrast(self, features: Tensor, inputs: Any) -> Tensor:
        """The joint loss of all rows' features."""
        ...

    def loss_parameters(self) -> list[nn.Parameter]:
        """What the joint loss itself learns."""
        ...

    def joined(self, sums: Losses, contrast: Tensor) -> Losses:
        """The losses of a whole batch from the means over its parts and the joint loss."""
        ...


class Objective(Protocol):
    """A training method."""

    metric: Metric

    def check(self, config: TrainConfig, store: Store) -> Facts:
        """Finds every fault that the store can show before a worker starts.

        Raises:
            SettingsError: settings that do not fit the store.
        """
        ...

    def build(self, config: TrainConfig, facts: Any, classes: int) -> Any:
        """The task, with weights that depend on the seed alone."""
        ...

    def rebuild(self, config: TrainConfig, weights: dict[str, Tensor], classes: int) -> Any:
        """The task that a checkpoint's weights belong to; no store is asked."""
        ...


METRICS = {"align": Metric()}
"""Of built-in methods, so that tables and reports need not load torch to know what is best; a test holds that
they are right."""


def metric_named(name: str) -> Metric:
    """What a method is judged by; see `objective_named`."""
    return METRICS[name] if name in METRICS else objective_named(name).metric


def objective_of(config: TrainConfig) -> Objective:
    """The method of a run; see `objective_named`."""
    return objective_named(config.objective)


def objective_named(name: str) -> Objective:
    """A method by its name or import path.

    Raises:
        SettingsError: there is no such module, or it has no OBJECTIVE.
    """
    if (
        name not in BUILT_IN and os.getcwd() not in sys.path
    ):  # which a command that was installed does not look into
        sys.path.append(os.getcwd())
    try:
        return cast(Objective, import_module(BUILT_IN.get(name, name)).OBJECTIVE)
    except (ModuleNotFoundError, AttributeError) as error:
        message = (
            f"objective={name!r}: {error}; known are {', '.join(BUILT_IN)}, or the import path of a module "
            "with an OBJECTIVE (training/objectives/protocol.py)."
        )
        raise SettingsError(message) from None
