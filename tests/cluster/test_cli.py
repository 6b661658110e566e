"""The command: verbs, help, exit codes, the doctor, and what a job runs."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from cluster import cli, demo, diagnosis, doctor
from cluster.__main__ import main as cluster_main
from pipeline.__main__ import main as pipeline_main
from training.__main__ import main as training_main
from tuning.__main__ import main as tuning_main

MAINS = {"pipeline": pipeline_main, "training": training_main, "tuning": tuning_main, "cluster": cluster_main}


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_teaches_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    assert f"gpt4image {verb}" in told
    assert told.count("--") >= 2


@pytest.mark.parametrize("package", MAINS)
def test_a_package_lists_its_verbs_and_refuses_others(
    package: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert MAINS[package](["nonsense"]) == 2
    assert MAINS[package](["--help"]) == 0
    told = capsys.readouterr().err
    for verb, (owner, _) in cli.VERBS.items():
        assert owner != package or verb in told


def test_the_command_without_a_verb_or_with_a_wrong_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    assert cli.main([]) == 2
    assert cli.main(["descibe"]) == 2
    assert "no verb 'descibe'; did you mean describe?" in capsys.readouterr().err
    assert pipeline_main(["descibe"]) == 2
    assert "did you mean describe?" in capsys.readouterr().err


def test_versions_are_told_without_importing_what_they_are_of() -> None:
    code = (
        "import sys; from cluster import cli\n"
        "assert cli.main(['--version']) == 0\n"
        "assert not {'torch', 'ray', 'pyarrow', 'vllm'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    told = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert told["torch"] == metadata.version("torch") and told["ray"] == metadata.version("ray")
    assert told["gpt4image"] == metadata.version("gpt4image-ray") and "0." in told["vllm"]


@pytest.mark.parametrize("package", MAINS)
def test_a_verb_says_the_same_of_itself_everywhere(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--help"])
    lines = set(capsys.readouterr().out.splitlines())
    MAINS[package](["--help"])
    assert lines.issuperset(line for line in capsys.readouterr().err.splitlines() if line.startswith("  "))


@pytest.mark.parametrize(
    "arguments", [["status"], ["train"], ["tune"], ["export", "run"], ["ingest", "--images", "x"]]
)
def test_a_missing_flag_is_exit_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2


def test_wrong_input_is_exit_code_2_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["status", "--store", str(tmp_path / "nowhere")]) == 2
    assert cli.main(["evaluate", str(tmp_path)]) == 2
    assert cli.main(["train", "--store", str(tmp_path / "nowhere")]) == 2
    told = capsys.readouterr().err
    assert "gpt4image ingest" in told and "holds no config.json" in told


def test_help_answers_without_loading_anything_heavy() -> None:
    code = (
        "import sys; from cluster import cli\n"
        "try: cli.main(['caption', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'pyarrow', 'transformers', 'vllm', 'mlflow'} & set(sys.modules)), "
        "file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().endswith("[]"), done.stderr


def test_submit_without_a_job_server_says_how_to_start_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster_main(["submit", "--address", "http://127.0.0.1:1", "--", "status", "--store", "/s"]) == 2
    assert "ray start --head" in capsys.readouterr().err


@pytest.mark.alone
def test_the_doctor_finds_this_environment_well_and_speaks_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster_main(["doctor", "--deep", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    states = {finding["name"]: finding["state"] for finding in told["findings"]}
    assert told["healthy"]
    assert {
        "ray",
        "torch and torchvision",
        "vllm engine",
        "captioner",
        "mlflow",
        "cuda",
        "text encoder",
    } <= states.keys()
    needed = ["vllm engine", "torch and torchvision", *(check.name for check in doctor.DEEP)]
    assert {states[name] for name in needed} == {"ok"}
    details = {finding["name"]: finding["detail"] for finding in told["findings"]}
    assert "red" in details["vllm captions"] and details["encoder encodes"] == "(1, 384)"


def test_a_demo_goes_on_as_it_was_begun_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures of one task would pass for those of another."""
    monkeypatch.setattr(demo, "steps", lambda config, root: [])
    command = ["demo", "--to", str(tmp_path / "demo")]
    assert cluster_main(command) == cluster_main(command) == 0
    assert cluster_main([*command, "--task", "relations"]) == 2
    assert "task: kinds then, relations now" in capsys.readouterr().err
    assert cluster_main([*command, "--objective", "mae"]) == 2
    assert "objective: align then, mae now" in capsys.readouterr().err
    (tmp_path / "old" / "scenes").mkdir(parents=True)
    (tmp_path / "old" / "scenes" / "truth.jsonl").touch()
    assert cluster_main(["demo", "--to", str(tmp_path / "old")]) == 2
    assert "begun by an earlier release" in capsys.readouterr().err


def test_a_missing_part_comes_with_its_mend() -> None:
    found = doctor._examine(doctor.Check(name="x", question="no_such_question", mend="ask another"))
    assert (found.state, found.mend) == ("missing", "ask another")
    assert "no_such_question" in found.detail
    absent = doctor._examine(doctor.Check(name="x", question="cuda", mend="m", needed=False))
    assert (absent.state, absent.mend) == ("absent", "m")
    assert {check.question for check in (*doctor.QUICK, *doctor.DEEP)} == diagnosis.QUESTIONS.keys()
