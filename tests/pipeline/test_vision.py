"""Vision towers against their libraries, and the stage that keeps what they say."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from transformers import (
    AutoModel,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModel,
    ConvNextConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    SiglipImageProcessor,
    SwinConfig,
    ViTConfig,
    ViTMSNConfig,
)

from pipeline.config import FeatureConfig
from pipeline.encoders import models, vision
from pipeline.encoders.vision import VisionTower
from pipeline.errors import SettingsError
from pipeline.stages.features import LookAtPictures, PrepareViews
from pipeline.store import IMAGES, Store
from tests import towers
from training.data.vision_features import FeatureColumns, found


def picture(width: int, height: int) -> Image.Image:
    """Smooth, as photographs are: noise would show every rounding of a resize."""
    rng = np.random.default_rng(3)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def seen(tower: VisionTower, image: Image.Image) -> vision.Seen:
    return tower(torch.from_numpy(tower.view(image).copy()).permute(2, 0, 1)[None])


def test_a_clip_says_what_transformers_says(tmp_path: Path) -> None:
    reference = towers.clip(tmp_path, pad=4)
    tower = VisionTower(models.resolve(str(tmp_path)), device="cpu")
    facts = tower.facts
    assert (facts.size, facts.resize, facts.grid, facts.dim, facts.token_dim) == (32, 36, 4, 16, 32)
    image = picture(80, 60)
    pixels = CLIPImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"]
    assert np.abs(tower.view(image).astype(int) - _unnormalised(pixels, facts)).max() <= 3
    exact = torch.from_numpy(tower.view(image).copy()).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (facts.mean, facts.std))
    with torch.no_grad():
        output = reference.vision_model(pixel_values=(exact - mean) / std)
        pooled = reference.visual_projection(output.pooler_output)
        tokens = reference.vision_model.post_layernorm(output.last_hidden_state[:, 1:])
    found = seen(tower, image)
    torch.testing.assert_close(found.pooled, torch.nn.functional.normalize(pooled, dim=-1))
    torch.testing.assert_close(found.tokens, tokens, atol=1e-5, rtol=1e-5)


def test_of_a_vision_part_without_projection_the_class_token_is_taken(tmp_path: Path) -> None:
    reference = towers.clip(tmp_path / "whole")
    alone = CLIPVisionModel.from_pretrained(tmp_path / "whole")
    alone.save_pretrained(tmp_path / "part")
    CLIPImageProcessor.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "part")
    whole, part = (
        VisionTower(models.resolve(str(tmp_path / each)), device="cpu") for each in ("whole", "part")
    )
    image = picture(40, 40)
    torch.testing.assert_close(seen(part, image).tokens, seen(whole, image).tokens)
    assert part.facts.pooling == "class token" and part.facts.dim == 32
    with torch.no_grad():
        projected = reference.visual_projection(seen(part, image).pooled)
    cosine = torch.nn.functional.cosine_similarity(projected, seen(whole, image).pooled)
    assert float(cosine) == pytest.approx(1)


def test_a_siglip_squashes_and_pools_by_attention(tmp_path: Path) -> None:
    reference = towers.siglip(tmp_path)
    tower = VisionTower(models.resolve(str(tmp_path)), device="cpu")
    assert (tower.facts.resize, tower.facts.grid, tower.facts.dim) == (0, 4, 32)
    image = picture(80, 60)
    pixels = SiglipImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"]
    assert np.abs(tower.view(image).astype(int) - _unnormalised(pixels, tower.facts)).max() <= 3
    with torch.no_grad():
        output = reference.vision_model(pixel_values=pixels)
    cosine = torch.nn.functional.cosine_similarity(seen(tower, image).pooled, output.pooler_output)
    assert float(cosine) > 0.999


def _unnormalised(pixels: torch.Tensor, facts: vision.TowerFacts) -> np.ndarray:
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (facts.mean, facts.std))
    return ((pixels[0] * std + mean) * 255).permute(1, 2, 0).numpy().round().astype(int)


@pytest.mark.parametrize(("name", "grid"), [("test_vit", 10), ("test_resnet", 5), ("test_convnext", 5)])
def test_a_model_of_timms_says_what_timm_says(tmp_path: Path, name: str, grid: int) -> None:
    reference = towers.of_timm(tmp_path, name)
    tower = VisionTower(models.resolve(f"local-dir:{tmp_path}"), device="cpu")
    image = picture(200, 170)
    images = torch.from_numpy(tower.view(image).copy()).permute(2, 0, 1)[None]
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (tower.facts.mean, tower.facts.std))
    with torch.no_grad():
        features = reference.forward_features((images / 255 - mean) / std)
        pooled = reference.forward_head(features, pre_logits=True)
    tokens = features.flatten(2).mT if features.ndim == 4 else features[:, 1:]
    assert tower.facts.grid == grid and tower.facts.family == "timm"
    torch.testing.assert_close(tower(images).tokens, tokens, atol=1e-4, rtol=1e-4)
    expected = torch.nn.functional.normalize(pooled, dim=-1)
    torch.testing.assert_close(tower(images).pooled, expected, atol=1e-4, rtol=1e-4)


def test_where_a_margin_is_odd_each_library_cuts_in_its_own_way(tmp_path: Path) -> None:
    """Of 35 pixels 32: torchvision begins at the second, transformers at the first."""
    noise = np.random.default_rng(0).integers(0, 256, (35, 38, 3), dtype=np.uint8)
    towers.clip(tmp_path / "clip", pad=3)
    clip = vision.describe(models.resolve(str(tmp_path / "clip")))
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "clip")
    pixels = processor(Image.fromarray(noise), return_tensors="pt")["pixel_values"]
    assert np.abs(clip.cut(Image.fromarray(noise)).astype(int) - _unnormalised(pixels, clip)).max() <= 1
    towers.of_timm(tmp_path / "timm", img_size=32)
    described = json.loads((tmp_path / "timm" / "config.json").read_text())
    described["pretrained_cfg"]["crop_pct"] = 0.9
    (tmp_path / "timm" / "config.json").write_text(json.dumps(described))
    facts = vision.describe(models.resolve(f"local-dir:{tmp_path / 'timm'}"))
    assert facts.resize == clip.resize == 35
    transform = create_transform(32, crop_pct=0.9, interpolation=facts.interpolation, use_prefetcher=True)
    wanted = np.asarray(transform(Image.fromarray(noise))).transpose(1, 2, 0)
    np.testing.assert_array_equal(facts.cut(Image.fromarray(noise)), wanted)


def test_a_clip_of_half_precision_is_computed_in_float32(tmp_path: Path) -> None:
    towers.clip(tmp_path).half().save_pretrained(tmp_path)
    reference = CLIPModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tower = VisionTower(models.resolve(str(tmp_path)), device="cpu")
    image = torch.from_numpy(tower.view(picture(40, 40)).copy()).permute(2, 0, 1)[None]
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (tower.facts.mean, tower.facts.std))
    with torch.no_grad():
        pooled = reference.get_image_features((image / 255 - mean) / std).pooler_output
    expected = torch.nn.functional.normalize(pooled, dim=-1)
    torch.testing.assert_close(tower(image).pooled, expected, atol=1e-6, rtol=1e-5)


_VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
_VIT |= {"image_size": 32, "patch_size": 8}


@pytest.mark.parametrize(
    "config",
    [
        ViTConfig(**_VIT),
        DeiTConfig(**_VIT),
        ViTMSNConfig(**_VIT),
        Dinov2Config(**_VIT),
        Dinov2WithRegistersConfig(**_VIT, num_register_tokens=2),
        DINOv3ViTConfig(**_VIT, num_register_tokens=2),
    ],
    ids=lambda config: config.model_type,
)
def test_a_class_token_is_taken_of_models_that_have_one(tmp_path: Path, config: Any) -> None:
    AutoModel.from_config(config).save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    tower = VisionTower(models.resolve(str(tmp_path)), device="cpu")
    facts = tower.facts
    assert (facts.pooling, facts.dim, facts.grid, facts.token_dim) == ("class token", 16, 4, 16)
    assert seen(tower, picture(40, 40)).tokens.shape == (1, 16, 16)
    assert vision.describe(models.resolve(str(tmp_path)), 48).grid == 6


@pytest.mark.parametrize(
    "config",
    [
        SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4),
        ConvNextConfig(hidden_sizes=[16, 16, 16, 16], depths=[1, 1, 1, 1], image_size=32),
    ],
    ids=lambda config: config.model_type,
)
def test_no_patch_passes_for_a_class_token(tmp_path: Path, config: Any) -> None:
    AutoModel.from_config(config).save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match=rf"{config.model_type} has no square .* clip, siglip, vit, deit"):
        vision.describe(models.resolve(str(tmp_path)))


def test_a_model_of_several_maps_is_named(tmp_path: Path) -> None:
    towers.of_timm(tmp_path, "crossvit_9_240")
    with pytest.raises(SettingsError, match="no pooled feature and one map or row of patches"):
        vision.describe(models.resolve(f"local-dir:{tmp_path}"))


def test_other_sizes_are_taken_where_they_fit_and_explained_where_not(tmp_path: Path) -> None:
    towers.clip(tmp_path / "clip")
    clip = models.resolve(str(tmp_path / "clip"))
    tower = VisionTower(clip, size=48, device="cpu")
    assert (tower.facts.grid, tower.facts.resize) == (6, 48)
    assert seen(tower, picture(50, 90)).tokens.shape == (1, 36, 32)
    with pytest.raises(
        SettingsError, match=r"size=50: no multiple of its patches of 8 pixels; pass 48 or 56"
    ):
        vision.describe(clip, 50)
    towers.of_timm(tmp_path / "timm", img_size=64)
    timm = models.resolve(f"local-dir:{tmp_path / 'timm'}")
    assert (vision.describe(timm).grid, vision.describe(timm, 96).grid) == (4, 6)
    with pytest.raises(SettingsError, match=r"timm_wrapper has no square pictures .* local-dir:FOLDER"):
        vision.describe(models.resolve(str(tmp_path / "timm")))
    with pytest.raises(SettingsError, match="describes no model of timm"):
        vision.describe(models.resolve(f"local-dir:{tmp_path / 'clip'}"))
    with pytest.raises(SettingsError, match="no such model with weights on the hub"):
        models.resolve("timm:no_such_vit")


def test_a_tower_is_no_part_of_what_holds_it(tmp_path: Path) -> None:
    towers.clip(tmp_path)
    holder = torch.nn.Linear(2, 2)
    holder.tower = VisionTower(models.resolve(str(tmp_path)), device="cpu")  # type: ignore[assignment]
    assert copy.deepcopy(holder).tower is holder.tower and set(holder.state_dict()) == {"weight", "bias"}


def test_missing_weights_are_no_random_ones(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    towers.clip(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SettingsError, match=r"no weights for visual_projection\.weight"):
        VisionTower(models.resolve(str(tmp_path)), device="cpu")


def staged(config: FeatureConfig, variant: str, shard: int, redo: bool = False) -> dict[str, Any]:
    model = models.resolve(config.tower)
    item = pa.table({"shard": [shard], "redo": [redo]})
    prepared = PrepareViews(config, model, variant)(item)
    return LookAtPictures(config, model, variant)(prepared).to_pylist()[0]


def test_a_shard_is_written_once_and_failed_rows_alone_are_redone(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    towers.clip(tmp_path / "clip")
    folder = make_store(tmp_path / "store")
    store = Store(str(folder))
    rows = store.read_shard("images", "", 0).to_pylist()
    whole = dict(rows[1])
    rows[1] |= {"image": None, "error": "damaged"}
    store.write_shard("images", "", 0, pa.Table.from_pylist(rows, schema=IMAGES), seconds=0)
    config = FeatureConfig(
        store=str(folder), tower=str(tmp_path / "clip"), tokens=True, device="cpu", tower_batch=4
    )
    assert staged(config, "v", 0) == {"shard": 0, "rows": 10, "failed": 1, "tokens": 0}
    first = store.read_shard("features", "v", 0)
    assert first["error"].to_pylist()[:3] == [None, "no picture: damaged", None]
    read = FeatureColumns(variant="v", names=("pooled", "tokens"), token_dim=32).read
    columns = read(store, 0, first["id"])
    assert columns["pooled"].shape == (10, 16) and columns["tokens"].shape == (10, 16, 32)
    assert columns["pooled"].dtype == np.float16 and not columns["tokens"][1].any()
    norms = np.linalg.norm(columns["pooled"].astype(np.float32), axis=1)
    np.testing.assert_allclose(norms, [1, 0] + [1] * 8, atol=2e-3)
    tower = VisionTower(models.resolve(config.tower), device="cpu")
    again = seen(tower, Image.open(io.BytesIO(whole["image"])))
    rows[1] = whole
    store.write_shard("images", "", 0, pa.Table.from_pylist(rows, schema=IMAGES), seconds=0)
    assert staged(config, "v", 0)["failed"] == 1, "a shard that is there is left as it is"
    assert staged(config, "v", 0, redo=True)["failed"] == 0
    assert store.receipt("features", "v", 0).attempt == 2
    after = read(store, 0, first["id"])
    np.testing.assert_array_equal(np.delete(after["tokens"], 1, 0), np.delete(columns["tokens"], 1, 0))
    np.testing.assert_allclose(after["tokens"][1], again.tokens[0].numpy(), atol=2e-2)
    np.testing.assert_allclose(after["pooled"][1], again.pooled[0].numpy(), atol=2e-3)


@pytest.mark.alone
def test_the_verb_makes_resumes_and_tells(
    ray_session: None,
    tmp_path: Path,
    make_store: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    from pipeline.__main__ import main

    towers.clip(tmp_path / "clip")
    folder = make_store(tmp_path / "store")
    flags = ["--store", str(folder), "--tower", str(tmp_path / "clip"), "--device", "cpu"]
    assert main(["features", *flags, "--tokens"]) == 0
    store = Store(str(folder))
    name, record = found(store, tokens=True)
    assert name.startswith("clip-") and record["dim"] == 16 and record["grid"] == 4
    assert record["revision"].startswith("files-") and {"transformers", "torch"} <= record["versions"].keys()
    kept = store.read_file(f"features/{name}/part-00001.parquet")
    store.delete_file(f"features/{name}/receipts/part-00001.json")
    with pytest.raises(
        SettingsError, match="lacks 1 of 4 shards; finish it first: the same `gpt4image features`"
    ):
        found(store)
    assert main(["features", *flags, "--tokens"]) == 0
    assert store.read_file(f"features/{name}/part-00001.parquet") == kept
    assert "33 rows" in capsys.readouterr().err
    assert main(["status", "--store", str(folder), "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    told = {stage["stage"]: stage for stage in stages}["features"]
    assert (told["done_shards"], told["rows"], told["failed"], told["remaining_shards"]) == (4, 33, 0, 0)
    assert main(["status", "--store", str(folder), "--verify"]) == 0
    assert " at 32 px, tokens: 4 shards, 33 rows, 0 failed" in capsys.readouterr().out
    assert main(["retry", "--store", str(folder), "--device", "cpu"]) == 0
    assert "no row has failed" in capsys.readouterr().err
    assert main(["inspect", str(folder), "--to", str(tmp_path / "page.html")]) == 0
    assert main(["features", "--store", str(folder), "--tower", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
