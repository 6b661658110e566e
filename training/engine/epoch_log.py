"""What a run keeps an eye on between steps: sums for the log, a loss that is no number, the time for a
checkpoint.

Workers agree every `TOGETHER` steps, in one small reduction; nothing else here makes the device wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import NotFiniteError
from pipeline.store import Store
from training.config import TrainConfig
from training.data.loader import Batch
from training.data.order import ROW, SHARD, Array
from training.engine.checkpoint import State
from training.engine.distributed import world_size

Metrics = dict[str, float]
TOGETHER = 10
NAMED = 12


class Watch:
    """One worker's view; methods from `look` on are called by all workers at the same step."""

    def __init__(
        self, config: TrainConfig, store: Store, device: torch.device, rank: int, state: State, steps: int
    ) -> None:
        """`steps` are those of the whole run."""
        self._config, self._store, self._device, self._rank, self._steps = config, store, device, rank, steps
        self._state = state
        self._names: list[str] = []
        self._sums = torch.zeros(0, dtype=torch.float64, device=device)
        self._recent: list[tuple[int, Array, Tensor]] = []
        self._begun = self._checkpointed = time.monotonic()
        self._first_step = state.step

    def begin(self) -> None:
        """The clock of this epoch's training, or of the rest of it, starts."""
        self._begun = time.monotonic()
        self._first_step = self._state.step

    def add(self, step: int, batch: Batch, losses: dict[str, Tensor]) -> None:
        """Takes in a step's losses."""
        if not self._names:
            self._names = ["samples", *sorted(losses)]
            self._sums = torch.zeros(len(self._names), dtype=torch.float64, device=self._device)
            if self._rank == 0:  # sums of all workers up to the checkpoint that was resumed from
                before = [self._state.sums.get(name, 0.0) for name in self._names]
                self._sums += torch.tensor(before, dtype=torch.float64, device=self._device)
        count = len(batch.labels)
        means = torch.stack([losses[name].detach().double().mean() for name in self._names[1:]])
        self._sums += count * torch.cat([means.new_ones(1), means])
        self._recent.append((step, batch.samples, losses["loss"].detach()))

    def look(self, step: int, stop: int, progress: Callable[[Metrics], None] | None) -> bool:
        """Whether a checkpoint is due after this step. Every few steps, workers compare notes.

        Raises:
            NotFiniteError: on all workers, if the loss of one was no number.
        """
        config = self._config
        by_steps = bool(config.place.checkpoint_steps) and (step + 1) % config.place.checkpoint_steps == 0
        if (step + 1) % TOGETHER and step + 1 != stop and not by_steps:
            return False
        bad = ~torch.isfinite(torch.stack([loss for _, _, loss in self._recent]))
        waited = time.monotonic() - self._checkpointed > 60 * config.place.checkpoint_minutes
        wanted = (
            self._rank == 0
            and not config.place.checkpoint_steps
            and config.place.checkpoint_minutes > 0
            and waited
        )
        notes = torch.stack([bad.any(), torch.tensor(wanted, device=bad.device)]).to(
            self._device, torch.float32
        )
        if world_size() > 1:
            dist.all_reduce(notes, op=dist.ReduceOp.MAX)
        any_bad, due = (bool(note) for note in notes.tolist())
        if any_bad:
            raise NotFiniteError(self._accusation(bad.tolist()))
        if progress is not None:
            done = (step + 1 - self._first_step) * config.optim.batch_size
            now = {
                "step": step + 1,
                "steps": self._steps,
                "batch": config.optim.batch_size,
                "images_per_s": done / self._seconds(),
            }
            progress({**now, "loss": float(self._recent[-1][2])})
        self._recent.clear()
        due = due or by_steps
        if due:
            self._checkpointed = time.monotonic()
        return due

    def state(self, step: int) -> State:
        """Where the run stands inside an epoch; sums are those of all workers."""
        sums = dict(zip(self._names, self._joint_sums(), strict=True))
        return replace(self._state, step=step, sums=sums, seconds=self._state.seconds + self._seconds())

    def epoch_means(self, step: int) -> Metrics:
        """Means over the epoch's samples of all workers, with their number, seconds and images/s."""
        sums = dict(zip(self._names, self._joint_sums(), strict=True))
        samples = sums.pop("samples")
        seconds = self._state.seconds + self._seconds()
        means = {name: value / samples for name, value in sums.items()}
        if "correct" in means:  # of methods that classify
            means["train_top1"] = 100 * means.pop("correct")
        done = (step - self._first_step) * self._config.optim.batch_size
        return means | {"samples": samples, "seconds": seconds, "images_per_s": done / self._seconds()}

    def end_epoch(self, step: int, metrics: Metrics) -> State:
        """The state at an epoch's end; sums start anew."""
        self._state = State(step=step, history=[*self._state.history, metrics])
        self._names = []
        self._checkpointed = time.monotonic()
        return self._state

    def _seconds(self) -> float:
        return max(time.monotonic() - self._begun, 1e-9)

    def _joint_sums(self) -> list[float]:
        sums = self._sums.clone()
        if world_size() > 1:
            dist.all_reduce(sums)
        joint: list[float] = sums.tolist()
        return joint

    def _accusation(self, bad: list[bool]) -> str:
        """The steps and ids of the first batch of each worker that went wrong first."""
        first = next((number for number, is_bad in enumerate(bad) if is_bad), None)
        mine = None if first is None else (self._recent[first][0], self._ids(self._recent[first][1]))
        notes = [mine] * world_size()
        if world_size() > 1:
            dist.all_gather_object(notes, mine)
        guilty = [note for note in notes if note is not None]
        step = min(step for step, _ in guilty)
        ids = [key for at, keys in guilty if at == step for key in keys]
        more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
        return (
            f"step {step + 1}: the loss is no finite number. The batch: {', '.join(ids[:NAMED])}{more}. Look "
            f"at these pictures and their captions, or try a lower --lr (now {self._config.optim.lr}), a "
            "longer --warmup-epochs or --clip-grad 1."
        )

    def _ids(self, samples: Array) -> list[str]:
        ids = {
            s: self._store.read_shard("images", "", s, ["id"])["id"]
            for s in np.unique(samples[:, SHARD]).tolist()
        }
        return list(dict.fromkeys(ids[int(row[SHARD])][int(row[ROW])].as_py() for row in samples))
