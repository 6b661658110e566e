"""What short runs give, kept to be compared with: `python tests/golden/record.py` writes runs.json and
store.json anew.

Record after a change that is meant to alter numbers, and say so; three minutes. Trainings: the losses of each
step and a hash of the weights, on a store drawn by a seed, with one thread and plain SGD, whose steps do not
magnify the last bit as Adam's do; each epoch is one step, so that an epoch's means are the step's losses.
Describing: hashes of the rows of every stage, of rendered scenes by the real engine and the real encoder.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parent.parent.parent
RUNS, STORE = (Path(__file__).with_name(name) for name in ("runs.json", "store.json"))

SETTINGS: dict[str, dict[str, Any]] = {
    "baseline": {"alignment_weight": 0.0},
    "aligned": {},
    "aligned transformer, everything learned": {
        "backbone": "test_vit",
        "learn_temperature": True,
        "text_projection": "learned",
        "store_negatives": 8,
    },
    "sigmoid": {"alignment": "sigmoid"},
    "bce": {"loss": "bce", "label_smoothing": 0.1},
    "mixup": {"mixup": 0.8, "cutmix": 1.0, "erase": 0.25, "drop_path": 0.1, "backbone": "test_vit"},
    "accumulation": {"accumulate": 2},
    "two workers": {},
    "two workers, accumulation": {"accumulate": 2, "mixup": 0.8},
}
STEPS = 6


def machine() -> str:
    """Equal where arithmetic is: torch's version, the vector instructions in use, and the kind of
    processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )
    kind = hashlib.blake2b(model.encode(), digest_size=4).hexdigest()
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {kind}"


def trained(name: str, folder: Path) -> dict[str, Any]:
    """The losses of each step of a training, and a hash of the weights after the last; `folder` is for its
    store."""
    from tests.conftest import build_store

    build_store(folder / "store", train=16, val=6, missing_captions=2)
    if name.startswith("two workers"):
        mp.spawn(_train, args=(name, folder, 2), nprocs=2, join=True)
    else:
        threads = torch.get_num_threads()
        _train(0, name, folder, 1)
        torch.set_num_threads(threads)
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def _train(rank: int, name: str, folder: Path, world: int) -> None:
    from training.config import TrainConfig
    from training.engine import checkpoint, loop

    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
        )
    values: dict[str, Any] = {
        "backbone": "test_resnet",
        "image_size": 32,
        "epochs": STEPS,
        "batch_size": 16,
        "projection_dim": 4,
        "lr": 0.004,
        "optimizer": "momentum",
        "warmup_epochs": 0,
        "loader_workers": 1,
        "seed": 1,
    }
    config = TrainConfig.of(store=str(folder / "store"), **values | SETTINGS[name])
    snapshots: list[checkpoint.Snapshot] = []
    history = loop.fit(
        config, torch.device("cpu"), rank, None, lambda metrics, take: snapshots.append(take())
    )
    if rank == 0:
        steps = [
            {key: epoch[key] for key in ("loss", "cross_entropy", "alignment") if key in epoch}
            for epoch in history
        ]
        snapshots[-1].write(str(folder / "checkpoint"))
        (folder / "found.json").write_text(
            json.dumps({"losses": steps, "weights": weights(folder / "checkpoint")})
        )
    if world > 1:
        dist.destroy_process_group()


def weights(checkpoint: Path) -> str:
    """A hash of a model's tensors and their names."""
    from safetensors.torch import load_file

    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(load_file(checkpoint / "model.safetensors").items()):
        digest.update(
            f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + tensor.contiguous().numpy().tobytes()
        )
    return digest.hexdigest()


def rows(store: Path) -> dict[str, Any]:
    """What a store holds: its plan, the names of its variants, and a hash of the rows of every stage."""
    from pipeline.store import Store

    opened = Store(str(store))
    variants = {"images": "", **{stage: opened.only_variant(stage) for stage in ("captions", "embeddings")}}
    hashes = {}
    for stage, variant in variants.items():
        digest = hashlib.blake2b(digest_size=16)
        for shard in range(opened.dataset.shards):
            for row in opened.read_shard(stage, variant, shard).to_pylist():
                digest.update(repr(sorted(row.items())).encode())
        hashes[stage] = digest.hexdigest()
    return {
        "classes": opened.dataset.classes,
        "rows": opened.dataset.rows,
        "variants": variants,
        "hashes": hashes,
    }


def main() -> None:
    """Writes both files."""
    from cluster import cli

    runs = {}
    for name in SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            runs[name] = trained(name, Path(folder))
    RUNS.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        scenes, store = f"{folder}/scenes", f"{folder}/store"
        render = [str(ROOT / "examples" / "scenes" / "render.py"), "--to", scenes, "--train-per-class", "16"]
        render += ["--task", "relations"]
        subprocess.run(
            [sys.executable, *render, "--val-per-class", "8", "--workers", "1"],
            check=True,
            capture_output=True,
        )
        describe = [
            "describe",
            "--caption-preset",
            "scenes",
            "--images",
            scenes,
            "--store",
            store,
            "--shard-rows",
            "64",
        ]
        assert cli.main(describe) == 0
        STORE.write_text(json.dumps({"machine": machine(), **rows(Path(store))}, indent=1) + "\n")
    print(f"written: {RUNS.relative_to(ROOT)}, {STORE.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
