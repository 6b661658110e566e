"""Losses of short trainings in this process, kept to be compared with: `python tests/golden/record.py` writes losses.json anew.

Record after a change that is meant to alter numbers, and say so; 20 seconds. A store drawn by a seed, one thread, plain SGD,
whose steps do not magnify the last bit as Adam's do. Each epoch is one step, so that an epoch's means are the step's losses.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
FILE = Path(__file__).with_name("losses.json")

SETTINGS: dict[str, dict[str, Any]] = {
    "baseline": {"alignment_weight": 0.0},
    "aligned": {},
    "aligned transformer, everything learned": {
        "backbone": "test_vit", "learn_temperature": True, "text_projection": "learned", "store_negatives": 8,
    },
    "sigmoid": {"alignment": "sigmoid"},
    "bce": {"loss": "bce", "label_smoothing": 0.1},
    "mixup": {"mixup": 0.8, "cutmix": 1.0, "erase": 0.25, "drop_path": 0.1, "backbone": "test_vit"},
    "accumulation": {"accumulate": 2},
}  # fmt: skip
STEPS = 6


def machine() -> str:
    """Equal where arithmetic is: torch's version, the vector instructions in use, and the kind of processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    kind = hashlib.blake2b(model.encode(), digest_size=4).hexdigest()
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {kind}"


def losses(name: str, folder: Path) -> list[dict[str, float]]:
    """What each step of a training gave; `folder` is for its store."""
    from tests.conftest import build_store
    from training import loop
    from training.config import TrainConfig

    store = build_store(folder / "store", train=16, val=6, missing_captions=2)
    values: dict[str, Any] = {
        "backbone": "test_resnet", "image_size": 32, "epochs": STEPS, "batch_size": 16, "projection_dim": 4, "lr": 0.004,
        "optimizer": "momentum", "warmup_epochs": 0, "loader_workers": 1, "seed": 1,
    }  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        config = TrainConfig(store=str(store), **values | SETTINGS[name])
        history = loop.fit(config, torch.device("cpu"), 0, None, lambda metrics, take: None)
    finally:
        torch.set_num_threads(threads)
    return [{key: epoch[key] for key in ("loss", "cross_entropy", "alignment") if key in epoch} for epoch in history]


def main() -> None:
    """Writes losses.json."""
    found = {}
    for name in SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = losses(name, Path(folder))
    FILE.write_text(json.dumps({"machine": machine(), "losses": found}, indent=1) + "\n")
    print(f"written: {FILE.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
