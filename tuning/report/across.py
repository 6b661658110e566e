"""Sweeps beside each other: what the plain model of one is worth over that of another, seed by seed, such as
one that starts from a pre-training over one that starts from nothing."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence

from training import run_folder
from tuning.report.configurations import Content
from tuning.report.significance import FEWEST_SEEDS, student_interval


def lines(contents: Sequence[Content]) -> list[str]:
    """A sentence for each backbone that the first sweep and a later one over the same store trained plainly,
    for equally many steps, with the same three seeds or more."""
    first, *others = contents
    told = []
    for other in others:
        if other["store"] != first["store"]:
            continue
        before, after = _plain(first), _plain(other)
        for backbone in sorted(before.keys() & after.keys()):
            seeds = sorted(
                seed
                for seed in before[backbone].keys() & after[backbone].keys()
                if before[backbone][seed][1] == after[backbone][seed][1]
            )
            if len(seeds) < FEWEST_SEEDS:
                continue
            pairs = [(before[backbone][seed][0], after[backbone][seed][0]) for seed in seeds]
            gains = [now - then for then, now in pairs]
            low, high = student_interval(gains)
            interval = f"95 % {low:+.1f} to {high:+.1f}" if math.isfinite(low) else "all alike"
            means = [statistics.fmean(side) for side in zip(*pairs, strict=True)]
            shown = "" if low > 0 or high < 0 else ": no difference shown"
            told.append(
                f"Plain {backbone}, {_name(other)} over {_name(first)}: {statistics.fmean(gains):+.1f} "
                f"points of top-1 ({means[0]:.1f} to {means[1]:.1f}), {interval}, "
                f"{len(seeds)} seeds{shown}."
            )
    return told


def _plain(content: Content) -> dict[str, dict[int, tuple[float, int]]]:
    """Top-1 and steps, by backbone and seed, of finished trainings of the plain model that nothing was
    searched for."""
    found: dict[str, dict[int, tuple[float, int]]] = {}
    longest = content["rungs"][-1] if content["rungs"] else 0
    for trial in content["trials"]:
        if trial["arm"] != "baseline" or trial["values"] or trial["result"] is None:
            continue
        if trial["epochs"] == longest and "top1" in trial["result"]["last"]:
            last = trial["result"]["last"]
            scores = found.setdefault(trial["backbone"], {})
            scores[trial["seed"]] = (run_folder.headline(last), int(last.get("step", 0)))
    return found


def _name(content: Content) -> str:
    return os.path.basename(str(content["sweep"]).rstrip("/"))
