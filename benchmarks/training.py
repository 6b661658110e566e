"""Training speed: baseline and aligned training here beside a plain PyTorch loop, same backbone, pictures,
cores and batch.

Run `python benchmarks/training.py [--backbones NAME ...]`. The plain loop: torch's DataLoader over an
ImageFolder, timm's model, AdamW, cross entropy, with autocast and channels-last where ours has them.
Contenders take turns in processes of their own; the second epoch counts. Ours runs through Ray Train where
Ray is installed. On a GPU also the share of the card's bfloat16 peak.

What the alignment costs is measured apart (`--only steps`), since whole trainings swing by more than that:
steps of the baseline and of aligned trainings take turns in one process, without decoding.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import loading
import record

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
GOAL, GOAL_ALIGNED, GOAL_BALANCED = 1.0, 1.02, 1.03
# Dense bfloat16 TFLOP/s of the makers' data sheets.
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "A10G": 70.0}


def main() -> int:
    """Prints a table and the JSON line."""
    import torch

    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    backbones = ["resnet50", "vit_small_patch16_224", "hiera_tiny_224"] if gpu else ["resnet18"]
    parser.add_argument(
        "--backbones", nargs="+", default=backbones, help=f"timm models (default {' '.join(backbones)})"
    )
    parser.add_argument(
        "--size", type=int, default=224 if gpu else 128, help="edge of the input (default 224; 128 on a CPU)"
    )
    parser.add_argument(
        "--batch", type=int, default=256 if gpu else 64, help="images a step (default 256; 64 on a CPU)"
    )
    parser.add_argument(
        "--rows", type=int, default=12800 if gpu else 512, help="drawn pictures (default 12800; 512 on a CPU)"
    )
    parser.add_argument("--loader-workers", type=int, default=max(2, (os.cpu_count() or 2) - 2 if gpu else 2))
    parser.add_argument("--turns", type=int, default=3, help="turns of each contender (default 3)")
    parser.add_argument("--rounds", type=int, default=40, help="steps of each kind in turns (default 40)")
    parser.add_argument("--only", choices=["all", "steps"], default="all", help="steps: what alignment costs")
    parser.add_argument("--save", action="store_true", help="also write the result below benchmarks/results")
    parser.add_argument("--contender", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        made = steps(options) if options.contender == "steps" else CONTENDERS[options.contender](options)
        print(json.dumps(made), flush=True)
        return 0
    table = [f"{'':26}{'':14}{'images/s':>10}{'of plain':>10}{'of peak':>10}   turns"]
    found: dict[str, dict[str, float]] = {}
    costs: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), options.rows)
        for backbone in options.backbones:
            costs[backbone] = json.loads(turn("steps", backbone, folder, options))
            if options.only == "steps":
                continue
            speeds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
            for _ in range(options.turns):
                for name in CONTENDERS:
                    speeds[name].append(float(turn(name, backbone, folder, options)))
            medians = {name: statistics.median(values) for name, values in speeds.items()}
            found[backbone] = medians
            per_image = flops(backbone, options.size)
            for name, values in speeds.items():
                peak = (
                    f"{medians[name] * per_image / 1e12 / peak_of_card():.3f}"
                    if gpu and peak_of_card()
                    else "-"
                )
                turns = " ".join(f"{value:.0f}" for value in values)
                ratio = medians[name] / medians["plain loop"]
                table.append(
                    f"{backbone:26}{name:14}{medians[name]:>10.1f}{ratio:>10.3f}{peak:>10}   {turns}"
                )
    slower = max(cost["aligned"] for cost in costs.values())
    balanced = max(cost["balanced"] for cost in costs.values())
    told = [
        f"{backbone:26}a step's time over the baseline's, in turns: "
        + ", ".join(
            f"{name} {cost[name]:.3f} (quarter to quarter {cost[name + ' spread']})" for name in ALIGNED
        )
        for backbone, cost in costs.items()
    ]
    told.append(f"goals: aligned {GOAL_ALIGNED}, targets of the class and balanced gradients {GOAL_BALANCED}")
    if options.only == "steps":
        record.publish(
            "alignment_cost",
            "What the alignment costs: an aligned step beside a plain one",
            "python benchmarks/training.py --only steps",
            told,
            ("torch", "timm"),
            save=options.save,
            value=round(balanced, 3),
            unit="of a plain step's time, targets of the class and balanced gradients",
            goal=GOAL_BALANCED,
            aligned=round(slower, 3),
            size=options.size,
            batch=options.batch,
            holds=balanced <= GOAL_BALANCED and slower <= GOAL_ALIGNED,
        )
        return 0
    table += told
    worst = min(min(m["baseline"], m["aligned"]) / m["plain loop"] for m in found.values())
    stall = max(m["aligned"] / m["checkpointed"] for m in found.values())
    table.append(f"with a checkpoint every four steps over without, in time: {stall:.3f}")
    record.publish(
        "training",
        "Training: images/s beside a plain PyTorch loop",
        "python benchmarks/training.py",
        table,
        ("torch", "timm", "ray"),
        save=options.save,
        value=round(worst, 3),
        unit="of a plain loop's images/s",
        goal=GOAL,
        aligned_over_baseline=round(slower, 3),
        balanced_over_baseline=round(balanced, 3),
        checkpointed_over_aligned=round(stall, 3),
        size=options.size,
        batch=options.batch,
        holds=worst >= GOAL and balanced <= GOAL_BALANCED and slower <= GOAL_ALIGNED,
    )
    return 0


def prepare(folder: Path, rows: int) -> None:
    """Pictures as an image folder, and a store with as many random unit vectors, whose making is no matter
    here."""
    import numpy as np
    import pyarrow as pa

    from pipeline.store import CAPTIONS, Store, embeddings_table

    images = loading.draw(folder / "images", min(rows, 1024))
    for row in range(1024, rows):  # links are enough for speed
        source = images / f"class-{row % 2}" / f"{row % 1024:05}.jpg"
        (images / f"class-{row % 2}" / f"{row:05}.jpg").hardlink_to(source)
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "ingest",
        "--images",
        str(images),
        "--store",
        str(folder / "store"),
    ]
    subprocess.run([*command, "--val-fraction", "0.02"], check=True, cwd=ROOT, stdout=sys.stderr)
    store = Store(str(folder / "store"))
    store.write_variant("captions", "drawn", {"engine": "imported", "versions": {}})
    store.write_variant(
        "embeddings", "drawn", {"captions": "drawn", "encoder": "none", "pooling": "mean", "versions": {}}
    )
    rng = np.random.default_rng(0)
    for shard in range(store.dataset.shards):
        ids = store.read_shard("images", "", shard, ["id"])["id"].to_pylist()
        vectors = rng.normal(size=(len(ids), 384)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        captions = [{"id": key, "caption": f"caption {key}"} for key in ids]
        embeddings = [
            {"id": key, "embedding": v, "tokens": 4, "truncated": False, "error": None}
            for key, v in zip(ids, vectors, strict=True)
        ]
        store.write_shard(
            "captions", "drawn", shard, pa.Table.from_pylist(captions, schema=CAPTIONS), seconds=0
        )
        store.write_shard("embeddings", "drawn", shard, embeddings_table(embeddings, 384), seconds=0)


def turn(name: str, backbone: str, folder: str, options: argparse.Namespace) -> str:
    """What a contender prints at last, images/s of the second epoch, in a process of its own."""
    command = [sys.executable, __file__, "--contender", name, "--folder", folder, "--backbones", backbone]
    for flag in ("size", "batch", "rows", "loader_workers", "rounds"):
        command += [f"--{flag.replace('_', '-')}", str(getattr(options, flag))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return done.stdout.splitlines()[-1]


def plain(options: argparse.Namespace) -> float:
    """What a careful user writes without this project."""
    import timm
    import torch
    from torch.nn import functional
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(os.cpu_count() or 1)
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(options.size, scale=(0.35, 1), interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )
    loader: Any = torch.utils.data.DataLoader(
        ImageFolder(f"{options.folder}/images", transform),
        batch_size=options.batch,
        shuffle=True,
        drop_last=True,
        num_workers=options.loader_workers,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )
    size = {"img_size": options.size} if "vit" in options.backbones[0] else {}
    model = timm.create_model(options.backbones[0], num_classes=2, **size).to(
        device, memory_format=torch.channels_last
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    mean, std = (
        torch.tensor(v, device=device).view(1, 3, 1, 1)
        for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    speed = 0.0
    for _ in range(2):
        start, count = time.monotonic(), 0
        total = torch.zeros((), device=device)
        for images, labels in loader:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            images = ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = functional.cross_entropy(model(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach()
            count += len(labels)
        total.item()  # waits for the device
        speed = count / (time.monotonic() - start)
    return speed


def ours(options: argparse.Namespace, **flags: Any) -> float:
    """`gpt4image train`; its loop alone where there is no Ray."""
    import torch

    from training.engine import loop

    config = configured(options, **flags)
    if importlib.util.find_spec("ray") is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        history = loop.fit(config, device, 0, None, lambda metrics, take: take())
    else:
        from training.run import train

        history = train(config, progress=False)["history"]
    return history[-1]["images_per_s"]


def configured(options: argparse.Namespace, **more: Any) -> Any:
    """The settings of a training here."""
    import torch

    from training.config import TrainConfig

    return TrainConfig.of(
        store=f"{options.folder}/store",
        run=tempfile.mkdtemp(dir=options.folder),
        backbone=options.backbones[0],
        epochs=2,
        image_size=options.size,
        batch_size=options.batch,
        loader_workers=options.loader_workers,
        workers=1,
        threads=0 if torch.cuda.is_available() else os.cpu_count() or 1,
        tracking_uri="none",
        **more,
    )


def steps(options: argparse.Namespace) -> dict[str, Any]:
    """Time of an aligned step over a plain one's: the medians of rounds in which each takes one step, on the
    same batches, by the product's own stepper."""
    import torch

    from training.engine.build import Run

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    if not gpu:
        torch.set_num_threads(os.cpu_count() or 1)
    kinds = {"baseline": BASELINE, **ALIGNED}
    runs = {
        name: Run.of(configured(options, **flags), device, 0, None, None) for name, flags in kinds.items()
    }
    batches = {}
    for name, run in runs.items():
        run.train()
        batches[name] = [batch.to(device) for batch in run.loader.train(run.sequence, 0, 4, 0, 1)]
    taken: dict[str, list[float]] = {name: [] for name in runs}
    warm = 3
    for number in range(warm + options.rounds):
        for name in list(runs)[:: 1 if number % 2 else -1]:
            begun = time.perf_counter()
            losses = runs[name].stepper(batches[name][number % 4], number)
            float(losses["loss"])  # waits for the device
            if gpu:
                torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - begun)
    found: dict[str, Any] = {}
    for name in ALIGNED:
        rounds = zip(taken[name][warm:], taken["baseline"][warm:], strict=True)
        ratios = [own / plain for own, plain in rounds]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found |= {name: middle, f"{name} spread": f"{low:.3f} to {high:.3f}"}
    return found


