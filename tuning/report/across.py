"""Sweeps beside each other: what the plain model of one is worth over that of another, seed by seed, such as
one that starts from a pre-training over one that starts from nothing."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence

from training import run_folder
from tuning.report.configurations import Content
from tuning.report.significance import student_interval


def lines(contents: Sequence[Content]) -> list[str]:
    """A sentence for each backbone that the first sweep and a later one over the same store trained plainly,
    for equally long, with the same seeds."""
    first, *others = contents
    told = []
    for other in others:
        if other["store"] != first["store"]:
            continue
        before, after = _plain(first), _plain(other)
        for backbone in sorted(before.keys() & after.keys()):
            seeds = sorted(before[backbone].keys() & after[backbone].keys())
            if len(seeds) < 2:
                continue
            pairs = [(before[backbone][seed], after[backbone][seed]) for seed in seeds]
            gains = [now - then for then, now in pairs]
            low, high = student_interval(gains)
            means = [statistics.fmean(side) for side in zip(*pairs, strict=True)]
            shown = "" if low > 0 or high < 0 else ": no difference shown"
            told.append(
                f"Plain {backbone}, {_name(other)} over {_name(first)}: {statistics.fmean(gains):+.1f} "
                f"points of top-1 ({means[0]:.1f} to {means[1]:.1f}), 95 % {low:+.1f} to {high:+.1f}, "
                f"{len(seeds)} seeds{shown}."
            )
    return told


def _plain(content: Content) -> dict[str, dict[int, float]]:
    """Top-1 by backbone and seed of finished trainings of the plain model that nothing was searched for."""
    found: dict[str, dict[int, float]] = {}
    longest = content["rungs"][-1] if content["rungs"] else 0
    for trial in content["trials"]:
        if trial["arm"] != "baseline" or trial["values"] or trial["result"] is None:
            continue
        if trial["epochs"] == longest and "top1" in trial["result"]["last"]:
            score = run_folder.headline(trial["result"]["last"])
            found.setdefault(trial["backbone"], {})[trial["seed"]] = score
    return found


def _name(content: Content) -> str:
    return os.path.basename(str(content["sweep"]).rstrip("/"))
