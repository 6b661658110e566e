"""Workers of a group: how many, and one state for all."""

from __future__ import annotations

import os
from typing import Any

import psutil
import torch.distributed as dist
from torch import nn


def world_size() -> int:
    """Processes that train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def agree_on_buffers(task: nn.Module, ema: Any) -> None:
    """Rank 0's batch-norm statistics for all: they are what the checkpoint holds, so they are what is
    evaluated."""
    if world_size() > 1:
        for model in (task,) if ema is None else (task, ema.module):
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


def be_reached_at(address: str) -> None:
    """Lets gloo listen on the network that has this machine's `address`, unless the user has named one.

    By itself it takes what the machine's name stands for. On Debian that is 127.0.1.1, where no other machine
    finds it, and where the name stands for nothing it is loopback, too.
    """
    for name, found in psutil.net_if_addrs().items():
        if any(each.address == address for each in found):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
