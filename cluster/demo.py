"""`demo`: the main job on the embedded default, from pictures to the page, in one process and one Ray.

Draws scenes, describes them with the shipped captioner, sweeps two backbones, compares five seeds,
writes report.html. About twelve minutes on two cores; the same command again goes on where it stopped, or
finds all done.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict

from cluster import cli
from cluster.config import DemoConfig
from pipeline.errors import OtherSettingsError

SWEEP_EPOCHS = "4"  # to see the sweep work; what is compared is trained for as long as the recipe says


def run(config: DemoConfig) -> int:
    """Runs the steps in order; stops at the first that fails and returns its exit code."""
    os.environ.pop("RAY_ADDRESS", None)  # all on this machine, whatever cluster is joined otherwise
    root = os.path.abspath(config.to)
    os.makedirs(root, exist_ok=True)
    _check_as_begun(config, root)
    seconds: dict[str, float] = {}
    with _PeakMemory() as memory:
        for name, step in _steps(config, root).items():
            print(f"\n== {name}", file=sys.stderr, flush=True)
            start = time.monotonic()
            code = step()
            seconds[name] = round(time.monotonic() - start, 1)
            if code:
                print(
                    f"demo: step {name!r} ended with exit code {code}; the same command goes on from here",
                    file=sys.stderr,
                )
                return code
    facts = {
        "seconds": seconds,
        "total_s": round(sum(seconds.values()), 1),
        "peak_memory_gib": round(memory.peak / 2**30, 2),
    }
    with open(os.path.join(root, "demo.json"), "w", encoding="utf-8") as stream:
        json.dump(facts, stream, indent=2)
    print(
        f"\n{facts['total_s']:.0f} s in all, peak memory {facts['peak_memory_gib']} GiB\nopen "
        f"{root}/report.html"
    )
    return 0


def _steps(config: DemoConfig, root: str) -> dict[str, Callable[[], int]]:
    store, uri = f"{root}/store", f"sqlite:///{root}/mlflow.db"
    common = ["--store", store, "--preset", "scenes", "--tracking-uri", uri]
    if config.epochs:
        common += ["--epochs", str(config.epochs)]

    def verb(*arguments: str) -> Callable[[], int]:
        return lambda: cli.main(arguments)

    return {
        "draw scenes": lambda: _render(config, root),
        "describe them": verb(
            "describe", "--images", f"{root}/scenes", "--store", store, "--caption-preset", "scenes"
        ),
        "what the store holds": verb("status", "--store", store),
        "sweep weight, dimension and backbone": verb(
            "tune",
            *common,
            "--sweep",
            f"{root}/sweep",
            "--alignment-weights",
            "0",
            "0.5",
            "--projection-dims",
            "64",
            "0",
            "--backbones",
            "test_resnet",
            "test_vit",
            "--concurrent",
            "2",
            "--no-export",
            "--fresh-seeds",
            "0",
            *(() if config.epochs else ("--epochs", SWEEP_EPOCHS)),
        ),
        # The recipe's weight, fixed beforehand, on seeds that the sweep has not seen.
        "compare over five seeds": verb(
            "tune",
            *common,
            "--sweep",
            f"{root}/seeds",
            "--alignment-weights",
            "0",
            "0.5",
            "--projection-dims",
            "0",
            "--seeds",
            "1",
            "2",
            "3",
            "4",
            "5",
            "--concurrent",
            "2",
            "--fresh-seeds",
            "0",  # these are: nothing is chosen here
        ),
        "evaluate": verb("evaluate", f"{root}/seeds/test_resnet-w0.5-d0-s1"),
        "report": verb("report", f"{root}/sweep", f"{root}/seeds", "--html", f"{root}/report.html"),
    }


def _check_as_begun(config: DemoConfig, root: str) -> None:
    """Pictures that are drawn stay: other settings need another folder.

    Raises:
        OtherSettingsError: it was begun otherwise, or by a release that did not say how.
    """
    file, settings = f"{root}/settings.json", {k: v for k, v in asdict(config).items() if k != "to"}
    if not os.path.isfile(file):
        if os.path.isfile(f"{root}/scenes/truth.jsonl"):
            message = f"to={config.to}: was begun by an earlier release; pass another --to, or delete it."
            raise OtherSettingsError(message)
        with open(file, "w", encoding="utf-8") as stream:
            json.dump(settings, stream, indent=2)
        return
    with open(file, encoding="utf-8") as stream:
        begun = json.load(stream)
    if begun != settings:
        lines = [f"to={config.to}: was begun with other settings; pass those again, or another --to."]
        lines += [
            f"  {name}: {begun.get(name)} then, {value} now"
            for name, value in settings.items()
            if begun.get(name) != value
        ]
        raise OtherSettingsError("\n".join(lines))


def _render(config: DemoConfig, root: str) -> int:
    if os.path.isfile(f"{root}/scenes/truth.jsonl"):
        return 0
    script = os.path.join(
        os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "examples", "scenes", "render.py"
    )
    counts = ["--train-per-class", str(config.train_per_class), "--val-per-class", str(config.val_per_class)]
    counts += ["--task", config.task]
    return subprocess.run([sys.executable, script, "--to", f"{root}/scenes", *counts], check=False).returncode


class _PeakMemory:
    """Samples the memory of this process and all its descendants (Ray's too) twice a second; shared pages
    count once."""

    def __enter__(self) -> _PeakMemory:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(2.0):
            self.peak = max(self.peak, _tree_memory())


def _tree_memory() -> int:
    import psutil

    total = 0
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total
