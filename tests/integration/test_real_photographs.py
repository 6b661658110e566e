"""Real photographs, when the folder that holds them lies beside the project: 32 px ones with imported
captions through store, training, evaluation and sweep; ordinary ones of all sizes and colour modes through
the vLLM captioner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from cluster import cli
from pipeline.store import Store

pytestmark = pytest.mark.alone
DATA = Path(__file__).resolve().parent.parent.parent.parent / "shared" / "data"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no photographs at {DATA}: this test needs that folder"
)


@needs_data
def test_small_photographs_with_imported_captions(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, runs = str(tmp_path / "store"), tmp_path / "runs"
    assert cli.main(["ingest", "--images", str(DATA / "cifar10"), "--store", store]) == 0
    assert cli.main(["import-captions", str(DATA / "cifar10" / "captions.jsonl"), "--store", store]) == 0
    assert cli.main(["embed", "--store", store]) == 0
    opened = Store(store)
    assert {name: split.rows for name, split in opened.dataset.splits.items()} == {
        "train": 5000,
        "test": 2000,
    }
    assert not list(opened.errors("embeddings", opened.only_variant("embeddings")))

    recipe = [
        "--store",
        store,
        "--preset",
        "small-32",
        "--backbones",
        "test_resnet",
        "--epochs",
        "1",
        "--eval-split",
        "test",
    ]
    sweep = ["--alignment-weights", "0", "0.3", "--projection-dims", "64", "--sweep", str(runs / "sweep")]
    sweep += ["--fresh-seeds", "0"]
    assert cli.main(["tune", *recipe, *sweep]) == 0
    capsys.readouterr()
    for trial in ("test_resnet-baseline-s0", "test_resnet-w0.3-d64-s0"):
        assert cli.main(["evaluate", str(runs / "sweep" / trial), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["images"] == 2000
        assert found["top1"] > 25, "ten classes: chance is 10"


@needs_data
def test_ordinary_photographs_through_the_vllm_captioner(ray_session: None, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert (
        cli.main(["ingest", "--images", str(DATA / "photos"), "--store", str(store), "--val-fraction", "0.2"])
        == 0
    )
    captioner = ["--caption-preset", "scenes", "--prompt", "Describe this image of {label} in detail."]
    assert cli.main(["caption", "--store", str(store), *captioner]) == 0
    opened = Store(str(store))
    variant = opened.only_variant("captions")
    assert opened.dataset.rows == len(list((DATA / "photos").rglob("*.JPEG")))
    sizes = set()
    for shard in range(opened.dataset.shards):
        captions = {row["id"]: row for row in opened.read_shard("captions", variant, shard).to_pylist()}
        for row in opened.read_shard("images", "", shard, ["id", "width", "height", "error"]).to_pylist():
            with Image.open(DATA / "photos" / row["id"]) as picture:
                assert {row["width"], row["height"]} == set(picture.size)
            assert row["error"] is None and captions[row["id"]]["error"] is None
            assert captions[row["id"]]["caption"]
            sizes.add((row["width"], row["height"]))
    assert len(sizes) > 10, "sizes vary"
