"""`demo`: the main job on the embedded default, from pictures to the page, in one process and one Ray.

Draws scenes, describes them with the shipped captioner, sweeps two backbones, compares five seeds,
writes report.html; with --objective what another method does with the scenes (`demo_steps.py`). The same
command again goes on where it stopped, or finds all done.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import asdict

from cluster import cli
from cluster.config import DemoConfig
from cluster.demo_steps import steps
from pipeline.errors import OtherSettingsError


def run(config: DemoConfig) -> int:
    """Runs the steps in order; stops at the first that fails and returns its exit code."""
    os.environ.pop("RAY_ADDRESS", None)  # all on this machine, whatever cluster is joined otherwise
    root = os.path.abspath(config.folder)
    os.makedirs(root, exist_ok=True)
    _check_as_begun(config, root)
    seconds: dict[str, float] = {}
    with _PeakMemory() as memory:
        for name, arguments in steps(config, root):
            print(f"\n== {name}", file=sys.stderr, flush=True)
            if arguments:
                print(f"$ gpt4image {shlex.join(arguments)}", file=sys.stderr, flush=True)
            start = time.monotonic()
            code = cli.main(arguments) if arguments else _render(config, root)
            seconds[name] = round(time.monotonic() - start, 1)
            if code:
                on = "the same command goes on from here"
                if code == 2:  # it has no flags for what recipes said then
                    on += "; where an earlier release began the folder, pass another --to"
                print(f"demo: step {name!r} ended with exit code {code}; {on}", file=sys.stderr)
                return code
    facts = {
        "seconds": seconds,
        "total_s": round(sum(seconds.values()), 1),
        "peak_memory_gib": round(memory.peak / 2**30, 2),
    }
    with open(os.path.join(root, "demo.json"), "w", encoding="utf-8") as stream:
        json.dump(facts, stream, indent=2)
    print(f"\n{facts['total_s']:.0f} s in all, peak memory {facts['peak_memory_gib']} GiB")
    page = f"{root}/report.html"
    print(f"open {page}" if os.path.isfile(page) else f"everything is in {root}")
    return 0


def _check_as_begun(config: DemoConfig, root: str) -> None:
    """Pictures that are drawn stay: other settings need another folder.

    Raises:
        OtherSettingsError: it was begun otherwise, or by a release that did not say how.
    """
    settings = {k: v for k, v in asdict(config).items() if k != "to"} | {"train_per_class": config.pictures}
    file = f"{root}/settings.json"
    if not os.path.isfile(file):
        if os.path.isfile(f"{root}/scenes/truth.jsonl"):
            message = f"to={config.folder}: was begun by an earlier release; pass another --to, or delete it."
            raise OtherSettingsError(message)
        with open(file, "w", encoding="utf-8") as stream:
            json.dump(settings, stream, indent=2)
        return
    with open(file, encoding="utf-8") as stream:
        begun = {"objective": "align", **json.load(stream)}  # early releases knew no other
    if begun != settings:
        lines = [f"to={config.folder}: was begun with other settings; pass those again, or another --to."]
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
    counts = ["--train-per-class", str(config.pictures), "--val-per-class", str(config.val_per_class)]
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
