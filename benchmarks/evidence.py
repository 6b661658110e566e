"""Evidence: does text pay, and is it the text that pays? Baseline, aligned, and controls whose class vectors
mean nothing, paired over seeds.

Run `python benchmarks/evidence.py [--full] [--work DIR]`. The default, ten minutes on two cores: the demo's
task, five seeds (plans/scenes.toml). With --full also a second backbone, a task that texts do not help with,
other targets, heads and captions, a rival, wrong labels and a long tail, five seeds (plans/full.toml, an
hour). Scenes are drawn and described by the shipped captioner, other pictures than the demo's. Everything is
kept in --work: the same command goes on where it stopped. What was tuned, and on which pictures, is in
docs/evidence.md.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import ablation
import numpy as np
import pyarrow as pa
import record

from pipeline.store import Store

ROOT = ablation.ROOT
SEED = 8  # of the pictures; the demo's have seed 0, those of the search 7
VAL_PER_CLASS = 30


def main() -> int:
    """Prints a table and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ablation.add_flags(parser)
    parser.add_argument("--full", action="store_true", help="every question of plans/full.toml")
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
    """Draws and describes the scenes of a set, and takes what is for that alone out of its settings.

    `describe`: further flags of that verb. `tail`: how many times as many pictures the first class has as the
    last, falling evenly on a logarithmic scale. `noise`: share of the training labels that are wrong.
    """
    from cluster import cli

    task, per_class = settings.pop("task"), settings.pop("train_per_class")
    flags, tail, noise = (
        settings.pop(name, none) for name, none in (("describe", []), ("tail", 1), ("noise", 0))
    )
    settings["store"] += f"-{per_class}-s{SEED}"  # others have another folder, and other rows
    images, store = work / f"{settings['store']}-images", work / settings["store"]
    if not (images / "drawn").exists():
        shutil.rmtree(images, ignore_errors=True)
        command = [sys.executable, str(ROOT / "examples" / "scenes" / "render.py"), "--to", str(images)]
        command += ["--task", task, "--seed", str(SEED), "--train-per-class", str(per_class)]
        subprocess.run([*command, "--val-per-class", str(VAL_PER_CLASS)], check=True, stdout=sys.stderr)
        classes = sorted((images / "train").iterdir())
        for place, folder in enumerate(classes):
            kept = round(per_class * tail ** (-place / (len(classes) - 1)))
            for picture in sorted(folder.iterdir())[kept:]:
                picture.unlink()
        (images / "drawn").touch()
    describe = ["describe", "--images", str(images), "--store", str(store), "--caption-preset", "scenes"]
    assert cli.main([*describe, *flags]) == 0
    if noise and not (store / "mislabelled").exists():
        mislabel(Store(str(store)), noise)
        (store / "mislabelled").touch()


def mislabel(store: Store, share: float) -> None:
    """Gives a share of the training pictures another class, any other as likely; its caption stays."""
    rng = np.random.default_rng(SEED)
    count = len(store.dataset.classes)
    for shard in store.split_shards("train"):
        table = store.read_shard("images", "", shard)
        labels = table["label"].to_numpy()
        others = (labels + rng.integers(1, count, len(labels))) % count
        wrong = np.where(rng.random(len(labels)) < share, others, labels)
        place = table.schema.get_field_index("label")
        table = table.set_column(place, table.schema.field(place), pa.array(wrong, pa.int32()))
        store.write_shard("images", "", shard, table, seconds=0)


if __name__ == "__main__":
    start = time.monotonic()
    code = main()
    print(f"{time.monotonic() - start:.0f} s in all", file=sys.stderr)
    raise SystemExit(code)
