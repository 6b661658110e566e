"""Evidence: does text pay? Baseline, aligned, and a control in which texts say nothing of their class, paired
over seeds.

Run `python benchmarks/evidence.py [--full] [--work DIR] [--images DIR --captions FILE.jsonl]`. The default,
ten minutes on two cores: the scenes' kinds, three seeds. With --full also the scenes' relations, a second
backbone and five seeds (hours). Everything is kept in --work: the same command goes on where it stopped. The
control deals the captions of a class to another class, each to its own, so that the texts keep their geometry
and lose their meaning. What was tuned, and on which pictures, is in docs/evidence.md.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
Row = dict[str, Any]


def main() -> int:
    """Prints a table and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="all sets, two backbones, five seeds")
    parser.add_argument(
        "--work", default="runs/evidence", help="folder of stores and sweeps (default runs/evidence)"
    )
    parser.add_argument("--images", default="", help="an image folder with splits train and val or test, too")
    parser.add_argument("--captions", default="", help="its captions, as import-captions takes them")
    parser.add_argument("--no-scenes", action="store_true", help="leave the scenes out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="default 1 2 3, with --full 1 to 5")
    parser.add_argument("--backbones", nargs="+", default=[], help="timm models (default test_resnet)")
    parser.add_argument("--weight", type=float, default=0.5, help="alignment weight (default 0.5)")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of tune, last")
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/evidence.md")
    options = parser.parse_args()
    options.seeds = options.seeds or ([1, 2, 3, 4, 5] if options.full else [1, 2, 3])
    options.backbones = options.backbones or ["test_resnet", *(["test_vit"] if options.full else [])]
    rows: list[Row] = []
    for name, make, recipe in sets(options):
        place = Path(options.work).resolve() / name
        rows += compare(name, make(place), place, recipe, options)
        print("\n".join(table(rows, options)), file=sys.stderr)
    gains = [row for row in rows if row["texts"] == "own"]
    record.publish(
        "evidence",
        "Evidence: aligned against baseline, paired over seeds",
        "python benchmarks/evidence.py" + " --full" * options.full,
        table(rows, options),
        ("torch", "timm", "ray"),
        save=options.save,
        value=sum(row["verdict"] == "a gain" for row in gains),
        unit=f"of {len(gains)} comparisons show a gain",
        goal=None,
        holds=all(row["verdict"] != "a loss" for row in gains),
        rows=rows,
    )
    return 0


def table(rows: list[Row], options: argparse.Namespace) -> list[str]:
    """What is there so far."""
    lines = [
        f"{'set':18}{'backbone':14}{'texts':14}{'baseline':>9}{'aligned':>9}{'difference':>11}  95 % interval"
    ]
    for row in rows:
        interval = f"[{row['low']:+.2f}, {row['high']:+.2f}]"
        lines.append(
            f"{row['set']:18}{row['backbone']:14}{row['texts']:14}{row['baseline']:>9.2f}{row['aligned']:>9.2f}"
            f"{row['mean']:>+11.2f}  {interval:18}{row['verdict']}"
        )
    seeds = " ".join(map(str, options.seeds))
    return [*lines, f"top-1 of the last epoch in percent, weight {options.weight:g}, seeds {seeds}"]


def sets(options: argparse.Namespace) -> list[tuple[str, Callable[[Path], str], list[str]]]:
    """(name, maker of a store, recipe)."""
    found: list[tuple[str, Callable[[Path], str], list[str]]] = []
    if not options.no_scenes:
        tasks = ("kinds", "relations") if options.full else ("kinds",)
        found += [(f"scenes-{task}", lambda place, t=task: scenes(place, t), SCENES) for task in tasks]
    if options.images:
        found.append((Path(options.images).name, lambda place: given(place, options), PHOTOGRAPHS))
    return found


SCENES = ["--preset", "scenes"]
PHOTOGRAPHS = ["--preset", "small-32"]
PER_CLASS = {"kinds": 16, "relations": 37}  # some 450 pictures to train on


def scenes(place: Path, task: str) -> str:
    """Scenes drawn anew, described by the shipped captioner."""
    images, store = str(place / "images"), str(place / "store")
    if not Path(images, "truth.jsonl").exists():
        script = str(ROOT / "examples" / "scenes" / "render.py")
        counts = ["--train-per-class", str(PER_CLASS[task]), "--val-per-class", "40"]
        command = [sys.executable, script, "--to", images, "--task", task, *counts]
        subprocess.run(command, check=True, stdout=sys.stderr)
    verb("describe", "--images", images, "--store", store, "--caption-preset", "scenes")
    return store


def given(place: Path, options: argparse.Namespace) -> str:
    """Other images, with the captions brought along."""
    store = str(place / "store")
    verb("ingest", "--images", options.images, "--store", store)
    verb("import-captions", options.captions, "--store", store, "--max-failure-rate", "1")
    verb("embed", "--store", store, "--max-failure-rate", "1")
    return store


def dealt(store: str, place: Path) -> tuple[str, str]:
    """(the embeddings of the pictures' own captions, those of captions that are dealt to other classes)."""
    from pipeline.store import Store

    opened = Store(store)
    noted = place / "own.txt"  # before there are others
    if not noted.exists():
        noted.write_text(opened.only_variant("embeddings"))
    own = noted.read_text()
    captions = str(opened.variant("embeddings", own)["captions"])
    by_class: dict[int, list[tuple[str, str]]] = {}
    for shard in opened.split_shards("train"):
        pictures = opened.read_shard("images", "", shard, ["id", "label"]).to_pylist()
        texts = opened.read_shard("captions", captions, shard, ["caption"])["caption"].to_pylist()
        for picture, text in zip(pictures, texts, strict=True):
            if text is not None:
                by_class.setdefault(picture["label"], []).append((picture["id"], text))
    classes = sorted(by_class)
    random.Random(0).shuffle(classes)
    lines = []
    for giver, taker in zip(classes, [*classes[1:], classes[0]], strict=True):
        texts = [text for _, text in by_class[giver]]
        pairs = enumerate(by_class[taker])
        lines += [{"path": key, "caption": texts[number % len(texts)]} for number, (key, _) in pairs]
    file = place / "dealt.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    verb("import-captions", str(file), "--store", store, "--max-failure-rate", "1")
    new = next(name for name in opened.variants("captions") if name != captions)
    verb("embed", "--store", store, "--captions", new, "--max-failure-rate", "1")
    return own, next(name for name in opened.variants("embeddings") if name != own)


def compare(name: str, store: str, place: Path, recipe: list[str], options: argparse.Namespace) -> list[Row]:
    """Baseline and aligned over all seeds and backbones, then the control against the same baselines."""
    from pipeline.store import Store
    from tuning.significance import paired

    own, other = dealt(store, place)
    split = "val" if "val" in Store(store).dataset.splits else "test"
    common = ["--store", store, *recipe, "--eval-split", split, "--projection-dims", "0", "--concurrent", "2"]
    common += ["--backbones", *options.backbones, "--seeds", *map(str, options.seeds)]
    common += ["--workers", "1", "--no-export", "--tracking-uri", "none", *options.flags]
    trials: dict[str, list[Row]] = {}
    for texts, embeddings, weights in (("own", own, ("0", str(options.weight))), ("dealt", other, None)):
        sweep = place / f"sweep-{texts}"
        grid = ["--alignment-weights", *(weights or (str(options.weight),)), "--sweep", str(sweep)]
        verb("tune", *common, *grid, "--embeddings", embeddings)
        trials[texts] = [
            trial for trial in json.loads((sweep / "sweep.json").read_text())["trials"] if trial["result"]
        ]
    baselines = [trial for trial in trials["own"] if trial["config"]["alignment_weight"] == 0]
    return [
        {
            "set": name,
            "backbone": pair.cell.backbone,
            "texts": {"own": "own", "dealt": "other class's"}[texts],
            "baseline": sum(pair.baseline) / len(pair.baseline),
            "aligned": sum(pair.method) / len(pair.method),
            "mean": round(pair.mean, 3),
            "low": round(pair.low, 3),
            "high": round(pair.high, 3),
            "verdict": pair.verdict,
            "seeds": pair.seeds,
        }
        for texts in trials
        for pair in paired(trials[texts] if texts == "own" else baselines + trials[texts])
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
