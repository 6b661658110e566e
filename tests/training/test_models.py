"""Backbones, head, checkpoints, export."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from training.config import TrainConfig
from training.data.mixing import text_targets
from training.engine import checkpoint, loop
from training.engine.epoch_log import NotFiniteError
from training.engine.step import Stepper
from training.losses.alignment import TextGather
from training.losses.classification import CrossEntropy
from training.models import backbones, optimizers
from training.objectives import align
from training.objectives.align import Alignment, AlignTask, Goal, Inputs
from training.settings import flat

BACKBONES = [
    ("resnet18", 64),
    ("resnet50", 64),
    ("vit_tiny_patch16_224", 64),
    ("convnext_atto", 64),
    ("hiera_tiny_224", 224),
]


def goal(texts: torch.Tensor) -> Goal:
    groups = torch.arange(len(texts))
    return Goal(TextGather(texts, groups), *text_targets(groups))


@pytest.mark.parametrize(("name", "size"), BACKBONES)
def test_a_backbone_is_built_and_takes_one_step(name: str, size: int) -> None:
    torch.manual_seed(0)
    model = backbones.build(name, num_classes=7, image_size=size)
    task = AlignTask(model, Alignment(weight=0.3, dim=16, learn_temperature=True), CrossEntropy(0.1))
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    before = {key: value.clone() for key, value in task.named_parameters()}
    images, labels = torch.randn(4, 3, size, size), torch.tensor([0, 1, 2, 3])
    texts = torch.nn.functional.normalize(torch.randn(4, 16), dim=-1)
    parts = task(Inputs(images, labels, goal(texts)))
    parts["loss"].backward()
    optimizer.step()
    still = [
        key
        for key, value in task.named_parameters()
        if torch.equal(value, before[key]) and value.grad is None
    ]
    assert still == [], "every parameter trains, or DDP would wait for it"
    assert torch.isfinite(parts["loss"]) and parts["alignment"] > 0
    torch.testing.assert_close(parts["loss"].detach(), parts["cross_entropy"] + 0.3 * parts["alignment"])


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_features_and_logits_are_timms_own(name: str) -> None:
    model = backbones.build(name, num_classes=7, image_size=64).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features, logits = backbones.features_and_logits(model, images)
        torch.testing.assert_close(logits, model(images))
    assert features.shape == (2, backbones.num_features(model))


def test_a_misspelt_backbone_names_what_was_meant() -> None:
    with pytest.raises(ValueError, match=r"no such model; did you mean .*resnet18"):
        backbones.build("resnet81", num_classes=2, image_size=64)


def test_a_size_that_a_backbone_cannot_take_names_its_own() -> None:
    with pytest.raises(ValueError, match="pass --image-size 32 or 64, or another"):
        backbones.probe("hiera_tiny_224", 50)
    for name, size in BACKBONES:
        backbones.probe(name, size)


def test_the_baseline_has_no_head_and_starts_from_the_same_weights() -> None:
    common = {"store": "s", "backbone": "resnet18", "seed": 3}
    plain = align.build_task(TrainConfig.of(**common, alignment_weight=0), 5, 0)  # type: ignore[arg-type]
    aligned = align.build_task(TrainConfig.of(**common, alignment_weight=1), 5, 16)  # type: ignore[arg-type]
    assert plain.head is None
    for (name, mine), (_, other) in zip(
        plain.backbone.named_parameters(), aligned.backbone.named_parameters(), strict=True
    ):
        assert torch.equal(mine, other), name


def test_the_papers_head() -> None:
    """Linear, BatchNorm, ReLU, Linear for ResNets (6,296,576 parameters for 2048 to 1024); without BatchNorm
    for ViTs."""
    from training.models.heads import ProjectionHead

    head = ProjectionHead(2048, 1024, "mlp", batch_norm=True)
    assert (
        sum(p.numel() for p in head.parameters()) == 2048 * 2048 + 2 * 2048 + 2048 * 1024 + 1024 == 6_296_576
    )
    vit = ProjectionHead(768, 1024, "mlp", batch_norm=False)
    assert sum(p.numel() for p in vit.parameters()) == 768 * 2048 + 2048 + 2048 * 1024 + 1024 == 3_673_088
    out = head(torch.randn(3, 2048))
    torch.testing.assert_close(out.norm(dim=1), torch.ones(3))


def test_a_checkpoint_brings_everything_back(tmp_path: Path) -> None:
    from timm.utils import ModelEmaV3

    config = TrainConfig.of(store="s", backbone="test_resnet", optimizer="adamw", seed=0)
    task = align.build_task(config, 5, 16)
    optimizer, ema = optimizers.optimizer(config, task), ModelEmaV3(task, decay=0.5)
    aimed = goal(torch.nn.functional.normalize(torch.randn(4, 16), dim=-1))
    parts = task(Inputs(torch.randn(4, 3, 64, 64), torch.arange(4), aimed))
    parts["loss"].backward()
    optimizer.step()
    ema.update(task)
    state = checkpoint.State(
        step=7, history=[{"epoch": 1.0, "top1": 10.0}], sums={"loss": 0.1 + 0.2}, seconds=1.5
    )
    snapshot = checkpoint.Snapshot.take(task, optimizer, ema, state)
    expected = {name: value.clone() for name, value in task.state_dict().items()}
    averaged = {name: value.clone() for name, value in ema.module.state_dict().items()}
    with torch.no_grad():  # what happens between taking and writing does not count
        for parameter in [*task.parameters(), *ema.module.parameters()]:
            parameter.add_(1)
    snapshot.write(str(tmp_path / "c"))
    other = align.build_task(TrainConfig.of(**(flat(config) | {"seed": 9})), 5, 16)
    other_optimizer, other_ema = optimizers.optimizer(config, other), ModelEmaV3(other, decay=0.5)
    assert checkpoint.load(str(tmp_path / "c"), other, other_optimizer, other_ema) == state
    for name, value in expected.items():
        assert torch.equal(value, other.state_dict()[name]), name
    for name, value in averaged.items():
        assert torch.equal(value, other_ema.module.state_dict()[name]), name
    mine, found = optimizer.state_dict(), other_optimizer.state_dict()
    assert mine["param_groups"] == found["param_groups"]
    for key, values in mine["state"].items():
        for name, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(found["state"][key][name])), (
                key,
                name,
            )


class StopError(Exception):
    """Stands for a kill."""


def run_alone(
    config: TrainConfig, folder: Path, resume: str | None = None, stop_at: int | None = None
) -> Path:
    """The per-worker loop in this process; returns the last checkpoint's folder."""
    last: list[Path] = []

    def report(metrics: dict[str, float] | None, take: Callable[[], checkpoint.Snapshot]) -> None:
        snapshot = take()
        target = folder / f"step-{snapshot.content['step']}"
        snapshot.write(str(target))
        last.append(target)
        if snapshot.content["step"] == stop_at:
            raise StopError

    with contextlib.suppress(StopError):
        loop.fit(config, torch.device("cpu"), 0, resume, report)
    return last[-1]


