"""Masked autoencoding: what is drawn, what is computed, how it trains, is judged, exported and goes on as
fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.errors import SettingsError
from pipeline.store import Store
from training import preparation
from training.__main__ import main, parse_train
from training.config import TrainConfig
from training.data.order import Rows
from training.engine import checkpoint, loop
from training.engine.build import Run
from training.models import backbones, masked_hiera, optimizers
from training.models.published_hiera import resized_positions
from training.objectives import mae
from training.presets import PRESETS, preset
from training.settings import flat

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, make_store: Callable[..., Path]) -> Path:
    return make_store(tmp_path_factory.mktemp("mae") / "store", train=24, val=9)


def settings(store: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "store": str(store),
        **preset("hiera-scenes-mae", "mae"),
        "objective": "mae",
        "image_size": 32,
        "epochs": 2,
        "epoch_repeats": 1,
        "batch_size": 12,
        "warmup_epochs": 0,
        "decoder_depth": 1,
        "decoder_width": 32,
        "threads": 1,
        "loader_workers": 1,
    }
    return TrainConfig.of(**values | changes)


def trained(config: TrainConfig, folder: Path, resume_from: str | None = None) -> list[dict[str, float]]:
    def report(metrics: Any, take: Callable[[], checkpoint.Snapshot]) -> None:
        snapshot = take()
        snapshot.write(str(folder / f"checkpoint_{snapshot.content['step']}"))

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(flat(config)))
    return loop.fit(config, CPU, 0, resume_from, report)


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "mae"
    trained(settings(store, ema=0.5), folder)
    return folder


@pytest.mark.parametrize(
    ("size", "params"),
    [("t", 27.91), ("s", 35.01), ("b", 51.52), ("b-plus", 69.90), ("l", 213.74), ("h", 672.78)],
)
def test_every_size_has_its_recipes_and_as_many_parameters_as_published(size: str, params: float) -> None:
    with torch.device("meta"):
        tuned = TrainConfig.of(store="s", **preset(f"hiera-{size}-finetune")).but(pretrained=False)
        classifier = backbones.of_run(tuned, 1000)
        first = TrainConfig.of(store="s", **preset(f"hiera-{size}-mae", "mae"), objective="mae")
        task = mae.OBJECTIVE.build(first, mae.Facts(), 0)
    assert sum(p.numel() for p in classifier.parameters()) / 1e6 == pytest.approx(params, abs=0.005)
    assert task.decoder.grid == [14, 14] and task.decoder.patch == 16 and task.decoder.unit == [2, 2]
    assert first.optim.betas == (0.9, 0.95) and first.optim.epochs == 1600
    assert first.model.backbone == tuned.model.backbone.removesuffix(".mae")
    heads = {"head.fc.weight", "head.fc.bias"}
    assert task.backbone.state_dict().keys() == classifier.state_dict().keys() - heads


def test_a_mask_depends_on_seed_step_and_picture_alone_and_leaves_equally_many() -> None:
    samples = np.array([[0, shard, row, 0] for shard in range(3) for row in range(40)])
    whole = mae.seen(7, 0.6, samples, (1, 7))
    assert whole.shape == (120, 49) and set(whole.sum(1)) == {19}, "49 (1 - 0.6), rounded down"
    parts = np.concatenate([mae.seen(7, 0.6, part, (1, 7)) for part in np.array_split(samples[::-1], 7)])
    assert (parts[::-1] == whole).all()
    for seeds in ((2, 7), (1, 8), ()):
        other = mae.seen(7, 0.6, samples, seeds)
        assert 0.2 < (other & whole).sum() / whole.sum() < 0.6
    each = whole.mean(0)
    assert each.min() > 0.2 and each.max() < 0.6, "no unit is preferred"
    later = samples + np.array([3, 0, 0, 1])
    assert (mae.seen(7, 0.6, later) == mae.seen(7, 0.6, samples)).all(), "an evaluation's is the picture's"
    for units, kept in ((4, 1), (9, 3), (16, 6), (49, 19)):  # as the authors' package rounds
        assert mae.num_kept(units, 0.6) == kept == int(mae.seen(int(units**0.5), 0.6, samples[:1]).sum())


def test_what_is_removed_is_neither_seen_nor_computed() -> None:
    """Pixels of removed units change no prediction, not even through the stem, whose windows overlap."""
    config = settings(Path("s"), image_size=64)
    task = mae.OBJECTIVE.build(config, mae.Facts(), 0).eval()
    keep = torch.from_numpy(mae.seen(4, 0.6, np.array([[0, 0, 0, 0], [0, 0, 1, 0]])))
    images = torch.randn(2, 3, 64, 64)
    patches = masked_hiera.patches_of(images, task.decoder.patch)
    hidden = task.decoder.masked(keep)[..., None]
    other = masked_hiera.images_of(torch.where(hidden, torch.randn_like(patches), patches), 8)
    tokens: list[torch.Size] = []
    hook = task.backbone.blocks[0].register_forward_pre_hook(lambda _, given: tokens.append(given[0].shape))
    with torch.no_grad():
        assert not torch.equal(images, other)
        assert torch.equal(task.predict(images, keep), task.predict(other, keep))
    assert tokens == [(2, 6 * 64, 32)] * 2, "of 16 units of 64 tokens"
    hook.remove()
    assert hidden.sum() == 2 * 10 * 4 and hidden.shape == (2, 64, 1)
    assert torch.equal(masked_hiera.images_of(patches, 8), images)


def test_unrolled_pooling_is_that_of_the_plane_and_rolling_inverts_it_with_a_mask_or_without() -> None:
    """timm's, which everything here stands on."""
    hiera: Any = backbones.build("hiera_nano_64", num_classes=0, image_size=64)
    plane = torch.randn(2, 5, 32, 32)
    tokens = hiera.unroll(plane.flatten(2).transpose(1, 2))
    assert torch.equal(hiera.reroll(tokens, 0), plane.permute(0, 2, 3, 1))
    pooled = tokens.view(2, 4, -1, 5).amax(1)
    wanted = nn.functional.max_pool2d(plane, 2)
    assert torch.equal(hiera.reroll(pooled, 1), wanted.permute(0, 2, 3, 1))
    keep = torch.rand(2, 16).argsort(1) < 6
    seen = tokens[keep[..., None].tile(1, 64, 5)].view(2, -1, 5)
    units = hiera.reroll(seen, 0, mask=keep)
    every = plane.view(2, 5, 4, 8, 4, 8).permute(0, 2, 4, 3, 5, 1).flatten(1, 2)
    assert torch.equal(units, every[keep].view(2, 6, 8, 8, 5))


