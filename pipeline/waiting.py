"""Waiting for a cluster: until there is room for what a stage or a training asks of it, told while it lasts.

A cluster that scales to zero has nothing at the start, and others' work may hold what there is. Ray itself
waits in silence and for ever. What is asked for here is asked of the autoscaler, all of it at once; it is
given back when the wait ends, and whoever waited takes it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline import session
from pipeline.errors import RunStoppedError

_LOOK_S = 0.5
_TELL_S = 30.0
_HELPER: dict[str, float] = {"CPU": 1}
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """`count` processes, called `name` (plural), of `cpus` and `gpus` each; work begins when `least` of them
    have room.

    `gang`: those must have it at the same time, as the workers of a training. `helpers`: processes of one CPU
    that each of them starts, anywhere, and that must have room with it, as a worker's decoders.
    """

    name: str
    count: int
    cpus: float
    gpus: float = 0
    least: int = 0
    gang: bool = False
    helpers: int = 0

    @property
    def each(self) -> dict[str, float]:
        """Resources of one, as Ray calls them."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})

    @property
    def bundle(self) -> list[dict[str, float]]:
        """One and its helpers."""
        return [self.each, *[_HELPER] * self.helpers]

    def told(self, count: int = 0) -> str:
        """Such as `2 engines of 1 GPU and 1 CPU each`, of `count`, or of all."""
        beside = f", with {self.helpers} of {_amounts(_HELPER)} beside each" if self.helpers else ""
        return f"{count or self.count} {self.name} of {_amounts(self.each)} each{beside}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def wait(verb: str, wanted: Wanted, minutes: float, say: Say = _say) -> None:
    """Returns as soon as `least` of what is wanted have room (all of it where `least` is 0); at once on this
    machine, whose Ray is ours alone. What is told while it lasts goes to `say`.

    Raises:
        RunStoppedError: there was no room for so many minutes.
    """
    if session.is_local():
        return
    least = min(wanted.least or wanted.count, wanted.count)
    groups = _asked(wanted, least)
    try:
        _until(lambda: _room(groups, wanted.gang, least), verb, wanted, least, minutes, say)
    finally:
        _given_back(groups)


def _asked(wanted: Wanted, least: int) -> list[Any]:
    """Placement groups: one for a gang, one for each process beyond it, with their helpers."""
    from ray.util import placement_group

    gang = [placement_group(wanted.bundle * least)] if wanted.gang else []
    alone = wanted.count - least if wanted.gang else wanted.count
    return gang + [placement_group(wanted.bundle) for _ in range(alone)]


def _room(groups: list[Any], gang: bool, least: int) -> int:
    """How many have room."""
    from ray.util import placement_group_table

    table = placement_group_table()
    ready = [table.get(group.id.hex(), {}).get("state") == "CREATED" for group in groups]
    return (least * ready[0] + sum(ready[1:])) if gang else sum(ready)


def _given_back(groups: list[Any]) -> None:
    from ray.util import remove_placement_group

    for group in groups:
        remove_placement_group(group)


def _until(room: Callable[[], int], verb: str, wanted: Wanted, least: int, minutes: float, say: Say) -> None:
    begun = told = time.monotonic()
    time.sleep(_LOOK_S)  # what a cluster has is there at once
    have = room()
    if have >= least:
        return
    grows = "it grows" if session.grows() else "it has no autoscaler that reports to it"
    say(
        f"{verb}: waits for {wanted.told()}, {minutes:g} min at most; {_present()}, {grows}"
        + (f"; begins with {least}" if least < wanted.count else "")
    )
    while have < least:
        now = time.monotonic()
        if now - begun > 60 * minutes:
            message = (
                f"no room for {wanted.told(least)} after {minutes:g} min: "
                f"{_present()}{_refused(wanted)}. What is done is kept and the same command goes on; pass a "
                "larger --wait-minutes to wait longer, or ask for less."
            )
            raise RunStoppedError(message)
        if now - told > _TELL_S:
            told = now
            say(
                f"{verb}: has waited {_span(now - begun)}: {have} of {wanted.count} {wanted.name} have room; "
                f"{_present()}{_refused(wanted)}"
            )
        time.sleep(_LOOK_S)
        have = room()
    say(f"{verb}: {have} of {wanted.count} {wanted.name} have room after {_span(time.monotonic() - begun)}")


def _refused(wanted: Wanted) -> str:
    """What the autoscaler says of it."""
    refused = session.refused()
    for each in (wanted.each, _HELPER) if wanted.helpers else (wanted.each,):
        if each in refused:
            return f"; no group of nodes gives {_amounts(each)} now: each is at its maximum, or too small"
    return ""


def _present() -> str:
    return f"the cluster has {_amounts({'GPU': session.gpus(), 'CPU': session.cpus()})}"


def _amounts(resources: dict[str, Any]) -> str:
    return " and ".join(
        f"{amount:g} {name}{'' if amount == 1 else 's'}" for name, amount in sorted(resources.items())[::-1]
    )


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