EVERYTHING = {
    "mixup": 0.8,
    "cutmix": 1.0,
    "erase": 0.5,
    "drop_path": 0.2,
    "ema": 0.9,
    "accumulate": 2,
    "store_negatives": 5,
    "repeats": 2,
    "learn_temperature": True,
    "clip_grad": 1.0,
    "text_projection": "learned",
    "balance": "gradients",
    "alignment_schedule": "linear",
}


@pytest.mark.parametrize("kind", ["plain", pytest.param("everything", marks=pytest.mark.slow)])
def test_a_run_stopped_anywhere_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, make_store: Callable[..., Path], kind: str
) -> None:
    """Bit for bit, also from inside an epoch; 50 rows in batches of 16, so that epochs end inside a batch."""
    store = make_store(tmp_path / "s", train=50)
    config = TrainConfig.of(
        store=str(store),
        backbone="test_resnet" if kind == "plain" else "test_vit",
        image_size=32,
        epochs=3,
        batch_size=16,
        projection_dim=4,
        warmup_epochs=1.0,
        checkpoint_steps=1,
        **(EVERYTHING if kind == "everything" else {}),
    )
    straight = run_alone(config, tmp_path / "straight")
    assert straight.name == "step-10", "150 samples"
    from safetensors.torch import load_file

    def check(resumed: Path, told: str) -> None:
        for file in ("model", "optimizer", *(["ema"] if config.optim.ema else [])):
            expected, found = (load_file(folder / f"{file}.safetensors") for folder in (straight, resumed))
            assert expected.keys() == found.keys()
            for name, value in expected.items():
                assert torch.equal(value, found[name]), (told, file, name)
        measured = [
            [m["cross_entropy"], m["top1"], m["samples"]]
            for m in checkpoint.read_state(str(resumed))["history"]
        ]
        assert measured == [
            [m["cross_entropy"], m["top1"], m["samples"]]
            for m in checkpoint.read_state(str(straight))["history"]
        ]

    for stop in (1, 4, 6, 9):
        stopped = run_alone(config, tmp_path / f"stopped-{stop}", stop_at=stop)
        assert stopped.name == f"step-{stop}"
        check(run_alone(config, tmp_path / f"resumed-{stop}", resume=str(stopped)), f"stopped at {stop}")
    assert [m["samples"] for m in checkpoint.read_state(str(straight))["history"]] == [64, 48, 48]
    piece: str | None = None
    for until, step in ((1, 4), (2, 7), (9, 10)):
        ended = run_alone(config.but(until_epoch=until), tmp_path / f"until-{until}", resume=piece)
        assert ended.name == f"step-{step}", "the end of an epoch"
        piece = str(ended)
    check(ended, "in pieces")


