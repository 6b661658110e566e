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
from cluster.__main__ import parse_submit
from cluster.cli import VERBS
from cluster.jobs import forwarded
from pipeline import verbs
from tests.nodes import ROOT

SENT = packing.names_of(str(ROOT))
LEAST = {
    "ingest": ["--images", "/i", "--store", "/s"],
    "caption": ["--store", "/s", "--caption-preset", "scenes"],
    "embed": ["--store", "/s"],
    "features": ["--store", "/s", "--tower", "/m"],
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
    *("device", "tower_revision"),
    *("source_kind", "captioner", "caption_preset", "model_revision", "prompt", "base_url", "captions"),
    *("encoder_preset", "encoder_revision", "pooling", "long_captions", "split", "embeddings", "preset"),
    *("objective", "balance", "alignment_schedule", "alignment", "text_projection", "positives", "head"),
    *(
        "several_captions",
        "class_target",
        "class_half",
        "architecture",
        "init_state",
        "optimizer",
        "clip_mode",
        "loss",
        "train_split",
        "eval_split",
    ),
    *("auto_augment", "precision", "loader", "experiment", "log_artifacts", "register_as", "parent_run"),
    *("checkpoint", "weights", "class_prompts", "format", "axis", "search", "scheduler", "test_split"),
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
    job = checks.checked([*verb, "scenes"], SENT, {})
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
        (["train", "--store", "file://./s", "--run", "/r"], "store=file://./s"),
        (["train", "--store", "/s", "--run", "s3://b/r"], "tracking_uri: with s3://b/r"),
        (["train", "--store", "/s", "--run", "/r", "--backbone", "local-dir:tests/golden"], "backbone=local"),
        (
            ["train", "--store", "/s", "--run", "/r", "--tracking-uri", "http://me:pw@mlflow"],
            "the address holds a password",
        ),
    ],
)
def test_what_cannot_work_as_a_job_is_refused(command: list[str], said: str) -> None:
    with pytest.raises(ValueError) as told:
        checks.checked(command, SENT, {})
    assert said in str(told.value)


