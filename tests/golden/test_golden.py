"""Short runs give what they gave when they were recorded: what must not alter numbers, did not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.record import RUNS, SETTINGS, STEPS, STORE, machine, rows, trained

RECORDED, DESCRIBED = (json.loads(file.read_text()) for file in (RUNS, STORE))
AGAIN = "if the change is meant to alter numbers: python tests/golden/record.py"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name.startswith("two workers") else name
        for name in SETTINGS
    ],
)
def test_the_losses_are_the_recorded_ones(name: str, tmp_path: Path) -> None:
    """To the last bit, the weights too, on the kind of machine that recorded them; to rounding elsewhere."""
    found, expected = trained(name, tmp_path), RECORDED["runs"][name]
    assert len(found["losses"]) == STEPS
    same = RECORDED["machine"] == machine()
    tolerance = 0 if same else 2e-6  # other vector instructions: at most 5e-7
    for step, (mine, theirs) in enumerate(zip(found["losses"], expected["losses"], strict=True)):
        assert mine == pytest.approx(theirs, rel=tolerance, abs=0), f"{name}, step {step}: {AGAIN}"
    if same:
        assert found["weights"] == expected["weights"], AGAIN


@pytest.mark.alone
def test_a_described_store_is_the_recorded_one(described: Path) -> None:
    """Every byte of every row on the kind of machine that recorded it; elsewhere another caption may win by a
    rounding."""
    found = rows(described)
    for name in ("classes", "rows", "variants"):
        assert found[name] == DESCRIBED[name], AGAIN
    assert found["hashes"]["images"] == DESCRIBED["hashes"]["images"], AGAIN
    if DESCRIBED["machine"] == machine():
        assert found["hashes"] == DESCRIBED["hashes"], AGAIN
