"""What is being captioned right now, noted in the store, so that whatever kills the engine is found and put
aside.

An engine can die of one picture (a crash in native code, an endless allocation) and take its process along;
Ray starts it again and hands it the same shard. The note tells the successor: after three deaths on a shard
it does the shard in halves, keeping what succeeds, until one picture is left, which becomes a row with an
error. Deaths by other causes (a lost node, a killed run) do not repeat on one shard, and the note of a
finished shard is gone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipeline.captioners.protocol import Caption
from pipeline.config import CaptionConfig
from pipeline.store import Store

WHOLE_TRIES = 3  # deaths of the engine on a shard, within one run, before it is done in halves
WHOLE_RUNS = 5  # runs that ended on a shard before it is (where the engine takes the whole machine along)
# Pictures of one shard that killed the engine before the engine itself is to blame, and the run stops.
CULPRITS = 20
LOADING_TRIES = 5  # deaths of an actor's engine while it loads before the run stops


class EngineDeadError(RuntimeError):
    """The engine cannot be brought to life; the text says where to look. The run stops, what is done is
    kept."""


@dataclass(kw_only=True)
class Note:
    """A shard under way. `todo` and `done` are filled only while it is done in halves; rows are positions in
    the shard."""

    runs: list[str] = field(default_factory=list)
    """Runs that have had this shard in hand, the present one last."""
    deaths: int = 0
    """Deaths of the engine on it in the present run."""
    reason: str = ""
    """What the last engine said, if it could."""
    todo: list[list[int]] = field(default_factory=list)
    """Shares of the shard still to do; the first is the one under way."""
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Captions of finished shares, by row."""


class Underway:
    """The notes of one caption variant."""

    def __init__(self, store: Store, variant: str, run: str) -> None:
        self._store, self._variant, self._run = store, variant, run

    def caption(
        self, shard: int, rows: list[int], captioner: Callable[[list[int]], list[Caption]]
    ) -> tuple[list[Caption], str]:
        """A shard's captions by `captioner`, which may never return; the second value says what was out of
        the ordinary."""
        if not rows:
            return [], ""
        note = self._begin(shard, rows)
        if not note.todo and not note.done:
            self._write(shard, note)
            return captioner(rows), ""
        captions = {int(row): _from_record(record) for row, record in note.done.items()}
        for share in self._shares(shard, note):
            for row, caption in zip(share, captioner(share), strict=True):
                captions[row] = caption
                note.done[str(row)] = _to_record(caption)
        failed = sum(caption.error is not None for caption in captions.values())
        return [
            captions[row] for row in rows
        ], f"done in parts after the engine died on it; {failed} pictures put aside"

    def said(self, shard: int, reason: str) -> None:
        """Records what an engine said before it goes, for the error of the row that turns out to be the
        cause."""
        note = self._read(shard)
        note.reason = reason[:500]
        self._write(shard, note)

    def innocent(self, shard: int) -> None:
        """The engine goes for a reason of its own (out of memory): this death does not count against the
        shard."""
        note = self._read(shard)
        note.deaths -= 1
        self._write(shard, note)

    def finished(self, shard: int) -> None:
        """Forgets a shard that has its receipt."""
        self._store.delete_file(self._path(shard))

    def _begin(self, shard: int, rows: list[int]) -> Note:
        note = self._read(shard)
        if note.runs and note.runs[-1] == self._run:
            note.deaths += 1
        else:
            note.runs.append(self._run)
            note.deaths = 0
        if note.todo:
            self._narrow(note)
        elif not note.done and (note.deaths >= WHOLE_TRIES or len(note.runs) > WHOLE_RUNS):
            note.todo = _halves(rows)
        return note

    def _narrow(self, note: Note) -> None:
        """The share under way killed the engine: its halves come next, or, when it is one picture, that is
        the one."""
        culprit, *others = note.todo
        if len(culprit) > 1:
            note.todo = _halves(culprit) + others
            return
        said = f": {note.reason}" if note.reason else ""
        if sum(caption["error"] is not None for caption in note.done.values()) >= CULPRITS:
            message = (
                f"the engine died on {CULPRITS} pictures of one shard{said}; that is hardly the pictures' "
                "fault."
            )
            raise EngineDeadError(message)
        error = f"the engine died on this picture{said}; look at it, replace it, then run retry"
        note.done[str(culprit[0])] = _to_record(Caption(error=error))
        note.todo, note.reason = others, ""

    def _shares(self, shard: int, note: Note) -> Iterator[list[int]]:
        self._write(shard, note)
        while note.todo:
            yield note.todo[0]
            note.todo.pop(0)
            self._write(shard, note)

    def _path(self, shard: int) -> str:
        return f"{self._store.folder('captions', self._variant)}/underway/part-{shard:05d}.json"

    def _read(self, shard: int) -> Note:
        data = self._store.read_file(self._path(shard))
        return Note(**json.loads(data)) if data else Note()

    def _write(self, shard: int, note: Note) -> None:
        self._store.write_file(self._path(shard), json.dumps(asdict(note)).encode(), lasting=False)


