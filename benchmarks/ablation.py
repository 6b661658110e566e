"""Ablations: many short trainings of one plan, several at a time, paired over seeds.

Run `python benchmarks/ablation.py PLAN.toml --to TABLE.jsonl [--processes N] [--minutes M]`. A plan names
sets (stores), backbones and arms, each as settings of `gpt4image train` by their names; see benchmarks/plans.
Each training is the product's own loop (`training.engine.loop.fit`) in a process of its own, without Ray:
what is measured is the method. A row is written as soon as it is there and is not computed again; tables are
printed at the end.

A stage with `choose = true` is a search: of its arms the one with the highest mean becomes, for its set and
backbone, the recipe of the stages after it. So the baseline is tuned before anything is compared with it. A
set with `searched_on = OTHER` takes the recipe found on that one and is never searched on itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
Settings = dict[str, Any]
Row = dict[str, Any]
MEASURED = ("top1", "train_top1", "steps", "seconds")
OF_THE_PLAN = ("backbones", "searched_on")  # what a set says that is no setting of a training


@dataclasses.dataclass(frozen=True)
class Job:
    """One training; `settings` hold those of the set, the backbone and the arm."""

    stage: str
    set: str
    backbone: str
    arm: str
    seed: int
    settings: Settings

    @property
    def key(self) -> str:
        """What a row is known by: another value of any setting, the recipe's too, is another row."""
        from training.presets import preset

        recipe = preset(self.settings.get("preset", "small-64"))
        return json.dumps([self.set, recipe | self.settings, self.seed], sort_keys=True)


def main() -> int:
    """Works the plan off and prints its tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", help="a TOML file")
    parser.add_argument("--to", required=True, help="table of JSON lines; goes on where it stopped")
    parser.add_argument("--stores", default=".", help="folder that the plan's stores lie in")
    add_flags(parser)
    options = parser.parse_args()
    plan = tomllib.loads(Path(options.plan).read_text())
    rows, missing = work(plan, Path(options.to), options)
    print("\n".join(tables(comparisons(plan, rows, options))))
    return int(missing > 0)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Of any script that works a plan off."""
    parser.add_argument("--set", nargs="*", default=[], help="only these sets")
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count() or 1,
        help="trainings at a time (default: a core each)",
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no training after this time")


def work(plan: Settings, table: Path, options: argparse.Namespace) -> tuple[dict[str, Row], int]:
    """Every training that has no row yet, as soon as the searches that it waits for are done; all rows by
    their keys, and how many are missing: those that failed, and those that there was no time for."""
    rows: dict[str, Row] = {}
    if table.exists():
        whole = table.read_text().rpartition("\n")[0]  # a kill may have cut the last line
        rows = {row["key"]: row for row in map(json.loads, whole.splitlines())}
        table.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    begun = time.monotonic()
    running: dict[Future[Row], Job] = {}
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // options.processes)
    with ProcessPoolExecutor(options.processes, context, prepare, (threads,)) as pool:
        failed: set[str] = set()
        while True:
            if (time.monotonic() - begun) / 60 < options.minutes:
                known = rows.keys() | failed | {job.key for job in running.values()}
                free = options.processes - len(running)
                waiting = (job for job in ready(plan, rows, options) if job.key not in known)
                for job in itertools.islice(waiting, free):
                    running[pool.submit(train, job, options.stores)] = job
            if not running:
                missing = sum(job.key not in rows for job in ready(plan, rows, options))
                if missing:
                    print(f"{missing} trainings have no row; the same command goes on", file=sys.stderr)
                return rows, missing
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                job = running.pop(future)
                if (row := outcome(job, future)) is None:
                    failed.add(job.key)
                    continue
                rows[job.key] = row
                with table.open("a") as lines:
                    lines.write(json.dumps(row) + "\n")
                told = f"{row['top1']:6.2f}  train {row['train_top1']:6.2f}  {row['seconds']:5.0f} s"
                name = f"{job.set:14}{job.backbone:14}{job.arm:26}{job.seed:>3}"
                print(name + told, file=sys.stderr, flush=True)