def flops(backbone: str, size: int) -> float:
    """Floating-point operations of a training step for one image: three times the forward pass's."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from training.models.backbones import build

    with torch.device("meta"):
        model = build(backbone, num_classes=2, image_size=size)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, size, size))
    return 3.0 * counter.get_total_flops()


def peak_of_card() -> float:
    """TFLOP/s of this GPU, 0 where it is not known."""
    import torch

    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    return next((peak for card, peak in PEAKS.items() if card in name), 0.0)


OF_CLASS: dict[str, Any] = {
    "projection_dim": 0,
    "center_texts": True,
    "class_shrinkage": 1.0,
    "positives": "class",
}
BASELINE = {"alignment_weight": 0.0}
ALIGNED: dict[str, dict[str, Any]] = {
    "aligned": {"alignment_weight": 0.3},
    "balanced": {"alignment_weight": 0.5, "balance": "gradients", **OF_CLASS},
}
CONTENDERS = {
    "plain loop": plain,
    "baseline": lambda options: ours(options, **BASELINE),
    "aligned": lambda options: ours(options, **ALIGNED["aligned"]),
    "balanced": lambda options: ours(options, **ALIGNED["balanced"]),
    "checkpointed": lambda options: ours(
        options, **ALIGNED["aligned"], checkpoint_steps=4
    ),  # all, every four steps
}

if __name__ == "__main__":
    start = time.monotonic()
    code = main()
    print(f"{time.monotonic() - start:.0f} s in all", file=sys.stderr)
    raise SystemExit(code)
