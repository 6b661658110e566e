"""Checkpoints as safetensors plus JSON: model, optimizer, moving average and where the run stands, and the
way back.

Nothing is pickled, so a checkpoint from anywhere can be opened. A folder holds model.safetensors,
optimizer.safetensors, ema.safetensors where there is an average, and state.json, which is written last: a
folder without it is no checkpoint. There is no state of random generators, since every step seeds its own
(see `step`).
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from pyarrow import fs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import MissingError
from pipeline.store import files, locations
from training import run_folder

STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class State:
    """Where a run stands: steps done, the metrics of each finished epoch, and what the present one has summed
    up."""

    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Snapshot:
    """A copy in CPU memory, to be written while training goes on."""

    files: dict[str, dict[str, Tensor]]
    content: dict[str, Any]

    @classmethod
    def take(cls, task: nn.Module, optimizer: torch.optim.Optimizer, ema: Any, state: State) -> Snapshot:
        """Copies everything; `ema` is timm's ModelEmaV3 or None."""
        tensors, plain = _flatten(optimizer.state_dict())
        files = {"model": task.state_dict(), "optimizer": tensors}
        if ema is not None:
            files["ema"] = ema.module.state_dict()
        copies = {f"{name}.safetensors": _copied(parts) for name, parts in files.items()}
        return cls(copies, {**asdict(state), "epoch": len(state.history), "optimizer": plain})

    def write(self, folder: str) -> None:
        """Writes into a folder of this machine, which is made if need be."""
        os.makedirs(folder, exist_ok=True)
        for name, tensors in self.files.items():
            save_file(tensors, os.path.join(folder, name))
        with open(os.path.join(folder, STATE), "w", encoding="utf-8") as stream:
            json.dump(self.content, stream)

    def upload(self, filesystem: fs.FileSystem, path: str) -> None:
        """Writes into a folder of any file system, state.json last."""
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
            self.write(folder)
            filesystem.create_dir(path, recursive=True)
            for name in self.files:
                local = os.path.join(folder, name)
                fs.copy_files(
                    local,
                    f"{path}/{name}",
                    source_filesystem=fs.LocalFileSystem(),
                    destination_filesystem=filesystem,
                )
            files.write_whole(filesystem, f"{path}/{STATE}", json.dumps(self.content).encode())


def load(
    folder: str, task: nn.Module, optimizer: torch.optim.Optimizer | None = None, ema: Any = None
) -> State:
    """Fills the task, and optimizer and moving average if given, from a checkpoint folder; returns where the
    run stands."""
    task.load_state_dict(load_file(os.path.join(folder, "model.safetensors")))
    content = read_state(folder)
    if optimizer is not None:
        optimizer.load_state_dict(
            _unflatten(load_file(os.path.join(folder, "optimizer.safetensors")), content["optimizer"])
        )
        _match_layouts(optimizer)
    if ema is not None:
        ema.module.load_state_dict(load_file(os.path.join(folder, "ema.safetensors")))
    return State(**{name: content[name] for name in ("step", "history", "sums", "seconds")})


def read_state(folder: str) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    content: dict[str, Any] = json.loads(locations.fetch(folder, STATE))
    return content


def find(run: str, which: str = "last") -> str:
    """The checkpoint folder of a run: the last one, or the finished epoch whose model is the best; its path
    or address.

    Raises:
        FileNotFoundError: the run has none.
    """
    filesystem, root = locations.resolve(run)
    entries = filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True))
    folders = [info.path for info in entries if info.type == fs.FileType.Directory]
    both = {
        path: filesystem.get_file_info([f"{path}/{STATE}", f"{path}/model.safetensors"]) for path in folders
    }
    paths = [path for path, infos in both.items() if all(info.type == fs.FileType.File for info in infos)]
    states: dict[str, dict[str, Any]] = {}
    for path in paths:
        with contextlib.suppress(ValueError):  # a kill cut it, in a release that wrote in place
            states[path] = read_state(locations.join(run, path.rpartition("/")[2]))
    if which == "best":  # among the ends of epochs: between them nothing is evaluated
        states = {path: state for path, state in states.items() if state["history"] and not state["sums"]}
    if not states:
        message = f"run={run}: holds no checkpoint; train it first: gpt4image train --store STORE --run {run}"
        raise MissingError(message)

    metric = run_folder.judged_by(run_folder.read_json(run, "config.json") or {})

    def merit(path: str) -> tuple[float, ...]:
        step = states[path]["step"]
        return (run_folder.merit(states[path]["history"][-1], metric), step) if which == "best" else (step,)

    best = max(states, key=merit)
    return best if locations.is_local(run) else locations.join(run, best.rpartition("/")[2])


@contextmanager
def opened(run: str, which: str = "last") -> Iterator[str]:
    """See `find`; of a remote run a copy on this machine, for as long as it is open."""
    folder = find(run, which)
    if locations.is_local(run):
        yield folder
        return
    filesystem, path = locations.resolve(folder)
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        fs.copy_files(path, folder, source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem())
        yield folder


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _match_layouts(optimizer: torch.optim.Optimizer) -> None:
    """Lays moments out as their parameters are: fused optimizers walk both in memory order and do not look at
    strides."""
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if (
                isinstance(value, Tensor)
                and value.shape == parameter.shape
                and value.stride() != parameter.stride()
            ):
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{index}.{name}"] = value
    groups = []
    for number, group in enumerate(state["param_groups"]):
        tensors |= {
            f"group-{number}.{name}": value for name, value in group.items() if isinstance(value, Tensor)
        }
        groups.append({name: value for name, value in group.items() if not isinstance(value, Tensor)})
    return tensors, {"groups": groups, "scalars": scalars}


def _unflatten(tensors: dict[str, Tensor], plain: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in plain["groups"]]
    for key, value in {**tensors, **plain["scalars"]}.items():
        index, name = key.split(".", 1)
        if index.startswith("group-"):
            groups[int(index.removeprefix("group-"))][name] = value
        else:
            state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": groups}
