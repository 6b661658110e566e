"""`doctor --address`: what every node of a cluster can do, and what of it does not fit together.

A process on each node tells what is there (`look`); `judged` makes findings of that, each with its mend. Only
nodes that are up can be looked at; of a cluster that grows those that will come are not.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from cluster.config import DoctorConfig
from cluster.doctor import Finding
from pipeline import session
from pipeline.errors import UserError
from pipeline.presets import CAPTION_PRESETS, ENCODER_PRESETS, CaptionPreset

GB = 1e9
# What must be the same everywhere: Ray refuses other versions late or not at all, others change results.
ALIKE = ("python", "ray", "torch", "vllm", "transformers", "timm")
# A node process needs as much for libraries and shards in flight before any model.
LEAST_MEMORY = 8 * GB
# Object stores refuse requests that are signed 15 minutes off; locks are taken over after minutes, too.
MOST_SKEW_S = 5.0
ANSWER_S = 120.0


@dataclass(kw_only=True)
class Node:
    """What a node told; `fault` is why it told nothing."""

    name: str
    is_head: bool = False
    fault: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    gpus: list[float] = field(default_factory=list)
    gpus_for_ray: int = 0
    memory: float = 0.0
    disk: float = 0.0
    store: str = ""
    models: dict[str, str] = field(default_factory=dict)
    skew_s: float = 0.0


def examine(config: DoctorConfig) -> list[Finding]:
    """Joins the cluster, looks from every node and says what was found.

    Raises:
        ConnectionError: no cluster answers there.
    """
    # A job has its own cluster's address; what Ray takes for "auto" may be another one on the same machine.
    if config.address != "auto" or not os.environ.get("RAY_ADDRESS"):
        os.environ["RAY_ADDRESS"] = config.address
    session.start_ray()
    import ray

    models = _models(config)
    mark = f".doctor-{uuid.uuid4().hex[:8]}"
    made = bool(config.store) and not _is_there(config.store)
    driver_fault = _written(config.store, mark, make=True) if config.store else ""
    alive = [node for node in ray.nodes() if node["Alive"]]
    asked = [(node, _ask(node, config.store, mark, models)) for node in alive]
    nodes = [_answer(node, answer) for node, answer in asked]
    if config.store:
        _removed(config.store, mark)
        if made:
            _removed_folder(config.store)
    return judged(nodes, config, driver_fault, grows=session.grows())


def judged(nodes: list[Node], config: DoctorConfig, driver_fault: str, *, grows: bool) -> list[Finding]:
    """Findings of what nodes told."""
    working = [node for node in nodes if not node.fault]
    if not working:
        return [_up(nodes, grows), *_silent(nodes)]
    preset = CAPTION_PRESETS.get(config.caption_preset)
    found = [
        _up(nodes, grows),
        *_silent(nodes),
        *_versions(working),
        _gpus(working, preset, config.caption_preset, grows),
        _memory(working),
        _clocks(working),
    ]
    if config.store:
        found.append(_store(working, config.store, driver_fault))
    for model in _models(config):
        found.append(_model(working, model))
    return found


def look(store: str, mark: str, models: tuple[str, ...]) -> dict[str, Any]:
    """Runs on a node: versions, GPUs (bytes each), memory and disk (bytes), whether the store can be written
    and holds what the driver wrote, and where each model is."""
    return {
        "versions": _here(),
        "gpus": _cards(),
        "memory": float(session.memory()),
        "disk": float(shutil.disk_usage(os.getcwd()).free),
        "store": _seen(store, mark) if store else "",
        "models": {model: _model_here(model) for model in models},
    }


def _here() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ALIKE[1:]:
        for distribution in (name, f"{name}-cpu"):
            with suppress(metadata.PackageNotFoundError):
                found[name] = metadata.version(distribution)
                break
        else:
            found[name] = "not installed"
    return found


def _cards() -> list[float]:
    """Bytes of each GPU, whether Ray gave it to this process or not."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())]
        return [float(pynvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles]
    except Exception:  # no driver, no library: no GPU
        return []


def _model_here(name: str) -> str:
    """Where a model is: `folder`, `cache`, `hub`, or why it is nowhere."""
    from pipeline.encoders.models import resolve

    try:
        model = resolve(name)
    except Exception as error:
        return f"missing: {str(error).splitlines()[0]}"
    if model.hub_revision is None:
        return "folder"
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    with suppress(CacheNotFound):
        if any(repo.repo_id == name for repo in scan_cache_dir().repos):
            return "cache"
    return "hub"


def _written(store: str, mark: str, *, make: bool = False) -> str:
    """Writes a mark; why it cannot, or nothing. `make` the folder, where it is not there: a node that does
    not see it must not have one of its own afterwards."""
    from pipeline.store import files, locations

    try:
        filesystem, path = locations.resolve(locations.join(store, mark))
        if make:
            filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        elif locations.is_local(store) and not os.path.isdir(path.rpartition("/")[0]):
            return "the folder is not there"
        files.write_whole(filesystem, path, mark.encode(), lasting=False)
    except Exception as error:
        return _told(error)
    return ""


def _removed(store: str, mark: str) -> None:
    from pipeline.store import locations

    with suppress(Exception):
        filesystem, path = locations.resolve(locations.join(store, mark))
        filesystem.delete_file(path)


def _is_there(store: str) -> bool:
    """Whether a folder is there; an object store has none to be left behind."""
    from pipeline.store import locations

    return not locations.is_local(store) or os.path.isdir(locations.resolve(store)[1])


def _removed_folder(store: str) -> None:
    """One that was made for the question, if nothing else has come into it."""
    from pipeline.store import locations

    with suppress(OSError):
        os.rmdir(locations.resolve(store)[1])


def _seen(store: str, mark: str) -> str:
    """Of a node: `cannot write: ...`, `does not see the driver's file`, or nothing."""
    from pipeline.store import locations

    own = f"{mark}-{uuid.uuid4().hex[:8]}"
    if fault := _written(store, own):
        return f"cannot write: {fault}"
    _removed(store, own)
    try:
        filesystem, path = locations.resolve(locations.join(store, mark))
        with filesystem.open_input_stream(path) as stream:
            alike = stream.read() == mark.encode()
    except OSError:
        alike = False
    return "" if alike else "does not see the driver's file"


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _ask(node: dict[str, Any], store: str, mark: str, models: tuple[str, ...]) -> tuple[Any, Any]:
    """Two calls of one process on the node: what is there, and, once it is warm, what its clock says."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    actor: Any = ray.remote(_Looker).options(num_cpus=0, scheduling_strategy=there).remote()
    return actor, actor.look.remote(store, mark, models)


class _Looker:
    def look(self, store: str, mark: str, models: tuple[str, ...]) -> dict[str, Any]:
        return look(store, mark, models)

    def clock(self) -> float:
        return time.time()


def _answer(node: dict[str, Any], asked: tuple[Any, Any]) -> Node:
    import ray

    told = Node(
        name=node["NodeManagerHostname"] + f" ({node['NodeManagerAddress']})",
        is_head="node:__internal_head__" in node["Resources"],
        gpus_for_ray=int(node["Resources"].get("GPU", 0)),
    )
    actor, answer = asked
    try:
        for name, value in ray.get(answer, timeout=ANSWER_S).items():
            setattr(told, name, value)
        before = time.time()
        clock = ray.get(actor.clock.remote(), timeout=ANSWER_S)
        after = time.time()
        off = clock - (before + after) / 2
        told.skew_s = off if abs(off) > (after - before) / 2 else 0.0
    except UserError:
        raise
    except ray.exceptions.GetTimeoutError:
        told.fault = f"no answer in {ANSWER_S:.0f} s"
    except Exception as error:  # an environment that lacks our packages, a node that goes
        said = " ".join(line.strip() for line in str(error).splitlines()[-8:] if line.strip())
        told.fault = said[-400:] or type(error).__name__
    return told


def _up(nodes: list[Node], grows: bool) -> Finding:
    gpus, head = sum(node.gpus_for_ray for node in nodes), sum(node.is_head for node in nodes)
    growth = "; it grows, and nodes that are not up cannot be looked at" if grows else ""
    return Finding(
        name="nodes", state="ok", detail=f"{len(nodes)} up ({head} head), {gpus} GPUs by Ray's count{growth}"
    )


def _silent(nodes: list[Node]) -> list[Finding]:
    return [
        Finding(
            name=f"node {node.name}",
            state="missing",
            detail=node.fault,
            mend="give it the environment of the others (`make setup`, or the image), and see its log",
        )
        for node in nodes
        if node.fault
    ]


def _versions(nodes: list[Node]) -> list[Finding]:
    found = []
    for part in ALIKE:
        counts = Counter(node.versions.get(part, "?") for node in nodes)
        if len(counts) > 1:
            most = counts.most_common(1)[0][0]
            others = [f"{node.name} {node.versions[part]}" for node in nodes if node.versions[part] != most]
            detail = f"{most} on {counts[most]} nodes, but {', '.join(others)}"
            mend = "install one version on every node (the same image, or the same constraints file)"
            found.append(Finding(name=part, state="missing", detail=detail, mend=mend))
    if not found:
        alike = (
            ", ".join(f"{part} {nodes[0].versions[part]}" for part in ALIKE) if nodes else "no node answers"
        )
        found.append(Finding(name="versions", state="ok", detail=alike))
    return found


def _gpus(nodes: list[Node], preset: CaptionPreset | None, name: str, grows: bool) -> Finding:
    cards = [(node.name, card) for node in nodes for card in node.gpus]
    sizes = Counter(f"{card / GB:.0f} GB" for _, card in cards)
    detail = ", ".join(f"{count} of {size}" for size, count in sizes.items()) or "none is up"
    unseen = [node.name for node in nodes if len(node.gpus) > node.gpus_for_ray]
    if unseen:
        mend = "start Ray there with --num-gpus, or without CUDA_VISIBLE_DEVICES"
        told = f"{detail}; Ray does not know of all on {', '.join(unseen)}"
        return Finding(name="gpus", state="missing", detail=told, mend=mend)
    if not cards:
        if preset and preset.gpu_gb and not grows:
            mend = (
                "bring nodes with GPUs to the cluster, or compute on CPUs with a smaller model (--device cpu)"
            )
            return Finding(name="gpus", state="missing", detail=f"none, and {name} needs one", mend=mend)
        if preset and preset.gpu_gb:
            mend = "bring one node with a GPU up and ask again: none was looked at"
            return Finding(name="gpus", state="absent", detail=f"{detail}, and {name} needs one", mend=mend)
        return Finding(name="gpus", state="absent", detail=detail)
    # Cards are sold by a rounded size, of which a tenth may be kept back.
    small = [where for where, card in cards if preset and card < 0.9 * preset.gpu_gb * GB]
    if preset and small:
        told = f"{detail}; {name} needs {preset.gpu_gb} GB, more than {', '.join(sorted(set(small)))} has"
        mend = "take a smaller --caption-preset, lower --context-length, or keep engines off those nodes"
        return Finding(name="gpus", state="missing", detail=told, mend=mend)
    return Finding(name="gpus", state="ok", detail=detail + (f", enough for {name}" if preset else ""))


def _memory(nodes: list[Node]) -> Finding:
    small = [f"{node.name} {node.memory / GB:.1f} GB" for node in nodes if node.memory < LEAST_MEMORY]
    least = min((node.memory for node in nodes), default=0.0) / GB
    disk = min((node.disk for node in nodes), default=0.0) / GB
    detail = f"at least {least:.0f} GB and {disk:.0f} GB of disk on each node"
    if small:
        mend = f"give each node {LEAST_MEMORY / GB:.0f} GB or more"
        return Finding(name="memory", state="missing", detail=f"{detail}; {', '.join(small)}", mend=mend)
    return Finding(name="memory", state="ok", detail=detail)


def _clocks(nodes: list[Node]) -> Finding:
    off = [f"{node.name} {node.skew_s:+.0f} s" for node in nodes if abs(node.skew_s) > MOST_SKEW_S]
    if off:
        mend = "synchronise clocks (chrony, systemd-timesyncd): object stores refuse what is signed by others"
        return Finding(name="clocks", state="missing", detail=", ".join(off), mend=mend)
    most = max((abs(node.skew_s) for node in nodes), default=0.0)
    return Finding(name="clocks", state="ok", detail=f"within {most:.1f} s of this process")


def _store(nodes: list[Node], store: str, driver_fault: str) -> Finding:
    faults = ([f"this process cannot write: {driver_fault}"] if driver_fault else []) + [
        f"{node.name} {node.store}" for node in nodes if node.store
    ]
    if not faults:
        return Finding(name="store", state="ok", detail=f"{store}: every node writes it and sees the same")
    mend = (
        "put it on storage that all nodes mount at this path, or on s3:// or gs:// with credentials on every "
        "node"
    )
    return Finding(name="store", state="missing", detail=f"{store}: {'; '.join(faults)}", mend=mend)


def _model(nodes: list[Node], model: str) -> Finding:
    lacking = {
        node.name: told for node in nodes if (told := node.models.get(model, "")).startswith("missing")
    }
    if lacking:
        where, why = next(iter(lacking.items()))
        more = f", and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        mend = "let nodes reach the hub, or put the weights into their cache (hf download) or into the image"
        return Finding(name=f"model {model}", state="missing", detail=f"{where}{more}: {why}", mend=mend)
    places = Counter(node.models.get(model, "?") for node in nodes)
    words = {"folder": "a folder", "cache": "the hub's cache", "hub": "the hub, loaded when it is needed"}
    detail = ", ".join(f"{words.get(place, place)} on {count} nodes" for place, count in places.items())
    return Finding(name=f"model {model}", state="ok", detail=detail)


def _models(config: DoctorConfig) -> tuple[str, ...]:
    captioner, encoder = (
        CAPTION_PRESETS.get(config.caption_preset),
        ENCODER_PRESETS.get(config.encoder_preset),
    )
    return tuple(
        name for name in (captioner.model if captioner else "", encoder.encoder if encoder else "") if name
    )
