"""The estimate from a sample against what the real run then takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config import EstimateConfig
from pipeline.estimate import StageCost, _scaled, as_text, seconds_per_row
from pipeline.store import Stage

ROOT = Path(__file__).resolve().parent.parent.parent
STAGES = [
    StageCost(stage="images", start_s=2, seconds_per_image=0.001, bytes_per_image=5000),
    StageCost(stage="captions", start_s=100, seconds_per_image=0.05, bytes_per_image=50),
    StageCost(stage="embeddings", start_s=10, seconds_per_image=0.002, bytes_per_image=800),
]
ACTORS: dict[Stage, int] = {"images": 1, "captions": 1, "embeddings": 1}
COUNTS = {"rows": 1000, "failed": 3, "prompt": 300_000, "output": 100_000}


def test_more_gpus_divide_the_steady_time_of_their_stages_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.session.gpus", lambda: 1)
    config = EstimateConfig(images="x", gpus=8, price_per_gpu_hour=2.0)
    found = _scaled(config, 1_000_000, 5, STAGES, ACTORS, COUNTS)
    on_gpu = 100 + 50_000 / 8 + 10 + 2_000 / 8
    assert found.hours == pytest.approx((5 + 2 + 1000 + on_gpu) / 3600)
    assert found.gpu_hours == pytest.approx(8 * on_gpu / 3600)
    assert found.cost == pytest.approx(2 * found.gpu_hours)
    assert (found.tokens, found.prompt_tokens) == (100_000_000, 300_000_000)
    assert found.storage_bytes == 5_850_000_000
    assert "1000000 images" in as_text(found) and "on 8 GPUs" in as_text(found)


def test_a_paid_server_costs_by_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.session.gpus", lambda: 0)
    config = EstimateConfig(images="x", captioner="openai", price_per_million_tokens=(0.5, 2.0))
    assert _scaled(config, 1_000_000, 5, STAGES, ACTORS, COUNTS).cost == pytest.approx(300 * 0.5 + 100 * 2)


@pytest.mark.parametrize("offset", [0.0, 0.3, 2.0, 3.9])
@pytest.mark.parametrize("shards", [3, 4, 7, 12])
def test_the_steady_rate_of_actors_out_of_step(offset: float, shards: int) -> None:
    """Two actors, four seconds a shard of 100: 0.02 s a row, whenever the second begins and whoever takes the last shard."""
    ends = sorted([4.0 * k for k in range(1, shards)] + [4.0 * k + offset for k in range(1, shards)])
    assert seconds_per_row([(end, 100) for end in ends[:shards]], 2) == pytest.approx(0.02)
    alone = [(30.0 + 4.0 * k, 100) for k in range(shards)]
    assert seconds_per_row(alone, 1) == pytest.approx(0.04)


def test_an_estimate_needs_something_to_describe() -> None:
    with pytest.raises(ValueError, match="name what is to be described"):
        EstimateConfig()


@pytest.mark.slow
def test_the_estimate_holds_within_a_quarter(tmp_path: Path) -> None:
    """A sample of a third of 3,072 pictures against describing them all, both with everything that a command costs."""
    script = ROOT / "examples" / "scenes" / "render.py"
    counts = ["--train-per-class", "256", "--val-per-class", "0"]
    subprocess.run([sys.executable, str(script), "--to", str(tmp_path / "in"), *counts], check=True, stdout=subprocess.DEVNULL)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    common = ["--images", str(tmp_path / "in"), "--shard-rows", "256"]
    command = [sys.executable, "-m", "pipeline", "estimate", *common, "--sample", "1024", "--json"]
    said = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    predicted = json.loads(said)
    command = [sys.executable, "-m", "pipeline", "describe", *common, "--store", str(tmp_path / "store")]
    begun = time.monotonic()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    taken = time.monotonic() - begun
    assert predicted["images"] == 3072
    assert predicted["hours"] * 3600 == pytest.approx(taken, rel=0.25), (predicted, taken)
    stored = sum(path.stat().st_size for path in (tmp_path / "store").rglob("*.parquet"))
    assert predicted["storage_bytes"] == pytest.approx(stored, rel=0.25)
