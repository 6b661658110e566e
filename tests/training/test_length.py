"""How long a training is: its steps, passes and epochs, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from training import preparation
from training.__main__ import parse_train
from training.config import TrainConfig
from training.engine import loop


def test_a_training_of_few_steps_says_how_many_epochs_would_do(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    store = make_store(tmp_path / "store", train=24)
    flags = ["--store", str(store), "--batch-size", "10", "--alignment-weight", "0", "--min-epoch-steps", "0"]
    (said,) = preparation.length(parse_train([*flags, "--epochs", "5", "--epoch-repeats", "2"]))
    assert said.startswith("24 steps in all are few") and "--epochs 209 or more" in said
    enough = [*flags, "--epochs", "209", "--epoch-repeats", "2"]
    assert not preparation.length(parse_train(enough))
    assert not preparation.length(parse_train(["--preset", "smoke", *flags]))
    told, few = preparation.length(parse_train([*flags, "--epochs", "5", "--min-epoch-steps", "20"]))
    assert told == "an epoch is 8 passes over 24 pictures, 19 steps (--min-epoch-steps 20)"
    assert few.startswith("96 steps in all are few"), "as asked for, and still few"


@pytest.mark.parametrize(
    ("pictures", "batch", "steps", "passes"),
    [
        (5000, 32, 100, 1),
        (2970, 32, 100, 1),
        (990, 32, 100, 3),
        (196, 8, 0, 4),
        (196, 8, 200, 8),
        (3, 2, 9, 6),
    ],
)
def test_an_epoch_of_few_pictures_makes_as_many_passes_as_its_steps_take(
    pictures: int, batch: int, steps: int, passes: int
) -> None:
    repeats = 4 if pictures == 196 else 1
    config = TrainConfig.of(store="s", batch_size=batch, min_epoch_steps=steps, epoch_repeats=repeats)
    assert config.passes(pictures) == passes


def test_a_training_has_the_steps_that_its_recipe_asks_for(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    store = make_store(tmp_path / "store", train=24)
    config = TrainConfig.of(
        store=str(store),
        run=str(tmp_path / "run"),
        workers=1,
        backbone="test_resnet",
        image_size=32,
        batch_size=8,
        epochs=2,
        min_epoch_steps=7,
        alignment_weight=0.0,
    )
    history = loop.fit(config, torch.device("cpu"), 0, None, lambda metrics, take: None)
    assert [epoch["step"] for epoch in history] == [6, 12], "three steps a pass, seven wanted: two passes"
