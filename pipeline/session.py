"""Ray for this process: joins the cluster that RAY_ADDRESS names, or starts Ray on this machine, on loopback
only."""

from __future__ import annotations

import logging
import os
import platform
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import SettingsError, UnreachableError, leave

# A head answers before the autoscaler beside it has reported for the first time.
_FIRST_WORD_S = 30.0
_ANSWER_S = 10.0
_LOOK_S = 2.0  # between two looks at whether the cluster is still there


@dataclass(frozen=True, kw_only=True)
class ClusterRuntime:
    """How long a cluster is waited for."""

    wait_minutes: float = 60.0
    """Longest wait until a cluster has room, where it grows or others work on it; said while it lasts."""


def wait_faults(config: ClusterRuntime) -> list[str]:
    """What is wrong with how long a cluster is waited for."""
    if config.wait_minutes < 0:
        return [f"wait_minutes={config.wait_minutes}: must be 0 or more."]
    return []


@dataclass(frozen=True, kw_only=True)
class ModelRuntime(ClusterRuntime):
    """What models compute on."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """What models compute on. auto: GPUs, and the CPUs of a machine without any; a cluster that has no GPU
    computes on CPUs only when told to. On a cluster that grows, auto and cuda ask for nodes with GPUs."""


def start_ray() -> None:
    """Makes Ray ready; does nothing when it is. A submitted job has RAY_ADDRESS set and joins its cluster.

    Raises:
        ConnectionError: RAY_ADDRESS names a cluster that does not answer or refuses the token.
    """
    if not os.environ.get("RAY_ADDRESS"):
        # Read by Ray when it is imported: without it a laptop's Ray would listen on every interface.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Idle workers end after five seconds: each wakes a hundred times a second, and two threads that
        # compute in step both wait when one of their cores is taken.
        os.environ.setdefault("RAY_num_workers_soft_limit", "0")
        os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "5000")
        # Of the same cost: an actor that watches for the loss of spot machines, and metrics for a dashboard
        # that does not run.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
        _keep_memory()
    else:
        _outlast_the_node()
    import ray

    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        _join()
        _hear_sigterm()
        return
    # Logical CPUs: models on all cores and decoders on as many, or a trial, its controller and its workers,
    # must fit beside each other. 2 GiB of object store hold the shards in flight; the dashboard would cost
    # start-up time and open a port.
    ray.init(
        address="local",
        num_cpus=max(8, 2 * cores_here() + 2),
        object_store_memory=2 * 2**30,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    _hear_sigterm()


def _hear_sigterm() -> None:
    """Our handler again, after Ray's: they would end its processes first and exit with 1, and, in C++, print
    addresses of the stack and end the process where it stands."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, leave)


@cache
def _outlast_the_node() -> None:
    """Lets this process wait longer for a lost head than its node does, whose end `_watch` then tells of.

    Ray would end both at the same time, a driver at once, with a line about its GCS and nothing of what is
    kept. Read by Ray when it is imported.
    """
    name = "RAY_gcs_rpc_server_reconnect_timeout_s"
    os.environ[name] = str(int(os.environ.get(name, "60")) + 30)


def _keep_memory() -> None:
    """Lets this machine's Ray processes keep up to 1 GiB of what they free, in one arena and in huge pages.

    As glibc has it, activations of 32 MiB, and all that a thread frees (Ray Train trains in one), go back to
    the system at once and are mapped and zeroed again in the next step: a ResNet-18 on two cores takes
    100,000 page faults a step and is 13 % slower (docs/log.md). Before 2.35, glibc limits the threshold and
    has no huge pages.
    """
    name, version = platform.libc_ver()
    if name == "glibc" and tuple(int(number) for number in version.split(".")[:2]) >= (2, 35):
        tunables = {"arena_max": 1, "hugetlb": 1, "mmap_threshold": 2**30, "trim_threshold": 2**30}
        os.environ.setdefault(
            "GLIBC_TUNABLES", ":".join(f"glibc.malloc.{key}={value}" for key, value in tunables.items())
        )