def test_a_batch_computed_in_parts_has_the_gradient_of_the_whole(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    """Without BatchNorm, whose statistics are a part's own; with learned temperature and text projection."""
    store = make_store(tmp_path / "s", train=48)
    ends = {}
    for parts in (1, 3):
        config = TrainConfig.of(
            store=str(store),
            backbone="test_vit",
            image_size=32,
            epochs=1,
            batch_size=24,
            projection_dim=4,
            optimizer="momentum",
            lr=0.1,
            warmup_epochs=0,
            accumulate=parts,
            learn_temperature=True,
            text_projection="learned",
            alignment_weight=1.0,
        )
        ends[parts] = run_alone(config, tmp_path / f"parts-{parts}")
    from safetensors.torch import load_file

    whole, in_parts = (load_file(ends[parts] / "model.safetensors") for parts in (1, 3))
    start = align.build_task(config, 3, 4, 8).state_dict()
    moved = max(float((whole[name] - start[name]).abs().max()) for name in whole)
    for name, value in whole.items():
        assert (value - in_parts[name]).abs().max() < 1e-4 * moved, name
    first, second = (checkpoint.read_state(str(ends[parts]))["history"][0] for parts in (1, 3))
    assert first["alignment"] == pytest.approx(second["alignment"], rel=1e-4)


SWITCHES: dict[str, tuple[str, dict[str, Any], float]] = {
    # name: (backbone, settings, how far the weights may end from those of the plain run, as a share of the
    # way they went)
    "activations computed again": ("test_vit", {"checkpoint_activations": True}, 1e-4),
    "contiguous memory": ("test_resnet", {"channels_last": False}, 1e-2),
    "bfloat16": ("test_vit", {"precision": "bfloat16"}, 0.5),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_what_only_saves_time_or_memory_changes_nothing_else(
    tmp_path: Path, make_store: Callable[..., Path], name: str
) -> None:
    backbone, changed, tolerance = SWITCHES[name]
    store = make_store(tmp_path / "s", train=32)
    config = TrainConfig.of(
        store=str(store),
        backbone=backbone,
        image_size=32,
        epochs=1,
        batch_size=16,
        projection_dim=4,
        warmup_epochs=0,
        optimizer="momentum",
        lr=0.05,
        weight_decay=0.0,
    )
    from safetensors.torch import load_file

    plain = load_file(run_alone(config, tmp_path / "plain") / "model.safetensors")
    switched = load_file(run_alone(config.but(**changed), tmp_path / "switched") / "model.safetensors")
    assert plain.keys() == switched.keys()
    start = align.build_task(config, 3, 4).state_dict()
    names = [name for name, value in plain.items() if value.is_floating_point()]
    way = sum(float((plain[name] - start[name]).square().sum()) for name in names) ** 0.5
    apart = sum(float((plain[name] - switched[name]).square().sum()) for name in names) ** 0.5
    assert apart < tolerance * way


@pytest.mark.parametrize(("precision", "fused"), [("float32", True), ("bfloat16", False)])
def test_attention_on_cpus_is_fused_in_float32_alone(
    tmp_path: Path,
    make_store: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    fused: bool,
) -> None:
    """The fused one's backward pass is slow in bfloat16 there."""
    calls = []
    of_torch = torch.nn.functional.scaled_dot_product_attention

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return of_torch(*arguments, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    config = TrainConfig.of(
        store=str(make_store(tmp_path / "s", train=16)),
        backbone="test_vit",
        image_size=32,
        epochs=1,
        batch_size=16,
        projection_dim=4,
        precision=precision,
    )
    run_alone(config, tmp_path / "run")
    assert bool(calls) == fused


@pytest.mark.parametrize(
    "changed",
    [
        {"loss": "bce", "label_smoothing": 0.1, "mixup": 0.5},
        {"clip_grad": 0.02, "clip_mode": "agc"},
        {"optimizer": "lamb"},
        {"alignment": "sigmoid"},
        {"alignment": "cosine"},
        {"alignment": "image-to-text", "store_negatives": 8},
        pytest.param({"small_stem": True, "backbone": "resnet18", "image_size": 16}, marks=pytest.mark.slow),
        {"layer_decay": 0.7, "backbone": "test_vit"},
    ],
)
def test_other_ways_learn_too(
    tmp_path: Path, make_store: Callable[..., Path], changed: dict[str, Any]
) -> None:
    store = make_store(tmp_path / "s", train=60, val=30)
    settings = {
        "backbone": "test_resnet",
        "image_size": 32,
        "epochs": 5,
        "batch_size": 20,
        "projection_dim": 4,
        "lr": 3e-3,
    }
    last = run_alone(TrainConfig.of(store=str(store), **(settings | changed)), tmp_path / "run")
    history = checkpoint.read_state(str(last))["history"]
    assert history[-1]["cross_entropy"] < history[0]["cross_entropy"]
    assert history[-1]["alignment"] < history[0]["alignment"] and history[-1]["retrieval_rank"] >= 1


def test_layers_below_learn_more_slowly_and_norms_do_not_decay() -> None:
    config = TrainConfig.of(
        store="s", backbone="vit_tiny_patch16_224", layer_decay=0.5, image_size=32, learn_temperature=True
    )
    task = align.build_task(config, 3, 4)
    optimizer = optimizers.optimizer(config, task)
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(task.named_parameters())
    assert len(of) == len(parameters)
    scales = [of[id(parameters[f"backbone.blocks.{n}.attn.qkv.weight"])]["lr_scale"] for n in range(12)]
    assert all(low == pytest.approx(high / 2) for low, high in itertools.pairwise(scales))
    assert of[id(parameters["head.layers.0.weight"])].get("lr_scale", 1.0) == 1.0
    for name, parameter in parameters.items():
        assert of[id(parameter)]["weight_decay"] == (
            0.0 if parameter.ndim < 2 or "pos_embed" in name or "cls" in name else 0.05
        ), name


def test_a_collapsed_model_ranks_its_captions_last() -> None:
    """As `evaluate` does it: five pictures, four different captions, one picture without any."""
    texts = torch.nn.functional.normalize(
        torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    groups = torch.tensor([3, 3, 7, -1, 9, 11])
    texts[1] = texts[0]
    assert align.caption_ranks(texts, texts, groups).tolist() == [1] * 5
    assert align.caption_ranks(torch.zeros(6, 8), texts, groups).tolist() == [4] * 5
    assert align.caption_ranks(torch.full((6, 8), torch.nan), texts, groups).tolist() == [4] * 5


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_pictures(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    store = make_store(tmp_path / "s", train=48)
    config = TrainConfig.of(
        store=str(store),
        backbone="test_resnet",
        image_size=32,
        epochs=30,
        batch_size=16,
        projection_dim=4,
        lr=1e25,
        warmup_epochs=0,
    )
    with pytest.raises(
        NotFiniteError,
        match=r"step \d+: the loss is no finite number. The batch: train/\d/\d-\d\.jpg, .*lower --lr",
    ):
        run_alone(config, tmp_path / "run")


def test_training_learns_what_there_is_to_learn(tmp_path: Path, make_store: Callable[..., Path]) -> None:
    """The colour is the class: both the baseline and the aligned run must find it."""
    store = make_store(tmp_path / "s", train=120, val=60)
    for weight in (0.0, 0.5):
        config = TrainConfig.of(
            store=str(store),
            backbone="test_resnet",
            image_size=32,
            epochs=6,
            batch_size=20,
            projection_dim=0,
            alignment_weight=weight,
        )
        last = run_alone(config, tmp_path / f"run-{weight}")
        history = checkpoint.read_state(str(last))["history"]
        assert history[-1]["top1"] > 90, (weight, history[-1])
        assert history[-1]["eval_images"] == 60
        assert history[-1]["top5"] == 100


def test_learning_rate_warms_up_and_ends_at_its_minimum() -> None:
    config = TrainConfig.of(store="s", epochs=10, warmup_epochs=2, lr=1.0, min_lr=0.1)
    stepper = Stepper.__new__(Stepper)
    stepper.config, stepper.warmup_steps, stepper.steps = config, 10, 50
    rates = [stepper.learning_rate(step) for step in range(50)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1) and rates[10:] == sorted(rates[10:], reverse=True)


def test_all_faults_of_the_settings_are_told_together() -> None:
    with pytest.raises(ValueError) as error:
        TrainConfig.of(store="s", alignment_weight=-1, temperature=0, batch_size=1, workers=2, lr=-1)
    told = str(error.value)
    assert len(told.splitlines()) == 4 and "fewer than two images for each of 2 workers" in told


def test_every_preset_is_valid_and_builds() -> None:
    from training.presets import PRESETS, preset

    for name in PRESETS:
        config = TrainConfig.of(store="s", **preset(name))
        assert timm.is_model(config.model.backbone), name
        backbones.probe(
            config.model.backbone,
            config.model.image_size,
            config.model.patch_size,
            small_stem=config.model.small_stem,
            drop_path=config.model.drop_path,
        )
        optimizers.check_optimizer(config.optim.optimizer)
    with pytest.raises(ValueError, match="choose one of small-64"):
        preset("nope")


@pytest.mark.slow
def test_a_compiled_run_learns_what_a_plain_one_does(tmp_path: Path, make_store: Callable[..., Path]) -> None:
    """torch.compile, forward and backward; the last batch of an evaluation is a smaller one."""
    from safetensors.torch import load_file

    config = TrainConfig.of(
        store=str(make_store(tmp_path / "s", train=32)),
        backbone="test_resnet",
        image_size=32,
        epochs=2,
        batch_size=16,
        projection_dim=4,
        warmup_epochs=0.0,
    )
    plain = run_alone(config, tmp_path / "plain")
    compiled = run_alone(config.but(compile=True), tmp_path / "compiled")
    expected, found = (load_file(folder / "model.safetensors") for folder in (plain, compiled))
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-2, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_stochastic_depth_that_a_backbone_does_not_have_is_told_before_anything_starts() -> None:
    with pytest.raises(ValueError, match=r"drop_path=0\.1: .*vgg11.* pass --drop-path 0"):
        backbones.probe("vgg11", 64, drop_path=0.1)
    for name, size in BACKBONES:
        backbones.probe(name, size, drop_path=0.1)