@pytest.mark.parametrize("changes", [{}, {"accumulate": 3}, {"norm_pix_loss": False, "drop_path": 0.2}])
def test_it_learns_and_goes_on_bit_for_bit(store: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = settings(store, epochs=3, **changes)
    straight = trained(config, tmp_path / "straight")
    assert straight[-1]["reconstruction"] < straight[0]["reconstruction"]
    assert {"reconstruction_loss", "loss", "eval_images"} <= straight[-1].keys()
    assert not {"top1", "train_top1", "cross_entropy"} & straight[-1].keys()
    resumed = trained(config, tmp_path / "resumed", str(tmp_path / "straight" / "checkpoint_4"))
    assert resumed[-1]["reconstruction"] == straight[-1]["reconstruction"]


def test_two_workers_shares_and_parts_add_up_to_the_whole(store: Path) -> None:
    """Losses, gradients, and the evaluator."""
    config = settings(store, batch_size=13)
    run = Run.of(config, CPU, 0, None, None)
    task, rows = run.task, run.eval_rows.in_order()

    def gradient(parts: list[Any], world: int) -> torch.Tensor:
        task.zero_grad()
        for rank, batch in enumerate(parts):
            inputs = task.prepare(batch, run.stepper.views, mae.Draw(0, 3, rank, world, 13))
            (task(inputs, world * len(inputs) / 13)["loss"] / world).backward()
        return torch.cat([p.grad.flatten() for p in task.parameters()])

    batches = {
        world: [next(run.loader.train(run.sequence, 3, 4, rank, world)) for rank in range(world)]
        for world in (1, 2)
    }
    torch.testing.assert_close(gradient(batches[2], 2), gradient(batches[1], 1), rtol=1e-4, atol=1e-7)

    def evaluated(batches: list[Any]) -> torch.Tensor:
        evaluator = task.evaluator(CPU)
        with torch.no_grad():
            for each in batches:
                evaluator.add(each, run.stepper.views.norm(each.images), run.stepper.precision)
        return evaluator.sums()

    every = list(run.loader.evaluate(rows, 4, 0, 1))
    split = [list(run.loader.evaluate(rows, 4, rank, 2)) for rank in (0, 1)]
    torch.testing.assert_close(evaluated(every), evaluated(split[0]) + evaluated(split[1]))
    assert evaluated(every)[1] == len(rows) == len(Rows(Store(str(store)), "val"))


def test_evaluate_tells_its_own_metric_and_draws_reconstructions(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run), "--to", str(tmp_path / "found"), "--knn"]) == 0
    told = capsys.readouterr().out
    last = checkpoint.read_state(str(run / "checkpoint_4"))["history"][-1]
    assert "val: 9 images" in told and f"reconstruction loss  {last['ema_reconstruction']:.4f}" in told
    assert "k-NN top-1" in told and "top-5" not in told
    found = json.loads((tmp_path / "found" / "evaluation.json").read_text())
    assert found["reconstruction"] == pytest.approx(last["ema_reconstruction"], rel=1e-5)
    assert {path.name for path in (tmp_path / "found").iterdir()} == {
        "evaluation.json",
        "reconstructions.png",
    }
    picture = np.asarray(Image.open(tmp_path / "found" / "reconstructions.png"))
    assert picture.shape == (8 * 166 + 6, 3 * 166 + 6, 3), "rows of original, seen, predicted"
    original, seen, predicted = (picture[6:166, 6 + 166 * n : 166 * (n + 1)].astype(int) for n in range(3))
    share = (np.abs(seen - original).max(2) > 2).mean()
    assert 0.5 < share <= 0.75, "of four units one is seen, and grey is no colour of noise"
    assert (np.abs(predicted - original).max(2) > 2).mean() <= share + 1e-9, "what is seen stays as it is"


