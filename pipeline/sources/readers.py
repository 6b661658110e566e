"""Pictures of a source read by their place, also out of the middle of a tar or a Parquet file."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sources import files, parquet
from pipeline.store import LISTED, locations

_IN_PARQUET = re.compile(r"(.*)#g(\d+)-(\d+)", re.DOTALL)


class Reader:
    """Reads pictures by their place. Rows of one Parquet row group come one after the other: the last group
    is kept.

    It is kept in Arrow's memory; of a large group (`parquet.LARGE_GROUP`) only the rows that are expected
    are, and it is read piece by piece: where a file is one group of many gigabytes, several readers would
    otherwise hold it several times.
    """

    def __init__(self, root: str, kind: str) -> None:
        self._root, self._listed = root, kind in LISTED
        self._last: tuple[str, pa.ChunkedArray | dict[int, pa.Scalar]] = ("", {})
        self._expected: dict[str, set[int]] = {}

    def expect(self, places: Iterable[str]) -> None:
        """Says which places will be asked for next, all together."""
        self._expected = {}
        for match in map(_IN_PARQUET.fullmatch, places):
            if match is not None:
                self._expected.setdefault(f"{match[1]}#g{match[2]}", set()).add(int(match[3]))

    def __call__(self, place: str, max_bytes: int) -> bytes:
        """The bytes, at most `max_bytes` of them plus one.

        Raises:
            OSError: they cannot be read.
        """
        match = _IN_PARQUET.fullmatch(place)
        if match is None:
            return locations.fetch_picture(self._root, place, max_bytes, listed=self._listed)
        file, row_group, row = match[1], int(match[2]), int(match[3])
        pictures = self._last[1]
        if self._last[0] != f"{file}#g{row_group}" or (isinstance(pictures, dict) and row not in pictures):
            self._last = ("", {})  # two groups at a time are one too many
            try:
                pictures = self._read_row_group(
                    file, row_group, self._expected.get(f"{file}#g{row_group}", set()) | {row}
                )
            except OSError as error:
                locations.check_alive(self._root, error, file if self._listed else "")
                raise
            self._last = (f"{file}#g{row_group}", pictures)
        value = pictures[row].as_py()
        if isinstance(value, dict):
            # Hugging Face's `image`: bytes, or a path beside the file.
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            if "://" in value or value.startswith("/") or ".." in value.split("/"):
                message = f"the row names {value[:200]!r}, which is not beside its file"
                raise OSError(message)  # a data set from elsewhere must not say what is read on this machine
            return locations.fetch_picture(
                self._root, "/".join([*file.split("/")[:-1], locations.place_of(value)]), max_bytes
            )
        if not value:
            message = "the row holds neither bytes nor a path"
            raise OSError(message)
        return bytes(value[: max_bytes + 1])

    def _read_row_group(
        self, file: str, row_group: int, wanted: set[int]
    ) -> pa.ChunkedArray | dict[int, pa.Scalar]:
        with files.opened(self._root, locations.unescaped(file)) as stream:
            opened = pq.ParquetFile(stream)
            column = parquet.image_column(opened, file)
            if parquet.size_of_pictures(opened, row_group, column) <= parquet.LARGE_GROUP:
                return opened.read_row_group(row_group, columns=[column]).column(0)
            # By default the whole column is fetched before its first page is decoded.
            opened = pq.ParquetFile(stream, metadata=opened.metadata, pre_buffer=False, buffer_size=2**23)
            pictures: dict[int, pa.Scalar] = {}
            start = 0
            for batch in opened.iter_batches(
                batch_size=32, row_groups=[row_group], columns=[column], use_threads=False
            ):
                rows = sorted(row for row in range(start, start + len(batch)) if row in wanted)
                # A copy: the batch itself is let go.
                taken = batch.column(0).take(pa.array([row - start for row in rows], pa.int64()))
                pictures |= dict(zip(rows, taken, strict=True))
                start += len(batch)
        return pictures
