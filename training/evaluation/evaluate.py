"""`evaluate`: what a run's model can do on a split, in this process, on a GPU if there is one (`remote`: in
a Ray task).

Pictures are resized, cropped and normalised as timm validates the exported model, and arithmetic is float32
wherever it runs, so top-1 and top-5 are timm's own to the image (of pictures with an EXIF rotation the store
uses the upright view; timm does not).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from pipeline.captioners.prompts import class_name
from pipeline.errors import SettingsError
from pipeline.store import Store, locations
from training import run_folder
from training.config import EvaluateConfig
from training.data.few_shot import classes_of
from training.engine import checkpoint
from training.evaluation import findings, measures, zeroshot
from training.evaluation.outputs import Array, Judge, Outputs, load
from training.objectives.protocol import TextSpace, objective_of

Found = dict[str, Any]

PROMPTS = ("a photo of a {label}",)
K, TEMPERATURE = 20, 0.07  # of k-NN; DINO's best on ImageNet
WORST, PAIRS = 10, 30  # classes and mistakes that are listed


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Everything that was found: `summary` is what --json prints. Of a model without a classifier there is no
    more than that and the pictures."""

    summary: Found
    classes: list[str]
    outputs: Outputs | None = None
    matrix: Array | None = None
    calibration: measures.Calibration | None = None
    pictures: dict[str, Array] = field(default_factory=dict)
    """See `protocol.Objective.pictures`."""


def evaluate(settings: EvaluateConfig) -> Judgement:
    """Measures a run's checkpoint, and writes the files if --to is given.

    Raises:
        FileNotFoundError: no run, or no checkpoint in it.
        ValueError: no such split, or zero-shot of a run without alignment or with an encoder that is not to
            be had.
    """
    config = run_folder.read(settings.run).but(run=run_folder.address(settings.run))
    trained = config  # which classes it saw is a matter of training
    config = config.but(class_half=settings.class_half) if settings.class_half else config
    if settings.store:
        # A CLIP from nothing has its tokenizer in its store.
        if not config.method.own_model or config.objective == "clip":
            message = f"store={settings.store}: {config.objective} is judged on {config.store} alone."
            raise SettingsError(message)
        config = config.but(store=run_folder.address(settings.store))
    if settings.to:
        locations.check_writable("to", settings.to)
    own = bool(config.method.own_model)
    if own and settings.classes_file:
        message = (
            f"classes_file: {config.objective} is judged with the store's classes; choose among them with "
            "--class-half."
        )
        raise SettingsError(message)
    if settings.asks_zero_shot and config.method.is_baseline:
        message = (
            f"zero_shot: {settings.run} is a baseline, without a head into the texts' space; evaluate an "
            "aligned run."
        )
        raise SettingsError(message)
    store = Store(config.store)
    classes = store.dataset.classes
    asked = zeroshot.candidates(classes, settings.classes_file) if settings.asks_zero_shot else None
    with checkpoint.opened(settings.run, settings.checkpoint) as folder:
        loaded = load(config, folder, len(classes), settings.weights)
    judge, split = Judge(config, loaded), settings.split or config.data.eval_split
    space = None
    if settings.retrieval or asked:
        space = objective_of(config).text_space(trained, store, judge.task)
    if asked and space is None and not own:
        message = f"zero_shot: images of {settings.run} share no space with texts ({config.objective})."
        raise SettingsError(message)
    outputs = None
    kept = settings.knn or settings.linear_probe or own
    if judge.classifies or kept or space is not None:
        outputs = judge.outputs(split, space, texts=settings.retrieval, features=kept)
    if judge.classifies:
        assert outputs is not None
        judgement = _judged(outputs, classes)
    else:
        judgement = Judgement(summary=_by_own_metric(judge, split, outputs), classes=classes)
    summary: Found = {
        "run": settings.run,
        "objective": config.objective,
        "split": split,
        "checkpoint": settings.checkpoint,
        "weights": loaded.weights,
        "epoch": int(loaded.state["epoch"]),
        **judgement.summary,
        "classes": len(classes_of(config.data.class_half, len(classes))),
    }
    if settings.knn and outputs is not None:
        summary["knn"] = _knn(judge, outputs, split)
    if settings.linear_probe and outputs is not None:
        summary["linear_probe"] = _linear_probe(judge, outputs)
    if judge.classifies and outputs is not None:
        told = objective_of(config).findings(config, judge, split, outputs, settings.class_prompts)
        if told:
            summary["findings"] = [asdict(each) for each in told]
    if space is not None and outputs is not None and settings.retrieval:
        summary["retrieval"] = _retrieval(space, outputs)
    if space is not None and outputs is not None and asked is not None:
        templates = settings.class_prompts or PROMPTS
        prompts = zeroshot.prompt_vectors(store, space, asked.names, templates)
        assert outputs.projected is not None
        seen = zeroshot.seen_classes(store, config.data.train_split, trained.data.class_half)
        scores = zeroshot.judge(outputs.projected, outputs.labels, prompts, asked, seen)
        summary["zero_shot"] = {"prompts": list(templates), "classes_file": settings.classes_file, **scores}
    judgement = replace(judgement, summary=summary, pictures=judge.pictures(split))
    if settings.to:
        findings.write(judgement, store, settings.to)
    return judgement


