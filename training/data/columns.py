"""What a method reads from the store beside pictures and labels: columns of a shard, row for row those of its
pictures."""

from __future__ import annotations

from typing import Any, Protocol

import numpy.typing as npt
import pyarrow as pa

from pipeline.store import Store

Array = npt.NDArray[Any]


class Columns(Protocol):
    """Reads some columns of a shard; sent to decoders in other processes, so it holds plain data."""

    def read(self, store: Store, shard: int, ids: pa.ChunkedArray) -> dict[str, Array]:
        """[n, ...] arrays by name, for the n pictures with these ids.

        Raises:
            SettingsError: the stage read holds other rows.
        """
        ...