def outcome(job: Job, future: Future[Row]) -> Row | None:
    """The row of a training, or None, said on stderr, where it failed."""
    try:
        found = future.result()
    except Exception as error:
        print(f"{job.set} {job.backbone} {job.arm} {job.seed}: {error}", file=sys.stderr, flush=True)
        return None
    return {
        "key": job.key,
        **{name: getattr(job, name) for name in ("stage", "set", "backbone", "arm", "seed")},
        **found,
    }


def ready(plan: Settings, rows: dict[str, Row], options: argparse.Namespace) -> Iterator[Job]:
    """All trainings whose recipe is settled, seed after seed, so that a cut table compares like with like."""
    chosen: dict[tuple[str, str], Settings] = {}
    waiting: set[tuple[str, str]] = set()
    for stage in plan["stages"]:
        jobs = [
            job
            for job in of_stage(plan, stage, chosen, options)
            if (searched_on(plan, job.set), job.backbone) not in waiting
        ]
        yield from jobs
        if stage.get("choose"):
            for place in dict.fromkeys((job.set, job.backbone) for job in jobs):
                mine = [job for job in jobs if (job.set, job.backbone) == place]
                if all(job.key in rows for job in mine):
                    chosen[place] = chosen.get(place, {}) | stage["arms"][best(mine, rows)]
                else:
                    waiting.add(place)


def searched_on(plan: Settings, name: str) -> str:
    """The set whose searches give a set its recipe: itself, unless it names another."""
    return str(plan["sets"][name].get("searched_on", name))


def of_backbone(plan: Settings, name: str, backbone: str) -> Settings:
    """What a set says of one backbone, where its `backbones` are a table and no list of names."""
    own = plan["sets"][name].get("backbones", {})
    return dict(own.get(backbone, {})) if isinstance(own, dict) else {}


def best(jobs: list[Job], rows: dict[str, Row]) -> str:
    """The arm with the highest mean top-1."""
    scores: dict[str, list[float]] = {}
    for job in jobs:
        scores.setdefault(job.arm, []).append(rows[job.key]["top1"])
    return max(scores, key=lambda arm: statistics.fmean(scores[arm]))


def of_stage(
    plan: Settings,
    stage: Settings,
    chosen: dict[tuple[str, str], Settings],
    options: argparse.Namespace,
) -> Iterator[Job]:
    """The trainings of a stage with the recipes as chosen so far."""
    sets = [name for name in stage.get("sets", plan["sets"]) if not options.set or name in options.set]
    places = [
        (name, backbone)
        for name, backbone in itertools.product(sets, stage.get("backbones", plan["backbones"]))
        if backbone in plan["sets"][name].get("backbones", plan["backbones"])
    ]
    for seed, (name, backbone), (arm, settings) in itertools.product(
        stage["seeds"], places, stage["arms"].items()
    ):
        settled = {
            **plan.get("common", {}),
            **plan["backbones"][backbone],
            **{key: value for key, value in plan["sets"][name].items() if key not in OF_THE_PLAN},
            **of_backbone(plan, name, backbone),
            **chosen.get((searched_on(plan, name), backbone), {}),
            **settings,
        }
        yield Job(stage["name"], name, backbone, arm, seed, settled)


def prepare(threads: int) -> None:
    """A worker's share of the cores; it is killed with its parent's interrupt, without a word."""
    import signal

    import torch

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(threads)


