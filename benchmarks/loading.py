"""Loading speed: this project's loader beside torch's DataLoader over an ImageFolder and beside plain Ray
Data.

Run `python benchmarks/loading.py [--images DIR]`. All three decode the same JPEGs (by default 1,536 drawn
ones, 500 x 375 pixels and 100 kB, like ImageNet's) on the same cores to random resized crops of 224 pixels
with flips, bicubic, as uint8 batches of 128. Each contender has processes of its own, is warmed up by one
pass and then timed over the next; contenders take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
GOAL = 1.3
BATCH = 128


def main() -> int:
    """Prints a table and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", default="", help="an image folder DIR/<class>/*.jpg; empty: drawn pictures"
    )
    parser.add_argument(
        "--rows", type=int, default=1536, help="pictures, where they are drawn (default 1536)"
    )
    parser.add_argument("--size", type=int, default=224, help="edge of the crops (default 224)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes or threads (default: the cores)"
    )
    parser.add_argument("--turns", type=int, default=3, help="turns of each contender (default 3)")
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/loading.md")
    parser.add_argument("--contender", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(CONTENDERS[options.contender](options)), flush=True)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if not options.images:
            options.images = str(draw(Path(folder) / "images", options.rows))
        store = str(Path(folder) / "store")
        ingest = [sys.executable, "-m", "pipeline", "ingest", "--images", options.images, "--store", store]
        subprocess.run(ingest, check=True, cwd=ROOT, stdout=sys.stderr)
        speeds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for _ in range(options.turns):
            for name in CONTENDERS:
                speeds[name].append(measured(name, store, options))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    table = [f"{'':28}{'images/s':>10}{'of torch':>10}   {'turns'}"]
    for name, values in speeds.items():
        turns = " ".join(f"{value:.0f}" for value in values)
        table.append(
            f"{name:28}{medians[name]:>10.1f}{medians[name] / medians['torch DataLoader']:>10.2f}   {turns}"
        )
    ours = max(medians["ours, threads"], medians["ours, actors"])
    ratio = ours / medians["torch DataLoader"]
    record.publish(
        "loading",
        "Loading: images/s beside torch's DataLoader and Ray Data",
        "python benchmarks/loading.py",
        table,
        ("torch", "torchvision", "ray", "pillow"),
        save=options.save,
        value=round(ratio, 3),
        unit="times torch's DataLoader",
        goal=GOAL,
        of_ray_data=round(ours / medians["Ray Data"], 3),
        workers=options.workers,
        holds=ratio >= GOAL,
    )
    return 0


def draw(folder: Path, rows: int) -> Path:
    """JPEGs of 500 x 375 pixels and about 100 kB: coarse shapes with fine noise, in two classes."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for row in range(rows):
        target = folder / f"class-{row % 2}"
        target.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (10, 13, 3), dtype=np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse).astype(np.int16) + rng.integers(-25, 26, (375, 500, 1), dtype=np.int16)
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(target / f"{row:05}.jpg", quality=85)
    return folder


def measured(name: str, store: str, options: argparse.Namespace) -> float:
    """images/s of one turn, in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--contender",
        name,
        "--images",
        options.images,
        "--size",
        str(options.size),
    ]
    environment = {**os.environ, "STORE": store, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--workers", str(options.workers)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def torch_loader(options: argparse.Namespace) -> float:
    """DataLoader, ImageFolder and torchvision's transforms, as in its reference scripts; workers stay between
    passes."""
    import torch
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(options.size, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )
    loader: Any = torch.utils.data.DataLoader(
        ImageFolder(options.images, transform),
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=options.workers,
        persistent_workers=True,
    )
    return second_pass(lambda: (images for images, _ in loader))


def ray_data(options: argparse.Namespace) -> float:
    """Ray Data as its documentation has it: read_images by folder, map with the same transforms,
    iter_torch_batches."""
    from pipeline.session import start_ray

    start_ray()
    import ray
    from torchvision.transforms import v2

    ray.data.DataContext.get_current().enable_progress_bars = False
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(options.size, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
        ]
    )

    def augmented(row: dict[str, Any]) -> dict[str, Any]:
        import numpy as np
        from PIL import Image

        return {"image": np.asarray(transform(Image.fromarray(row["image"])))}

    dataset = ray.data.read_images(options.images, mode="RGB", shuffle="files").map(augmented, num_cpus=1)
    return second_pass(
        lambda: (b["image"] for b in dataset.iter_torch_batches(batch_size=BATCH, drop_last=True))
    )


def ours(options: argparse.Namespace, *, actors: bool) -> float:
    """The loader of `gpt4image train`."""
    from pipeline.store import Store
    from training.data.augment import Augment
    from training.data.decoder import DecoderSpec
    from training.data.loader import Loader, ThreadDecoding
    from training.data.order import Rows, Sequence

    store = Store(os.environ["STORE"])
    augment = Augment(
        size=options.size, crop_scale=0.08, flip=0.5, crop_pct=0.95, interpolation="bicubic", seed=0
    )
    spec = DecoderSpec(store=store.uri, columns=(), augment=augment, keep=64)
    if actors:
        from pipeline.session import start_ray
        from training.run import actor_decoding

        start_ray()
        decoding: Any = actor_decoding(spec, options.workers)
    else:
        decoding = ThreadDecoding(spec.build(), options.workers)
    loader = Loader(decoding, lookahead=4)
    sequence = Sequence(Rows(store, next(iter(store.dataset.splits))), seed=0, window=16, batch=BATCH)
    steps = sequence.epoch_samples // BATCH
    starts = iter(range(0, 10 * steps, steps))

    def one_pass() -> Any:
        start = next(starts)
        return (batch.images for batch in loader.train(sequence, start, start + steps, 0, 1))

    return second_pass(one_pass)


def second_pass(batches: Any) -> float:
    """images/s of the second pass over the set; the first warms up."""
    for _ in batches():
        pass
    start = time.monotonic()
    count = sum(len(images) for images in batches())
    return count / (time.monotonic() - start)


CONTENDERS = {
    "torch DataLoader": torch_loader,
    "Ray Data": ray_data,
    "ours, threads": lambda options: ours(options, actors=False),
    "ours, actors": lambda options: ours(options, actors=True),
}

if __name__ == "__main__":
    start = time.monotonic()
    code = main()
    print(f"{time.monotonic() - start:.0f} s in all", file=sys.stderr)
    raise SystemExit(code)