class Loading:
    """Note of one actor's engines: how often they died while loading, and how much smaller their settings
    have become."""

    def __init__(self, store: Store, variant: str, actor: str) -> None:
        self._store = store
        self._path = f"{store.folder('captions', variant)}/underway/engine-{actor}.json"
        self._state = json.loads(store.read_file(self._path) or b'{"deaths": 0, "smaller": 0}')

    @property
    def smaller(self) -> int:
        """How many times the settings have been halved."""
        return int(self._state["smaller"])

    def begin(self) -> None:
        """To be called before loading.

        Raises:
            EngineDeadError: engines keep dying while they load.
        """
        if self._state["deaths"] >= LOADING_TRIES:
            message = (
                f"the captioning engine died {LOADING_TRIES} times while loading; its own message stands in "
                "the worker's log, below /tmp/ray/session_latest/logs. Try `gpt4image doctor --deep`, or "
                "--captioner transformers."
            )
            raise EngineDeadError(message)
        self._put(deaths=self._state["deaths"] + 1)

    def loaded(self) -> None:
        """To be called when the engine stands."""
        self._put(deaths=0)

    def out_of_memory(self, smallest: int) -> None:
        """The actor's next engine is to be smaller.

        Raises:
            EngineDeadError: it is already as small as it can be.
        """
        if self.smaller >= smallest:
            message = (
                f"out of memory even with settings halved {smallest} times: take a smaller model, "
                "--caption-edge or --context-length, or cards with more memory."
            )
            raise EngineDeadError(message)
        self._put(deaths=0, smaller=self.smaller + 1)

    def _put(self, **changes: int) -> None:
        self._state |= changes
        self._store.write_file(self._path, json.dumps(self._state).encode(), lasting=False)


def smaller(config: CaptionConfig, times: int) -> CaptionConfig:
    """Settings with the engine's batch halved `times` times, and with more of the card left to what is
    outside vLLM's share."""
    if not times:
        return config
    batch = config.engine_batch or (256 if config.captioner == "vllm" else 16)
    share = max(0.5, config.gpu_memory_utilization - 0.05 * times)
    return replace(config, engine_batch=max(1, batch >> times), gpu_memory_utilization=share)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an engine failed for want of memory, whatever class its library raises."""
    text = f"{type(error).__name__} {error}".lower()
    signs = (
        "outofmemory",
        "out of memory",
        "no available memory",
        "kv cache is needed",
        "memoryerror",
        "can't allocate memory",
    )
    return any(sign in text for sign in signs)


def is_engine_death(error: BaseException) -> bool:
    """Whether an engine in a process of its own has died while it was loaded: a new one may live (`Loading`
    counts them)."""
    return "engine core" in str(error).lower() or type(error).__name__ == "EngineDeadError"


def _to_record(caption: Caption) -> dict[str, Any]:
    """A caption in a note, where it is called `text`: a release that goes on with a note may not be the one
    that wrote it."""
    fields = asdict(caption)
    return {"text": fields.pop("caption"), **fields}


def _from_record(record: dict[str, Any]) -> Caption:
    fields = dict(record)
    return Caption(caption=fields.pop("text"), **fields)


def _halves(rows: list[int]) -> list[list[int]]:
    middle = (len(rows) + 1) // 2
    return [half for half in (rows[:middle], rows[middle:]) if half]
