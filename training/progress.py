"""A run's small files, on a disk or s3://, and the lines on the screen that are made of them."""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

from pyarrow import fs

from pipeline import locations
from training.record import headline


def read_json(run: str, name: str) -> dict[str, Any] | None:
    """A JSON file of a run; None where there is none."""
    text = _read(run, name)
    if text is None:
        return None
    content: dict[str, Any] = json.loads(text)
    return content


def write_json(run: str, name: str, content: dict[str, Any]) -> None:
    """Writes a JSON file of a run, whole or not at all."""
    write_text(run, name, json.dumps(content, indent=2) + "\n")


def write_text(run: str, name: str, text: str) -> None:
    """Writes a text file of a run, whole or not at all."""
    filesystem, root = locations.resolve(run)
    local = isinstance(filesystem, fs.LocalFileSystem)
    path = f"{root}/{name}"
    with filesystem.open_output_stream(f"{path}.tmp" if local else path) as stream:  # an object store puts whole objects
        stream.write(text.encode())
    if local:
        filesystem.move(f"{path}.tmp", path)


def _read(run: str, name: str) -> str | None:
    if not run:
        return None
    try:
        return locations.fetch(run, name).decode()
    except FileNotFoundError:
        return None


class Follower:
    """Prints a line an epoch and a bar of the present one, from what rank 0 writes into the run's folder."""

    def __init__(self, run: str, epochs: int, *, show: bool) -> None:
        self._run, self._epochs, self._show = run, epochs, show
        self._shown = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Follower:
        if self._show:
            self._shown = len(self._lines())  # what an earlier start of this run has printed
            if self._shown:
                print(f"train: {self._run} goes on after epoch {self._shown} of {self._epochs}", file=sys.stderr, flush=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._show:
            self._stop.set()
            self._thread.join()

    def _lines(self) -> list[str]:
        return (_read(self._run, "metrics.jsonl") or "").splitlines()

    def _follow(self) -> None:
        from tqdm import tqdm

        pause = 0.5 if locations.is_local(self._run) else 5.0
        told = 0.0
        waited = 0.0
        with tqdm(disable=not sys.stderr.isatty(), bar_format="{desc}", leave=False, file=sys.stderr) as bar:
            while True:
                stopping = self._stop.wait(pause)
                waited += pause
                lines = self._lines()
                for line in lines[self._shown :]:
                    tqdm.write(self._epoch_line(json.loads(line)), file=sys.stderr)
                    told = waited
                self._shown = max(self._shown, len(lines))
                if stopping:
                    return
                now = read_json(self._run, "progress.json")
                if now is None:
                    continue
                bar.set_description_str(self._step_line(now))
                if bar.disable and waited - told > 60:  # a log, not a screen: a line a minute
                    print(self._step_line(now), file=sys.stderr, flush=True)
                    told = waited

    def _epoch_line(self, m: dict[str, float]) -> str:
        left = (self._epochs - m["epoch"]) * m["seconds"]
        aligned = f"  align {m['alignment']:.3f}" if "alignment" in m else ""
        raw = f" (without averaging {m['top1']:.1f})" if "ema_top1" in m else ""
        return (
            f"epoch {m['epoch']:>3.0f}/{self._epochs}  ce {m['cross_entropy']:.3f}{aligned}  top-1 {headline(m):.1f}{raw}  "
            f"top-5 {headline(m, 'top5'):.1f}  {m['images_per_s']:.0f} img/s  {_clock(left)} left"
        )

    def _step_line(self, now: dict[str, float]) -> str:
        left = (now["steps"] - now["step"]) * now["batch"] / now["images_per_s"]
        where = f"step {now['step']:.0f}/{now['steps']:.0f}  loss {now['loss']:.3f}"
        return f"{where}  {now['images_per_s']:.0f} img/s  {_clock(left)} left"


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
