"""Evidence: baseline against aligned training, paired over seeds, on drawn scenes and, where given, on other
labelled images.

Run `python benchmarks/evidence.py [--images DIR --captions FILE.jsonl]`. For two backbones, 50 and 100 images
a class, it trains with weight 0 and with the paper's 0.3 under three or more seeds, same recipe, and prints
the mean paired difference of the last epoch's top-1 with its 95 % interval, gain or not. Scenes are captioned
by the shipped model; other images bring their captions.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> int:
    """Prints a table and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", default="", help="an image folder with splits train and val or test, beside the scenes"
    )
    parser.add_argument("--captions", default="", help="its captions, as import-captions takes them")
    parser.add_argument("--size", type=int, default=32, help="edge of its input (default 32)")
    parser.add_argument("--no-scenes", action="store_true", help="leave the scenes out")
    parser.add_argument(
        "--per-class", type=int, nargs="+", default=[50, 100], help="training images a class (default 50 100)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3], help="three or more (default 1 2 3)"
    )
    parser.add_argument("--backbones", nargs="+", default=["test_resnet", "test_vit"], help="timm models")
    parser.add_argument(
        "--weight", type=float, default=0.3, help="alignment weight (default 0.3, the paper's)"
    )
    parser.add_argument(
        "--epochs", type=int, default=12, help="epochs at the largest set; fewer images get as many steps"
    )
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of tune, last")
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/evidence.md")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, make, recipe in sets(options):
            for count in options.per_class:
                place = Path(folder) / f"{name}-{count}"
                store = make(place, count)
                rows += compare(name, count, store, place, recipe, options)
    head = (
        f"{'set':10}{'a class':>8} {'backbone':14}{'baseline':>9}{'aligned':>9}{'difference':>11}  "
        f"{'95 % interval':20}"
    )
    table = [head + "  best epochs"]
    for row in rows:
        interval = f"[{row['low']:+.2f}, {row['high']:+.2f}]"
        table.append(
            f"{row['set']:10}{row['per_class']:>8} "
            f"{row['backbone']:14}{row['baseline']:>9.2f}{row['aligned']:>9.2f}{row['mean']:>+11.2f}  "
            f"{interval:20}  {row['best_mean']:+.2f}  {row['verdict']}"
        )
    table.append(
        f"top-1 of the last epoch in percent, weight {options.weight}, seeds "
        f"{' '.join(map(str, options.seeds))}"
    )
    gains = sum(row["verdict"] == "a gain" for row in rows)
    record.publish(
        "evidence",
        "Evidence: aligned against baseline, paired over seeds",
        "python benchmarks/evidence.py",
        table,
        ("torch", "timm", "ray"),
        save=options.save,
        value=gains,
        unit=f"of {len(rows)} comparisons show a gain",
        goal=None,
        holds=True,
        rows=rows,
    )
    return 0


def sets(options: argparse.Namespace) -> list[tuple[str, Any, list[str]]]:
    """(name, maker of a store for a number of images a class, recipe)."""
    found: list[tuple[str, Any, list[str]]] = []
    if not options.no_scenes:
        found.append(("scenes", scenes, ["--preset", "scenes"]))
    if options.images:
        recipe = ["--preset", "small-32", "--image-size", str(options.size), "--batch-size", "64"]
        name = Path(options.images).name
        found.append((name, lambda place, count: given(place, count, options), [*recipe, "--lr", "2e-3"]))
    return found


def scenes(place: Path, count: int) -> str:
    """Scenes drawn anew, described by the shipped captioner."""
    script = str(ROOT / "examples" / "scenes" / "render.py")
    counts = ["--train-per-class", str(count), "--val-per-class", "100"]
    subprocess.run(
        [sys.executable, script, "--to", str(place / "images"), *counts], check=True, stdout=sys.stderr
    )
    verb(
        "describe",
        "--images",
        str(place / "images"),
        "--store",
        str(place / "store"),
        "--caption-preset",
        "scenes",
    )
    return str(place / "store")


def given(place: Path, count: int, options: argparse.Namespace) -> str:
    """The first images of each class (by name) as links, with the captions brought along."""
    source = Path(options.images)
    for split in sorted(path for path in source.iterdir() if path.is_dir()):
        for group in sorted(path for path in split.iterdir() if path.is_dir()):
            target = place / "images" / split.name / group.name
            target.mkdir(parents=True)
            for picture in sorted(group.iterdir())[: count if split.name.startswith("train") else None]:
                (target / picture.name).symlink_to(picture.resolve())
    store = str(place / "store")
    verb("ingest", "--images", str(place / "images"), "--store", store)
    kept = [
        line
        for line in Path(options.captions).read_text().splitlines()
        if (place / "images" / json.loads(line)["path"]).exists()
    ]
    (place / "captions.jsonl").write_text("\n".join(kept) + "\n")
    verb("import-captions", str(place / "captions.jsonl"), "--store", store)
    verb("embed", "--store", store)
    return store


def compare(
    name: str, count: int, store: str, place: Path, recipe: list[str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One sweep of both weights over all seeds and backbones."""
    from pipeline.store import Store
    from tuning.significance import paired

    splits = Store(store).dataset.splits
    epochs = round(options.epochs * max(options.per_class) / count)
    verb(
        "tune",
        "--store",
        store,
        *recipe,
        "--sweep",
        str(place / "sweep"),
        "--alignment-weights",
        "0",
        str(options.weight),
        "--projection-dims",
        "0",
        "--backbones",
        *options.backbones,
        "--seeds",
        *map(str, options.seeds),
        "--epochs",
        str(epochs),
        "--workers",
        "1",
        "--concurrent",
        "2",
        "--eval-split",
        "val" if "val" in splits else "test",
        "--no-export",
        "--tracking-uri",
        "none",
        *options.flags,
    )
    trials = [
        trial
        for trial in json.loads((place / "sweep" / "sweep.json").read_text())["trials"]
        if trial["result"]
    ]
    best = {pair.cell.backbone: pair.mean for pair in paired(trials, which="best")}
    return [
        {
            "set": name,
            "per_class": count,
            "backbone": pair.cell.backbone,
            "baseline": sum(pair.baseline) / len(pair.baseline),
            "aligned": sum(pair.method) / len(pair.method),
            "mean": round(pair.mean, 3),
            "low": round(pair.low, 3),
            "high": round(pair.high, 3),
            "best_mean": round(best[pair.cell.backbone], 3),
            "verdict": pair.verdict,
            "seeds": pair.seeds,
            "epochs": epochs,
        }
        for pair in paired(trials)
    ]


def verb(*arguments: str) -> None:
    """A command of the product, in this process."""
    from cluster import cli

    assert cli.main(list(arguments)) == 0, arguments


if __name__ == "__main__":
    start = time.monotonic()
    code = main()
    print(f"{time.monotonic() - start:.0f} s in all", file=sys.stderr)
    raise SystemExit(code)
