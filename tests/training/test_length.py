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
    assert told == "an epoch is 8.3 passes over 24 pictures, 20 steps (--min-epoch-steps 20)"
    assert few.startswith("100 steps in all are few") and few.endswith("pass --epochs 50 or more.")


@pytest.mark.parametrize(
    ("pictures", "batch", "repeats", "steps", "samples"),
    [
        (5000, 32, 1, 100, 5000),
        (2970, 32, 1, 100, 3200),
        (990, 32, 1, 100, 3200),
        (196, 8, 4, 0, 784),
        (196, 8, 4, 200, 1600),
        (0, 8, 4, 200, 0),
    ],
)
def test_an_epoch_of_few_pictures_has_the_steps_that_are_asked_for(
    pictures: int, batch: int, repeats: int, steps: int, samples: int
) -> None:
    config = TrainConfig.of(store="s", batch_size=batch, min_epoch_steps=steps, epoch_repeats=repeats)
    assert config.epoch_samples(pictures) == samples


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
    assert [epoch["step"] for epoch in history] == [7, 14]
