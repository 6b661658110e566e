"""Watching the cluster that this process has joined: a driver whose cluster is gone ends, and says so.

Ray leaves it waiting, for ever when a new cluster comes up at the old address. What a driver depends on is
the Ray daemon (raylet) of its own machine. That one ends with its machine, and when the head is not back
within Ray's minute or is back as another cluster; where a head keeps its state outside of itself (Redis) it
comes back as the same one, and nothing ends. So the socket on which the raylet listens tells it all.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable

_LOOK_S = 2.0


def watch(address: str, raylet: str, joined: Callable[[], bool]) -> None:
    """Ends this process with exit code 1 once the cluster at `address` is gone.

    Args:
        address: for the message.
        raylet: path of the socket of this machine's raylet.
        joined: whether this process still belongs to the cluster.
    """

    def look() -> None:
        while joined():
            if _is_gone(raylet, joined):
                _end(address)
            time.sleep(_LOOK_S)

    threading.Thread(target=look, name="watch", daemon=True).start()


def _is_gone(path: str, joined: Callable[[], bool]) -> bool:
    """Whether nobody listens there, twice in a row."""
    for pause in (_LOOK_S, 0.0):
        if _listens(path) or not joined():
            return False
        time.sleep(pause)
    return True


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
