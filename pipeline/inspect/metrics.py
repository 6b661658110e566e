"""What Prometheus hears of our work: counts of a stage, and how far a stage or a training is.

Ray exports them on every node beside its own, as `ray_gpt4image_...` (a counter's name ends in `_total`);
`cluster/grafana` has a dashboard. On a machine whose Ray is this process's own nobody looks, and nothing is
made. A count or a value costs 3 us where it is told: three of them a shard, and a few every five seconds.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any, Self

from pipeline import session

# Ray exports a gauge once for each time that it is set, every ten seconds, and forgets it after twenty: it
# must be set anew as long as it holds.
_BEAT_S = 5.0
_STAGE = ("stage", "variant")
COUNTERS = {
    "images": ("Rows of finished shards, failed ones too", _STAGE),
    "failures": ("Rows of finished shards that have no result", _STAGE),
    "tokens": ("Tokens that the captioner wrote, or that the text encoder read", _STAGE),
}
GAUGES = {
    "engines_wanted": ("Engines, or encoders, that a stage asks for", _STAGE),
    "engines_up": ("1 for each engine, or encoder, that has its model loaded", _STAGE),
    "training_epoch": ("Epochs that are finished", ("run",)),
    "training_epochs": ("Epochs of the whole run", ("run",)),
    "training_step": ("Steps that are done", ("run",)),
    "training_images_per_second": ("Images a second in the present epoch, all workers", ("run",)),
    "training_loss": ("Parts of the loss, means of the latest epoch", ("run", "part")),
    "training_score": ("What an epoch is judged by, on the eval split", ("run", "metric")),
}


def on() -> bool:
    """Whether anybody can look: on a cluster. Actors do not know, their driver tells them."""
    return not session.is_local()


class Watched:
    """A stage or a training as Prometheus sees it, with labels that all its metrics have; idle unless `on`.

    No fault of Ray's metrics reaches the work: the first one is told, and the rest is left out.
    """

    def __init__(self, on: bool, **labels: str) -> None:
        self.on = on
        self._labels = labels
        self._shown: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="metrics", daemon=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """What was shown last is said once more, and vanishes from Prometheus within half a minute."""
        self._stop.set()
        self._say_again()

    def count(self, name: str, amount: float) -> None:
        """Adds to a counter."""
        if self.on and amount > 0:
            with self._no_harm():
                _counter(name).inc(amount, tags=self._labels)

    def show(self, name: str, value: float, **labels: str) -> None:
        """Sets a gauge, which holds until it is set anew, or this ends."""
        if not self.on:
            return
        self._shown[name, tuple(labels.items())] = value
        with self._no_harm():
            _gauge(name).set(value, tags=self._labels | labels)
            if not self._thread.ident:
                self._thread.start()

    def _beat(self) -> None:
        while not self._stop.wait(_BEAT_S):
            self._say_again()

    def _say_again(self) -> None:
        for (name, labels), value in list(self._shown.items()):
            if self.on:
                with self._no_harm():
                    _gauge(name).set(value, tags=self._labels | dict(labels))

    @contextlib.contextmanager
    def _no_harm(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.on = False
            print(f"metrics: none from here on: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


@cache
def _counter(name: str) -> Any:
    from ray.util.metrics import Counter

    description, labels = COUNTERS[name]
    return Counter(f"gpt4image_{name}", description, labels)


@cache
def _gauge(name: str) -> Any:
    from ray.util.metrics import Gauge

    description, labels = GAUGES[name]
    return Gauge(f"gpt4image_{name}", description, labels)
