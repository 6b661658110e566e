"""Evidence: does text pay, and is it the text that pays? Baseline, aligned, and controls whose class vectors
mean nothing, paired over seeds.

Run `python benchmarks/evidence.py [--full] [--work DIR]`. The default, ten minutes on two cores: the demo's
task, five seeds (plans/scenes.toml). With --full also a second backbone, a task that texts do not help with,
other targets and a rival, five seeds (plans/full.toml, three hours). Scenes are drawn and described by the
shipped captioner, other pictures than the demo's. Everything is kept in --work: the same command goes on
where it stopped. What was tuned, and on which pictures, is in docs/evidence.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import ablation
import record

ROOT = ablation.ROOT
SEED = 8  # of the pictures; the demo's have seed 0, those of the search 7
VAL_PER_CLASS = 30


def main() -> int:
    """Prints a table and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ablation.add_flags(parser)
    parser.add_argument("--full", action="store_true", help="two tasks, two backbones, five seeds")
    parser.add_argument(
        "--work", default="runs/evidence", help="folder of stores and rows (default runs/evidence)"
    )
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/evidence.md")
    options = parser.parse_args()
    work = Path(options.work).resolve()
    name = "full" if options.full else "scenes"
    plan = tomllib.loads((ROOT / "benchmarks" / "plans" / f"{name}.toml").read_text())
    for given in plan["sets"].values():
        draw(given, work)
    options.stores = str(work)
    rows, missing = ablation.work(plan, work / "rows.jsonl", options)
    comparisons = ablation.comparisons(plan, rows, options)
    means = [each for each in comparisons if each["arm"] == "class means" and each["set"] == "scenes"]
    record.publish(
        "evidence",
        "Evidence: aligned against baseline, paired over seeds",
        "python benchmarks/evidence.py" + " --full" * options.full,
        ablation.tables(comparisons),
        ("torch", "timm"),
        save=options.save,
        value=round(means[0]["gain"], 2) if means and "gain" in means[0] else None,
        unit="points of top-1, class means against baseline, scenes",
        goal=0,
        holds=bool(means) and (means[0].get("low") or 0) > 0,
        rows=comparisons,
    )
    return int(missing > 0)


def draw(settings: dict[str, Any], work: Path) -> None:
    """Draws and describes the scenes of a set, and takes what is for that alone out of its settings."""
    from cluster import cli

    task, per_class = settings.pop("task"), settings.pop("train_per_class")
    settings["store"] += f"-{per_class}-s{SEED}"  # others have another folder, and other rows
    images, store = work / f"{settings['store']}-images", work / settings["store"]
    if not (images / "truth.jsonl").exists():
        command = [sys.executable, str(ROOT / "examples" / "scenes" / "render.py"), "--to", str(images)]
        command += ["--task", task, "--seed", str(SEED), "--train-per-class", str(per_class)]
        subprocess.run([*command, "--val-per-class", str(VAL_PER_CLASS)], check=True, stdout=sys.stderr)
    describe = ["describe", "--images", str(images), "--store", str(store), "--caption-preset", "scenes"]
    assert cli.main(describe) == 0


if __name__ == "__main__":
    start = time.monotonic()
    code = main()
    print(f"{time.monotonic() - start:.0f} s in all", file=sys.stderr)
    raise SystemExit(code)