def _join() -> None:
    import ray

    _check_address(os.environ["RAY_ADDRESS"])
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        message = (
            f"no Ray cluster answers at {os.environ['RAY_ADDRESS']} (RAY_ADDRESS). Is it up, and is the "
            "token right? With token authentication set RAY_AUTH_MODE=token, and the token in "
            "~/.ray/auth_token or RAY_AUTH_TOKEN."
        )
        raise UnreachableError(message) from error
    from ray._private.worker import global_worker

    node: Any = global_worker.node  # Ray has no public call for it
    if node is not None:  # of a client that joins through a proxy
        _watch(os.environ["RAY_ADDRESS"], node.raylet_socket_name)


def _check_address(address: str) -> None:
    """Ray itself tries for two minutes, with warnings of its own.

    Raises:
        SettingsError: it is no address that can be joined.
        UnreachableError: nothing listens there.
    """
    if "://" in address:
        message = (
            f"RAY_ADDRESS={address}: a cluster is joined by host:port, from one of its nodes; through its "
            "job server (http://...) a verb runs as a job: gpt4image submit --address ... -- VERB."
        )
        raise SettingsError(message)
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return  # auto, local: Ray's to find
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except OSError as error:
        message = f"no Ray cluster answers at {address} (RAY_ADDRESS): {error.strerror or error}. Is it up?"
        raise UnreachableError(message) from None


def _watch(address: str, raylet: str) -> None:
    """Ends this process with exit code 1, and says why, once the cluster at `address` is gone.

    Ray leaves a driver waiting, for ever when a new cluster comes up at the old address. What a driver
    depends on is the Ray daemon (raylet) of its own machine. That one ends with its machine, and when the
    head is not back within Ray's minute or is back as another cluster; where a head keeps its state outside
    of itself (Redis) it comes back as the same one, and nothing ends. So the socket on which the raylet
    listens (its path) tells it all.
    """
    import ray

    def look() -> None:
        silent = 0
        while ray.is_initialized():
            silent = 0 if _listens(raylet) else silent + 1
            if silent > 1 and ray.is_initialized():
                _end(address)
            time.sleep(_LOOK_S)

    threading.Thread(target=look, name="watch", daemon=True).start()


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_LOOK_S)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # a machine under load: slow, and not gone
            pass
    return True


