"""The store: layout, schemas, receipts, what is still to do; the contract between pipeline, training and
everything later.

    STORE/dataset.json
    STORE/images/part-00000.parquet                 with images/receipts/part-00000.json
    STORE/captions/<variant>/part-00000.parquet     with variant.json and receipts/
    STORE/embeddings/<variant>/part-00000.parquet   with variant.json and receipts/
    STORE/features/<variant>/part-00000.parquet     likewise: what a vision tower says of the pictures

Shard k has the same rows in the same order in every stage, so stages are read side by side and never joined.
A shard is written under a temporary name, renamed, and only then receipted: what has a receipt is whole.
Plain pyarrow reads all of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipeline.errors import MissingError, SettingsError
from pipeline.store import locations
from pipeline.store.files import is_alive, json_bytes, write_whole
from pipeline.store.schema import (
    LISTED,
    SCHEMA_VERSION,
    VERBS,
    Dataset,
    Receipt,
    Split,
    Stage,
    check_table,
    content_hash,
    part_name,
)

_BEGINNING = "beginning-"


class Store:
    """A store at a folder or URI. Opening reads dataset.json only."""

    def __init__(self, uri: str) -> None:
        """Opens an existing store.

        Raises:
            FileNotFoundError: there is no dataset.json.
            ValueError: the store was written with a newer schema.
        """
        self.uri = uri
        self._fs, self._root = locations.resolve(uri)
        try:
            raw = json.loads(self._read("dataset.json"))
        except FileNotFoundError:
            message = (
                f"store={uri}: holds no dataset.json; make it with: gpt4image ingest --images DIR --store "
                f"{uri}"
            )
            raise MissingError(message) from None
        version = raw.get("schema_version")
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            message = (
                f"store={uri}: has schema version {version}, this release reads up to {SCHEMA_VERSION}; "
                "install a newer gpt4image-ray, or make the store again with this one."
            )
            raise SettingsError(message)
        raw["splits"] = {name: Split(**split) for name, split in raw["splits"].items()}
        self.dataset = Dataset(**raw)

    @staticmethod
    def exists(uri: str) -> bool:
        """Whether a store was begun at `uri`."""
        filesystem, root = locations.resolve(uri)
        return bool(filesystem.get_file_info(f"{root}/dataset.json").type == fs.FileType.File)

    @staticmethod
    def create(uri: str, dataset: Dataset) -> Store:
        """Begins a store, or opens the one that somebody else has begun meanwhile: the caller compares its
        `dataset`.

        Each that would begin says so first and looks for others then. Of two, one at least sees the other and
        writes nothing; so no dataset.json is ever replaced, on any storage that lists what was written
        (neither Arrow's file systems nor all servers know a conditional write).

        Raises:
            ValueError: another process is beginning a store of other content here, at this moment.
        """
        filesystem, root = locations.resolve(uri)
        content = json_bytes(asdict(dataset))
        of_mine = f"{_BEGINNING}{hashlib.sha256(content).hexdigest()[:16]}"
        mine = f"{of_mine}-{uuid.uuid4().hex[:8]}.json"
        write_whole(filesystem, f"{root}/{mine}", json_bytes({"host": platform.node(), "pid": os.getpid()}))
        try:
            others = [name for name in _beginnings(filesystem, root) if not name.startswith(of_mine)]
            if not Store.exists(uri):
                if others:
                    message = (
                        f"store={uri}: another ingest, of other pictures or with other settings, begins it "
                        f"at this moment, so nothing was written. If none does, an earlier one was killed: "
                        f"delete {others[0]} there and try again."
                    )
                    raise SettingsError(message)
                write_whole(filesystem, f"{root}/dataset.json", content)
        finally:
            filesystem.delete_file(f"{root}/{mine}")
        return Store(uri)

    @property
    def contents(self) -> str:
        """A hash that tells this store's rows and classes from those of another store that stood, or will
        stand, at its place."""
        source = self.dataset.source
        cut = {name: source.get(name) for name in ("fingerprint", "cut", "shard_rows", "shard_bytes")}
        deciding = [
            self.dataset.classes,
            {name: asdict(split) for name, split in self.dataset.splits.items()},
            cut,
        ]
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]

    def folder(self, stage: Stage, variant: str = "") -> str:
        """Path of a stage's shards, relative to the store."""
        assert bool(variant) == (stage != "images"), (stage, variant)
        return f"{stage}/{variant}" if variant else stage

    def variants(self, stage: Stage) -> list[str]:
        """Names of the variants of a stage, sorted; the images stage has the one nameless variant."""
        if stage == "images":
            return [""]
        selector = fs.FileSelector(f"{self._root}/{stage}", allow_not_found=True)
        return sorted(
            info.base_name for info in self._fs.get_file_info(selector) if info.type == fs.FileType.Directory
        )

    def variant(self, stage: Stage, variant: str) -> dict[str, Any]:
        """The settings that made a variant: the content of its variant.json."""
        try:
            settings: dict[str, Any] = json.loads(self._read(f"{self.folder(stage, variant)}/variant.json"))
        except FileNotFoundError:
            known = ", ".join(self.variants(stage)) or "none"
            message = f"store={self.uri}: no {stage} variant {variant!r}; there are: {known}."
            raise MissingError(message) from None
        return settings

    def only_variant(self, stage: Stage, wanted: str = "") -> str:
        """The variant named, or the only one there is.

        Raises:
            ValueError: none exists, several exist and none was named, or the named one does not exist.
        """
        names = self.variants(stage)
        if wanted in names or (not wanted and len(names) == 1):
            return wanted or names[0]
        if not names:
            message = (
                f"store={self.uri}: has no {stage} yet; run: gpt4image {VERBS[stage]} --store {self.uri}"
            )
            if stage == "features":
                message += " --tower MODEL"
            if stage == "captions":
                message += (
                    " --caption-preset NAME, or gpt4image import-captions FILE for captions that you have"
                )
        else:
            flaw = f"no {stage} variant {wanted!r}" if wanted else f"several {stage} variants and none named"
            described = [f"{name}{self._made_of(stage, name)}" for name in names]
            flag = "feature-variant" if stage == "features" else stage
            message = (
                f"store={self.uri}: {flaw}; pass --{flag} with one of: {', '.join(described)}. One that is "
                f"not wanted any more may be deleted: its folder in {stage}/."
            )
        raise SettingsError(message)

    def _made_of(self, stage: Stage, variant: str) -> str:
        return f" (of captions {self.variant(stage, variant)['captions']})" if stage == "embeddings" else ""

    def write_variant(self, stage: Stage, variant: str, settings: dict[str, Any]) -> None:
        """Records what makes a variant, once: an existing record is left as it is."""
        path = f"{self.folder(stage, variant)}/variant.json"
        if self._fs.get_file_info(f"{self._root}/{path}").type == fs.FileType.NotFound:
            self.write_file(path, json_bytes(settings))

    def write_shard(
        self,
        stage: Stage,
        variant: str,
        shard: int,
        table: pa.Table,
        *,
        seconds: float,
        attempt: int = 1,
        note: str = "",
        source: str = "",
    ) -> Receipt:
        """Checks a shard against its schema, writes it whole, then its receipt."""
        check_table(stage, table)
        sink = pa.BufferOutputStream()
        # Encoded pictures do not compress; captions and vectors do, a little, at no cost worth naming.
        pq.write_table(
            table,
            sink,
            compression={name: "none" if name == "image" else "zstd" for name in table.column_names},
        )
        data = sink.getvalue().to_pybytes()
        failed = len(table) - table["error"].null_count
        receipt = Receipt(
            shard=shard,
            rows=len(table),
            failed=failed,
            bytes=len(data),
            checksum=hashlib.sha256(data).hexdigest(),
            seconds=round(seconds, 3),
            attempt=attempt,
            flagged=_flagged(table),
            note=note,
            source=source,
        )
        folder = self.folder(stage, variant)
        self.write_file(f"{folder}/{part_name(shard)}.parquet", data)
        self.write_file(f"{folder}/receipts/{part_name(shard)}.json", json_bytes(asdict(receipt)))
        return receipt

    def read_shard(
        self, stage: Stage, variant: str, shard: int, columns: list[str] | None = None
    ) -> pa.Table:
        """One shard, or some of its columns, checked against the schema."""
        path = f"{self._root}/{self.folder(stage, variant)}/{part_name(shard)}.parquet"
        table = pq.read_table(path, filesystem=self._fs, columns=columns)
        check_table(stage, table, columns)
        return table

    def receipts(self, stage: Stage, variant: str = "") -> dict[int, Receipt]:
        """Receipts of the finished shards, by shard."""
        shards = self.finished(stage, variant)
        if isinstance(self._fs, fs.LocalFileSystem):
            return {shard: self.receipt(stage, variant, shard) for shard in shards}
        with ThreadPoolExecutor(
            32
        ) as pool:  # an object store's answer is waited for; on a disk threads are slower than none
            return dict(
                zip(shards, pool.map(lambda shard: self.receipt(stage, variant, shard), shards), strict=True)
            )

    def is_finished(self, stage: Stage, variant: str, shard: int) -> bool:
        """Whether a shard has its receipt."""
        path = f"{self._root}/{self.folder(stage, variant)}/receipts/{part_name(shard)}.json"
        return bool(self._fs.get_file_info(path).type == fs.FileType.File)

    def receipt(self, stage: Stage, variant: str, shard: int) -> Receipt:
        """The receipt of a finished shard."""
        return Receipt(
            **json.loads(self._read(f"{self.folder(stage, variant)}/receipts/{part_name(shard)}.json"))
        )

    def finished(self, stage: Stage, variant: str = "") -> list[int]:
        """Shards with a receipt, by one listing of names."""
        selector = fs.FileSelector(
            f"{self._root}/{self.folder(stage, variant)}/receipts", allow_not_found=True
        )
        names = (info.base_name for info in self._fs.get_file_info(selector))
        return sorted(
            int(n[len("part-") : -len(".json")])
            for n in names
            if n.startswith("part-") and n.endswith(".json")
        )

    def pending(self, stage: Stage, variant: str = "") -> list[int]:
        """Shards without a receipt, in order: what a run, first or resumed, has to do."""
        done = set(self.finished(stage, variant))
        return [shard for shard in range(self.dataset.shards) if shard not in done]

    def outdated(self, variant: str, caption_variant: str) -> list[int]:
        """Finished shards of an embedding variant whose captions have been written anew since, by a second
        run or by `retry`."""
        made, now = self.receipts("embeddings", variant), self.receipts("captions", caption_variant)
        return [
            shard for shard, receipt in made.items() if shard in now and not receipt.belongs_to(now[shard])
        ]

    def damaged(self, stage: Stage, variant: str = "") -> Iterator[tuple[int, str]]:
        """(shard, what is wrong) of finished shards whose file is gone, or is not the one on the receipt;
        reads all of them."""
        for shard, receipt in self.receipts(stage, variant).items():
            data = self.read_file(f"{self.folder(stage, variant)}/{part_name(shard)}.parquet")
            if data is None:
                yield shard, "the file is gone"
            elif hashlib.sha256(data).hexdigest() != receipt.checksum:
                yield shard, f"{len(data)} bytes that are not the {receipt.bytes} on its receipt"

    def require_complete(self, stage: Stage, variant: str = "") -> None:
        """Raises ValueError, saying how to finish, when a stage that the next one reads has shards to do."""
        missing = len(self.pending(stage, variant))
        if missing:
            verb = VERBS[stage]
            name = f" {variant}" if variant else ""
            message = (
                f"store={self.uri}: {stage}{name} lacks {missing} of {self.dataset.shards} shards; "
                f"finish it first: the same `gpt4image {verb}` again goes on where it stopped."
            )
            raise SettingsError(message)

    def split_shards(self, split: str) -> range:
        """Shards of a split.

        Raises:
            ValueError: the store has no such split.
        """
        if split not in self.dataset.splits:
            message = (
                f"split={split!r}: the store has {', '.join(self.dataset.splits)}; name one of these"
                + (", or ingest again into a new store with --val-fraction 0.1." if split == "val" else ".")
            )
            raise SettingsError(message)
        shards = self.dataset.splits[split]
        return range(shards.first_shard, shards.first_shard + shards.num_shards)

    def picture(self, image_bytes: bytes | None, uri: str | None, expected_hash: str | None) -> bytes:
        """The encoded bytes of a picture that has no error: those in the shard, or, stored with --no-pack,
        those at its place.

        Raises:
            StorageError: what holds the pictures does not answer.
            OSError: the place cannot be read, or holds another picture than when it was ingested.
        """
        if image_bytes is not None:
            return image_bytes
        source = self.dataset.source
        fetched = locations.fetch_picture(
            source["uri"], uri or "", source["max_bytes"], listed=source["kind"] in LISTED
        )
        if expected_hash and content_hash(fetched) != expected_hash:
            message = (
                f"{uri} of {self.dataset.source['uri']} is another picture than when it was ingested: put "
                "the old one back, or ingest into a new store (without --no-pack pictures are kept in the "
                "store)"
            )
            raise OSError(message)
        return fetched

    def errors(self, stage: Stage, variant: str = "") -> Iterator[tuple[str, str]]:
        """(id, error) of every failed row of the finished shards."""
        for shard, receipt in self.receipts(stage, variant).items():
            if receipt.failed:
                table = self.read_shard(stage, variant, shard, ["id", "error"])
                yield from (
                    (row["id"], row["error"]) for row in table.to_pylist() if row["error"] is not None
                )

    def write_file(self, path: str, data: bytes, *, lasting: bool = True) -> None:
        """Puts a whole file into the store; readers see the old one or the new one, never a part.

        `lasting=False` leaves to the system when it reaches the disk: it outlives the process, not a loss of
        power.
        """
        write_whole(self._fs, f"{self._root}/{path}", data, lasting)

    def read_file(self, path: str) -> bytes | None:
        """A file of the store, or None where there is none."""
        try:
            return self._read(path)
        except FileNotFoundError:
            return None

    def delete_file(self, path: str) -> None:
        """Removes a file of the store, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(f"{self._root}/{path}")

    def delete_folder(self, path: str) -> None:
        """Removes a folder of the store and what is in it, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.delete_dir(f"{self._root}/{path}")

    def remove_leftovers(self, stage: Stage, variant: str = "") -> None:
        """Deletes temporary files of writers of this machine that are no longer alive; a killed run leaves at
        most one each."""
        folder = f"{self._root}/{self.folder(stage, variant)}"
        for directory in (folder, f"{folder}/receipts"):
            for name in os.listdir(directory) if os.path.isdir(directory) else []:
                match = re.fullmatch(r"\.(.+)\.(\d+)\.[0-9a-f]{8}\.tmp", name)
                if match and match[1].endswith(f".{platform.node()}") and not is_alive(int(match[2])):
                    os.unlink(f"{directory}/{name}")

    def _read(self, path: str) -> bytes:
        with self._fs.open_input_stream(f"{self._root}/{path}") as stream:
            return bytes(stream.read())


def _beginnings(filesystem: fs.FileSystem, root: str) -> list[str]:
    """Who says that they are beginning a store; whoever said so an hour ago is dead."""
    infos = filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True))
    recent = time.time() - 3600
    return [
        info.base_name for info in infos if info.base_name.startswith(_BEGINNING) and _modified(info) > recent
    ]


def _modified(info: fs.FileInfo) -> float:
    return info.mtime.timestamp() if info.mtime is not None else time.time()


def _flagged(table: pa.Table) -> int:
    if "flag" in table.column_names:
        return len(table) - int(table["flag"].null_count)
    return sum(map(bool, table["truncated"].to_pylist())) if "truncated" in table.column_names else 0
