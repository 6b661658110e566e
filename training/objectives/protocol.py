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

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

from pipeline.errors import SettingsError
from training.config import TrainConfig
from training.objectives.metric import Metric
from training.objectives.registry import module_of
from training.settings import MethodSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from pipeline.encoders.cut import Cut
    from pipeline.store import Store
    from training.data.columns import Array, Columns
    from training.data.loader import Batch
    from training.data.views import Draw, Views
    from training.evaluation.outputs import Judge, Outputs

Losses = dict[str, "Tensor"]
"""`loss` to differentiate, and what else is logged: scalars, or [b] values whose mean is meant; `correct`
becomes train_top1."""
Precision = Callable[[], AbstractContextManager[Any]]
"""Makes the context that a forward pass runs in: torch's autocast, or none."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a method found in the store before training; a method's own has more fields."""

    variants: dict[str, str] = field(default_factory=dict)
    """Stages of the store and which variant of each is trained on, for the record."""
    found: dict[str, Any] = field(default_factory=dict)
    """Settings that were left open (`MethodSettings.left_open`), as they are recorded."""
    columns: tuple[Columns, ...] = ()
    """What is read beside pictures and labels; sent to decoders of other processes."""
    fixed_cut: Cut | None = None
    """Where columns were made of pictures as they are: how a picture is cut, for training as for evaluation,
    without random crops and flips. None: crops as the settings say."""
    pictures: bool = True
    """Whether pictures are decoded; a method that reads what was made of them may do without: batches then
    have [b, 3, 0, 0]."""


class Inputs(Protocol):
    """What `Task.forward` takes: a worker's share of a batch, on the device."""

    def __len__(self) -> int: ...

    def part(self, rows: slice, gradient: Gradient | None) -> Inputs:
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
        """Takes in a batch; `images` are its pictures, normalised. The batch is seen again after the next
        epoch: it is not to be changed in place."""
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


class TextSpace(Protocol):
    """A space that a model's images share with texts: what retrieval and zero-shot need."""

    @property
    def embeddings(self) -> str:
        """The embedding variant whose encoder also embeds prompts."""
        ...

    @property
    def columns(self) -> Columns:
        """Reads `targets` ([n, D'] text targets) and `groups` ([n], equal for equal captions, -1: none)."""
        ...

    def images(self, features: Tensor) -> Tensor:
        """[b, F] features of the backbone to [b, d] of unit length."""
        ...

    def texts(self, targets: Array) -> Array:
        """[n, D'] text targets to [n, d] of unit length."""
        ...

    def prompts(self, vectors: Array) -> Array:
        """[n, D] text embeddings to [n, d] of unit length."""
        ...


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a method tells in `evaluate`, beside its accuracy."""

    name: str
    value: float | None = None
    """In percent; None: the note says it all."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What the card of an exported model says of its training."""

    how: str
    """Completes "trained with ..."."""
    lines: tuple[str, ...] = ()
    """Where its targets came from, in sentences."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the method, to be shown: a card is published, so nothing that tells of the machine."""


class Objective(Protocol):
    """A training method; one of one's own inherits from it what need not be said."""

    settings: type[MethodSettings] = MethodSettings
    """Its own settings, whose fields are flags of `train`."""
    metric: Metric = Metric()

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

    def notes(self, config: TrainConfig, store: Store, facts: Any) -> tuple[str, ...]:
        """What the user is told once, before the run starts."""
        return ()

    def deployed(self, task: Any) -> nn.Module:
        """The model that a task is trained for: what is exported, and whose features are judged."""
        backbone: nn.Module = task.backbone
        return backbone

    def for_evaluation(self, config: TrainConfig, store: Store, task: Any) -> Facts:
        """What the evaluator of a rebuilt task finds in the store; asked where the model does not
        classify."""
        return self.check(config, store)

    def pictures(self, task: Any, batch: Batch, images: Tensor) -> dict[str, Array]:
        """What there is to see of some pictures: [h, w, 3] uint8 by the name of a file, which `evaluate --to`
        writes as PNG.

        Args:
            task: in evaluation mode.
            batch: some pictures of the split, on the task's device.
            images: they, normalised.
        """
        return {}

    def text_space(self, config: TrainConfig, store: Store, task: Any) -> TextSpace | None:
        """The space that the task's images share with texts; None where there is none.

        Raises:
            SettingsError: the run does not say which texts it was trained on, and the store has several.
        """
        return None

    def findings(
        self, config: TrainConfig, judge: Judge, split: str, outputs: Outputs, templates: Sequence[str]
    ) -> list[Finding]:
        """What else there is to tell of a run on a split, by features where its model is not timm's.

        Args:
            config: the run's settings.
            judge: of the run.
            split: that it is judged on.
            outputs: of the split, with features where the method has a model of its own.
            templates: of class prompts; empty: the method's own.
        """
        return []

    def export(self, config: TrainConfig, task: Any, folder: str) -> dict[str, Any]:
        """Writes the model of a method that brings its own (`MethodSettings.own_model`) into a folder, with
        config.json and README.md; returns `architecture` and `parameters`.

        Raises:
            SettingsError: there is nothing to export.
        """
        message = f"run={config.run}: {config.objective} exports nothing."
        raise SettingsError(message)

    def describe(self, config: TrainConfig, store: Store) -> Description:
        """For the card of an exported model."""
        return Description(how=config.objective, settings=config.method.told())


def objective_of(config: TrainConfig) -> Objective:
    """The method of a run; see `settings.module_of`."""
    return cast(Objective, module_of(config.objective))
