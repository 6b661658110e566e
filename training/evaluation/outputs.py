"""A run's model and its answers for the pictures of a split."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.encoders.cut import Cut
from pipeline.errors import SettingsError
from pipeline.store import Store
from training.config import TrainConfig
from training.data.columns import Columns
from training.data.few_shot import classes_of, rows_of
from training.data.loader import Batch
from training.engine import build, checkpoint, loop
from training.models import backbones
from training.objectives.protocol import TextSpace, objective_of

Array = npt.NDArray[Any]
SHOWN = 8  # pictures


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A run's model: the task in evaluation mode, which of its weights they are (raw or ema), and where
    training stood."""

    task: Any
    weights: str
    state: dict[str, Any]


def load(config: TrainConfig, folder: str, num_classes: int, weights: str = "auto") -> Loaded:
    """The whole task with a checkpoint's weights; its widths are those of the weights, so no store is asked.

    Args:
        config: the run's settings.
        folder: of the checkpoint.
        num_classes: of the store.
        weights: raw, ema, or auto for the moving average where there is one.

    Raises:
        ValueError: the checkpoint has no moving average.
    """
    from safetensors.torch import load_file

    average = os.path.join(folder, "ema.safetensors")
    if weights == "auto":
        weights = "ema" if os.path.isfile(average) else "raw"
    if weights == "ema" and not os.path.isfile(average):
        message = (
            "weights=ema: the run kept no moving average (it was trained without --ema); pass --weights raw."
        )
        raise SettingsError(message)
    tensors = load_file(average if weights == "ema" else os.path.join(folder, "model.safetensors"))
    task = objective_of(config).rebuild(config, tensors, num_classes)
    return Loaded(task=task.eval(), weights=weights, state=checkpoint.read_state(folder))


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """A model's answers for n images, in the store's order; `predicted`, `top5` and `confidence` are empty
    where it has no classifier."""

    samples: Array
    """[n, 4], see `training.data.order`."""
    labels: Array
    predicted: Array
    top5: Array
    """[n] whether the label is among the five best."""
    confidence: Array
    """[n] probability of the predicted class: softmax, or the sigmoid of a run with binary cross entropy."""
    features: Array | None
    """[n, F] what the classifier reads."""
    projected: Array | None
    """[n, d] in the space shared with texts."""
    targets: Array | None
    """[n, D] text targets."""
    groups: Array | None
    """[n] equal for equal captions, -1 where there is none."""

    @property
    def correct(self) -> Array:
        """[n] bool, whether the predicted class is the picture's."""
        same: Array = self.predicted == self.labels
        return same


class Judge:
    """A run's model and what is needed to show it the pictures of its store."""

    def __init__(self, config: TrainConfig, loaded: Loaded) -> None:
        import torch

        self.config, self.store = config, Store(config.store)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.task = build.to_device(loaded.task, self.device)
        self.model = build.to_device(objective_of(config).deployed(self.task), self.device).eval()
        self._norm = build.make_norm(self.model, self.device)

    @property
    def classifies(self) -> bool:
        """Whether the model answers with classes."""
        return backbones.classifies(self.model)

    def metrics(self, split: str) -> dict[str, float]:
        """What the task's own evaluator finds on a split, in float32.

        Raises:
            ValueError: see `outputs`.
        """
        import torch

        facts = objective_of(self.config).for_evaluation(self.config, self.store, self.task)
        evaluator = self.task.evaluator(self.device)
        with torch.inference_mode():
            samples = self._samples(split)
            for host_batch in self._batches(samples, facts.columns, split, facts.fixed_cut):
                batch = host_batch.to(self.device)
                evaluator.add(batch, self._norm(batch.images), contextlib.nullcontext)
        found: dict[str, float] = evaluator.metrics(evaluator.sums().tolist())
        return found

    def pictures(self, split: str) -> dict[str, Array]:
        """See `protocol.Objective.pictures`, of some pictures from all over the split."""
        import torch

        samples = self._samples(split)
        samples = samples[np.linspace(0, len(samples) - 1, min(SHOWN, len(samples))).astype(int)]
        with torch.inference_mode():
            (batch,) = [each.to(self.device) for each in self._batches(samples, ())]
            return objective_of(self.config).pictures(self.task, batch, self._norm(batch.images))

    def outputs(
        self,
        split: str,
        space: TextSpace | None = None,
        *,
        texts: bool = False,
        features: bool = False,
        training: bool = False,
    ) -> Outputs:
        """Shows the model every usable picture of a split once.

        Args:
            split: of the store.
            space: that images are projected into.
            texts: read the space's text targets beside the pictures, too.
            features: keep the features.
            training: only the pictures that the run is trained on (--shots).

        Raises:
            ValueError: no such split, or none of its pictures can be read.
        """
        import torch

        parts: dict[str, list[Array]] = {}
        columns = (space.columns,) if space and texts else ()
        with torch.inference_mode():
            for batch in self._batches(self._samples(split, training=training), columns, split):
                for name, value in self._answers(batch.images, batch.labels, space, features).items():
                    parts.setdefault(name, []).append(value.cpu().numpy())
                parts.setdefault("samples", []).append(batch.samples)
                for name, column in batch.columns.items():
                    parts.setdefault(name, []).append(column.numpy())
        found: dict[str, Any] = {name: np.concatenate(value) for name, value in parts.items()}
        absent: dict[str, Any] = dict.fromkeys(("features", "projected", "targets", "groups"))
        absent |= dict.fromkeys(("predicted", "top5", "confidence"), np.zeros(0))
        return Outputs(**absent | found)

    def _samples(self, split: str, *, training: bool = False) -> Array:
        rows = rows_of(self.config, self.store, split, training=training)
        if not len(rows):
            message = (
                f"split={split}: has no usable picture; `gpt4image status --store {self.config.store}` says "
                "why."
            )
            raise SettingsError(message)
        return rows.in_order()

    def _batches(
        self, samples: Array, columns: tuple[Columns, ...], split: str = "", fixed_cut: Cut | None = None
    ) -> Iterator[Batch]:
        """Decoded, see `build.decoder_spec`; progress is shown of a split that is named."""
        from tqdm import tqdm

        loader = build.make_loader(self.config, columns, self.model, fixed_cut)
        shown = None if split else True
        told: dict[str, Any] = {"unit": "img", "file": sys.stderr, "disable": shown, "leave": False}
        with tqdm(total=len(samples), desc=f"evaluate {split}", **told) as bar:
            for batch in loader.evaluate(samples, loop.EVALUATED, 0, 1):
                yield batch
                bar.update(len(batch.labels))

    def _answers(self, images: Any, labels: Any, space: TextSpace | None, keep: bool) -> dict[str, Any]:
        import torch

        images, labels = images.to(self.device), labels.to(self.device)
        features, logits = backbones.features_and_logits(self.model, self._norm(images))
        answers = {"labels": labels}
        if self.classifies:
            if self.config.data.class_half != "all":
                among = classes_of(self.config.data.class_half, logits.shape[1])
                others = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
                others[among.start : among.stop] = False
                logits = logits.masked_fill(others, -torch.inf)
            best = logits.topk(min(5, logits.shape[1])).indices
            probabilities = logits.sigmoid() if self.config.optim.loss == "bce" else logits.softmax(1)
            answers |= {
                "predicted": best[:, 0],
                "top5": (best == labels[:, None]).any(1),
                "confidence": probabilities.gather(1, best[:, :1])[:, 0],
            }
        if keep:
            answers["features"] = features
        if space is not None:
            answers["projected"] = space.images(features)
        return answers
