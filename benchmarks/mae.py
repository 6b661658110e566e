"""Masked autoencoding: a training step that sees 40 % of a picture's mask units beside one that sees all of
them, same task, same pictures.

Run `python benchmarks/mae.py [--backbones NAME ...]`. A step is preparation (masks), forward, backward and
AdamW, as `gpt4image train --objective mae` computes it; pictures are random bytes. Contenders take turns,
step by step; medians count. `encoder` is forward and backward of the backbone alone; the decoder (8 blocks of
512) computes the same in both, and beside the smallest sizes it is nearly as much as the full encoder, which
bounds what masking can gain there. Seconds on a CPU are its own (process time), whatever else the machine
does.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import record

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
GOAL, RATIO = 1.8, 0.6
NAMED = ("hiera_tiny_224", "hiera_base_224", "hiera_base_plus_224", "hiera_large_224")


def main() -> int:
    """Prints a table and the JSON line."""
    import torch

    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbones", nargs="+", default=NAMED, help="the goal is for each of them")
    parser.add_argument("--batch", type=int, default=64 if gpu else 4, help="images a step (64; 4 on a CPU)")
    parser.add_argument("--turns", type=int, default=20 if gpu else 7, help="timed steps of each contender")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/mae.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = [f"{'':22}{'':9}{'seen':>6}{'s/step':>9}{'images/s':>10}{'faster':>8}   turns"]
    ratios: dict[str, dict[str, float]] = {}
    for backbone in options.backbones:
        ratios[backbone] = {}
        contenders = prepared(backbone, options.batch, torch.device("cuda" if gpu else "cpu"))
        for what in ("step", "encoder"):
            both = {name: steps[what] for name, steps in contenders.items()}
            times = measured(both, options.turns, time.perf_counter if gpu else time.process_time)
            medians = {name: statistics.median(values) for name, values in times.items()}
            ratios[backbone][what] = round(medians["all"] / medians["40 %"], 3)
            for name, values in times.items():
                turns = " ".join(f"{value:.3f}" for value in values)
                table.append(
                    f"{backbone:22}{what:9}{name:>6}{medians[name]:>9.3f}"
                    f"{options.batch / medians[name]:>10.1f}{medians['all'] / medians[name]:>8.2f}   {turns}"
                )
    value = min(found["step"] for found in ratios.values())
    reached = [name for name, found in ratios.items() if found["step"] >= GOAL]
    table.append(f"a step {GOAL} times as fast: {', '.join(reached) or 'none'}")
    record.publish(
        "mae",
        "Masked autoencoding: a step at mask ratio 0.6 beside a full one",
        f"python benchmarks/mae.py --batch {options.batch} --turns {options.turns}",
        table,
        ("torch", "timm"),
        save=options.save,
        value=value,
        unit="times as fast",
        goal=GOAL,
        of_backbones=ratios,
        batch=options.batch,
        threads=options.threads,
        holds=value >= GOAL,
    )
    return 0


def prepared(backbone: str, batch: int, device: Any) -> dict[str, dict[str, Callable[[], None]]]:
    """By what is seen of a picture: a whole step, and the encoder's part of it."""
    import numpy as np
    import torch

    from training.config import TrainConfig
    from training.data.loader import Batch
    from training.data.views import Draw, Views
    from training.engine import build
    from training.models import optimizers
    from training.objectives import mae
    from training.presets import preset

    recipe = preset("hiera-t-mae", "mae") | {"backbone": backbone}
    config = TrainConfig.of(store="none", objective="mae", **recipe)
    task = build.to_device(mae.OBJECTIVE.build(config, mae.Facts(), 0), device).train()
    optimizer = optimizers.optimizer(config, task)
    views = Views(config, build.make_norm(task.backbone, device), 0)
    precision = build.make_precision(config, device)
    samples = np.array([[0, 0, row, 0] for row in range(batch)])
    pixels = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8)
    pictures = Batch(pixels, torch.zeros(batch, dtype=torch.long), {}, samples).to(device)

    def inputs_at(ratio: float) -> Any:
        task.settings = replace(config.method, mask_ratio=ratio)
        return task.prepare(pictures, views, Draw(0, 1, 0, 1, batch))

    def step(ratio: float) -> None:
        inputs = inputs_at(ratio)
        optimizer.zero_grad(set_to_none=True)
        with precision():
            losses = task(inputs)
        losses["loss"].backward()
        optimizer.step()
        losses["loss"].item()  # waits for the device

    def encoder(ratio: float) -> None:
        inputs = inputs_at(ratio)
        with precision():
            last, _ = task.backbone.forward_features(
                inputs.images, mask=inputs.keep, return_intermediates=True
            )
        last.float().square().mean().backward()
        task.backbone.zero_grad(set_to_none=True)
        last.sum().item()

    return {
        name: {"step": partial(step, ratio), "encoder": partial(encoder, ratio)}
        for name, ratio in (("40 %", RATIO), ("all", 0.0))
    }


def measured(
    contenders: dict[str, Callable[[], None]], turns: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each turn; the first, which warms up, does not count."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for name, run in contenders.items():
            start = clock()
            run()
            if turn:
                times[name].append(clock() - start)
    return times


if __name__ == "__main__":
    raise SystemExit(main())
