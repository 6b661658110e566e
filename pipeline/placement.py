"""How many actors a stage gets and what each may use, from the cluster's GPUs and CPUs, the model and the
store.

A stage gets what its settings ask for. What a machine, or a cluster that does not grow, cannot give is said
at once: Ray would wait for it, silently and for ever. A cluster that grows is waited for (`waiting`), so what
it has at the start decides nothing but what the settings leave open. The same machine, model and store give
the same placement, whatever is done already: a run that goes on computes as it began.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from pipeline import session
from pipeline.config import CaptionConfig, EmbedConfig, FeatureConfig
from pipeline.encoders.models import ModelRef
from pipeline.errors import SettingsError

# Of a model of at most so many bytes several share a machine's cores, in processes of 2 GiB each, nearly all
# of it libraries and room for activations. Larger ones would take memory, and read it for every token, as
# often as there are processes.
_SMALL = 2**28
_PROCESS = 2**31
# Loading takes as long as some 2,000 captions of a small model: one that gets fewer is not worth its start.
_ROWS_EACH = 2048
# CPUs, by Ray's count, of a decoder and of the writer (half of one).
_BESIDE = 2
# Processes of one CPU that a cluster which grows is asked for where the settings leave their number open: it
# should not grow without bounds, and with so many reading, or embedding, is seldom what a job waits for.
_MOST_UNASKED = 32


@dataclass(frozen=True)
class Pool:
    """Actors of a stage: at most, at least and at first. It works with those that are there; idle ones beyond
    the least end."""

    most: int
    least: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "least", self.least or self.most)
        object.__setattr__(self, "first", self.first or self.most)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """`actors` hold a model, with `gpus` and `cpus` each; `decoders` actors of one CPU prepare what those
    take.

    `least`: of a pool that grows and shrinks, how many it begins with and keeps; 0: the pool's size is fixed.
    `crowded`: the models compute on all cores of this machine, so that whatever runs beside them takes from
    them.
    """

    actors: int
    gpus: float
    cpus: int
    decoders: int = 0
    least: int = 0
    crowded: bool = False

    @property
    def pool(self) -> Pool:
        """All are asked for at once: a pool that begins small reaches its size minutes late."""
        return Pool(self.actors, self.least)

    @property
    def decoder_pool(self) -> Pool:
        """Beside a pool that grows one begins, and more come as pictures queue: asked for at once, they would
        take the CPUs of the first nodes, and no engine would find room."""
        return Pool(self.decoders, least=1, first=1) if self.least else Pool(self.decoders)

    def no_more_than(self, shards: int) -> Placement:
        """Of a pool that grows: no nodes are asked for that would have no shard to work on."""
        if not self.least:
            return self
        return replace(self, actors=min(self.actors, shards), least=min(self.least, shards))


def captioners(config: CaptionConfig, model: ModelRef, rows: int) -> Placement:
    """Engines and the decoders beside them, for a store of so many rows, done or not. Raises as `encoders`
    does."""
    if config.captioner == "openai":  # asking a server needs neither a GPU nor much of a core
        asking = config.replicas or 1
        decoders = asking if session.grows() else _decoders(asking, asking, "replicas")
        least = min(asking, _least(config.min_replicas))
        return Placement(actors=asking, gpus=0.0, cpus=1, decoders=decoders, least=least)
    on_gpus = session.computes_on_gpus(config.device)
    if session.grows() or (config.min_replicas and not session.is_local()):
        return _growing(config, on_gpus)
    return _placement(
        config.replicas, "replicas", model, rows, on_gpus=on_gpus, cores=config.engine_cores, decodes=True
    )


def encoders(config: EmbedConfig, model: ModelRef, rows: int) -> Placement:
    """Text encoders for a store of so many rows, done or not.

    Raises:
        ValueError: the cluster has not so many GPUs or CPUs.
    """
    on_gpus = session.computes_on_gpus(config.device)
    if session.grows():
        # On GPUs embedding takes minutes: it does with those that are there, or with one.
        unasked = session.gpus() if on_gpus else min(_MOST_UNASKED, rows // _ROWS_EACH)
        actors = config.encoder_replicas or max(1, unasked)
        return Placement(actors=actors, gpus=float(on_gpus), cpus=1, least=1)
    return _placement(config.encoder_replicas, "encoder_replicas", model, rows, on_gpus=on_gpus)


def towers(config: FeatureConfig, model: ModelRef, rows: int) -> Placement:
    """Vision towers and the decoders beside them. Raises as `encoders` does."""
    on_gpus = session.computes_on_gpus(config.device)
    if session.grows():
        unasked = session.gpus() if on_gpus else min(_MOST_UNASKED, rows // _ROWS_EACH)
        actors = config.tower_replicas or max(1, unasked)
        decoders = max(actors, session.spare_cores())
        return Placement(actors=actors, gpus=float(on_gpus), cpus=1, decoders=decoders, least=1)
    return _placement(config.tower_replicas, "tower_replicas", model, rows, on_gpus=on_gpus, decodes=True)


def ingesters(shards: int) -> Pool:
    """Actors that read and decode pictures; a cluster that grows gets nodes for them while they are busy."""
    now = session.spare_cores()
    if not session.grows():
        return Pool(now)
    now = min(now, shards)
    return Pool(max(now, min(_MOST_UNASKED, shards)), least=1, first=now)


def _growing(config: CaptionConfig, on_gpus: bool) -> Placement:
    """Of a cluster whose nodes come and go: what is asked for, whatever is there."""
    actors = config.replicas or (session.gpus() if on_gpus else 1)
    if not actors:
        message = (
            "replicas=0: the cluster grows, has no GPU now, and nothing says how many it should get; pass "
            "--replicas with the engines (a GPU each) that you want, or --device cpu."
        )
        raise SettingsError(message)
    cpus = 1 if on_gpus else config.engine_cores or 1
    least = min(actors, _least(config.min_replicas))
    decoders = max(actors, session.spare_cores())
    if not session.grows():  # of what is there the least must leave room for one, and for the writer
        decoders = max(1, min(decoders, session.cpus() - least * cpus - 1))
    return Placement(actors=actors, gpus=float(on_gpus), cpus=cpus, decoders=decoders, least=least)


def _least(wanted: int) -> int:
    return 0 if session.is_local() else wanted or int(session.grows())


def check(captioning: CaptionConfig, embedding: EmbedConfig) -> None:
    """Finds before anything is read or paid for that a cluster has nothing to compute on, or that nothing
    says how much it should get; raises as `captioners` does."""
    if captioning.captioner != "openai":
        on_gpus = session.computes_on_gpus(captioning.device)
        if session.grows():
            _growing(captioning, on_gpus)
    session.computes_on_gpus(embedding.device)


def side_by_side(model: ModelRef, cores: int, memory: int, rows: int) -> int:
    """Processes that share the cores of a machine without GPUs: one core each for a small model, else one
    process with all.

    Threads of one small model mostly wait for each other: two engines of one core each make 1.3 times the
    captions of one engine with both (`benchmarks/captioning.py`). At most a quarter of the memory (bytes) is
    theirs.
    """
    if not 0 < _weights(model) <= _SMALL:
        return 1
    return max(1, min(cores, memory // 4 // _PROCESS, rows // _ROWS_EACH))


def _placement(
    wanted: int,
    flag: str,
    model: ModelRef,
    rows: int,
    *,
    on_gpus: bool,
    cores: int = 0,
    decodes: bool = False,
) -> Placement:
    gpus, total = session.gpus() if on_gpus else 0, session.cpus()
    if gpus and wanted > gpus:
        name = flag.replace("_", "-")
        message = (
            f"{flag}={wanted}: the cluster has {gpus} GPUs, and each actor needs one; pass --{name} {gpus} "
            "or fewer."
        )
        raise SettingsError(message)
    if cores > (largest := session.largest_node()):
        message = (
            f"engine_cores={cores}: the largest node has {largest} CPUs; pass --engine-cores {largest} or "
            "fewer."
        )
        raise SettingsError(message)
    if gpus:
        actors, cpus = wanted or gpus, 1
    else:
        # On a cluster of this one machine Ray's CPUs are its cores, and decoding needs some of them. On
        # several nodes decoders spread over half of each, and a model must find its CPUs on one node,
        # whatever came first.
        free = max(1, min(session.cores(), total - _BESIDE * decodes))
        if decodes and session.several_nodes():
            free = max(1, min(free, session.largest_node() // 2))
        actors = wanted or (1 if cores else side_by_side(model, free, session.memory(), rows))
        # Ray gives an actor as many OpenMP threads as CPUs: a model without a GPU computes with them, so it
        # gets the cores.
        cpus = cores or max(1, free // actors)
    if actors * cpus > total:
        message = (
            f"{flag}={actors}: with {cpus} CPUs each more than the cluster's {total}; pass fewer, or take a "
            "larger cluster."
        )
        raise SettingsError(message)
    decoders = _decoders(actors, actors * cpus, flag) if decodes else 0
    crowded = not gpus and actors * cpus >= session.cores()
    return Placement(actors=actors, gpus=float(bool(gpus)), cpus=cpus, decoders=decoders, crowded=crowded)


def _decoders(actors: int, taken: int, flag: str) -> int:
    """As many as half of the cores, or one for each model, within what the models and the writer leave."""
    left = session.cpus() - taken - 1
    if left < 1:
        message = (
            f"{flag}={actors}: takes {taken} of the cluster's {session.cpus()} CPUs, and decoding and "
            f"writing need {_BESIDE} beside them; pass fewer, or take a larger cluster."
        )
        raise SettingsError(message)
    return min(max(session.spare_cores(), actors), left)


def _weights(model: ModelRef) -> int:
    """Bytes of the weights in a folder; 0 for a model of the hub, which is not here yet."""
    if not os.path.isdir(model.location):
        return 0
    return sum(
        file.stat().st_size for file in os.scandir(model.location) if file.name.endswith(".safetensors")
    )
