"""Draw labelled scenes as an ordinary image folder, with the true caption of every picture beside it.

Run `python examples/scenes/render.py --to /tmp/scenes`; it writes train/, val/ and truth.jsonl below that
folder. A core draws some 300 pictures a second at about 3 kB each, so the default 2,520 pictures take some
ten seconds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the sibling modules, however this file is loaded

from draw import write_picture
from scene import TASKS, Scene, attributes_of, caption_of

Job = tuple[int, str, str, int, str]


def jobs_for(root: Path, classes: Sequence[str], counts: dict[str, int], seed: int) -> list[Job]:
    """Every picture to draw; also makes the class folders."""
    for split in counts:
        for label in classes:
            (root / split / label).mkdir(parents=True, exist_ok=True)
    return [
        (seed, split, label, index, str(root))
        for split, count in counts.items()
        for label in classes
        for index in range(count)
    ]


def drawn(jobs: Sequence[Job], workers: int) -> Iterator[tuple[str, Scene]]:
    """The jobs' results in order, drawn here or in worker processes."""
    if workers < 1:
        yield from map(write_picture, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(write_picture, jobs, chunksize=32)


def write_truth(results: Iterable[tuple[str, Scene]], path: Path) -> int:
    """One JSON line an image; returns how many."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for name, scene in results:
            line = {"path": name, "caption": caption_of(scene), "attributes": attributes_of(scene)}
            file.write(json.dumps(line) + "\n")
            count += 1
    return count


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    result.add_argument("--to", type=Path, required=True, help="folder to write; made if missing")
    result.add_argument(
        "--task",
        choices=tuple(TASKS),
        default="kinds",
        help="what a class is: the colour and shape of what lies inside another object (28), or what the two "
        "main objects share and how they are arranged (12)",
    )
    result.add_argument("--train-per-class", type=int, default=50, help="pictures of each class in train/")
    result.add_argument("--val-per-class", type=int, default=40, help="pictures of each class in val/")
    result.add_argument(
        "--seed", type=int, default=0, help="another seed, another data set; same seed, same bytes"
    )
    result.add_argument("--workers", type=int, default=0, help="processes to draw in; 0 draws in this one")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Draw what the command line asks for."""
    options = parser().parse_args(argv)
    started = time.perf_counter()
    counts = {"train": options.train_per_class, "val": options.val_per_class}
    classes = TASKS[options.task]
    jobs = jobs_for(options.to, classes, counts, options.seed)
    count = write_truth(drawn(jobs, options.workers), options.to / "truth.jsonl")
    seconds = time.perf_counter() - started
    print(f"{count} pictures of {len(classes)} classes in {options.to} ({count / seconds:.0f} a second)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
