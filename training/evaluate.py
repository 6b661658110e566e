"""`evaluate`: what a run's model can do on a split, in this process, on a GPU if there is one.

Pictures are resized, cropped and normalised as timm validates the exported model, and arithmetic is float32 wherever it runs, so
top-1 and top-5 are timm's own to the image (of pictures with an EXIF rotation the store uses the upright view; timm does not).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import locations
from pipeline.errors import SettingsError
from pipeline.prompts import class_name
from pipeline.store import Store
from training import backbones, checkpoint, findings, judging, loop, record, targets, zeroshot
from training.config import EvaluateConfig, TrainConfig
from training.data import Rows
from training.objectives.align import AlignTask

Array = npt.NDArray[Any]
Found = dict[str, Any]

PROMPTS = ("a photo of a {label}",)
K, TEMPERATURE = 20, 0.07  # of k-NN; DINO's best on ImageNet
WORST, PAIRS = 10, 30  # classes and mistakes that are listed


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A run's model: the task in evaluation mode, which of its weights they are (raw or ema), and where training stood."""

    task: AlignTask
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
        message = "weights=ema: the run kept no moving average (it was trained without --ema); pass --weights raw."
        raise SettingsError(message)
    tensors = load_file(average if weights == "ema" else os.path.join(folder, "model.safetensors"))
    last = {"mlp": "head.layers.3.weight", "linear": "head.layers.weight"}[config.head]
    dim = len(tensors[last]) if last in tensors else 0
    text = tensors.get("text_projection.weight")
    task = loop.build_task(replace(config, pretrained=False), num_classes, dim, 0 if text is None else text.shape[1])
    task.load_state_dict(tensors)
    return Loaded(task=task.eval(), weights=weights, state=checkpoint.read_state(folder))


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """A model's answers for n images, in the store's order."""

    samples: Array
    """[n, 4], see `training.order`."""
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
    texts: Array | None
    """[n, D] text targets."""
    groups: Array | None
    """[n] equal for equal captions, -1 where there is none."""