def train(job: Job, stores: str) -> Row:
    """Trains here and gives what the last epoch found."""
    import torch

    from training.config import TrainConfig
    from training.engine import loop
    from training.presets import preset
    from training.run_folder import headline

    settings = dict(job.settings)
    control = settings.pop("control", "")
    store = str(Path(stores) / settings.pop("store"))
    base = preset(settings.pop("preset", "small-64"))
    config = TrainConfig.of(**base | settings | {"store": store, "seed": job.seed, "workers": 1})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.place.threads:  # their number changes rounding, and with it what a short training finds
        torch.set_num_threads(config.place.threads)
    begun = time.monotonic()
    with replaced(control, job.seed):
        history = loop.fit(config, device, 0, None, lambda metrics, take: None)
    last = history[-1]
    return {
        "top1": headline(last),
        "train_top1": last["train_top1"],
        "loss": last["loss"],
        "steps": last["step"],
        "device": device.type,
        "seconds": round(time.monotonic() - begun, 1),
    }


def replaced(control: str, seed: int) -> Any:
    """Class means that mean nothing, drawn anew for each seed: `random` vectors of the same mean and spread
    in their place, or `permuted` so that no class has its own. Both keep the loss and the second head; the
    second keeps the texts' geometry, too, but not which class is like which. (A shift of all classes by the
    same number would keep that: where classes are pairs of attributes it takes like to like.)"""
    from contextlib import ExitStack, nullcontext
    from unittest.mock import patch

    import numpy as np

    from training.data.texts import classes as class_texts

    original = class_texts.means

    def means(*arguments: Any) -> Any:
        found = original(*arguments)
        rng = np.random.default_rng(seed)
        if control == "permuted":
            order = rng.permutation(len(found))
            while (order == np.arange(len(found))).any():
                order = rng.permutation(len(found))
            return found[order]
        centre = found.mean(0)
        drawn = rng.standard_normal(found.shape) * (found - centre).std() + centre
        return drawn.astype(np.float32)

    if not control:
        return nullcontext()
    controlled = ExitStack()
    controlled.enter_context(patch.object(class_texts, "means", means))
    # What is made of them is no matter of the store.
    controlled.enter_context(patch.object(class_texts, "kept", lambda store, name, split, what, fit: fit()))
    return controlled


def comparisons(plan: Settings, rows: dict[str, Row], options: argparse.Namespace) -> list[Row]:
    """For each stage, set, backbone and arm: means over seeds, and the difference to the first arm with the
    95 % Student interval of the mean over paired seeds."""
    from tuning.report.significance import student_interval

    found = []
    jobs = [job for job in ready(plan, rows, options) if job.key in rows]
    for place in dict.fromkeys((job.stage, job.set, job.backbone) for job in jobs):
        here = [job for job in jobs if (job.stage, job.set, job.backbone) == place]
        reference = next(iter(next(s for s in plan["stages"] if s["name"] == place[0])["arms"]))
        first = {job.seed: rows[job.key]["top1"] for job in here if job.arm == reference}
        for arm in dict.fromkeys(job.arm for job in here):
            mine = {job.seed: rows[job.key] for job in here if job.arm == arm}
            row = dict(zip(("stage", "set", "backbone"), place, strict=True)) | {"arm": arm}
            row |= {part: statistics.fmean(each[part] for each in mine.values()) for part in MEASURED}
            row["values"] = {seed: round(each["top1"], 2) for seed, each in mine.items()}
            paired = [each["top1"] - first[seed] for seed, each in mine.items() if seed in first]
            if len(paired) > 1 and arm != reference:
                row["gain"] = statistics.fmean(paired)
                row["low"], row["high"] = student_interval(paired)
            found.append(row)
    return found


def tables(found: list[Row]) -> list[str]:
    """A line an arm, below the name of its stage, set and backbone."""
    lines = []
    for place, rows in itertools.groupby(found, lambda row: (row["stage"], row["set"], row["backbone"])):
        lines.append(f"{place[0]}: {place[1]}, {place[2]}")
        for row in rows:
            line = f"  {row['arm']:26}{row['top1']:7.2f}  n={len(row['values'])}"
            line += f"  train {row['train_top1']:6.2f}"
            if "gain" in row:
                line += f"  {row['gain']:+6.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"
            lines.append(f"{line}  {row['steps']:.0f} steps, {row['seconds']:.0f} s")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
