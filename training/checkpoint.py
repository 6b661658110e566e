"""Checkpoints as safetensors plus JSON: model, optimizer and random state of one epoch's end, and the way back.

Nothing is pickled, so a checkpoint from anywhere can be opened. A folder holds model.safetensors, optimizer.safetensors and
state.json.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class State:
    """Where a run stands: epochs done and the metrics of each."""

    epoch: int
    history: list[dict[str, float]]


def save(folder: str, task: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Writes a checkpoint into an existing folder."""
    save_file(
        {name: tensor.contiguous() for name, tensor in task.state_dict().items()}, os.path.join(folder, "model.safetensors")
    )
    tensors, plain = _flatten(optimizer.state_dict())
    tensors["rng"] = torch.get_rng_state()
    save_file(tensors, os.path.join(folder, "optimizer.safetensors"))
    content = {"epoch": state.epoch, "history": state.history, "optimizer": plain}
    with open(os.path.join(folder, "state.json"), "w", encoding="utf-8") as stream:
        json.dump(content, stream)


def load(folder: str, task: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> State:
    """Fills the task, and the optimizer if given, from a checkpoint folder; returns where the run stands."""
    task.load_state_dict(load_file(os.path.join(folder, "model.safetensors")))
    content = read_state(folder)
    if optimizer is not None:
        tensors = load_file(os.path.join(folder, "optimizer.safetensors"))
        torch.set_rng_state(tensors.pop("rng"))
        optimizer.load_state_dict(_unflatten(tensors, content["optimizer"]))
    return State(epoch=content["epoch"], history=content["history"])


def read_state(folder: str) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    with open(os.path.join(folder, "state.json"), encoding="utf-8") as stream:
        content: dict[str, Any] = json.load(stream)
    return content


def find(run: str, which: str = "last") -> str:
    """The checkpoint folder of a run: the last epoch's, or the one with the best top-1.

    Raises:
        FileNotFoundError: the run has none.
    """
    folders = [entry.path for entry in os.scandir(run) if entry.is_dir()] if os.path.isdir(run) else []
    states = {f: read_state(f) for f in folders if os.path.isfile(os.path.join(f, "state.json"))}
    if not states:
        message = f"run={run}: holds no checkpoint; train it first: gpt4image train --store STORE --run {run}"
        raise FileNotFoundError(message)
    if which == "best":
        return max(states, key=lambda f: (states[f]["history"][-1]["top1"], states[f]["epoch"]))
    return max(states, key=lambda f: states[f]["epoch"])


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{index}.{name}"] = value
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, {"groups": state["param_groups"], "scalars": scalars}


def _unflatten(tensors: dict[str, Tensor], plain: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **plain["scalars"]}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in plain["groups"]]
    return {"state": state, "param_groups": groups}
