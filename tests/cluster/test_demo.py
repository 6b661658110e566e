"""The demo's steps for each training method."""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from cluster import demo
from cluster.__main__ import main
from cluster.cli import VERBS
from cluster.config import DemoConfig
from cluster.demo_steps import Step, steps
from pipeline.verbs import parse
from training.objectives.registry import BUILT_IN

METHODS = get_args(get_type_hints(DemoConfig)["objective"])


def test_every_method_has_a_demo_of_its_own_and_a_folder() -> None:
    assert set(METHODS) == BUILT_IN.keys()
    assert len({DemoConfig(objective=method).folder for method in METHODS}) == len(METHODS)
    assert DemoConfig().folder == "runs/demo" and DemoConfig(to="x", objective="mae").folder == "x"


@pytest.mark.parametrize("method", METHODS)
def test_every_step_is_a_command_that_is_understood(method: str, tmp_path: Path) -> None:
    for epochs in (0, 2):
        made = steps(DemoConfig(objective=method, epochs=epochs), str(tmp_path))
        for title, (verb, *arguments) in ((each.title, each.arguments) for each in made if each.arguments):
            settings = parse(verb, VERBS[verb][1], arguments)
            assert str(tmp_path) in str(settings), title
        assert [each.title for each in made if not each.arguments] == ["draw scenes"]


def test_a_step_that_fails_ends_the_demo_with_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = Step("look at nothing", ("status", "--store", str(tmp_path / "none")))
    monkeypatch.setattr(demo, "steps", lambda config, root: [wrong, Step("never")])
    assert main(["demo", "--to", str(tmp_path / "demo")]) == 2
    told = capsys.readouterr().err
    assert "step 'look at nothing' ended with exit code 2; the same command goes on" in told
    assert "an earlier release began the folder, pass another --to" in told
    assert "never" not in told
