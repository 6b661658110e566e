"""How far a sweep is: its state and cost, how it searches, what went wrong, and how its winner is trained."""

from __future__ import annotations

import shlex
from collections import Counter
from typing import Any

from tuning.report.configurations import Content

ORDER = ("complete", "stopped", "running", "waiting", "diverged", "failed")
"""Statuses of trials, as tables have them."""
_ENDED = ("complete", "stopped", "diverged", "failed")


def ended(content: Content) -> int:
    """Trainings that are over for now, whatever their end."""
    return sum(trial["status"] in _ENDED for trial in content["trials"])


def state(content: Content) -> str:
    """How far the sweep is, what it took, and its budget."""
    counts = Counter(trial["status"] for trial in content["trials"])
    words = {"complete": "whole", "stopped": "stopped early", "waiting": "to come"}
    if content["state"] == "running":
        words["stopped"] = "stopped early or to be compared first"
    parts = ", ".join(f"{counts[name]} {words.get(name, name)}" for name in ORDER if counts[name])
    begin = {
        "budget spent": "The budget is spent",
        "too many failures": "Ended because too many trainings failed",
        "interrupted": "Interrupted (the same command goes on)",
    }.get(content["state"], content["state"].capitalize())
    budget = _budget(content["budget"])
    took = f", {clock(content['seconds'])}" if content["seconds"] else ""
    took += f" of a budget of {budget}" if budget else ""
    counted = f"{ended(content)} of {planned(content)} trainings ended"
    return f"{begin}: {counted}{f' ({parts})' if parts else ''}{took}."


def planned(content: Content) -> int:
    """Trainings in all, those to come among them, as far as that is known."""
    return max(len(content["trials"]), int(content.get("planned", 0)))


def _budget(budget: dict[str, Any]) -> str:
    told = [f"{budget['trials']} configurations an arm"] if budget.get("trials") else []
    told += [f"{budget['hours']:g} hours"] if budget.get("hours") else []
    return ", ".join(told + ([f"{budget['gpu_hours']:g} GPU hours"] if budget.get("gpu_hours") else []))


def plan(content: Content) -> str:
    """How was searched: what, by which means, on which seeds."""
    axes = "; ".join(f"{name} {values}" for name, values in content["axes"].items())
    kind = "TPE" if content["search"] == "tpe" else content["search"]
    told = [f"{kind} search" + (f" over {axes}" if axes else "")]
    if content["scheduler"] != "none":
        rungs = ", ".join(map(str, content["rungs"]))
        told.append(f"{content['scheduler'].upper()}: the worse end after epochs {rungs}")
    told.append(f"seeds {', '.join(map(str, content['seeds']))}")
    if content["fresh_seeds"]:
        told.append(f"final comparison on fresh seeds {', '.join(map(str, content['fresh_seeds']))}")
    return f"{'. '.join(part[0].upper() + part[1:] for part in told)}."


def provenance(content: Content) -> str:
    """Of which code and which texts."""
    told = [f"commit {content['commit'][:12]}"] if content["commit"] else []
    told += [f"{name} {variant}" for name, variant in content["variants"].items() if variant]
    return ", ".join(told)


def trouble(content: Content) -> list[str]:
    """A line a training that diverged or failed, and why."""
    return [
        f"{trial['name']} {trial['status']}: {trial['failure'] or 'no reason on record'}"
        for trial in content["trials"]
        if trial["status"] in ("diverged", "failed")
    ]


def winner(content: Content) -> str:
    """The command that trains the best configuration; empty while there is none."""
    if not content["best"]:
        return ""
    return f"gpt4image train --config {shlex.quote(content['sweep'] + '/best.json')} --run runs/winner"


def clock(seconds: float) -> str:
    """Such as 41 s, 3 min 20 s, 1 h 12 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if 0 < seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def winner_is(content: Content) -> str:
    """What best.json is of: the best of the whole search, which may be the plain model."""
    number = content["best"].get("configuration")
    trial = next((each for each in content["trials"] if each["configuration"] == number), None)
    if trial is None:
        return ""
    kind = "the plain model" if trial["arm"] == "baseline" else "a setting of the method"
    return f"the best of the search is {kind}, {trial['name'].rpartition('-')[0]}"
