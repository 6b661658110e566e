"""Workers of a group: how many, and one state for all."""

from __future__ import annotations

from typing import Any

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
