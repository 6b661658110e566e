"""`train`: a Ray Train V2 run over the store, from settings to checkpoints; the one file here that builds Ray objects.

A run is a folder: settings (config.json), MLflow id, Ray Train's checkpoints, metrics.jsonl and at the end result.json. The same
command on the same folder goes on from the last checkpoint. `python -m training train --store STORE --preset scenes`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from pipeline.session import start_ray
from pipeline.store import Store
from training import tracking
from training.config import TrainConfig

Result = dict[str, Any]

# What may differ between a run and its resumption: where it runs and how it is watched, not what is computed.
_FREE = ("run", "workers", "threads", "loader_threads", "max_failures", "tracking_uri", "experiment", "parent_run")


def train(config: TrainConfig, *, callbacks: Sequence[Any] = (), progress: bool = True) -> Result:
    """Trains, or resumes, or finds the run finished; returns the content of result.json.

    Args:
        config: the run's settings; everything is checked before any worker starts.
        callbacks: Ray Train user callbacks, such as Tune's.
        progress: print a line an epoch.
    """
    variants = check(config)
    config = replace(config, run=os.path.abspath(os.path.expanduser(config.run or default_run(config))))
    finished = _read_json(config, "result.json")
    _check_same_settings(config)
    if finished is not None:
        print(f"train: {config.run} is complete; nothing to do", file=sys.stderr)
        return finished
    start_ray()
    workers, use_gpu, cpus = _workers(config)
    config = replace(config, workers=workers)
    if config.batch_size % workers:
        message = f"batch_size={config.batch_size}: no multiple of the {workers} workers; pass another --batch-size or --workers."
        raise ValueError(message)
    os.makedirs(config.run, exist_ok=True)
    _write_json(config, "config.json", asdict(config))
    run_id = _tracking_run(config, variants)

    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"config": asdict(config), "run_id": run_id},
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": cpus, "GPU": int(use_gpu)}
        ),
        run_config=RunConfig(
            name=os.path.basename(config.run), storage_path=os.path.dirname(config.run), callbacks=list(callbacks),
            failure_config=FailureConfig(max_failures=config.max_failures),
            # The best by top-1 and the latest: Ray keeps both.
            checkpoint_config=CheckpointConfig(num_to_keep=2, checkpoint_score_attribute="top1"),
        ),
    )  # fmt: skip
    with _Progress(config) if progress else _Progress.silent():
        trainer.fit()
    result = _result(config, run_id)
    _write_json(config, "result.json", result)
    return result


def train_worker(arguments: dict[str, Any]) -> None:
    """One worker of the group: joins the process group that Ray Train made and runs the loop."""
    import ray.train
    import torch
    from ray.train.torch import get_device

    from training import loop

    config = TrainConfig(**arguments["config"])
    context = ray.train.get_context()
    rank = context.get_world_rank()
    device = get_device()
    assert isinstance(device, torch.device)
    tracker = tracking.Tracker(config.tracking_uri, arguments["run_id"] if rank == 0 else "")
    lines: list[str] = []

    def report(metrics: loop.Metrics, save: Callable[[str], None]) -> None:
        if rank != 0:
            ray.train.report(metrics)
            return
        folder = tempfile.mkdtemp(prefix="checkpoint-")
        save(folder)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
        tracker.metrics(metrics, step=int(metrics["epoch"]))
        lines.append(json.dumps(metrics) + "\n")
        _write_text(config, "metrics.jsonl", "".join(lines))

    latest = ray.train.get_checkpoint()
    if latest is None:
        loop.fit(config, device, rank, None, report)
    else:
        with latest.as_directory() as folder:
            from training import checkpoint

            lines += [json.dumps(metrics) + "\n" for metrics in checkpoint.read_state(folder)["history"]]
            loop.fit(config, device, rank, folder, report)
    tracker.finish()


def default_run(config: TrainConfig) -> str:
    """A new folder below runs/, named by what differs between runs and by the time."""
    kind = f"w{config.alignment_weight:g}-d{config.projection_dim}" if config.alignment_weight else "baseline"
    return f"runs/{config.backbone}-{kind}-s{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"


def check(config: TrainConfig) -> dict[str, str]:
    """Finds every fault that can be found without starting workers; returns the variants trained on."""
    from training import backbones, targets
    from training.data import Rows

    store = Store(config.store)
    store.require_complete("images")
    backbones.probe(config.backbone, config.image_size)
    store.split_shards(config.eval_split)
    rows = len(Rows(store, config.train_split))
    if rows < config.batch_size:
        message = (
            f"batch_size={config.batch_size}: the split {config.train_split} has {rows} usable images; "
            f"pass --batch-size {max(2, rows // 2 * 2)} or less."
        )
        raise ValueError(message)
    if config.alignment_weight == 0:
        return {"embeddings": "", "captions": ""}
    # Fits and keeps the PCA here, once, rather than in every worker.
    found = targets.load(store, embeddings=config.embeddings, dim=config.projection_dim, split=config.train_split)
    return {"embeddings": found.embeddings, "captions": found.captions}


def _check_same_settings(config: TrainConfig) -> None:
    recorded = _read_json(config, "config.json")
    if recorded is None:
        return
    now = asdict(config)
    changed = [
        f"{key}: {recorded.get(key)!r} then, {now[key]!r} now"
        for key in now
        if key not in _FREE and recorded.get(key) != now[key]
    ]
    if changed:
        message = f"run={config.run}: was begun with other settings; pass another --run.\n  " + "\n  ".join(changed)
        raise ValueError(message)


def _workers(config: TrainConfig) -> tuple[int, bool, int]:
    """(workers, whether each gets a GPU, CPUs of each): a GPU a worker, or the cores of this machine shared out."""
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    workers = config.workers or gpus or 2
    if gpus and workers > gpus:
        message = f"workers={workers}: the cluster has {gpus} GPUs; pass --workers {gpus} or fewer."
        raise ValueError(message)
    # Ray gives a worker as many OpenMP threads as CPUs; decoding threads come on top.
    return workers, gpus > 0, 2 if gpus else config.threads or max(1, (os.cpu_count() or 1) // workers)


def _tracking_run(config: TrainConfig, variants: dict[str, str]) -> str:
    recorded = _read_json(config, "mlflow.json")
    if recorded is not None:
        return str(recorded["run_id"])
    params = {key: value for key, value in asdict(config).items() if key not in _FREE}
    name = os.path.basename(config.run)
    run_id = tracking.start_run(config.tracking_uri, config.experiment, name, params, variants, config.parent_run)
    _write_json(config, "mlflow.json", {"run_id": run_id, "tracking_uri": config.tracking_uri})
    return run_id


def _result(config: TrainConfig, run_id: str) -> Result:
    from training import checkpoint

    history = checkpoint.read_state(checkpoint.find(config.run))["history"]
    best = max(history, key=lambda metrics: metrics["top1"])
    return {
        "run": config.run, "run_id": run_id, "epochs": len(history), "last": history[-1],
        "best_epoch": best["epoch"], "best_top1": best["top1"], "history": history,
    }  # fmt: skip


class _Progress:
    """Prints a line an epoch, from the metrics that rank 0 writes into the run's folder."""

    def __init__(self, config: TrainConfig) -> None:
        self._config: TrainConfig | None = config
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    @classmethod
    def silent(cls) -> _Progress:
        """One that prints nothing."""
        progress = cls.__new__(cls)
        progress._config = None
        return progress

    def __enter__(self) -> None:
        if self._config is not None:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        if self._config is not None:
            self._stop.set()
            self._thread.join()

    def _follow(self) -> None:
        shown = 0
        while True:
            stopping = self._stop.wait(0.5)
            shown = self._show(shown)
            if stopping:
                return

    def _show(self, shown: int) -> int:
        config = self._config
        assert config is not None
        try:
            with open(os.path.join(config.run, "metrics.jsonl"), encoding="utf-8") as stream:
                lines = stream.readlines()
        except FileNotFoundError:
            return shown
        for line in lines[shown:]:
            m = json.loads(line)
            left = (config.epochs - m["epoch"]) * m["seconds"]
            aligned = f"  align {m['alignment']:.3f}" if "alignment" in m else ""
            print(
                f"epoch {m['epoch']:>3}/{config.epochs}  ce {m['cross_entropy']:.3f}{aligned}  top-1 {m['top1']:.1f}  "
                f"top-5 {m['top5']:.1f}  {m['images_per_s']:.0f} img/s  {left:.0f} s left",
                file=sys.stderr,
            )
        return len(lines)


def _read_json(config: TrainConfig, name: str) -> dict[str, Any] | None:
    path = os.path.join(config.run, name)
    if not config.run or not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as stream:
        content: dict[str, Any] = json.load(stream)
    return content


def _write_json(config: TrainConfig, name: str, content: dict[str, Any]) -> None:
    _write_text(config, name, json.dumps(content, indent=2) + "\n")


def _write_text(config: TrainConfig, name: str, text: str) -> None:
    path = os.path.join(config.run, name)
    with open(f"{path}.tmp", "w", encoding="utf-8") as stream:
        stream.write(text)
    os.replace(f"{path}.tmp", path)
