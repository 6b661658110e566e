"""Short trainings give the losses that they gave when they were recorded: what must not alter numbers, did not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.record import FILE, SETTINGS, STEPS, losses, machine

RECORDED = json.loads(FILE.read_text())


@pytest.mark.parametrize("name", SETTINGS)
def test_the_losses_are_the_recorded_ones(name: str, tmp_path: Path) -> None:
    """To the last bit on the kind of machine that recorded them, to rounding elsewhere."""
    found, expected = losses(name, tmp_path), RECORDED["losses"][name]
    assert len(found) == STEPS
    tolerance = 0 if RECORDED["machine"] == machine() else 2e-6  # other vector instructions: at most 5e-7
    again = "if the change is meant to alter numbers: python tests/golden/record.py"
    for step, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert mine == pytest.approx(theirs, rel=tolerance, abs=0), f"{name}, step {step}: {again}"