def _judged(outputs: Outputs, classes: list[str]) -> Judgement:
    """What the classifier's answers alone say."""
    correct = outputs.correct
    calibrated = measures.calibration(outputs.confidence, correct)
    matrix = measures.confusion(outputs.labels, outputs.predicted, len(classes))
    images, hits = matrix.sum(1), matrix.diagonal()
    present = np.flatnonzero(images)
    shares = 100 * hits[present] / images[present]
    worst = np.lexsort((present, shares))[:WORST]
    low, high = measures.interval(int(correct.sum()), len(correct))
    summary: Found = {
        "images": len(correct),
        "classes": len(classes),
        "top1": round(100 * float(correct.mean()), 3),
        "top1_interval": [round(100 * low, 3), round(100 * high, 3)],
        "top5": round(100 * float(outputs.top5.mean()), 3),
        "mean_per_class": round(float(shares.mean()), 3),
        "ece": round(100 * calibrated.ece, 3),
        "confidence": round(100 * float(outputs.confidence.mean()), 3),
        "worst_classes": [
            {
                "class": class_name(classes[present[n]]),
                "accuracy": round(float(shares[n]), 3),
                "images": int(images[present[n]]),
            }
            for n in worst
        ],
        "confused": [
            {"true": class_name(classes[true]), "predicted": class_name(classes[other]), "images": count}
            for true, other, count in measures.confused_pairs(matrix, PAIRS)
        ],
    }
    return Judgement(summary=summary, classes=classes, outputs=outputs, matrix=matrix, calibration=calibrated)


def _by_own_metric(judge: Judge, split: str, outputs: Outputs | None) -> Found:
    """What the method is judged by, where its model has no classifier; where other measures are asked for,
    too, they do not wait for a teacher that is not to be had."""
    try:
        metrics = judge.metrics(split)
    except SettingsError as error:
        if outputs is None:
            raise
        return {"images": len(outputs.labels), "left_out": str(error)}
    images = int(metrics.pop("eval_images"))
    return {"images": images, **metrics}


def _knn(judge: Judge, outputs: Outputs, split: str) -> Found:
    train = judge.config.data.train_split
    bank = outputs if split == train else judge.outputs(train, features=True)
    assert outputs.features is not None and bank.features is not None
    predicted = measures.nearest(
        outputs.features,
        bank.features,
        bank.labels,
        len(judge.store.dataset.classes),
        k=K,
        temperature=TEMPERATURE,
        same=split == train,
    )
    top1 = round(100 * float((predicted == outputs.labels).mean()), 3)
    return {"top1": top1, "k": K, "temperature": TEMPERATURE, "bank": len(bank.labels)}


def _linear_probe(judge: Judge, outputs: Outputs) -> Found:
    bank = judge.outputs(judge.config.data.train_split, features=True, training=True)
    assert outputs.features is not None and bank.features is not None
    from training.models import linear_probe

    probe = linear_probe.fit(bank.features, bank.labels)
    top1 = round(100 * float((probe(outputs.features) == outputs.labels).mean()), 3)
    return {"top1": top1, "penalty": probe.penalty, "images": len(bank.labels)}


def _retrieval(space: TextSpace, outputs: Outputs) -> Found | None:
    """None where fewer than two captions differ: then there is nothing to find."""
    assert outputs.projected is not None and outputs.targets is not None and outputs.groups is not None
    described = outputs.groups >= 0
    if not described.any():
        return None
    texts, groups = outputs.targets[described], outputs.groups[described]
    one_of, own = measures.different_texts(texts, groups)
    if len(one_of) < 2:
        return None
    ranks = measures.caption_ranks(outputs.projected[described], space.texts(texts[one_of]), own)
    recalls = {name: round(value, 3) for name, value in measures.retrieval(ranks).items()}
    return recalls | {"images": len(own), "captions": len(one_of)}
