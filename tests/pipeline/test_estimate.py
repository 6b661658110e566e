"""The estimate from a sample against what the real run then takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import session, waiting
from pipeline.config import EstimateConfig
from pipeline.errors import RunStoppedError
from pipeline.inspect import estimate
from pipeline.inspect.estimate import (
    Sample,
    StageCost,
    _cost,
    _place,
    _scaled,
    as_text,
    plan_sample,
    seconds_per_row,
)
from pipeline.store import Stage, Store

ROOT = Path(__file__).resolve().parent.parent.parent
STAGES = [
    StageCost(stage="images", start_s=2, seconds_per_image=0.001, bytes_per_image=5000),
    StageCost(stage="captions", start_s=100, seconds_per_image=0.05, bytes_per_image=50),
    StageCost(stage="embeddings", start_s=10, seconds_per_image=0.002, bytes_per_image=800),
]
ACTORS: dict[Stage, int] = {"images": 1, "captions": 1, "embeddings": 1}
COUNTS = {"rows": 1000, "engines": 1, "failed": 3, "prompt": 300_000, "output": 100_000}


def test_more_gpus_divide_the_steady_time_of_their_stages_and_nothing_else() -> None:
    config = EstimateConfig(images="x", caption_preset="scenes", gpus=8, price_per_gpu_hour=2.0)
    found = _scaled(config, 1_000_000, 5, STAGES, ACTORS, COUNTS, 1)
    on_gpu = 100 + 50_000 / 8 + 10 + 2_000 / 8
    assert found.hours == pytest.approx((5 + 2 + 1000 + on_gpu) / 3600)
    assert found.gpu_hours == pytest.approx(8 * on_gpu / 3600)
    assert found.cost == pytest.approx(2 * found.gpu_hours)
    assert (found.tokens, found.prompt_tokens) == (100_000_000, 300_000_000)
    assert found.storage_bytes == 5_850_000_000
    assert "1000000 images" in as_text(found) and "on 8 GPUs" in as_text(found)


def test_a_paid_server_costs_by_the_token() -> None:
    config = EstimateConfig(images="x", captioner="openai", price_per_million_tokens=(0.5, 2.0))
    assert _scaled(config, 1_000_000, 5, STAGES, ACTORS, COUNTS, 0).cost == pytest.approx(300 * 0.5 + 100 * 2)


@pytest.mark.parametrize("offset", [0.0, 0.3, 2.0, 3.9])
@pytest.mark.parametrize("shards", [3, 4, 7, 12])
def test_the_steady_rate_of_actors_out_of_step(offset: float, shards: int) -> None:
    """Two actors, four seconds a shard of 100: 0.02 s a row, whenever the second begins and whoever takes the
    last shard."""
    ends = sorted([4.0 * k for k in range(1, shards)] + [4.0 * k + offset for k in range(1, shards)])
    assert seconds_per_row([(end, 100) for end in ends[:shards]], 2) == pytest.approx(0.02)
    alone = [(30.0 + 4.0 * k, 100) for k in range(shards)]
    assert seconds_per_row(alone, 1) == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("rows", "engines", "alike", "asked", "expected"),
    [
        (50_000, 8, True, 0, Sample(rows=1536, shard_rows=512, engines=1)),
        (200_000, 8, True, 0, Sample(rows=9216, shard_rows=512, engines=6)),
        (1_281_167, 8, True, 0, Sample(rows=12_288, shard_rows=512, engines=8)),
        (10_000, 8, True, 0, Sample(rows=498, shard_rows=166, engines=1)),
        (10_000, 4, False, 0, Sample(rows=492, shard_rows=41, engines=4)),
        (300, 1, False, 0, Sample(rows=96, shard_rows=32, engines=1)),
        (40, 1, False, 0, Sample(rows=40, shard_rows=32, engines=1)),
        (50_000, 8, True, 12_288, Sample(rows=12_288, shard_rows=512, engines=8)),
    ],
)
def test_a_sample_is_at_most_a_twentieth_unless_asked_for(
    rows: int, engines: int, alike: bool, asked: int, expected: Sample
) -> None:
    config = EstimateConfig(images="x", caption_preset="scenes", sample=asked)
    found = plan_sample(config, rows, engines, alike=alike)
    assert found == expected
    assert asked or found.rows <= max(0.05 * rows, 3 * 32)


def test_the_rate_of_one_engine_is_that_of_eight_by_eight(
    make_store: Callable[..., Path], tmp_path: Path
) -> None:
    store = Store(str(make_store(tmp_path / "store", train=60, val=10)))
    for shard in range(7):
        path = tmp_path / "store" / "captions" / "test" / "receipts" / f"part-{shard:05}.json"
        os.utime(path, (1000 + 5 * shard, 1000 + 5 * shard))
    one, eight = (_cost(store, "captions", 65.0, 1, whole) for whole in (1, 8))
    assert (one.seconds_per_image, eight.seconds_per_image) == (pytest.approx(0.5), pytest.approx(0.5 / 8))
    assert one.start_s == eight.start_s == pytest.approx(30), "what is paid once is that of the sample"


def test_the_sample_lies_where_all_nodes_see_it_and_is_deleted(
    tmp_path: Path, bucket: str, make_store: Callable[..., Path]
) -> None:
    whole = Store(str(make_store(tmp_path / "store")))
    for work_dir in (str(tmp_path / "shared"), f"{bucket}/shared"):
        with pytest.raises(KeyError), _place(work_dir) as folder:
            assert folder.startswith(f"{work_dir}/estimate-")
            store = Store.create(f"{folder}/store", whole.dataset)
            store.write_variant("captions", "test", {})
            store.write_shard("captions", "test", 0, whole.read_shard("captions", "test", 0), seconds=2.0)
            assert _cost(store, "captions", 3.0, 1, 1).seconds_per_image == pytest.approx(0.2)
            raise KeyError
        with pytest.raises(FileNotFoundError):
            Store(f"{folder}/store")
    assert list((tmp_path / "shared").iterdir()) == []


def test_a_cluster_of_several_nodes_needs_a_place_for_the_sample(
    monkeypatch: pytest.MonkeyPatch, picture_folder: Callable[..., Path]
) -> None:
    monkeypatch.setattr(session, "start_ray", lambda: None)
    monkeypatch.setattr(session, "several_nodes", lambda: True)
    monkeypatch.setattr(session, "grows", lambda: False)
    config = EstimateConfig(images=str(picture_folder({"a": 2})), caption_preset="scenes")
    with pytest.raises(ValueError, match="work_dir: the cluster has several nodes"):
        estimate.estimate(config)
    monkeypatch.setattr(session, "several_nodes", lambda: False)
    monkeypatch.setattr(session, "grows", lambda: True)
    with pytest.raises(ValueError, match="work_dir: the cluster grows"):
        estimate.estimate(config)


def test_an_estimate_waits_no_longer_than_it_may(
    monkeypatch: pytest.MonkeyPatch, picture_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """That it waits is tested on a cluster that grows."""
    zero = {"start_ray": None, "grows": True, "several_nodes": False, "gpus": 0, "spare_cores": 1}
    for name, value in zero.items():
        monkeypatch.setattr(session, name, lambda value=value: value)
    asked = []

    def wait(verb: str, wanted: waiting.Wanted, minutes: float) -> None:
        asked.append((verb, wanted.told(), minutes))
        raise RunStoppedError(verb)

    monkeypatch.setattr(waiting, "wait", wait)
    flags = {"caption_preset": "scenes", "replicas": 3, "work_dir": str(tmp_path / "work"), "wait_minutes": 4}
    with pytest.raises(RunStoppedError):
        estimate.estimate(EstimateConfig(images=str(picture_folder({"a": 2})), **flags))  # type: ignore[arg-type]
    assert asked == [("estimate", "1 readers of 1 CPU each", 4)]


def test_an_estimate_needs_something_to_describe() -> None:
    with pytest.raises(ValueError, match="name what is to be described"):
        EstimateConfig(caption_preset="scenes")


@pytest.mark.alone
def test_the_estimate_holds_within_a_quarter(tmp_path: Path) -> None:
    """A sample of a third of 3,072 pictures against describing them all, both with everything that a command
    costs."""
    script = ROOT / "examples" / "scenes" / "render.py"
    counts = ["--task", "relations", "--train-per-class", "256", "--val-per-class", "0"]
    subprocess.run(
        [sys.executable, str(script), "--to", str(tmp_path / "in"), *counts],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    common = ["--images", str(tmp_path / "in"), "--caption-preset", "scenes", "--shard-rows", "256"]
    command = [sys.executable, "-m", "pipeline", "estimate", *common, "--sample", "1024", "--json"]
    said = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    ).stdout
    predicted = json.loads(said)
    command = [sys.executable, "-m", "pipeline", "describe", *common, "--store", str(tmp_path / "store")]
    begun = time.monotonic()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    taken = time.monotonic() - begun
    assert predicted["images"] == 3072
    assert predicted["hours"] * 3600 == pytest.approx(taken, rel=0.25), (predicted, taken)
    stored = sum(path.stat().st_size for path in (tmp_path / "store").rglob("*.parquet"))
    assert predicted["storage_bytes"] == pytest.approx(stored, rel=0.25)
