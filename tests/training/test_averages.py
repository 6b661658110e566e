"""The moving average of the weights, and the best epoch's checkpoint: what is evaluated and exported beside
the last weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import Tensor

from training.__main__ import main
from training.config import ExportConfig, TrainConfig
from training.engine import checkpoint, loop
from training.engine.step import Stepper
from training.export import export
from training.objectives import align
from training.settings import flat


def test_the_moving_average_is_the_explicit_one_over_all_steps(
    tmp_path: Path, make_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """a <- d a + (1 - d) w after each step, from the first weights on, with the decay d that the step had."""
    weights: list[dict[str, Tensor]] = []
    decays: list[float] = []
    step, decay = Stepper.__call__, ModelEmaV3.get_decay

    def copy(task: torch.nn.Module) -> dict[str, Tensor]:
        return {
            name: value.detach().double()
            for name, value in task.state_dict().items()
            if value.is_floating_point()
        }

    def spied_step(self: Stepper, *arguments: Any) -> Any:
        if not weights:
            weights.append(copy(self.task))
        found = step(self, *arguments)
        weights.append(copy(self.task))
        return found

    def spied_decay(self: Any, *arguments: Any) -> float:
        decays.append(decay(self, *arguments))
        return decays[-1]

    monkeypatch.setattr(Stepper, "__call__", spied_step)
    monkeypatch.setattr(ModelEmaV3, "get_decay", spied_decay)
    config = TrainConfig.of(
        store=str(make_store(tmp_path / "s", train=24, val=6)),
        backbone="test_resnet",
        image_size=32,
        epochs=3,
        batch_size=12,
        projection_dim=4,
        ema=0.6,
        lr=3e-3,
        warmup_epochs=0,
        learn_temperature=True,
    )
    snapshots: list[checkpoint.Snapshot] = []
    loop.fit(config, torch.device("cpu"), 0, None, lambda metrics, take: snapshots.append(take()))
    assert len(weights) == 7 and len(decays) == 6
    average = weights[0]
    for now, d in zip(weights[1:], decays, strict=True):
        average = {name: d * value + (1 - d) * now[name] for name, value in average.items()}
    found = snapshots[-1].files["ema.safetensors"]
    for name, value in average.items():
        torch.testing.assert_close(
            found[name].double(), value, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )
    last = snapshots[-1].files["model.safetensors"]
    assert any(not torch.equal(found[name], last[name]) for name in average)


@pytest.fixture
def run(tmp_path: Path, make_store: Callable[..., Path]) -> Path:
    """Four epochs, of which the second is the best, and a checkpoint inside the fifth."""
    store = make_store(tmp_path / "store", train=24, val=9)
    config = TrainConfig.of(
        store=str(store), backbone="test_resnet", image_size=32, epochs=5, batch_size=12, alignment_weight=0.0
    )
    history: list[dict[str, float]] = []
    for epoch, top1 in enumerate((40.0, 70.0, 70.0, 55.0), start=1):
        task = align.build_task(TrainConfig.of(**flat(config) | {"seed": epoch}), 3, 0)
        optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
        history.append(
            {"epoch": float(epoch), "step": 2.0 * epoch, "top1": top1, "top5": 100.0, "eval_images": 9.0}
        )
        state = checkpoint.State(step=2 * epoch, history=list(history))
        checkpoint.Snapshot.take(task, optimizer, None, state).write(
            str(tmp_path / "run" / f"checkpoint-{epoch}")
        )
    inside = checkpoint.State(step=9, history=list(history), sums={"loss": 1.0})
    checkpoint.Snapshot.take(task, optimizer, None, inside).write(str(tmp_path / "run" / "checkpoint-5"))
    (tmp_path / "run" / "config.json").write_text(json.dumps(flat(config)))
    return tmp_path / "run"


def test_the_best_checkpoint_is_the_finished_epoch_with_the_best_accuracy(run: Path, tmp_path: Path) -> None:
    assert Path(checkpoint.find(str(run))).name == "checkpoint-5"
    best = Path(checkpoint.find(str(run), "best"))
    assert best.name == "checkpoint-3", "of equals the later"
    export.export(ExportConfig(run=str(run), to=str(tmp_path / "model"), checkpoint="best"))
    model, expected = (
        timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True),
        load_file(best / "model.safetensors"),
    )
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[f"backbone.{name}"]), name
    assert "top-1 70.00 %" in (tmp_path / "model" / "README.md").read_text()


def test_evaluate_measures_the_best_checkpoint_when_asked(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for which, epoch in (("best", 3), ("last", 4)):
        assert main(["evaluate", str(run), "--checkpoint", which, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["checkpoint"], found["epoch"]) == (which, epoch)


def test_without_a_finished_epoch_there_is_no_best(tmp_path: Path) -> None:
    task = align.build_task(TrainConfig.of(store="s", backbone="test_resnet", alignment_weight=0.0), 3, 0)
    snapshot = checkpoint.Snapshot.take(
        task, torch.optim.SGD(task.parameters(), lr=0.1), None, checkpoint.State(step=1)
    )
    content = {**snapshot.content, "sums": {"loss": 1.0}}
    checkpoint.Snapshot(snapshot.files, content).write(str(tmp_path / "run" / "checkpoint-1"))
    assert Path(checkpoint.find(str(tmp_path / "run"))).name == "checkpoint-1"
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        checkpoint.find(str(tmp_path / "run"), "best")
