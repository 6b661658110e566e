"""What is checked before a job is sent, and what travels with it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster import checks, packing
from cluster.cli import VERBS
from cluster.jobs import forwarded
from pipeline import verbs
from tests.nodes import ROOT

LEAST = {
    "ingest": ["--images", "/i", "--store", "/s"],
    "caption": ["--store", "/s", "--caption-preset", "scenes"],
    "embed": ["--store", "/s"],
    "describe": ["--images", "/i", "--store", "/s", "--caption-preset", "scenes"],
    "import-captions": ["/c.jsonl", "--store", "/s"],
    "status": ["--store", "/s"],
    "estimate": ["--images", "/i", "--caption-preset", "scenes"],
    "inspect": ["/s", "--to", "/p.html"],
    "retry": ["--store", "/s"],
    "train": ["--store", "/s", "--run", "/r"],
    "evaluate": ["/r"],
    "export": ["/r", "--to", "/m"],
    "tune": ["--store", "/s", "--sweep", "/w"],
    "report": ["/w"],
}
# Settings that hold strings and are no places.
NO_PLACE = {
    *("source_kind", "captioner", "caption_preset", "model_revision", "prompt", "base_url", "captions"),
    *("encoder_preset", "encoder_revision", "pooling", "long_captions", "split", "embeddings", "preset"),
    *("objective", "balance", "alignment_schedule", "alignment", "text_projection", "positives", "head"),
    *("several_captions", "architecture", "optimizer", "clip_mode", "loss", "train_split", "eval_split"),
    *("auto_augment", "precision", "loader", "experiment", "log_artifacts", "register_as", "parent_run"),
    *("checkpoint", "weights", "class_prompts", "format"),
}


def strings(settings: Any) -> Iterator[str]:
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            yield from strings(value)
        elif isinstance(value, str) or "str" in str(field.type):
            yield field.name


@pytest.mark.parametrize("name", [name for name, (package, _) in VERBS.items() if package != "cluster"])
def test_every_setting_of_text_is_a_place_or_is_none(name: str) -> None:
    """A new one that is neither would pass unchecked."""
    found = set(strings(verbs.parse(name, VERBS[name][1], LEAST[name])))
    assert found <= checks.PATHS | checks.MODELS | checks.URIS | NO_PLACE


def test_a_jobs_command_line_is_the_packages_own() -> None:
    verb = ["describe", "--images", "/data/my images", "--store", "s3://bucket/store", "--caption-preset"]
    job = checks.checked([*verb, "scenes"], str(ROOT))
    told = "python -m pipeline describe --images '/data/my images' --store s3://bucket/store "
    assert job.entrypoint == f"{told}--caption-preset scenes"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ([], "gpt4image submit -- VERB"),
        (["demo"], "gpt4image submit -- VERB"),
        (["nonsense"], "gpt4image submit -- VERB"),
        (["train", "--store", "/s"], "pass --run with an absolute path"),
        (["tune", "--store", "/s"], "pass --sweep with an absolute path"),
        (["train", "--store", "relative/store", "--run", "/r"], "store=relative/store"),
        (["train", "--store", "/s", "--run=runs/x"], "run=runs/x"),
        (["evaluate", "runs/x"], "run=runs/x"),
        (["report", "/a", "runs/b"], "sweeps=runs/b"),
        (["import-captions", "captions.jsonl", "--store", "/s"], "file=captions.jsonl"),
        (
            ["train", "--store", "/s", "--run", "/r", "--backbone", "local-dir:mine"],
            "backbone=local-dir:mine",
        ),
        (["embed", "--store", "/s", "--encoder", "./mine"], "encoder=./mine"),
        (
            ["train", "--store", "/s", "--run", "/r", "--tracking-uri", "sqlite:///a.db"],
            "tracking_uri=sqlite",
        ),
        (["train", "--store", "/s", "--run", "/r", "--tracking-uri", "mlruns"], "tracking_uri=mlruns"),
        (["train", "--store", "/s", "--run", "/r", "--preset", "nope"], "nope"),
    ],
)
def test_what_cannot_work_as_a_job_is_refused(command: list[str], said: str) -> None:
    with pytest.raises(ValueError) as told:
        checks.checked(command, str(ROOT))
    assert said in str(told.value)


@pytest.mark.parametrize(
    ("flag", "value", "said"), [("--epoch", "3", "--epoch"), ("--mixup", "-1", "0 or more")]
)
def test_a_flag_that_the_verb_does_not_take_is_said_here(
    flag: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        checks.checked(["train", "--store", "/s", "--run", "/r", flag, value], str(ROOT))
    assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [
        ["--tracking-uri", "none"],
        ["--tracking-uri", "http://mlflow:5000"],
        ["--tracking-uri", "sqlite:////data/mlflow.db"],
        ["--backbone", "hf-hub:org/name@0123456"],
        ["--backbone", "local-dir:/models/birds"],
        ["--backbone", "local-dir:examples/scenes/captioner"],
    ],
)
def test_what_is_the_same_on_every_node_passes(more: list[str]) -> None:
    checks.checked(["train", "--store", "s3://b/s", "--run", "/r", *more], str(ROOT))


def test_one_place_and_verb_have_one_name() -> None:
    def name(*command: str) -> str:
        return checks.checked(list(command), str(ROOT)).name

    first = name("train", "--store", "/s", "--run", "/runs/my birds")
    assert first.startswith("train-my-birds-")
    assert first == name("train", "--store", "/other", "--run", "/runs/my birds/", "--epochs", "3")
    assert first != name("train", "--store", "/s", "--run", "/runs/mice")
    assert name("embed", "--store", "/s") != name("retry", "--store", "/s")
    assert name("status", "--store", "/s") == "", "any number may look"
    assert name("evaluate", "/runs/a") == "" != name("evaluate", "/runs/a", "--to", "/figures")


def checkout(folder: Path, files: list[str]) -> Path:
    for name in ["pipeline/__main__.py", *files]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x" * 1000)
    return folder


SECRET = [
    ".env",
    ".env.local",
    "key.pem",
    "sub/id_ed25519",
    ".ssh/config",
    "gcp-credentials.json",
    "sub/.netrc",
    ".aws/config",
]


@pytest.mark.parametrize("secret", SECRET)
def test_what_looks_like_a_secret_is_refused_by_name(tmp_path: Path, secret: str) -> None:
    folder = checkout(tmp_path / "work", ["prompts/environment.txt", "names.json", secret])
    with pytest.raises(ValueError, match=r"look like secrets.*--exclude") as told:
        packing.pack(str(folder), str(tmp_path / "copy"))
    assert secret in str(told.value)
    pattern = str(told.value).rpartition("--exclude ")[2]
    packed = packing.pack(str(folder), str(tmp_path / "copy"), [pattern])
    assert packed.files == 3 and packed.nbytes == 3000
    assert not (tmp_path / "copy" / secret).exists()


def test_what_git_ignores_stays_and_what_is_new_travels(tmp_path: Path) -> None:
    folder = checkout(
        tmp_path / "work", ["data.bin", "new file.py", "runs/x/log", "tests/t.py", "secret.pem"]
    )
    (folder / ".gitignore").write_text("data.bin\n*.pem\n")
    os.symlink("/nowhere", folder / "broken")
    os.symlink("pipeline", folder / "linked")
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    subprocess.run(["git", "-C", str(folder), "add", "pipeline"], check=True)
    (folder / "pipeline" / "gone.py").write_text("x")
    subprocess.run(["git", "-C", str(folder), "add", "pipeline"], check=True)
    (folder / "pipeline" / "gone.py").unlink()
    packing.pack(str(folder), str(tmp_path / "copy"))
    found = sorted(str(path.relative_to(tmp_path / "copy")) for path in (tmp_path / "copy").rglob("*.*"))
    assert found == [".gitignore", "new file.py", "pipeline/__main__.py"]


def test_more_than_ray_takes_is_said_with_what_is_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "LIMIT", 5000)
    folder = checkout(tmp_path / "work", ["small"])
    (folder / "large.bin").write_bytes(b"x" * 6000)
    with pytest.raises(ValueError, match=r"the largest are large\.bin"):
        packing.pack(str(folder), str(tmp_path / "copy"))
    with pytest.raises(ValueError, match="no checkout of gpt4image-ray"):
        packing.pack(str(tmp_path), str(tmp_path / "copy"))


def test_this_checkout_is_small_and_whole(tmp_path: Path) -> None:
    """And has no file that is taken for a secret."""
    packed = packing.pack(str(ROOT), str(tmp_path))
    assert packed.nbytes < 30 * 2**20
    for name in ("training/run.py", "examples/scenes/captioner/model.safetensors", "pyproject.toml"):
        assert (tmp_path / name).exists()


def test_addresses_travel_and_secrets_only_by_name() -> None:
    here = {
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "AWS_ENDPOINT_URL": "http://s3:9000",
        "AWS_SECRET_ACCESS_KEY": "s",
        "HOME": "/root",
    }
    told = {"MLFLOW_TRACKING_URI": "http://mlflow:5000", "AWS_ENDPOINT_URL": "http://s3:9000"}
    assert forwarded((), here) == told
    assert forwarded(("AWS_SECRET_ACCESS_KEY",), here) == told | {"AWS_SECRET_ACCESS_KEY": "s"}
    with pytest.raises(ValueError, match="MISSING: not set here"):
        forwarded(("MISSING",), here)
    hidden = here | {"MLFLOW_TRACKING_URI": "http://me:pass@mlflow:5000"}
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI holds a password") as refused:
        forwarded((), hidden)
    assert "pass@" not in str(refused.value)
    assert forwarded(("MLFLOW_TRACKING_URI",), hidden)["MLFLOW_TRACKING_URI"].startswith("http://me")