def test_its_encoder_is_exported_and_fine_tuned(
    run: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "encoder"
    assert main(["export", str(run), "--to", str(to), "--format", "timm,torch"]) == 0
    assert "largest difference of features 0.0e+00" in capsys.readouterr().out
    assert not (to / "labels.txt").exists()
    card = (to / "README.md").read_text()
    for said in ("features of 256 numbers", "reconstruction loss", "masked autoencoding"):
        assert said in card
    weights = load_file(run / "checkpoint_4" / "ema.safetensors")
    model: Any = timm.create_model(f"local-dir:{to}", pretrained=True)
    assert model.num_classes == 0 and model.q_pool == 3
    assert all(torch.equal(v, weights[f"backbone.{n}"]) for n, v in model.state_dict().items())
    shared = {"objective": "align", "alignment_weight": 0.0, "layer_decay": 0.65, "batch_size": 12}
    size = {"image_size": 32, "threads": 1, "epochs": 1, "warmup_epochs": 0}
    for start in (
        {"backbone": "hiera_nano_64", "init_from": str(run)},
        {"backbone": f"local-dir:{to}"},
    ):
        config = TrainConfig.of(store=str(store), **shared, **size, **start)
        config, _ = preparation.prepare(config.but(run=str(tmp_path / "tuned")))
        task = Run.of(config, CPU, 0, None, None).task
        assert all(
            torch.equal(value, weights[f"backbone.{name}"])
            for name, value in task.backbone.state_dict().items()
            if not name.startswith("head.fc")
        )
        lowest = min(g["lr_scale"] for g in optimizers.optimizer(config, task).param_groups)
        assert lowest == pytest.approx(0.65 ** (5 + 1)), "blocks, and the head"
    assert {"top1", "cross_entropy"} <= trained(config, tmp_path / "tuned")[-1].keys()


def told_of(store: Path, run: Path, **changes: Any) -> str:
    with pytest.raises(SettingsError) as error:
        preparation.prepare(settings(store, run=str(run), **changes))
    return str(error.value)


def test_what_does_not_fit_is_said_before_a_worker_starts(store: Path, tmp_path: Path) -> None:
    def told(**changes: Any) -> str:
        return told_of(store, tmp_path / "run", **changes)

    grid = "mask units are of 16 x 16 pixels, and 40 is no multiple of 16); pass --image-size 32 or 48"
    assert grid in told(image_size=40)
    assert "32 x 32 pixels" in told(backbone="hiera_tiny_224", image_size=50)
    assert "leave --patch-size out (0)" in told(patch_size=16)
    assert "label_smoothing: are of classifiers" in told(label_smoothing=0.1)
    assert "leaves 0 of 1 mask units" in told(image_size=16) and "--image-size 32" in told(image_size=16)
    assert "leaves 0 of 4 mask units" in told(mask_ratio=0.9)
    assert "is no Hiera, whose mask units" in told(backbone="test_vit")
    both = told(mixup=0.2, erase=0.1)
    assert "mixup=0.2: changes the pixels" in both and "erase=0.1" in both
    assert "freeze_backbone: is for a classifier" in told(
        backbone="hiera_tiny_224", pretrained=True, freeze_backbone=True
    )
    assert "no pre-trained weights for hiera_nano_64" in told(pretrained=True)
    assert "betas=(0.9, 0.95): sgd has none" in told(optimizer="sgd")
    for wrong, said in (
        ({"betas": (0.9,)}, "two numbers"),
        ({"mask_ratio": 1.0}, "below 1"),
        ({"decoder_heads": 5}, "must divide --decoder-width 32"),
    ):
        with pytest.raises(SettingsError, match=said):
            settings(store, **wrong)


def test_pictures_alone_are_enough(tmp_path: Path, store: Path) -> None:
    config, variants = preparation.prepare(settings(store, run=str(tmp_path / "run")))
    assert variants == {} and mae.OBJECTIVE.check(config, Store(str(store))).columns == ()
    parsed = parse_train(["--store", "s", "--preset", "hiera-scenes-mae", "--mask-ratio", "0.5"])
    assert (parsed.objective, parsed.method.mask_ratio, parsed.optim.betas) == ("mae", 0.5, (0.9, 0.95))
    assert not any("mask_ratio" in recipe or "betas" in recipe for recipe in PRESETS.values())


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_published_weights_are_a_start_for_pre_training_and_fine_tuning(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    """In the layout of the authors' package: see tests/parity/test_hiera.py for its names."""
    import hiera

    torch.manual_seed(5)
    nano = backbones.model_args("hiera_nano_64", 32)
    sizes = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 4, "q_pool": 2}
    nano |= {"input_size": (nano.pop("img_size"),) * 2}
    theirs = hiera.MaskedAutoencoderHiera(**nano, **sizes).state_dict()
    file = tmp_path / f"mae_hiera_nano.{ending}"
    if ending == "pth":
        torch.save({"model_state": theirs}, file)
    else:
        save_file(theirs, file)
    config, _ = preparation.prepare(settings(store, init_from=str(file), run=str(tmp_path / "run")))
    said = capsys.readouterr().err
    assert "CC BY-NC 4.0" in said and f"fusion and decoder start from {file}" in said
    task = Run.of(config, CPU, 0, None, None).task
    assert torch.equal(task.backbone.blocks[2].mlp.fc1.weight, theirs["blocks.2.mlp.fc1.weight"])
    assert torch.equal(task.backbone.head.norm.weight, theirs["encoder_norm.weight"])
    assert torch.equal(task.decoder.blocks[0].attn.qkv.weight, theirs["decoder_blocks.0.attn.qkv.weight"])
    assert torch.equal(task.fusion.heads[1].weight, theirs["multi_scale_fusion_heads.1.weight"])
    plain = {"store": "s", "backbone": "hiera_nano_64", "image_size": 32, "init_from": str(file)}
    tuned: Any = backbones.of_run(TrainConfig.of(**plain), 3)
    assert torch.equal(tuned.blocks[0].attn.proj.bias, theirs["blocks.0.attn.proj.bias"])

    def told(name: str, **changes: Any) -> str:
        return told_of(store, tmp_path / "again", init_from=str(tmp_path / name), **changes)

    part = {"decoder_norm.weight", "mask_token"}
    save_file({n: v for n, v in theirs.items() if n not in part}, tmp_path / "part.safetensors")
    assert "do not fit (decoder.mask_token and 1 more); pass a file that has all" in told("part.safetensors")
    part = {"multi_scale_fusion_heads.1.bias"}
    save_file({n: v for n, v in theirs.items() if n not in part}, tmp_path / "part.safetensors")
    assert "do not fit (fusion.heads.1.bias); pass" in told("part.safetensors")
    for other in ({"decoder_depth": 2}, {"image_size": 64}):
        said = told(file.name, **other)
        assert "that has --decoder-width 32 --decoder-depth 1 --image-size 32." in said
    assert "do not fit" in told(file.name, backbone="hiera_tiny_224", image_size=32)
    (tmp_path / f"bad.{ending}").write_bytes(b"no weights at all")
    for name in (f"none.{ending}", f"bad.{ending}"):
        assert "only tensors are loaded" in told(name)


def test_pre_training_that_starts_from_pre_training_keeps_its_decoder(
    run: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def begun(**changes: Any) -> tuple[dict[str, torch.Tensor], str]:
        asked = settings(store, init_from=str(run), run=str(tmp_path / "again"), seed=3, **changes)
        config, _ = preparation.prepare(asked)
        return Run.of(config, CPU, 0, None, None).task.state_dict(), capsys.readouterr().err

    weights = load_file(run / "checkpoint_4" / "ema.safetensors")
    found, said = begun()
    assert f"fusion and decoder start from {run}" in said
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    found, said = begun(decoder_depth=2)
    assert "fusion and decoder start from nothing: that run's are of another size" in said
    assert not torch.equal(found["decoder.pred.weight"], weights["decoder.pred.weight"])
    plain = TrainConfig.of(store=str(store), backbone="hiera_nano_64", image_size=32, epochs=1)
    trained(plain.but(batch_size=12, threads=1, alignment_weight=0.0), tmp_path / "classifier")
    asked = settings(store, init_from=str(tmp_path / "classifier"), run=str(tmp_path / "again"))
    preparation.prepare(asked)
    assert "start from nothing: that run has none" in capsys.readouterr().err
    for gone in ("gone", "gone.safetensors"):
        later = settings(store, init_from=str(tmp_path / gone))
        assert mae.OBJECTIVE.notes(later, Store(str(store)), mae.Facts()) == (), "a run that goes on"


def test_positions_of_another_size_keep_what_repeats_from_unit_to_unit() -> None:
    unit, slope = torch.randn(1, 4, 8, 8), torch.linspace(-1, 1, 16)

    def positions(edge: int) -> torch.Tensor:
        wide = nn.functional.interpolate(slope.expand(1, 4, 16, 16), size=(edge, edge), mode="bicubic")
        return (unit.tile(1, 1, edge // 8, edge // 8) + wide).flatten(2).transpose(1, 2)

    small = positions(16)
    assert torch.equal(resized_positions(small, (16, 16), (8, 8)), small)
    larger = resized_positions(small, (32, 32), (8, 8))
    plane = (larger - positions(32)).transpose(1, 2).unflatten(2, (32, 32))
    assert float(plane.abs().max()) < 0.5, "the slope within a unit counts as the unit's own"
    repeated = larger.transpose(1, 2).unflatten(2, (4, 8, 4, 8)).mean((2, 4))
    wanted = small.transpose(1, 2).unflatten(2, (2, 8, 2, 8)).mean((2, 4))
    torch.testing.assert_close(repeated - repeated.mean(), wanted - wanted.mean(), rtol=0, atol=0.15)


def test_fine_tuning_takes_larger_pictures_than_pre_training(run: Path, store: Path, tmp_path: Path) -> None:
    config = TrainConfig.of(store="s", backbone="hiera_nano_64", image_size=64, init_from=str(run))
    model: Any = backbones.of_run(config, 3)
    weights = load_file(run / "checkpoint_4" / "ema.safetensors")
    assert model.pos_embed.shape == (1, 32**2, 32) and weights["backbone.pos_embed"].shape == (1, 16**2, 32)
    assert torch.equal(model.blocks[0].norm1.weight, weights["backbone.blocks.0.norm1.weight"])
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