class Judge:
    """A run's model and what is needed to show it the pictures of its store."""

    def __init__(self, config: TrainConfig, loaded: Loaded) -> None:
        import torch

        self.config, self.store = config, Store(config.store)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.task = loop.to_device(loaded.task, self.device)
        self._norm = loop.make_norm(self.task.backbone, self.device)

    def outputs(self, split: str, texts: targets.Targets | None = None, *, features: bool = False) -> Outputs:
        """Shows the model every usable picture of a split once.

        Args:
            split: of the store.
            texts: which text targets to read beside the pictures.
            features: keep the features.

        Raises:
            ValueError: no such split, or none of its pictures can be read.
        """
        import torch
        from tqdm import tqdm

        rows = Rows(self.store, split)
        if not len(rows):
            message = f"split={split}: has no usable picture; `gpt4image status --store {self.config.store}` says why."
            raise SettingsError(message)
        loader = loop.make_loader(self.config, self.store, texts, self.task.backbone)
        parts: dict[str, list[Array]] = {}
        bar = tqdm(total=len(rows), desc=f"evaluate {split}", unit="img", file=sys.stderr, disable=None, leave=False)
        with bar, torch.inference_mode():
            for batch in loader.evaluate(rows.in_order(), loop.EVALUATED, 0, 1):
                for name, value in self._answers(batch.images, batch.labels, features).items():
                    parts.setdefault(name, []).append(value.cpu().numpy())
                parts.setdefault("samples", []).append(batch.samples)
                if batch.texts is not None and batch.groups is not None:
                    parts.setdefault("texts", []).append(batch.texts.numpy())
                    parts.setdefault("groups", []).append(batch.groups.numpy())
                bar.update(len(batch.labels))
        columns: dict[str, Any] = {name: np.concatenate(value) for name, value in parts.items()}
        absent: dict[str, Any] = dict.fromkeys(("features", "projected", "texts", "groups"))
        return Outputs(**absent | columns)

    def _answers(self, images: Any, labels: Any, keep: bool) -> dict[str, Any]:
        images, labels = images.to(self.device), labels.to(self.device)
        features, logits = backbones.features_and_logits(self.task.backbone, self._norm(images))
        best = logits.topk(min(5, logits.shape[1])).indices
        probabilities = logits.sigmoid() if self.config.loss == "bce" else logits.softmax(1)
        found = {
            "labels": labels, "predicted": best[:, 0], "top5": (best == labels[:, None]).any(1),
            "confidence": probabilities.gather(1, best[:, :1])[:, 0],
        }  # fmt: skip
        if keep:
            found["features"] = features
        if self.task.head is not None:
            found["projected"] = self.task.head(features)
        return found


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Everything that was found: `summary` is what --json prints."""

    summary: Found
    classes: list[str]
    outputs: Outputs
    matrix: Array
    calibration: judging.Calibration


def evaluate(settings: EvaluateConfig) -> Judgement:
    """Measures a run's checkpoint, and writes the files if --to is given.

    Raises:
        FileNotFoundError: no run, or no checkpoint in it.
        ValueError: no such split, or zero-shot of a run without alignment or with an encoder that is not to be had.
    """
    config = record.read(settings.run)
    if settings.to:
        locations.check_writable("to", settings.to)
    if settings.asks_zero_shot and not config.alignment_weight:
        message = f"zero_shot: {settings.run} is a baseline, without a head into the texts' space; evaluate an aligned run."
        raise SettingsError(message)
    store = Store(config.store)
    classes = store.dataset.classes
    asked = zeroshot.candidates(classes, settings.classes_file) if settings.asks_zero_shot else None
    with checkpoint.opened(settings.run, settings.checkpoint) as folder:
        loaded = load(config, folder, len(classes), settings.weights)
    found = _targets(settings.run, config, store) if config.alignment_weight and (settings.retrieval or asked) else None
    judge, split = Judge(config, loaded), settings.split or config.eval_split
    outputs = judge.outputs(split, found if settings.retrieval else None, features=settings.knn)
    judgement = _judged(outputs, classes)
    summary: Found = {
        "run": settings.run, "split": split, "checkpoint": settings.checkpoint, "weights": loaded.weights,
        "epoch": int(loaded.state["epoch"]), **judgement.summary,
    }  # fmt: skip
    if settings.knn:
        summary["knn"] = _knn(judge, outputs, split)
    if found is not None and settings.retrieval:
        summary["retrieval"] = _retrieval(judge.task, outputs)
    if found is not None and asked is not None:
        templates = settings.class_prompts or PROMPTS
        prompts = zeroshot.prompt_vectors(store, found, judge.task, asked.names, templates)
        assert outputs.projected is not None
        seen = zeroshot.seen_classes(store, config.train_split)
        scores = zeroshot.judge(outputs.projected, outputs.labels, prompts, asked, seen)
        summary["zero_shot"] = {"prompts": list(templates), "classes_file": settings.classes_file, **scores}
    judgement = replace(judgement, summary=summary)
    if settings.to:
        findings.write(judgement, store, settings.to)
    return judgement


def _targets(run: str, config: TrainConfig, store: Store) -> targets.Targets:
    names = store.variants("embeddings")
    if not config.embeddings and len(names) > 1:
        message = (
            f"run={run}: does not say which embeddings it was trained on, and the store has several: {', '.join(names)}; write "
            'the name into "embeddings" of its config.json, or pass --no-retrieval.'
        )
        raise SettingsError(message)
    dim = 0 if config.text_projection == "learned" else config.projection_dim
    return targets.load(store, embeddings=config.embeddings, dim=dim, split=config.train_split)


def _judged(outputs: Outputs, classes: list[str]) -> Judgement:
    """What the classifier's answers alone say."""
    correct = outputs.predicted == outputs.labels
    calibrated = judging.calibration(outputs.confidence, correct)
    matrix = judging.confusion(outputs.labels, outputs.predicted, len(classes))
    images, hits = matrix.sum(1), matrix.diagonal()
    present = np.flatnonzero(images)
    shares = 100 * hits[present] / images[present]
    worst = np.lexsort((present, shares))[:WORST]
    low, high = judging.interval(int(correct.sum()), len(correct))
    summary: Found = {
        "images": len(correct), "classes": len(classes), "top1": round(100 * float(correct.mean()), 3),
        "top1_interval": [round(100 * low, 3), round(100 * high, 3)], "top5": round(100 * float(outputs.top5.mean()), 3),
        "mean_per_class": round(float(shares.mean()), 3), "ece": round(100 * calibrated.ece, 3),
        "confidence": round(100 * float(outputs.confidence.mean()), 3),
        "worst_classes": [
            {"class": class_name(classes[present[n]]), "accuracy": round(float(shares[n]), 3), "images": int(images[present[n]])}
            for n in worst
        ],
        "confused": [
            {"true": class_name(classes[true]), "predicted": class_name(classes[other]), "images": count}
            for true, other, count in judging.confused_pairs(matrix, PAIRS)
        ],
    }  # fmt: skip
    return Judgement(summary=summary, classes=classes, outputs=outputs, matrix=matrix, calibration=calibrated)


def _knn(judge: Judge, outputs: Outputs, split: str) -> Found:
    train = judge.config.train_split
    bank = outputs if split == train else judge.outputs(train, features=True)
    assert outputs.features is not None and bank.features is not None
    predicted = judging.nearest(
        outputs.features, bank.features, bank.labels, len(judge.store.dataset.classes), k=K, temperature=TEMPERATURE,
        same=split == train,
    )  # fmt: skip
    top1 = round(100 * float((predicted == outputs.labels).mean()), 3)
    return {"top1": top1, "k": K, "temperature": TEMPERATURE, "bank": len(bank.labels)}


def _retrieval(task: AlignTask, outputs: Outputs) -> Found | None:
    """None where fewer than two captions differ: then there is nothing to find."""
    assert outputs.projected is not None and outputs.texts is not None and outputs.groups is not None
    described = outputs.groups >= 0
    if not described.any():
        return None
    texts, groups = outputs.texts[described], outputs.groups[described]
    one_of, own = judging.different_texts(texts, groups)
    if len(one_of) < 2:
        return None
    ranks = judging.caption_ranks(outputs.projected[described], zeroshot.shared_space(task, texts[one_of]), own)
    found = {name: round(value, 3) for name, value in judging.retrieval(ranks).items()}
    return found | {"images": len(own), "captions": len(one_of)}