@pytest.mark.parametrize(
    ("flag", "value", "said"), [("--epoch", "3", "--epoch"), ("--mixup", "-1", "0 or more")]
)
def test_a_flag_that_the_verb_does_not_take_is_said_here(
    flag: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        checks.checked(["train", "--store", "/s", "--run", "/r", flag, value], SENT, {})
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
    checks.checked(["train", "--store", "s3://b/s", "--run", "/r", *more], SENT, {})


def test_a_file_of_settings_travels_or_lies_where_every_node_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands in it is checked as flags are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text('{"epochs": 7, "store": "s3://b/s", "run": "runs/of another"}')
    (tmp_path / "here.json").write_text('{"store": "pictures", "epochs": 7}')
    train = ["train", "--run", "/r", "--config"]
    job = checks.checked([*train, "mine.json"], ["mine.json"], {})
    assert job.entrypoint == "python -m training train --run /r --config mine.json"
    checks.checked([*train, str(tmp_path / "mine.json")], [], {})
    with pytest.raises(ValueError, match=r"config=\./mine\.json: is not among the files that a job gets"):
        checks.checked([*train, "./mine.json"], ["theirs.json"], {})
    with pytest.raises(ValueError, match=r"store=pictures: a job runs in a copy"):
        checks.checked([*train, "here.json"], ["here.json"], {})
    with pytest.raises(ValueError, match="run: pass --run"):  # that of the file is another run's
        checks.checked(["train", "--config", "mine.json"], ["mine.json"], {})


def test_where_mlflow_writes_is_checked_wherever_it_is_said() -> None:
    train = ["train", "--store", "s3://b/s", "--run", "s3://b/r"]
    checks.checked(train, SENT, {"MLFLOW_TRACKING_URI": "http://mlflow:5000"})
    checks.checked(train, SENT, {"MLFLOW_TRACKING_URI": "http://me:pw@mlflow:5000"})
    checks.checked([*train, "--tracking-uri", "none"], SENT, {})
    for uri in ("sqlite:///mlflow.db", "./mlruns"):
        with pytest.raises(ValueError, match="tracking_uri="):
            checks.checked(train, SENT, {"MLFLOW_TRACKING_URI": uri})


def test_one_place_has_one_name() -> None:
    def name(*command: str) -> str:
        return checks.checked(list(command), SENT, {}).name

    first = name("train", "--store", "/s", "--run", "/runs/my birds")
    assert first.startswith("train-my-birds-")
    assert first == name("train", "--store", "/other", "--run", "/runs/./my birds/", "--epochs", "3")
    assert first != name("train", "--store", "/s", "--run", "/runs/mice")
    assert name("embed", "--store", "/s") == name("retry", "--store", "file:///s/")
    assert name("embed", "--store", "s3://b/s") != name("embed", "--store", "s3://c/s")
    assert name("status", "--store", "/s") == "", "any number may look"
    assert name("evaluate", "/runs/a") == "" != name("evaluate", "/runs/a", "--to", "/figures")


def checkout(folder: Path, files: list[str]) -> Path:
    for name in ["pipeline/__main__.py", *files]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x" * 1000)
    return folder


SECRET = [
    *(".env", ".env.local", "prod.env", "key.pem", "KEY.PEM", "sub/id_ed25519", ".ssh/config", ".aws/config"),
    *("gcp-credentials.json", "sub/.netrc", ".git-credentials", "client_secret_1.json", "kubeconfig.yaml"),
]


@pytest.mark.parametrize("secret", SECRET)
def test_what_looks_like_a_secret_is_refused_by_name(tmp_path: Path, secret: str) -> None:
    harmless = ["prompts/environment.txt", "names.json", ".env.example", "id_rsa.pub"]
    folder = checkout(tmp_path / "work", [*harmless, secret])
    with pytest.raises(ValueError, match=r"look like secrets.*--exclude") as told:
        packing.names_of(str(folder))
    assert secret in str(told.value)
    pattern = str(told.value).rpartition("--exclude ")[2]
    assert sorted(packing.names_of(str(folder), [pattern])) == sorted(["pipeline/__main__.py", *harmless])


def test_what_git_ignores_stays_and_what_is_new_travels(tmp_path: Path) -> None:
    new = ["data.bin", "new file.py", "runs/x/log", "tests/t.py", "lib/tests/t.py", "secret.pem", "kept.bin"]
    folder = checkout(tmp_path / "work", new)
    (folder / ".gitignore").write_text("*.bin\n*.pem\n")
    os.symlink("/nowhere", folder / "broken")
    (folder / "pipeline" / "gone.py").write_text("x")
    git = ["git", "-C", str(folder)]
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    subprocess.run([*git, "add", "-f", "pipeline", "kept.bin"], check=True)
    (folder / "pipeline" / "gone.py").unlink()
    names = packing.names_of(str(folder))
    assert sorted(names) == ["kept.bin", "lib/tests/t.py", "new file.py", "pipeline/__main__.py"]
    packed = packing.pack(str(folder), str(tmp_path / "copy"), names)
    assert (packed.files, packed.nbytes) == (4, 4000)
    assert sorted(n for n in names if (tmp_path / "copy" / n).exists()) == sorted(names)


def test_what_would_stay_behind_or_lead_out_is_refused(tmp_path: Path) -> None:
    folder = checkout(tmp_path / "work", [])
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    (tmp_path / "elsewhere").write_text("mine")
    os.symlink(tmp_path / "elsewhere", folder / "notes.txt")
    with pytest.raises(ValueError, match=r"notes\.txt lead out of the folder"):
        packing.names_of(str(folder))
    (folder / "notes.txt").unlink()
    inner = checkout(folder / "inner", [])
    subprocess.run(["git", "init", "-q", str(inner)], check=True)
    with pytest.raises(ValueError, match="inner is a repository or a link"):
        packing.names_of(str(folder))
    assert packing.names_of(str(folder), ["inner"]) == ["pipeline/__main__.py"]
    # A repository around it that ignores it.
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("*\n")
    hidden = checkout(tmp_path / "hidden", [])
    with pytest.raises(ValueError, match="or git ignores it"):
        packing.names_of(str(hidden))


def test_more_than_ray_takes_is_said_with_what_is_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private import ray_constants

    assert ray_constants.DASHBOARD_CLIENT_MAX_SIZE == packing.LIMIT, "what Ray's job server takes"
    monkeypatch.setattr(packing, "LIMIT", 5000)
    folder = checkout(tmp_path / "work", ["small"])
    (folder / "large.bin").write_bytes(b"x" * 6000)
    with pytest.raises(ValueError, match=r"the largest are large\.bin"):
        packing.names_of(str(folder))
    with pytest.raises(ValueError, match="no checkout of gpt4image-ray"):
        packing.names_of(str(tmp_path))


def test_this_checkout_is_small_and_whole(tmp_path: Path) -> None:
    """And has no file that is taken for a secret."""
    packed = packing.pack(str(ROOT), str(tmp_path), SENT)
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


def test_a_forgotten_separator_is_named_and_a_verb_as_a_value_is_none() -> None:
    with pytest.raises(ValueError, match="put -- in front of train"):
        parse_submit(["--detach", "train", "--store", "/s"])
    config, job = parse_submit(["--exclude", "train", "--", "status", "--store", "/s"])
    assert config.exclude == ("train",) and job[0] == "status"
