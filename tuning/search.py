"""Which training comes next: pure bookkeeping, which knows of no Ray and of no files.

A block is a configuration with all its seeds. Blocks are compared with those of their own arm only, by the
mean over seeds, at rungs: ASHA (Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys
2020, algorithm 2) promotes the best one in `reduction_factor`. Nothing is stopped: a training ends at its
rung and goes on from its checkpoint if its block is promoted, so that no process is killed and nothing that
was learned is lost. Where the number of configurations is known, lower rungs come first: with all blocks of
a rung compared fewer are promoted by luck.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tuning.config import TuneConfig
from tuning.space import Arm, Configuration, Values

Stage = Literal["search", "final"]


@dataclass(frozen=True)
class Piece:
    """A part of a training: from where it is to the end of an epoch."""

    configuration: Configuration
    seed: int
    rung: int
    """Index of the rung that it ends at."""
    stage: Stage = "search"

    @property
    def training(self) -> tuple[int, int]:
        """What all pieces of a training share."""
        return self.configuration.number, self.seed


@dataclass
class Block:
    """What is known of a configuration and its seeds."""

    configuration: Configuration
    seeds: tuple[int, ...]
    merits: dict[int, dict[int, float]] = field(default_factory=dict)
    """By rung and seed; more is better."""
    lost: set[int] = field(default_factory=set)
    """Seeds that diverged or failed: the block is compared with no other any more."""
    diverged: bool = False
    """Whether one of these diverged."""
    rung: int = 0
    """That it was let go to."""
    kept: bool = False
    """Of an earlier space: it is compared with the others, and not trained further."""

    def ended(self, rung: int) -> bool:
        """Whether no seed is on its way to the rung."""
        return all(seed in self.merits.get(rung, {}) or seed in self.lost for seed in self.seeds)

    def mean(self, rung: int) -> float:
        """Over those of its seeds that have come so far."""
        return statistics.fmean(self.merits[rung][seed] for seed in self.seeds if seed in self.merits[rung])

    def stands(self, rung: int) -> bool:
        """Whether all its seeds have a merit there."""
        return not self.lost and self.ended(rung)


class Search:
    """A sweep's trainings, one piece after the other.

    Args:
        config: of the sweep.
        arms: see `space.arms`.
    """

    def __init__(self, config: TuneConfig, arms: Sequence[Arm]) -> None:
        self.arms, self.rungs = list(arms), config.rungs
        self.blocks: list[Block] = []
        self.pairs: list[tuple[Block, Block]] = []
        """Of the final comparison, once the search is over: (baseline, method) of a backbone."""
        self.searched = set(config.seeds)
        """Seeds that a choice was made on, those of earlier starts among them."""
        self._spent = False
        self._config = config
        self._exhausted: set[Arm] = set()
        self._waiting: list[Piece] = []
        self._running: set[tuple[int, int]] = set()
        self._final: list[Piece] | None = None
        self._by_key: dict[str, Block] = {}
        self._by_arm: dict[Arm, list[Block]] = {arm: [] for arm in arms}
        # In turns: where the budget ends the search, no backbone and no baseline has had nothing.
        grids = [[(arm, values) for values in arm.grid()] for arm in arms] if config.search == "grid" else []
        for turn in itertools.zip_longest(*grids):
            for arm, values in filter(None, turn):
                self._new(arm, values)

    def known(self, backbone: str, is_baseline: bool, values: Values) -> Block:
        """The block of a configuration that was begun before; one that is not of today's space is kept."""
        mine = (arm for arm in self.arms if (arm.backbone, arm.is_baseline) == (backbone, is_baseline))
        arm = next(mine, Arm(backbone, is_baseline, {}, ({},), ()))
        if (block := self._by_key.get(_key(arm, values))) is not None:
            return block
        block = self._new(arm, values)
        block.kept = self._config.search == "grid" or arm not in self.arms or not arm.fits(values)
        return block

    def restore(self, block: Block, seed: int, history: Sequence[float], lost: str = "") -> None:
        """What a training has come to so far: the merit after each epoch, and whether it is lost (diverged or
        failed)."""
        for rung, epochs in enumerate(self.rungs):
            if len(history) >= epochs:
                block.merits.setdefault(rung, {})[seed] = history[epochs - 1]
                if len(history) > epochs or rung + 1 == len(self.rungs):
                    block.rung = max(block.rung, min(rung + 1, len(self.rungs) - 1))
        if lost:
            block.lost.add(seed)
            block.diverged |= lost == "diverged"

    def start(self) -> None:
        """Call once, after what is known was restored: lines up what blocks that were begun still lack."""
        for block in self.blocks:
            if not block.kept:
                self._line_up(block)

    def next(self) -> Piece | None:
        """What to train now; None where nothing is to be begun before something has ended, or ever."""
        if not self._waiting and not self._spent:
            steps = (self._draw, self._promote) if self._is_finite else (self._promote, self._draw)
            for step in steps:
                if (block := step()) is not None:
                    self._line_up(block)
                    break
        if self._spent and not self._waiting and not self._running and self._final is None:
            self._finish_best()
        if not self._waiting and not self._running and self._final is None:
            self._final = self._finals()
            self._waiting = list(self._final)
        if not self._waiting:
            return None
        piece = self._waiting.pop(0)
        self._running.add(piece.training)
        return piece

    @property
    def is_done(self) -> bool:
        """Whether nothing runs and nothing will."""
        return self._final is not None and not self._waiting and not self._running

    def record(self, piece: Piece, merits: Sequence[float], lost: str = "") -> None:
        """What came of a piece: the merit after each epoch of its training so far; `lost`: see `restore`."""
        self._running.discard(piece.training)
        if piece.stage == "final":
            return
        block = self.blocks[piece.configuration.number]
        if len(merits) < self.rungs[piece.rung]:
            lost = lost or "failed"  # or all others would wait for it
        self.restore(block, piece.seed, merits, lost)
        if block.lost:
            self._give_up(block)

    def _give_up(self, block: Block) -> None:
        """A block that lost a seed cannot be promoted: of its other seeds only those that are on their way
        come to the rung."""
        if len(self.rungs) == 1:
            return  # a grid's are told of, each
        number = block.configuration.number
        self._waiting = [each for each in self._waiting if each.configuration.number != number]
        there = block.merits.get(block.rung, {}).keys()
        block.lost |= {s for s in block.seeds if s not in there and (number, s) not in self._running}

    def spend(self) -> bool:
        """The budget is used up: nothing more of the search is begun. Returns whether there was more."""
        if self._spent or self._final is not None:
            return False  # what is waiting now belongs to the ends of the best
        room = self._config.search != "grid" and any(
            arm not in self._exhausted and self._has_room(arm) for arm in self.arms
        )
        promotable = any(self._promotable(arm, r) for arm in self.arms for r in range(len(self.rungs) - 1))
        left = bool(self._waiting) or room or promotable
        self._spent, self._waiting = True, []
        return left

    def stop(self) -> None:
        """Nothing more is begun, not even the final comparison."""
        self._spent, self._waiting, self._final = True, [], self._final or []

    def best(self, arms: Sequence[Arm]) -> Block | None:
        """The best configuration by the mean over its seeds, after whole trainings; where the budget allowed
        none, at the highest rung that one has come to. One that lost a seed is taken only where all did."""
        mine = [block for arm in arms for block in self._by_arm[arm]]
        for blocks in ([block for block in mine if not block.lost], mine):
            for rung in reversed(range(len(self.rungs))):
                there = [block for block in blocks if block.ended(rung) and block.merits.get(rung)]
                if there:
                    return max(there, key=lambda block: block.mean(rung))
        return None

    @property
    def has_pairs(self) -> bool:
        """Whether a backbone has both arms, which can be compared."""
        return any(count == 2 for count in Counter(arm.backbone for arm in self.arms).values())

    @property
    def planned(self) -> int:
        """Trainings of the search and of the final comparison; 0 where a budget decides."""
        if not self._is_finite:
            return 0
        return self._searched_trainings() + self._final_trainings()

    def _searched_trainings(self) -> int:
        drawn = sum(int(min(self._config.trials, arm.size)) for arm in self.arms)
        count = sum(not b.kept for b in self.blocks) if self._config.search == "grid" else drawn
        return count * len(self._config.seeds)

    def _final_trainings(self) -> int:
        backbones = Counter(arm.backbone for arm in self.arms)
        return 2 * len(self.fresh_seeds()) * sum(count == 2 for count in backbones.values())

    def told(self) -> str:
        """How much there is to do, in words."""
        search = (
            f"{self._searched_trainings()} trials" if self._is_finite else "trials until the budget is spent"
        )
        final = self._final_trainings()
        if not final:
            return search
        few = (
            " (fewer than three seeds cannot tell a difference from chance)"
            if self._config.fresh_seeds < 3
            else ""
        )
        return f"{search}, then {final} on fresh seeds{few}"

    def epochs_left(self) -> int:
        """Roughly, of the search as planned and the final comparison."""
        eta, seeds, rungs = self._config.reduction_factor, len(self._config.seeds), self.rungs
        total = 0
        for arm in self.arms:
            count = len(self._of(arm)) if self._config.search == "grid" else self._config.trials
            for place, rung in enumerate(rungs):
                total += max(1, count // eta**place) * seeds * (rung - (rungs[place - 1] if place else 0))
        finals = len(self.fresh_seeds()) * len(self.arms) * rungs[-1] if self.has_pairs else 0
        done = sum(
            rungs[max(block.merits)] * len(block.merits[max(block.merits)])
            for block in self.blocks
            if block.merits
        )
        if self._final is not None:
            return (
                len([p for p in self._final if p in self._waiting or p.training in self._running]) * rungs[-1]
            )
        return max(0, total - done) + finals

    def fresh_seeds(self) -> tuple[int, ...]:
        """Of the final comparison: those after the largest that was ever searched on."""
        first = max(self.searched) + 1
        return tuple(range(first, first + self._config.fresh_seeds))

    def _new(self, arm: Arm, values: Values) -> Block:
        block = Block(Configuration(len(self.blocks), arm, dict(values)), self._config.seeds)
        self.blocks.append(block)
        self._by_key[_key(arm, values)] = block
        self._by_arm.setdefault(arm, []).append(block)
        return block

    @property
    def _is_finite(self) -> bool:
        return self._config.search == "grid" or self._config.trials > 0

    def _line_up(self, block: Block) -> None:
        """All pieces that a block lacks to the rung that it was let go to."""
        if block.lost:
            self._give_up(block)
        for seed in block.seeds:
            if seed not in block.lost and seed not in block.merits.get(block.rung, {}):
                self._waiting.append(Piece(block.configuration, seed, block.rung))

    def _draw(self) -> Block | None:
        """A new configuration, for the arm that has fewest; the baseline's before the method's."""
        from tuning import sampling

        if self._config.search == "grid":
            return None  # all are there from the start
        open_ = [arm for arm in self.arms if arm not in self._exhausted and self._has_room(arm)]
        for arm in sorted(open_, key=lambda arm: len(self._of(arm))):
            values = sampling.draw(arm, self._by_arm[arm], self.rungs, self._config)
            if values is not None:
                return self._new(arm, values)
            self._exhausted.add(arm)
        return None

    def _has_room(self, arm: Arm) -> bool:
        count = len(self._of(arm))
        return count < arm.size and not (self._config.trials and count >= self._config.trials)

    def _of(self, arm: Arm) -> list[Block]:
        """Its blocks but those of an earlier space."""
        return [block for block in self._by_arm[arm] if not block.kept]

    def _promote(self) -> Block | None:
        """The best block that may go on, from the highest rung down."""
        for rung in reversed(range(len(self.rungs) - 1)):
            for arm in self.arms:
                for block in self._promotable(arm, rung):
                    block.rung = rung + 1
                    return block
        return None

    def _promotable(self, arm: Arm, rung: int) -> list[Block]:
        """Blocks that stay at a rung and are good enough to go on."""
        blocks = [block for block in self._of(arm) if block.ended(rung)]
        ranked = sorted((b for b in blocks if b.stands(rung)), key=lambda block: -block.mean(rung))
        allowed = len(blocks) // self._config.reduction_factor
        if self._is_closed(arm, rung):
            allowed = max(1, allowed)  # or a small arm would never be trained to the end
        return [block for block in ranked[:allowed] if block.rung == rung]

    def _is_closed(self, arm: Arm, rung: int) -> bool:
        """Whether no further block will come to a rung."""
        if any(b.rung == rung and not b.ended(rung) for b in self._of(arm)):
            return False
        if rung:
            return self._is_closed(arm, rung - 1) and not self._promotable(arm, rung - 1)
        return self._config.search == "grid" or arm in self._exhausted or not self._has_room(arm)

    def _finish_best(self) -> None:
        """After the budget: an arm that has no whole training gets that of its best block."""
        last = len(self.rungs) - 1
        for arm in self.arms:
            best = self.best([arm])
            if best is not None and not best.lost and not best.ended(last):
                best.rung = last
                self._line_up(best)

    def _finals(self) -> list[Piece]:
        """Each backbone's best configuration beside its best baseline, seed by seed."""
        for backbone in dict.fromkeys(arm.backbone for arm in self.arms):
            pair = [self.best([arm]) for arm in self.arms if arm.backbone == backbone]
            if len(pair) == 2 and pair[0] is not None and pair[1] is not None:
                self.pairs.append((pair[0], pair[1]))
        return [
            Piece(block.configuration, seed, len(self.rungs) - 1, "final")
            for pair in self.pairs
            for seed in self.fresh_seeds()
            for block in pair
        ]


def _key(arm: Arm, values: Values) -> str:
    return json.dumps([arm.backbone, arm.is_baseline, sorted(values.items())])


def merit_of(value: float) -> float:
    """A metric that is no number is the worst there is."""
    return value if math.isfinite(value) else -math.inf


def as_record(values: Values) -> dict[str, Any]:
    """Values as JSON gives them back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
