"""CoOp and CoCoOp as trainings: learned, gone on with, judged on classes they never saw, exported."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, CLIPModel

from pipeline.encoders import vision
from pipeline.encoders.models import resolve
from pipeline.errors import SettingsError
from pipeline.store import Store, features_table
from tests import towers
from tests.runs import fitted
from training import preparation
from training.__main__ import main, parse_train
from training.config import EvaluateConfig, ExportConfig, TrainConfig
from training.data.few_shot import drawn
from training.data.loader import Batch
from training.data.views import Draw
from training.engine import build
from training.evaluation import findings
from training.evaluation.evaluate import evaluate
from training.export.export import describe, export
from training.objectives import coop
from training.objectives.coop import Inputs
from training.objectives.protocol import objective_of
from tuning.cells import cell_of

METHODS: dict[str, dict[str, Any]] = {
    "coop": {"context_length": 3},
    "cocoop": {"context_length": 0, "context_words": "a photo of a", "prompts_at_once": 8},
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    towers.clip(folder)
    towers.tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def store(make_store: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("few") / "store", classes=5, train=60, val=30)


def settings(store: Path, model: Path, objective: str = "coop", **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "store": str(store),
        "objective": objective,
        "clip": str(model),
        "crop_scale": 0.9,
        "image_size": 32,
        "epochs": 4,
        "batch_size": 6,
        "optimizer": "momentum",
        "lr": 0.05,
        "warmup_epochs": 0,
        "shots": 8,
        "class_half": "base",
        "threads": 1,
        "ema": 0.5,
        **METHODS[objective],
    }
    return TrainConfig.of(**values | changes)


def with_features(store: Path, clip: Path, folder: Path, make_store: Callable[..., Path]) -> Path:
    """A store with the embeddings of all pictures, as `features` keeps them."""
    path = make_store(folder, classes=5, train=60, val=30)
    own, model = Store(str(path)), CLIPModel.from_pretrained(clip).eval()
    made = {"tower": str(clip), "revision": resolve(str(clip)).revision, "feature_size": 32, "tokens": False}
    own.write_variant("features", "made", made)
    config = settings(path, clip)
    task = objective_of(config).build(config, None, 5)
    loader = build.make_loader(config, (), task.backbone)
    for shard in range(own.dataset.shards):
        ids = own.read_shard("images", "", shard, ["id"])["id"].to_pylist()
        samples = np.array([[0, shard, row, 0] for row in range(len(ids))])
        (batch,) = loader.evaluate(samples, 100, 0, 1)
        norm = build.make_norm(task.backbone, torch.device("cpu"))
        with torch.no_grad():
            pooled = model.get_image_features(norm(batch.images)).pooler_output
        pooled = (pooled / pooled.norm(dim=-1, keepdim=True)).half().numpy()
        own.write_shard("features", "made", shard, features_table(ids, [None] * len(ids), pooled), seconds=0)
    return path


@pytest.mark.parametrize("objective", METHODS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_learns_goes_on_bit_for_bit_and_keeps_what_it_learned_alone(
    tmp_path: Path, store: Path, clip: Path, objective: str, accumulate: int
) -> None:
    config = settings(store, clip, objective, accumulate=accumulate)
    straight = fitted(config, tmp_path / "straight")
    resumed = fitted(config, tmp_path / "resumed", straight / "epoch-2")
    ends = [load_file(folder / "epoch-4" / "model.safetensors") for folder in (straight, resumed)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    learned = {"backbone.context"}
    learned |= {f"backbone.generator.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")}
    assert ends[0].keys() == (learned if objective == "cocoop" else {"backbone.context"})
    history = json.loads((straight / "epoch-4" / "state.json").read_text())["history"]
    assert history[-1]["loss"] < history[0]["loss"]
    assert {"top1", "ema_top1", "zero_shot_top1", "train_top1"} <= history[-1].keys()
    assert history[-1]["zero_shot_top1"] == history[0]["zero_shot_top1"]


@pytest.mark.parametrize("objective", METHODS)
def test_shares_of_a_batch_add_up_to_it(tmp_path: Path, store: Path, clip: Path, objective: str) -> None:
    config = settings(store, clip, objective)
    task = objective_of(config).build(config, None, 5)
    torch.manual_seed(0)
    inputs = Inputs(torch.tensor([0, 1, 2, 1, 0]), images=torch.randn(5, 3, 32, 32))
    gradients = []
    for cuts in ([slice(0, 5)], [slice(0, 3), slice(3, 5)]):
        total = 0
        for rows in cuts:
            part = inputs.part(rows, None)
            total = total + task(part, len(cuts) * len(part) / 5)["loss"] / len(cuts)
        gradients.append(torch.autograd.grad(total, list(task.parameters())))
    for whole, added in zip(*gradients, strict=True):
        torch.testing.assert_close(added, whole, atol=1e-5, rtol=1e-4)


def test_classes_that_take_part_are_numbered_from_0_also_where_pictures_are_mixed(
    store: Path, clip: Path
) -> None:
    config = settings(store, clip, class_half="new", mixup=1.0)
    task = objective_of(config).build(config, None, 5)
    norm = build.make_norm(task.backbone, torch.device("cpu"))
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    batch = Batch(images, torch.tensor([3, 4, 3, 3]), {}, np.zeros((4, 4), np.int64))
    mixed = task.prepare(batch, build.Views(config, norm, 5), Draw(0, 0, 0, 1, 4))
    assert mixed.classes.shape == (4, 2)
    torch.testing.assert_close(mixed.classes.sum(1), torch.ones(4))
    plain = build.Views(config.but(mixup=0.0), norm, 5)
    assert task.prepare(batch, plain, Draw(0, 0, 0, 1, 4)).classes.tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("objective", METHODS)
def test_base_and_new_classes_are_judged_each_among_themselves(
    tmp_path: Path, store: Path, clip: Path, objective: str, make_store: Callable[..., Path]
) -> None:
    run = fitted(settings(store, clip, objective), tmp_path / "run")
    judged = evaluate(EvaluateConfig(run=str(run), linear_probe=True))
    summary, outputs = judged.summary, judged.outputs
    assert summary["classes"] == 3 and set(outputs.labels) == set(outputs.predicted) | {0, 1, 2} == {0, 1, 2}
    told = {each["name"]: each["value"] for each in summary["findings"]}
    last = json.loads((run / "epoch-4" / "state.json").read_text())["history"][-1]
    assert told["zero-shot top-1"] == pytest.approx(last["zero_shot_top1"])
    assert summary["top1"] == pytest.approx(last["ema_top1"], abs=0.001)
    new = evaluate(EvaluateConfig(run=str(run), class_half="new"))
    assert set(new.outputs.labels) == {3, 4} and set(new.outputs.predicted) <= {3, 4}
    assert told["new top-1"] == pytest.approx(new.summary["top1"], abs=0.001)
    base, unseen = summary["top1"], new.summary["top1"]
    assert told["H"] == pytest.approx(2 * base * unseen / (base + unseen), abs=0.01)
    few = drawn(settings(store, clip), Store(str(store)))["pictures"]
    assert summary["linear_probe"]["images"] == sum(map(len, few.values()))
    lines = findings.table(summary)
    assert "zero-shot H" in lines and "nearest words" in lines and "linear probe top-1" in lines
    other = make_store(tmp_path / "other", classes=2, val=12)
    elsewhere = evaluate(EvaluateConfig(run=str(run), store=str(other), class_half="all"))
    assert (elsewhere.summary["images"], elsewhere.summary["classes"]) == (12, 2)
    every = evaluate(EvaluateConfig(run=str(run), class_half="all", class_prompts=("{label} old",)))
    assert every.summary["images"] == 30 and "new top-1" not in str(every.summary["findings"])
    assert "{label} old" in every.summary["findings"][0]["note"]


def test_a_picture_without_an_embedding_is_no_hit_of_any_class(store: Path, clip: Path) -> None:
    task = objective_of(settings(store, clip)).build(settings(store, clip), None, 5).eval()
    pooled = torch.randn(4, task.zero_shot.shape[1])
    pooled[:2] = 0
    batch = Batch(torch.empty(4, 0), torch.zeros(4, dtype=torch.int64), {"pooled": pooled}, np.zeros((4, 4)))
    evaluator = task.evaluator(torch.device("cpu"))
    with torch.no_grad():
        evaluator.add(batch, batch.images, contextlib.nullcontext)
    found = evaluator.metrics(evaluator.sums().tolist())
    assert found["top5"] == 50 and found["zero_shot_top1"] <= 50 and found["eval_images"] == 4


def test_new_classes_without_a_picture_or_none_at_all_spoil_no_evaluation(
    tmp_path: Path, store: Path, clip: Path, monkeypatch: pytest.MonkeyPatch, make_store: Callable[..., Path]
) -> None:
    run, real = fitted(settings(store, clip), tmp_path / "run"), coop.rows_of

    def rows_of(config: TrainConfig, *where: Any) -> Any:
        if config.data.class_half == "new":
            message = "none"
            raise SettingsError(message)
        return real(config, *where)

    monkeypatch.setattr(coop, "rows_of", rows_of)
    told = {each["name"]: each for each in evaluate(EvaluateConfig(run=str(run))).summary["findings"]}
    assert told["new top-1"]["value"] is None and "no usable picture" in told["new top-1"]["note"]
    one = make_store(tmp_path / "one", classes=2, train=24, val=12)
    with pytest.raises(SettingsError, match="class_half=base: has 1 of the classes"):
        preparation.check(settings(one, clip))


def test_classes_of_one_name_are_told(store: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, opened = settings(store, clip, class_half="all"), Store(str(store))
    method = objective_of(config)
    assert not method.notes(config, opened, method.check(config, opened))
    classes = ["blue-ring", "blue ring", "c", "d", "e"]
    monkeypatch.setattr(opened, "dataset", dataclasses.replace(opened.dataset, classes=classes))
    (note,) = method.notes(config, opened, method.check(config, opened))
    assert "several classes are called blue ring" in note and "--class-names" in note


def test_adaptive_clipping_holds_for_what_is_learned(tmp_path: Path, store: Path, clip: Path) -> None:
    still = {"ema": 0.0, "weight_decay": 0.0, "epochs": 1, "clip_mode": "agc"}
    ways = []
    for limit in (1e-9, 0.0):
        run = fitted(settings(store, clip, clip_grad=limit, **still), tmp_path / f"run-{limit}")
        begun = objective_of(settings(store, clip)).build(settings(store, clip), None, 5)
        learned = load_file(run / "epoch-1" / "model.safetensors")["backbone.context"]
        ways.append(float((learned - begun.backbone.context.detach()).norm()))
    assert ways[0] < 1e-3 * ways[1]


def test_contexts_of_each_class_are_for_no_other_classes(tmp_path: Path, store: Path, clip: Path) -> None:
    config = settings(store, clip, context_per_class=True, class_position="middle")
    run = fitted(config, tmp_path / "run")
    assert load_file(run / "epoch-4" / "model.safetensors")["backbone.context"].shape == (3, 3, 32)
    told = [each["name"] for each in evaluate(EvaluateConfig(run=str(run))).summary["findings"]]
    assert told == ["zero-shot top-1", "nearest words"]
    with pytest.raises(SettingsError, match="class_half=new: 3 classes have contexts of their own"):
        evaluate(EvaluateConfig(run=str(run), class_half="new"))


def test_the_stores_embeddings_are_read_in_place_of_pictures(
    tmp_path: Path, store: Path, clip: Path, make_store: Callable[..., Path]
) -> None:
    made = with_features(store, clip, tmp_path / "store", make_store)
    config = settings(made, clip, run=str(tmp_path / "run"))
    ready, variants = preparation.prepare(config)
    assert variants == {"features": "made"} and ready.method.image_features == "made"
    facts = objective_of(ready).check(ready, Store(str(made)))
    assert not facts.pictures
    config = config.but(crop_scale=1.0, flip=0.0, ema=0.0)
    histories = []
    for features in ("", "made", "none"):
        run = fitted(config.but(image_features=features), tmp_path / f"run-{features}")
        histories.append(json.loads((run / "epoch-4" / "state.json").read_text())["history"])
    assert histories[0][-1]["loss"] == histories[1][-1]["loss"] != histories[2][-1]["loss"]
    assert histories[0][0]["zero_shot_top1"] == histories[2][0]["zero_shot_top1"], (
        "the same pictures, seen whole"
    )
    with pytest.raises(SettingsError, match="image_features: pictures that are mixed or erased"):
        preparation.check(config.but(mixup=0.2))
    Store(str(made)).write_variant("features", "other", {"tower": "t", "revision": "r", "feature_size": 32})
    with pytest.raises(SettingsError, match="features other lacks 9 of 9 shards"):
        preparation.check(config.but(image_features="other"))


def test_pictures_are_evaluated_as_they_are_seen_for_the_store(tmp_path: Path, store: Path) -> None:
    """64 of 93 pixels: the floor of 64 / (64 / 93) is 92, and the margin is odd."""
    towers.clip(tmp_path, size=64, pad=29)
    towers.tokenizer(tmp_path)
    config = settings(store, tmp_path, image_size=64)
    task = objective_of(config).build(config, None, 5)
    augment = build.decoder_spec(config, (), task.backbone, 1).augment
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (93, 100, 3), dtype=np.uint8))
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    wanted = vision.describe(resolve(str(tmp_path))).cut(picture)
    np.testing.assert_array_equal(augment.evaluate(encoded.getvalue()), wanted)
    assert not augment.fixed


def test_a_run_goes_on_with_the_clip_and_the_features_it_was_begun_with(
    tmp_path: Path, store: Path, clip: Path
) -> None:
    from training import run_folder

    given = settings(store, clip, run=str(tmp_path / "run"))
    begun, _ = preparation.prepare(given)
    assert begun.method.clip_revision == resolve(str(clip)).revision
    assert begun.method.image_features == "none" and begun.model.backbone == "clip"
    recorded = json.loads(json.dumps(run_folder.written(begun, "")))
    assert run_folder.resumed(given, recorded).method == begun.method
    assert cell_of(recorded).words == "context 3" and preparation.title(begun) == "clip-context3-s0"


def test_an_export_of_coop_is_a_classifier_for_anyone_with_that_clip(
    tmp_path: Path, store: Path, clip: Path
) -> None:
    run = fitted(settings(store, clip), tmp_path / "run")
    told = export(ExportConfig(run=str(run), to=str(tmp_path / "model")))
    assert told["files"] == ["README.md", "config.json", "labels.txt", "model.safetensors"]
    assert "96 parameters" in describe(told)
    card = (tmp_path / "model" / "README.md").read_text()
    assert str(clip) not in card + (tmp_path / "model" / "config.json").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(5)]
    space: dict[str, Any] = {"CLIP": str(clip), "pictures": pictures}
    exec(code.replace("FOLDER", str(tmp_path / "model")), space)
    config = settings(store, clip)
    weights = load_file(run / "epoch-4" / "ema.safetensors")
    task = objective_of(config).rebuild(config, weights, 5).eval()
    seen = AutoImageProcessor.from_pretrained(clip)(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = task.backbone.logits(task.backbone.forward_features(seen))
    torch.testing.assert_close(space["logits"], logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(SettingsError, match="format=onnx: coop has no model of timm"):
        export(ExportConfig(run=str(run), to=str(tmp_path / "onnx"), format="onnx"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_size": 64}, "image_size=64: .* sees 32 pixels; pass --image-size 32"),
        ({"patch_size": 8, "layer_decay": 0.5}, "patch_size: is for models of timm.*\n.*layer_decay"),
        ({"context_length": 13}, "the prompt of class 'class 0' has 18 tokens"),
        ({"zero_shot_templates": ("a " * 20 + "{label}",)}, "the text tower reads 16"),
        ({"zero_shot_templates": ("a {label} in {place}",)}, "must hold {label} and no other braces"),
        ({"image_features": "none-such"}, "has no features yet"),
        ({"shots": 1}, "batch_size=6: the split train has 3 usable images"),
        ({"init_from": "/run"}, "init_from: is for models of timm"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_starts(
    store: Path, clip: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingsError, match=f"(?s){said}"):
        preparation.check(settings(store, clip, **changes))
    with pytest.raises(SettingsError, match=r"clip='\./none': .*no such folder, and not a hub name"):
        preparation.check(settings(store, Path("none"), clip="./none"))


def test_its_flags_are_its_own_and_a_backbone_is_none_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    config = parse_train(["--store", "s", "--preset", "cocoop", "--shots", "8"])
    assert (config.objective, config.method.context_words, config.data.shots) == ("cocoop", "a photo of a", 8)
    assert (config.optim.lr, config.optim.batch_size, config.model.backbone) == (0.016, 8, "clip")
    assert config.method.clip == "openai/clip-vit-base-patch16"  # the paper's, and not the toy of the scenes
    with pytest.raises(SettingsError, match="clip: name the frozen CLIP"):
        TrainConfig.of(store="s", objective="coop")
    wrong = [["--backbone", "resnet18"], ["--context-length", "0"], ["--zero-shot-templates", "a photo"]]
    for flags in wrong:
        with pytest.raises(SystemExit):
            main(["train", "--store", "s", "--objective", "coop", *flags])
    told = capsys.readouterr().err
    assert "coop brings its own model" in told and "needs --context-words" in told and "{label}" in told
