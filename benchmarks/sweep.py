"""Sweeps: does ASHA, whose rungs compare blocks of equal seeds, find what the whole grid finds, and at what
share of its cost?

Run `python benchmarks/sweep.py [--work DIR] [--save]`; about fifteen minutes on two cores. Both sweeps are
the product's own (`gpt4image tune`) over the same space on drawn scenes, described by the shipped captioner:
learning rate for the baseline, learning rate x weight for the method, two seeds each. Training is
deterministic, so that the grid's table says what ASHA's choice is worth after a whole training: the regret.
The goal: the grid's best, or one within its seed noise (the standard error of their paired difference), at
no more than 0.4 of its epochs. Seconds are told, too: where a training takes half a minute, starting its
processes takes as long as the first rungs. Everything is kept in --work: the same command goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import record as published  # noqa: E402

from tuning import record  # noqa: E402

GOAL = 0.4
SEED = 9  # of the pictures: neither the demo's, nor those of the search or of the evidence
SPACE = ["--alignment-weights", "0", "0.25", "0.5", "--projection-dims", "0", "--seeds", "1", "2"]
SPACE += ["--axis", "lr=3e-3,1e-2,3e-2", "--fresh-seeds", "0", "--no-export", "--tracking-uri", "none"]
SIDE_BY_SIDE = ["--concurrent", "2", "--threads", "1"]


def main() -> int:
    """Prints a table and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", default="runs/sweep-benchmark", help="folder of pictures, store and sweeps")
    parser.add_argument("--epochs", type=int, default=0, help="of a training; 0: the recipe's")
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/sweep.md")
    options = parser.parse_args()
    work = Path(options.work).resolve()
    store = described(work)
    length = ["--epochs", str(options.epochs)] if options.epochs else []
    grid = swept(store, work / "grid", *length)
    asha = swept(store, work / "asha", "--scheduler", "asha", *length)
    rows = [compared(arm, grid, asha) for arm in ("baseline", "method")]
    spent = {name: (total(asha, name), total(grid, name)) for name in ("epochs", "seconds")}
    cost = {name: mine / whole for name, (mine, whole) in spent.items()}
    lines = [f"{'':10} {'grid chooses':28} {'ASHA chooses':28} {'regret':>7} {'noise':>6}"]
    lines += [
        f"{row['arm']:10} {row['grid']:28} {row['asha']:28} {row['regret']:7.2f} {row['noise']:6.2f}"
        for row in rows
    ]
    lines += [
        f"ASHA's share of the grid's cost: epochs {cost['epochs']:.2f}, seconds of trials with their starts "
        f"{cost['seconds']:.2f} ({spent['seconds'][0]:.0f} of {spent['seconds'][1]:.0f} s)"
    ]
    found = all(row["regret"] <= row["noise"] for row in rows)
    published.publish(
        "sweep",
        "Sweeps: ASHA over blocks of seeds against the grid",
        "python benchmarks/sweep.py",
        lines,
        ("ray", "torch"),
        save=options.save,
        value=round(cost["epochs"], 3),
        unit="of the grid's epochs",
        seconds=round(cost["seconds"], 3),
        goal=GOAL,
        holds=found and cost["epochs"] <= GOAL,
        rows=rows,
    )
    return 0


def described(work: Path) -> Path:
    """The store of drawn scenes, made where it is not there yet."""
    from cluster import cli

    images, store = work / "images", work / "store"
    if not (images / "truth.jsonl").exists():
        command = [sys.executable, str(ROOT / "examples" / "scenes" / "render.py"), "--to", str(images)]
        command += ["--task", "kinds", "--seed", str(SEED), "--train-per-class", "7", "--val-per-class", "20"]
        subprocess.run(command, check=True, stdout=sys.stderr)
    describe = ["describe", "--images", str(images), "--store", str(store), "--caption-preset", "scenes"]
    assert cli.main(describe) == 0
    return store


def swept(store: Path, sweep: Path, *flags: str) -> record.Content:
    """A sweep of a process of its own, so that each pays its start."""
    places = ["--store", str(store), "--sweep", str(sweep), "--preset", "scenes"]
    command = [sys.executable, "-m", "tuning", "tune", *places, *SPACE, *SIDE_BY_SIDE, *flags]
    subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr)
    return record.read(str(sweep))


def compared(arm: str, grid: record.Content, asha: record.Content) -> dict[str, Any]:
    """What both choose of an arm, and what ASHA's choice is worth less, by the grid's whole trainings."""
    whole: dict[tuple[Any, ...], dict[int, float]] = {}
    for trial in grid["trials"]:
        if trial["arm"] == arm:
            scores = whole.setdefault(tuple(trial["values"].items()), {})
            scores[trial["seed"]] = trial["result"]["last"]["top1"]
    means = {values: statistics.fmean(scores.values()) for values, scores in whole.items()}
    best = max(means, key=means.__getitem__)
    last = asha["rungs"][-1]
    found: dict[tuple[Any, ...], list[float]] = {}
    for trial in asha["trials"]:
        if trial["arm"] == arm and trial["epochs"] == last:
            found.setdefault(tuple(trial["values"].items()), []).append(trial["history"][-1]["top1"])
    chosen = max(found, key=lambda values: statistics.fmean(found[values]))
    differences = [whole[best][seed] - whole[chosen][seed] for seed in whole[best]]
    noise = statistics.stdev(whole[best].values()) / len(differences) ** 0.5
    if chosen != best:
        noise = statistics.stdev(differences) / len(differences) ** 0.5
    return {
        "arm": arm,
        "grid": words(best, means[best]),
        "asha": words(chosen, means[chosen]),
        "regret": round(means[best] - means[chosen], 3),
        "noise": round(noise, 3),
    }


def words(values: tuple[Any, ...], mean: float) -> str:
    """Such as "lr 0.01, weight 0.5: 91.2"."""
    short = {"alignment_weight": "weight", "projection_dim": ""}
    told = [f"{short.get(name, name)} {value:g}" for name, value in values if short.get(name, name)]
    return f"{', '.join(told)}: {mean:.1f}"


def total(sweep: record.Content, name: str) -> float:
    """Epochs or seconds of all its trials."""
    return float(sum(trial[name] for trial in sweep["trials"]))


if __name__ == "__main__":
    raise SystemExit(main())
