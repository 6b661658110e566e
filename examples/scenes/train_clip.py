"""Train the shipped small CLIP from nothing on freshly drawn scenes and their true sentences, and write its
folder with what it can do.

Run `python examples/scenes/train_clip.py --to examples/scenes/clip`; `--help` explains the knobs. The defaults
take about half an hour and 2 GB of memory on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the sibling modules, however this file is loaded

from render import drawn, jobs_for
from scene import KINDS, RELATION_CLASSES, RELATIONS, Scene, Thing, caption_of

TRAIN_SEED, EXAM_SEED = 11, 12
"""Others than the demo's (0), the search's (7) and the evidence's (8): no picture of those is among these."""


def sentences_of(scene: Scene) -> list[str]:
    """True sentences of a scene, from all that is in it to one thing."""
    first, second = scene.first, scene.second
    relation = RELATIONS[scene.arrangement]
    found = [
        caption_of(scene),
        f"a {_plain(first)} {relation} a {_plain(second)}.",
        f"a {first.size} {first.texture} {_plain(first)} {relation} a {second.size} {_plain(second)}.",
    ]
    return [*found, f"a photo of a {_plain(first)}."] if scene.arrangement == "nested" else found


def _plain(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"


def draw(folder: Path, counts: dict[str, tuple[int, int]], seed: int, workers: int) -> None:
    """A folder of pictures and captions.jsonl: of each split so many of each kind and of each relation."""
    lines: list[str] = []
    for split, (kinds, relations) in counts.items():
        jobs = jobs_for(folder, KINDS, {split: kinds}, seed)
        jobs += jobs_for(folder, RELATION_CLASSES, {split: relations}, seed) if relations else []
        for name, scene in drawn(jobs, workers):
            captions = sentences_of(scene) if split == "train" else [caption_of(scene)]
            lines.append(json.dumps({"path": name, "captions": captions}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def gpt4image(package: str, *arguments: str) -> None:
    """A verb of the project, in a process of its own."""
    subprocess.run([sys.executable, "-m", package, *arguments], check=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    result.add_argument("--to", type=Path, required=True, help="folder of the model")
    result.add_argument("--work", type=Path, help="folder to draw and train in, kept; empty: a temporary one")
    result.add_argument("--per-kind", type=int, default=320, help="training pictures of each of 28 kinds")
    result.add_argument("--per-relation", type=int, default=300, help="and of each of 12 relations")
    result.add_argument("--epochs", type=int, default=10, help="passes over them")
    result.add_argument("--workers", type=int, default=0, help="processes to draw in; 0 draws in this one")
    return result
