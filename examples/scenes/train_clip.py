"""Train the shipped small CLIP from nothing on freshly drawn scenes and their true sentences, and write its
folder with what it can do.

Run `python examples/scenes/train_clip.py --to examples/scenes/clip`; `--help` explains the knobs. The
defaults take about half an hour and 2 GB of memory on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the sibling modules, however this file is loaded

import torch
from PIL import Image
from render import drawn, jobs_for
from scene import KINDS, RELATION_CLASSES, RELATIONS, Scene, Thing, caption_of
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

TRAIN_SEED, EXAM_SEED = 11, 12
"""Others than the demo's (0), the search's (7) and the evidence's (8): no picture of those is among these."""

CARD = """# A small CLIP of drawn scenes

{parameters} parameters; pictures of {size} pixels, patches of {patch}, {layers} layers of width {width}.
Trained from nothing by `gpt4image train --objective clip --preset clip-scenes` on {pictures} scenes of
`examples/scenes` and their true sentences (`train_clip.py`; {epochs} epochs, {minutes} minutes on a shared
CPU core). A teacher for tests and demonstrations, which knows these scenes alone. This project's own
(Apache-2.0).

```python
import torch
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

folder = "examples/scenes/clip"
clip = CLIPModel.from_pretrained(folder).eval()
texts = AutoTokenizer.from_pretrained(folder)(["a photo of a red star."], padding=True, return_tensors="pt")
images = AutoImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt")
logits = clip(**texts, **images).logits_per_image
```

On {scenes} held-out scenes of the 28 kinds (seed {seed}; no picture of the demo, of the search or of the
evidence is among them or among the lessons). Retrieval is among all of them and their whole sentences;
zero-shot is by "a photo of a KIND.", where chance is 3.6 (colour 25, shape 14.3).

| | percent |
|---|---:|
{rows}
"""


def sentences_of(scene: Scene) -> list[str]:
    """True sentences of a scene, from all that is in it to one thing."""
    first, second = scene.first, scene.second
    relation = RELATIONS[scene.arrangement]
    found = [
        caption_of(scene),
        f"a {_plain(first)} {relation} a {_plain(second)}.",
        # Colours tell most pictures apart; without them shapes must.
        f"a {first.shape} {relation} a {second.shape}.",
    ]
    if scene.arrangement != "nested":
        return found
    # As a class's name is written, and as one would say it.
    kind = _plain(first).replace(" ", "-") if scene.seed % 2 else _plain(first)
    return [*found, f"a photo of a {kind}."]


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
    result.add_argument("--epochs", type=int, default=14, help="passes over them")
    result.add_argument("--workers", type=int, default=0, help="processes to draw in; 0 draws in this one")
    return result


@torch.no_grad()
def embed(folder: Path, pictures: Sequence[Path], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """([n, d], [m, d]) of unit length, as any user of the folder has them."""
    clip: Any = CLIPModel.from_pretrained(folder).eval()
    processor, words = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    seen = []
    for start in range(0, len(pictures), 128):
        part = [Image.open(path).convert("RGB") for path in pictures[start : start + 128]]
        seen.append(clip.get_image_features(**processor(part, return_tensors="pt")).pooler_output)
    said = []
    for start in range(0, len(texts), 128):
        made = words(list(texts[start : start + 128]), padding=True, truncation=True, return_tensors="pt")
        said.append(clip.get_text_features(**made).pooler_output)
    return F.normalize(torch.cat(seen), dim=-1), F.normalize(torch.cat(said), dim=-1)


def exam(folder: Path, work: Path, workers: int, per_kind: int = 40) -> dict[str, float]:
    """What it can do on held-out scenes, so many of each kind, in percent."""
    jobs = jobs_for(work, KINDS, {"exam": per_kind}, EXAM_SEED)
    paths, scenes = zip(*drawn(jobs, workers), strict=True)
    captions = [caption_of(scene) for scene in scenes]
    prompts = [f"a photo of a {kind}." for kind in KINDS]
    images, texts = embed(folder, [work / path for path in paths], [*captions, *prompts])
    cosines = images @ texts[: len(captions)].T
    truth = torch.arange(len(captions))
    # Of 1,120 scenes hardly two have one caption; where they do, either is right.
    number = {caption: n for n, caption in enumerate(dict.fromkeys(captions))}
    group = torch.tensor([number[caption] for caption in captions])
    found = (images @ texts[len(captions) :].T).argmax(1)
    kinds = torch.tensor([KINDS.index(scene.label) for scene in scenes])
    colours = [kind.partition("-")[0] for kind in KINDS]
    shapes = [kind.partition("-")[2] for kind in KINDS]
    pairs = list(zip(found.tolist(), kinds.tolist(), strict=True))
    shares = {
        "image to text R@1": (group[cosines.argmax(1)] == group[truth]).double().mean(),
        "text to image R@1": (group[cosines.argmax(0)] == group[truth]).double().mean(),
        "zero-shot top-1, 28 kinds": (found == kinds).double().mean(),
        "its colour (of 4)": torch.tensor([colours[a] == colours[b] for a, b in pairs]).double().mean(),
        "its shape (of 7)": torch.tensor([shapes[a] == shapes[b] for a, b in pairs]).double().mean(),
    }
    return {name: 100 * float(share) for name, share in shares.items()} | {"scenes": len(captions)}


def card(folder: Path, found: dict[str, float], options: argparse.Namespace, minutes: float) -> None:
    """The folder's README.md."""
    clip = CLIPModel.from_pretrained(folder)
    vision = clip.config.vision_config
    text = CARD.format(
        parameters=f"{sum(each.numel() for each in clip.parameters()):,}",
        size=f"{vision.image_size} x {vision.image_size}",
        patch=vision.patch_size,
        layers=vision.num_hidden_layers,
        width=vision.hidden_size,
        pictures=f"{28 * options.per_kind + 12 * options.per_relation:,}",
        epochs=options.epochs,
        minutes=f"{minutes:.0f}",
        scenes=f"{found.pop('scenes'):,.0f}",
        seed=EXAM_SEED,
        rows="\n".join(f"| {name} | {value:.1f} |" for name, value in found.items()),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, train, export, examine."""
    options = parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        pictures, store, run = work / "pictures", str(work / "store"), str(work / "run")
        counts = {"train": (options.per_kind, options.per_relation), "val": (20, 0)}
        if not (pictures / "captions.jsonl").exists():
            draw(pictures, counts, TRAIN_SEED, options.workers)
        gpt4image("pipeline", "ingest", "--images", str(pictures), "--store", store)
        gpt4image("pipeline", "import-captions", str(pictures / "captions.jsonl"), "--store", store)
        train = ["train", "--objective", "clip", "--preset", "clip-scenes", "--store", store, "--run", run]
        began = time.monotonic()
        gpt4image("training", *train, "--epochs", str(options.epochs), "--threads", "1")
        minutes = (time.monotonic() - began) / 60
        gpt4image("training", "export", run, "--to", str(options.to), "--overwrite")
        found = exam(options.to, work / "exam", options.workers)
    card(options.to, found, options, minutes)
    print(json.dumps({name: round(value, 2) for name, value in found.items()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
