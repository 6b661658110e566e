"""How far runs are, on the screen and for Prometheus, from the small files in their folders."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Self

from pipeline.inspect.metrics import Watched
from pipeline.store import locations
from training.objectives.metric import Metric
from training.objectives.registry import RIVALS, SHORT_LOSSES
from training.run_folder import headline, read_json, read_text, write_json


@contextmanager
def waits(run: str, *, aloud: bool) -> Iterator[Callable[[str], None]]:
    """Where a run's wait for room is told: here, or, of a process that nobody hears, in its folder
    (waiting.json), for whoever started it (`Listener`)."""

    def say(text: str) -> None:
        if aloud:
            print(text, file=sys.stderr, flush=True)
        else:
            write_json(run, "waiting.json", {"told": text})

    try:
        yield say
    finally:
        if not aloud and read_json(run, "waiting.json") is not None:
            filesystem, path = locations.resolve(run)
            filesystem.delete_file(f"{path}/waiting.json")


class Listener:
    """Prints what runs that nobody hears say: while they wait for room, and once in a while how far they are.

    Args:
        runs: gives those that are under way.
        metric: that they are judged by.
        pause: seconds between two looks.
        told_every: seconds between two lines on how far they are, of which one is left out where nothing has
            moved.
    """

    def __init__(
        self,
        runs: Callable[[], Iterable[str]],
        *,
        metric: Metric | None = None,
        pause: float = 5.0,
        told_every: float = 60.0,
    ) -> None:
        self._runs, self._metric = runs, metric or Metric()
        self._told: dict[str, str] = {}
        self._pause, self._told_every = pause, told_every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="waits", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _listen(self) -> None:
        due, shown = time.monotonic() + self._told_every, ""
        while not self._stop.wait(self._pause):
            runs = list(self._runs())
            for run in runs:
                with suppress(OSError, ValueError):
                    now = (read_json(run, "waiting.json") or {"told": ""})["told"]
                    if now and now != self._told.get(run):
                        print(now, file=sys.stderr, flush=True)
                    self._told[run] = now
            if time.monotonic() < due:
                continue
            due = time.monotonic() + self._told_every
            line = "; ".join(f"{run.rpartition('/')[2]} {self._where(run)}" for run in runs)
            if line and line != shown:
                print(f"under way: {line}", file=sys.stderr, flush=True)
            shown = line

    def _where(self, run: str) -> str:
        with suppress(OSError, ValueError, KeyError):
            if lines := (read_text(run, "metrics.jsonl") or "").splitlines():
                last = json.loads(lines[-1])
                value = self._metric.shown(headline(last, self._metric.name))
                return f"epoch {last['epoch']:.0f}, {self._metric.title} {value}"
            if (now := read_json(run, "progress.json")) is not None:
                return f"step {now['step']:.0f} of {now['steps']:.0f}"
        return "starting"


def label(run: str) -> str:
    """What a run is called where its address may not be seen: by its folder's name, and what tells it from
    others of that name."""
    return f"{run.rpartition('/')[2]}-{hashlib.sha256(run.encode()).hexdigest()[:6]}"


class Follower:
    """Prints a line an epoch and a bar of the present one, from what rank 0 writes into the run's folder.

    With `watch` Prometheus hears the same: from here, so that it costs the workers nothing.
    """

    def __init__(
        self, run: str, epochs: int, *, show: bool, watch: bool = False, metric: Metric | None = None
    ) -> None:
        self._run, self._epochs, self._show = run, epochs, show
        self._watched = Watched(watch, run=label(run))
        self._metric = metric or Metric()
        self._follows = show or watch
        self._shown = 0
        self._step = 0.0  # of the latest epoch that Prometheus knows
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Follower:
        self._shown = len(self._lines()) if self._follows else 0  # what an earlier start has printed
        if self._shown and self._show:
            print(
                f"train: {self._run} goes on after epoch {self._shown} of {self._epochs}",
                file=sys.stderr,
                flush=True,
            )
        self._watched.show("training_epochs", self._epochs)
        self._watched.show("training_epoch", self._shown)
        if self._follows:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._follows:
            self._stop.set()
            self._thread.join()
        self._watched.end()

    def _lines(self) -> list[str]:
        return (read_text(self._run, "metrics.jsonl") or "").splitlines()

    def _follow(self) -> None:
        from tqdm import tqdm

        pause = 0.5 if locations.is_local(self._run) else 5.0
        told = 0.0
        waited = 0.0
        with tqdm(
            disable=not (self._show and sys.stderr.isatty()),
            bar_format="{desc}",
            leave=False,
            file=sys.stderr,
        ) as bar:
            while True:
                stopping = self._stop.wait(pause)
                waited += pause
                lines = self._lines()
                for line in lines[self._shown :]:
                    self._watch_epoch(json.loads(line))
                    if self._show:
                        tqdm.write(self._epoch_line(json.loads(line)), file=sys.stderr)
                    told = waited
                self._shown = max(self._shown, len(lines))
                if stopping:
                    return
                now = read_json(self._run, "progress.json")
                if now is None:
                    continue
                if now["step"] > self._step:
                    self._watched.show("training_step", now["step"])
                    self._watched.show("training_images_per_second", now["images_per_s"])
                bar.set_description_str(self._step_line(now))
                if self._show and bar.disable and waited - told > 60:  # a log, not a screen: a line a minute
                    print(self._step_line(now), file=sys.stderr, flush=True)
                    told = waited

    def _watch_epoch(self, m: dict[str, float]) -> None:
        if not self._watched.on:
            return
        self._watched.show("training_epoch", m["epoch"])
        self._step = m["step"]
        self._watched.show("training_step", m["step"])
        self._watched.show("training_images_per_second", m["images_per_s"])
        self._watched.show("training_score", headline(m, self._metric.name), metric=self._metric.name)
        for part in ("loss", *SHORT_LOSSES):
            if part in m:
                self._watched.show("training_loss", m[part], part=part)

    def _epoch_line(self, m: dict[str, float]) -> str:
        left = (self._epochs - m["epoch"]) * m["seconds"]
        name, title, digits = self._metric.name, self._metric.title, self._metric.digits - 1
        losses = (
            "  ".join(f"{short} {m[full]:.3f}" for full, short in SHORT_LOSSES.items() if full in m)
            or f"loss {m['loss']:.3f}"
        )
        raw = f" (without averaging {m[name]:.{digits}f})" if f"ema_{name}" in m else ""
        top5 = f"top-5 {headline(m, 'top5'):.1f}  " if "top5" in m else ""
        top5 += "".join(f"{short} {m[full]:.{digits}f}  " for full, short in RIVALS.items() if full in m)
        return (
            f"epoch {m['epoch']:>3.0f}/{self._epochs}  {losses}  {title} {headline(m, name):.{digits}f}{raw} "
            f" {top5}{m['images_per_s']:.0f} img/s  {_clock(left)} left"
        )

    def _step_line(self, now: dict[str, float]) -> str:
        left = (now["steps"] - now["step"]) * now["batch"] / now["images_per_s"]
        where = f"step {now['step']:.0f}/{now['steps']:.0f}  loss {now['loss']:.3f}"
        return f"{where}  {now['images_per_s']:.0f} img/s  {_clock(left)} left"


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