def _end(address: str) -> None:
    """At once: the main thread waits inside Ray, and what runs at a usual end asks the cluster, too. To be
    killed at any moment is what all our work is prepared for."""
    print(
        f"\nthe Ray cluster at {address} is gone: its head was lost or began anew, or this machine's node "
        "ended. What is done is kept: the same command goes on when the cluster is up.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def address() -> str:
    """Of the cluster that this process has joined; empty on this machine's own Ray."""
    import ray

    return "" if is_local() else str(ray.get_runtime_context().gcs_address)


def is_local() -> bool:
    """Whether Ray is this process's own on this machine, and no cluster that others use, too."""
    return not os.environ.get("RAY_ADDRESS")


def grows() -> bool:
    """Whether an autoscaler adds nodes to the cluster that this process has joined.

    Ray has no public call for it: an autoscaler (v2, which KubeRay runs) numbers the states that it reports,
    and where there is none, or one that only looks on, the number stays 0.
    """
    return not is_local() and _has_autoscaler(os.environ["RAY_ADDRESS"])


@cache
def _has_autoscaler(address: str) -> bool:
    """Asked once: the answer must not change within a stage."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    expected = is_autoscaler_v2(fetch_from_server=True) or _only_a_head_that_does_not_work()
    deadline = time.monotonic() + (_FIRST_WORD_S if expected else 0)
    while not (reports := bool(_autoscaling().autoscaler_state_version > 0)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return reports


def _only_a_head_that_does_not_work() -> bool:
    """Whether nodes must be about to come: the cluster has just begun, and its autoscaler perhaps not yet."""
    nodes = _nodes()
    return len(nodes) == 1 and not nodes[0]["Resources"].get("CPU", 0)


def refused() -> list[dict[str, float]]:
    """Resources that were asked for and that the autoscaler finds no node for: too much for any of its groups
    of nodes, or more than their maximum."""
    state = _autoscaling()
    gangs = [request for gang in state.infeasible_gang_resource_requests for request in gang.requests]
    return [dict(request.resources_bundle) for request in (*state.infeasible_resource_requests, *gangs)]


def _autoscaling() -> Any:
    from ray._private.worker import global_worker
    from ray.core.generated import autoscaler_pb2

    generated: Any = autoscaler_pb2
    worker: Any = global_worker
    reply = generated.GetClusterStatusReply()
    reply.ParseFromString(worker.gcs_client.get_cluster_status())
    return reply.autoscaling_state


def gpus() -> int:
    """GPUs of the cluster that this process has joined."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def computes_on_gpus(device: str) -> bool:
    """Whether models get GPUs, for the setting `device`.

    Raises:
        SettingsError: it is `auto` on a cluster that has no GPU and does not grow, or `cuda` where there is
            none and none can come.
    """
    if device == "cpu" or (device == "auto" and is_local()):
        return device == "auto" and gpus() > 0
    if gpus() or grows():
        return True
    if device == "cuda":
        where = "this machine" if is_local() else "the cluster"
        message = f"device=cuda: {where} has no GPU that Ray knows of; pass --device cpu, or mend that."
    else:
        message = (
            f"device=auto: the cluster has no GPU ({cpus()} CPUs); pass --device cpu to compute on "
            "those, or bring nodes with GPUs to it."
        )
    raise SettingsError(message)


def cpus() -> int:
    """CPUs of the cluster by Ray's count, which is what can be asked for; on this machine it is logical (see
    `start_ray`)."""
    import ray

    return int(ray.cluster_resources().get("CPU", 0))


def largest_node() -> int:
    """CPUs, by Ray's count, of the node that has most of them."""
    return int(max((node["Resources"].get("CPU", 0) for node in _nodes()), default=0))


def several_nodes() -> bool:
    """Whether the cluster has more than one node."""
    return len(_nodes()) > 1


def _nodes() -> list[Any]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def cores() -> int:
    """Cores to compute with on the node that has most of them: by Ray's count, but of this machine no more
    than it has."""
    import ray

    nodes = _nodes()
    own = ray.get_runtime_context().get_node_id()
    here = {node["NodeManagerAddress"] for node in nodes if node["NodeID"] == own}
    counts = []
    for node in nodes:
        count = int(node["Resources"].get("CPU", 0))
        counts.append(min(count, cores_here()) if node["NodeManagerAddress"] in here else count)
    return max(1, *counts)


def cores_here() -> int:
    """Cores that this process may use, a container's quota included."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _control_group("cpu.max").partition(" ")
    return (
        max(1, min(allowed, int(quota) // int(period))) if quota.isdigit() and period.isdigit() else allowed
    )


def memory() -> int:
    """Bytes of memory of this machine, or of the container it is."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _control_group("memory.max")
    return min(whole, int(limit)) if limit.isdigit() else whole


def _control_group(file: str) -> str:
    """A limit that Linux holds this container to (cgroup v2); empty where there is none."""
    try:
        return Path("/sys/fs/cgroup", file).read_text(encoding="ascii").strip()
    except OSError:
        return ""


def actor_name() -> str:
    """A name of the actor that this process is, the same after Ray has started it again; `driver` outside of
    actors."""
    import ray

    return (ray.get_runtime_context().get_actor_id() if ray.is_initialized() else None) or "driver"


def spare_cores() -> int:
    """Cores that decoding may use beside an engine or a training: half of this machine's, or of the cluster's
    nodes."""
    return max(1, (cpus() if several_nodes() else cores()) // 2)
