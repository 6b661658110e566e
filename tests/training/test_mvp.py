"""Masked modelling towards a teacher: masks, the ways through the student, and the method as a whole."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from pipeline.config import FeatureConfig
from pipeline.encoders import models, vision
from pipeline.errors import SettingsError
from pipeline.stages.variants import FeatureVariant
from pipeline.store import Store
from tests import towers
from tests.pipeline.test_vision import staged
from tests.runs import fitted
from training import preparation, run_folder
from training.__main__ import parse_train
from training.config import EvaluateConfig, TrainConfig
from training.data import masking
from training.data.loader import Batch
from training.data.order import Rows
from training.data.views import Draw
from training.engine import build, checkpoint
from training.engine.build import Run
from training.evaluation import findings
from training.evaluation.evaluate import evaluate
from training.models import masked_vit
from training.objectives.mvp import OBJECTIVE, Inputs, MvpTask
from tuning import space
from tuning.__main__ import parse_tune

CPU = torch.device("cpu")


def settings(store: Path, teacher: Path | str, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {"backbone": "test_vit", "image_size": 32, "patch_size": 8, "flip": 0.0}
    values |= {"objective": "mvp", "teacher": str(teacher), "epochs": 3, "batch_size": 12, "threads": 1}
    values |= {"lr": 3e-3, "warmup_epochs": 0.0, "ema": 0.5}
    return TrainConfig.of(store=str(store), **values | changes)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    towers.clip(tmp_path / "clip")
    return tmp_path / "clip"


def samples(count: int) -> np.ndarray:
    zero, number = np.zeros(count, int), np.arange(count)
    return np.column_stack([zero, number // 5, number % 5, zero])


@pytest.mark.parametrize("kind", ["blocks", "random"])
@pytest.mark.parametrize(("grid", "ratio", "count"), [(14, 0.4, 78), (6, 0.75, 27), (4, 0.1, 2)])
def test_masks_are_drawn_by_step_and_sample_and_mask_equally_many(
    kind: masking.Kind, grid: int, ratio: float, count: int
) -> None:
    drawn = masking.masks(kind, grid, ratio, (1, 7), samples(40))
    assert drawn.shape == (40, grid**2) and (drawn.sum(1) == count).all()
    np.testing.assert_array_equal(masking.masks(kind, grid, ratio, (1, 7), samples(40)[11:13]), drawn[11:13])
    assert (masking.masks(kind, grid, ratio, (1, 8), samples(40)) != drawn).any()
    fixed = masking.fixed(kind, grid, ratio, samples(40))
    later = samples(40) + np.array([3, 0, 0, 1])  # another pass, another view
    np.testing.assert_array_equal(masking.fixed(kind, grid, ratio, later), fixed)
    assert (drawn.mean(0) > 0).all(), "every patch is masked now and then"


def test_blocks_are_blocks_and_random_patches_are_not() -> None:
    def borders(kind: masking.Kind) -> float:
        """Masked patches beside masked ones, as a share of what lies beside masked ones."""
        masks = masking.masks(kind, 14, 0.4, (0, 0), samples(100)).reshape(-1, 14, 14)
        right, left = masks[:, :, 1:], masks[:, :, :-1]
        return float((right & left).sum() / (right | left).sum())

    assert borders("blocks") > 0.6 and borders("random") == pytest.approx(0.4 / 1.6, abs=0.02)


def vit(**arguments: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=0, **arguments).eval()


@pytest.mark.parametrize(
    "arguments", [{}, {"global_pool": "avg"}, {"class_token": False, "global_pool": "avg"}]
)
def test_nothing_masked_is_timms_own_way_through_the_vit(arguments: Any) -> None:
    student, images = vit(**arguments), torch.randn(2, 3, 32, 32)
    predictor = masked_vit.MaskTokens(64, 5)
    with torch.no_grad():
        features = student.fc_norm(student.forward_features(images))[:, student.num_prefix_tokens :]
        found = predictor(student, images, torch.zeros(2, 16, dtype=torch.bool))
        torch.testing.assert_close(found, predictor.linear(features))


@pytest.mark.parametrize("way", ["replaced", "dropped"])
def test_predictions_do_not_see_what_is_masked_and_gradients_reach_all(way: str) -> None:
    student, images = vit(), torch.randn(2, 3, 32, 32)
    predictor: Any = masked_vit.MaskTokens(64, 5)
    if way == "dropped":
        predictor = masked_vit.Decoder(64, 5, 4, 10, narrow=64, depth=2)
    masked = torch.from_numpy(masking.masks("random", 4, 6 / 16, (0,), samples(2)))
    found = predictor(student, images, masked)
    assert found.shape == (2, 16, 5)
    hidden = masked.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    torch.testing.assert_close(predictor(student, images.masked_fill(hidden, 9.0), masked), found)
    assert not torch.allclose(predictor(student, images.masked_fill(~hidden, 9.0), masked), found)
    found.square().sum().backward()
    without = [n for m in (student, predictor) for n, p in m.named_parameters() if p.grad is None]
    assert not without, "DDP waits for every parameter"
    swapped = masked.roll(1, 1)
    assert not torch.allclose(predictor(student, images, swapped), found)


def test_positions_of_the_decoder_tell_all_places_apart() -> None:
    places = masked_vit.sines(7, 64)[0]
    distances = torch.cdist(places, places) + 9 * torch.eye(49)
    assert places.shape == (49, 64) and float(distances.min()) > 0.1
    assert float(distances[0, 1]) < float(distances[0, 3])


@pytest.mark.parametrize(
    "changes",
    [{}, {"masked_patches": "dropped", "regressor_width": 64, "token_loss": "smooth-l1", "accumulate": 3}],
)
def test_it_learns_and_goes_on_bit_for_bit_without_its_teacher_in_checkpoints(
    tmp_path: Path, make_store: Callable[..., Path], teacher: Path, changes: dict[str, Any]
) -> None:
    config = settings(make_store(tmp_path / "store", train=36), teacher, epochs=4, **changes)
    straight = fitted(config, tmp_path / "straight")
    history = checkpoint.read_state(str(straight / "epoch-4"))["history"]
    assert {"token_loss", "train_cosine", "cosine", "token_error", "ema_cosine"} <= history[-1].keys()
    assert not {"top1", "cross_entropy", "correct"} & history[-1].keys()
    assert (
        history[-1]["cosine"] > history[0]["cosine"] and history[-1]["token_loss"] < history[0]["token_loss"]
    )
    assert history[0]["constant_cosine"] == history[-1]["constant_cosine"] < 1
    resumed = fitted(config, tmp_path / "resumed", straight / "epoch-2")
    ends = [load_file(run / "epoch-4" / "model.safetensors") for run in (straight, resumed)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert {name.split(".")[0] for name in ends[0]} == {"backbone", "predictor"}
    assert not [name for name in ends[0] if name.startswith("backbone.head")]
    own = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=0).state_dict()
    assert {f"backbone.{name}" for name in own} == {n for n in ends[0] if n.startswith("backbone.")}
    again = OBJECTIVE.rebuild(config, ends[0], 3)
    assert again.teacher is None and torch.equal(
        again.state_dict()["predictor.linear.weight"], ends[0]["predictor.linear.weight"]
    )
    assert run_folder.judged_by({"objective": "mvp"}).name == "cosine"


def begun(config: TrainConfig) -> tuple[MvpTask, Run, Any]:
    run = Run.of(config, CPU, 0, None, None)
    return run.task, run, next(iter(run.loader.train(run.sequence, 0, 1, 0, 1)))


def test_two_workers_and_parts_have_the_gradient_of_the_whole_batch(
    tmp_path: Path, make_store: Callable[..., Path], teacher: Path
) -> None:
    task, run, batch = begun(settings(make_store(tmp_path / "store"), teacher))
    task.eval()
    draw = Draw(seed=0, step=5, rank=0, world=2, batch_size=12)
    whole = task.prepare(batch, run.stepper.views, draw)

    def gradient(parts: list[Inputs], shares: list[float]) -> torch.Tensor:
        task.zero_grad()
        for part, share in zip(parts, shares, strict=True):
            (task(part, share)["loss"] / len(parts)).backward()
        return torch.cat([p.grad.ravel() for p in task.parameters() if p.grad is not None])

    one = gradient([whole], [1.0])
    cut = [whole.part(slice(0, 7), None), whole.part(slice(7, 12), None)]
    two = gradient(cut, [2 * 7 / 12, 2 * 5 / 12])
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)
    other = Draw(seed=0, step=5, rank=1, world=2, batch_size=12)
    assert torch.equal(task.prepare(batch, run.stepper.views, other).masked, whole.masked), (
        "by sample, not worker"
    )

    def evaluated(batches: list[Any]) -> torch.Tensor:
        evaluator = task.evaluator(CPU)
        with torch.inference_mode():
            for each in batches:
                evaluator.add(each, run.stepper.views.norm(each.images), run.stepper.precision)
        return evaluator.sums()

    rows = Rows(run.store, "val").in_order()
    every = list(run.loader.evaluate(rows, 5, 0, 1))
    split = [list(run.loader.evaluate(rows, 5, rank, 2)) for rank in (0, 1)]
    torch.testing.assert_close(evaluated(every), evaluated(split[0]) + evaluated(split[1]))


@pytest.mark.parametrize("form", ["cosine", "smooth-l1"])
def test_losses_are_those_of_the_formulas_and_nothing_is_taught_without_a_target(
    tmp_path: Path, make_store: Callable[..., Path], teacher: Path, form: str
) -> None:
    config = settings(make_store(tmp_path / "store"), teacher, token_loss=form, smooth_l1_beta=0.5)
    task = begun(config)[0]
    predicted, targets = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    targets[1] = 0
    found = task.errors(predicted, targets)
    p, t = predicted[0].numpy(), targets[0].numpy()
    if form == "cosine":
        lengths = np.linalg.norm(p, axis=1) * np.linalg.norm(t, axis=1)
        expected = 2 - 2 * (p * t).sum(1) / lengths
    else:
        d = np.abs(p - t)
        expected = np.where(d < 0.5, d**2, d - 0.25).mean(1)
    np.testing.assert_allclose(found[0], expected)
    assert not found[1].any()
    _, _, batch = begun(config)
    batch.columns["tokens"] = torch.randn(len(batch.images), task.grid**2, task.dim)
    norm, metrics = build.make_norm(task.backbone, torch.device("cpu")), []
    batch.columns["tokens"][1::2] = 0
    half = Batch(
        batch.images[::2], batch.labels[::2], {"tokens": batch.columns["tokens"][::2]}, batch.samples[::2]
    )
    for each in (batch, half):
        evaluator = task.evaluator(torch.device("cpu"))
        with torch.no_grad():
            evaluator.add(each, norm(each.images), contextlib.nullcontext)
        metrics.append(evaluator.metrics(evaluator.sums().tolist()) | {"eval_images": 0})
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4), "pictures without features count nowhere"


def stored(store: Path, teacher: Path) -> str:
    """The teacher's tokens in the store, by the stage's own steps."""
    config = FeatureConfig(store=str(store), tower=str(teacher), tokens=True, device="cpu")
    from pipeline.encoders import models, vision

    model = models.resolve(config.tower)
    facts = vision.describe(model)
    variant, opened = FeatureVariant.of(config, model, facts.size), Store(str(store))
    opened.write_variant("features", variant.name, {**variant.record(), **vars(facts), "versions": {}})
    for shard in range(opened.dataset.shards):
        staged(config, variant.name, shard)
    return variant.name


def test_stored_features_are_those_of_the_views_that_the_student_sees(
    tmp_path: Path, make_store: Callable[..., Path], teacher: Path
) -> None:
    store = make_store(tmp_path / "store")
    name = stored(store, teacher)
    config = settings(store, "", stored_features=True, crop_scale=1.0)
    config, variants = preparation.prepare(config.but(run=str(tmp_path / "run")))
    assert variants == {"features": name} and config.method.teacher == str(teacher)
    task, _, batch = begun(config)
    assert task.teacher is None
    tower = vision.describe(models.resolve(str(teacher)))
    facts = OBJECTIVE.check(config, Store(str(store)))
    assert facts.fixed_cut == tower.cut
    from_store = task.targets(batch)
    online, _, _ = begun(settings(store, teacher))
    asked = online.targets(type(batch)(batch.images, batch.labels, {}, batch.samples))
    cosine = torch.nn.functional.cosine_similarity(from_store, asked, dim=-1)
    assert float(cosine.min()) > 0.99, "of the same pixels, but for two ways to resize"
    history = checkpoint.read_state(str(fitted(config, tmp_path / "fitted") / "epoch-3"))["history"]
    assert history[-1]["cosine"] > history[0]["cosine"]

    def told(**changes: Any) -> str:
        with pytest.raises(SettingsError) as error:
            preparation.check(settings(store, **{"teacher": "", "stored_features": True} | changes))
        return str(error.value)

    both = told(flip=0.5)
    assert "flip=0.5: stored features are of pictures as they are evaluated; pass --flip 0." in both
    assert "crop_scale=0.35" in both and "pass --crop-scale 1." in both
    assert f"the features {name} are of {teacher}" in told(crop_scale=1.0, teacher="another/one")
    assert "3 x 3 patches of 8 pixels" in told(crop_scale=1.0, image_size=24)


def test_faults_are_found_before_a_worker_starts(
    tmp_path: Path, make_store: Callable[..., Path], teacher: Path
) -> None:
    store = make_store(tmp_path / "store")

    def told(**changes: Any) -> str:
        with pytest.raises(SettingsError) as error:
            preparation.check(settings(store, **{"teacher": teacher} | changes))
        return str(error.value)

    differing = told(image_size=64)
    assert "has 8 x 8 patches of 8 pixels" in differing and "4 x 4 of 8; pass --image-size 32" in differing
    assert "--patch-size 16, or --teacher-size 64." in differing
    preparation.check(settings(store, teacher, image_size=64, teacher_size=64))
    assert "teacher_size=30: " in told(teacher_size=30)
    assert "changes the student's picture after the teacher has seen it" in told(mixup=0.2)
    assert "is no plain ViT" in told(backbone="test_resnet", patch_size=0)
    assert "no such folder" in told(teacher="./nowhere")
    assert "pass --image-size 28 or 35, or another --patch-size" in told(patch_size=7)
    assert "leave --patch-size out (0)" in told(backbone="test_resnet")
    assert "masks 0 of 16 patches" in told(mask_ratio=0.02)
    assert "teacher: name the vision tower" in told(teacher="")
    assert "pass the 40 digits" in told(teacher_revision="main")
    assert "has no features yet; run: gpt4image features --store" in told(
        teacher="", stored_features=True, crop_scale=1.0
    )
    assert "is for a classifier on top" in told(freeze_backbone=True, pretrained=True)


def test_another_teacher_under_the_same_name_is_found_when_a_run_goes_on(
    tmp_path: Path, make_store: Callable[..., Path], teacher: Path
) -> None:
    config = settings(make_store(tmp_path / "store"), teacher, run=str(tmp_path / "run"))
    config, _ = preparation.prepare(config)
    assert config.method.teacher_revision.startswith("files-")
    told = OBJECTIVE.describe(config, Store(config.store))
    assert "Teacher: clip (files-" in told.lines[0] and str(tmp_path) not in f"{told.lines} {told.settings}"
    preparation.check(config)
    towers.clip(teacher, seed=1)
    with pytest.raises(SettingsError, match="its files have changed since they were recorded"):
        preparation.check(config)


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_a_linear_probe_of_a_run_trains_the_classifier_alone(
    tmp_path: Path, make_store: Callable[..., Path], teacher: Path, backbone: str
) -> None:
    store = make_store(tmp_path / "store", train=36)
    plain = {
        "objective": "align",
        "alignment_weight": 0.0,
        "backbone": backbone,
        "image_size": 32,
        "epochs": 1,
    }
    if backbone == "test_vit":
        first = fitted(settings(store, teacher, epochs=1), tmp_path / "first")
        plain |= {"patch_size": 8}
    else:
        first = fitted(
            TrainConfig.of(store=str(store), batch_size=12, threads=1, **plain), tmp_path / "first"
        )
    config = TrainConfig.of(
        store=str(store), batch_size=12, threads=1, init_from=str(first), freeze_backbone=True, **plain
    )
    chained, _ = preparation.prepare(config.but(run=str(tmp_path / "probe")))
    probe = fitted(chained.but(ema=0.5, epochs=2), tmp_path / "probe")
    file = "ema" if backbone == "test_vit" else "model"
    before = load_file(first / "epoch-1" / f"{file}.safetensors")
    after = load_file(probe / "epoch-2" / "model.safetensors")
    kept = {
        name: value
        for name, value in after.items()
        if name
        not in ("backbone.head.weight", "backbone.head.bias", "backbone.fc.weight", "backbone.fc.bias")
    }
    assert len(kept) >= len(after) - 2 and all(
        torch.equal(value, before[name]) for name, value in kept.items()
    )
    resumed = fitted(chained.but(ema=0.5, epochs=2), tmp_path / "again", probe / "epoch-1")
    ends = load_file(resumed / "epoch-2" / "model.safetensors")
    assert all(torch.equal(value, ends[name]) for name, value in after.items())
    with pytest.raises(SettingsError, match="what does not train must be trained"):
        preparation.check(config.but(init_from=""))
    if backbone == "test_vit":
        shutil.move(teacher, tmp_path / "elsewhere")
        summary = evaluate(EvaluateConfig(run=str(first), linear_probe=True)).summary
        lines = findings.table(summary)
        assert "left out: model=" in lines and "linear probe top-1" in lines, lines
        with pytest.raises(SettingsError, match="no such folder"):
            evaluate(EvaluateConfig(run=str(first)))


def test_recipes_bring_their_method_along_and_the_teacher_is_an_axis_of_sweeps() -> None:
    config = parse_train(["--store", "s", "--preset", "mvp-vit-b"])
    assert (config.objective, config.method.mask_ratio, config.optim.epochs) == ("mvp", 0.4, 300)
    assert parse_train(["--store", "s", "--objective", "mvp"]).model.backbone == "vit_base_patch16_224"
    scenes = parse_train(["--store", "s", "--preset", "mvp-scenes"])
    assert scenes.method.title() == "mvp-clip-m0.4" and scenes.data.flip == 0
    assert config.method.grid().cells() == [{"mask_ratio": 0.4}]
    flags = [
        "--store",
        "s",
        "--preset",
        "mvp-scenes",
        "--teachers",
        "a/x",
        "timm:y",
        "--mask-ratios",
        "0.4",
        "0.6",
    ]
    sweep = parse_tune(flags)
    (arm,) = space.arms(sweep)
    made = [space.Configuration(number, arm, values) for number, values in enumerate(arm.grid())]
    trials = [space.settings(sweep, each, 3, "/sweep") for each in made]
    assert [space.trial_name(trial) for trial in trials] == [
        f"test_vit2-mvp-{teacher}-m{ratio}-s3" for teacher in "xy" for ratio in (0.4, 0.6)
    ]
    assert trials[2].method.told() == {"teacher": "y", "masked": "0.4"}
