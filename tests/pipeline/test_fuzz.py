"""One row never takes others along: damaged pictures, odd names, odd lines, rows and members, thousands of
each, seeded."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config import SourceConfig
from pipeline.sources import images
from pipeline.sources.images import ImageError, decode, decode_to_fit
from pipeline.sources.plan import make_plan as plan
from pipeline.sources.plan import notes
from pipeline.stages.ingest import IngestShard
from pipeline.store import Store

DAMAGES = 1500  # for each kind of picture


def exif_block() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "a maker of cameras"
    exif[0x8769] = {0x9000: b"0230", 0x920A: 35.0}
    exif[0x8825] = {1: "N", 2: (52.0, 30.0, 1.5)}
    return exif.tobytes()


def encoded() -> dict[str, bytes]:
    """A small picture in every format that is read, with an EXIF block and an ICC profile where the format
    holds them."""
    from PIL import ImageCms

    rng = np.random.default_rng(3)
    image = Image.fromarray(rng.integers(0, 256, (20, 28, 3), dtype=np.uint8))
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    blocks: dict[str, dict[str, Any]] = {
        "JPEG": {"exif": exif_block(), "icc_profile": icc},
        "PNG": {"exif": exif_block(), "icc_profile": icc},
        "WEBP": {"exif": exif_block(), "icc_profile": icc},
        "TIFF": {"exif": exif_block(), "icc_profile": icc},
    }
    found = {}
    for kind in images.FORMATS:
        sink = io.BytesIO()
        image.save(sink, kind, **blocks.get(kind, {}))
        found[kind] = sink.getvalue()
    for kind, more in (
        ("JPEG", {"progressive": True}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("GIF", {"save_all": True}),
    ):
        sink = io.BytesIO()
        image.quantize(16).convert("RGB").save(sink, kind, **more)
        found[f"{kind} {next(iter(more))}"] = sink.getvalue()
    sink = io.BytesIO()
    image.convert("LA").save(sink, "PNG", exif=exif_block())
    found["PNG LA"] = sink.getvalue()
    return found


ENCODED = encoded()


def damaged(data: bytes, rng: random.Random, count: int) -> Iterator[bytes]:
    """Bytes flipped (most in the first kilobyte, where headers and EXIF are), cut, doubled, dropped and
    swapped."""
    for _ in range(count):
        found = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            place = rng.randrange(min(len(found), 1000 if rng.random() < 0.7 else len(found)))
            found[place] = rng.choice(
                (0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256), found[place] ^ 1 << rng.randrange(8))
            )
        start, end = sorted(rng.randrange(len(found)) for _ in range(2))
        how = rng.random()
        if how < 0.1:
            del found[start:]
        elif how < 0.2:
            found[start:start] = found[start:end]
        elif how < 0.25:
            del found[start:end]
        yield bytes(found)


@pytest.mark.parametrize("kind", ENCODED)
def test_of_a_damaged_picture_nothing_escapes_but_an_image_error(kind: str) -> None:
    for data in damaged(ENCODED[kind], random.Random(kind), DAMAGES):
        for reader in (decode, lambda data: decode_to_fit(data, 7, max_pixels=10**6)):
            try:
                picture = reader(data)
                assert picture.mode == "RGB" and min(picture.size) > 0
                assert len(picture.tobytes()) == picture.width * picture.height * 3
            except ImageError as error:
                assert len(str(error)) > 10


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_every_single_byte_of_an_exif_block_may_be_damaged(kind: str) -> None:
    """The pixels are whole, so the picture is used: upright where its orientation can still be read, else as
    it lies."""
    data, block = ENCODED[kind], exif_block().removeprefix(b"Exif\0\0")
    start = data.index(block)
    for place in range(start, start + len(block)):
        for value in (0, 0xFF, data[place] ^ 1):
            found = checksummed(data[:place] + bytes([value]) + data[place + 1 :])
            assert decode(found).size in ((28, 20), (20, 28)), (place - start, value)


def checksummed(data: bytes) -> bytes:
    """A PNG's checksums made right again; other formats as they are."""
    if not data.startswith(b"\x89PNG"):
        return data
    found, place = data[:8], 8
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        body = data[place + 4 : place + 8 + length]
        found += data[place : place + 4] + body + struct.pack(">I", zlib.crc32(body))
        place += length + 12
    return found


def ingested(images: Path, store: Path, **settings: Any) -> dict[str, dict[str, Any]]:
    """What ingest writes, without Ray, by id: valid UTF-8 and as many rows as the plan says, or the store
    would not take it."""
    config = SourceConfig(images=str(images), store=str(store), max_failure_rate=1, **settings)
    found = plan(config)
    opened = Store.create(config.store, found.dataset)
    ingest = IngestShard(config.store)
    for shard, rows in enumerate(found.shards):
        ingest(pa.table({"shard": [shard], "redo": [False], "rows": [[asdict(row) for row in rows]]}))
    rows = [
        row
        for shard in range(len(found.shards))
        for row in opened.read_shard("images", "", shard).to_pylist()
    ]
    assert len({row["id"] for row in rows}) == len(rows) == found.dataset.rows
    for row in rows:
        assert row["label"] >= 0 if row["error"] is None else 10 < len(row["error"]) <= 1000, row
    return {row["id"]: row for row in rows}


def left_out(images: Path) -> int:
    """How many pictures the notes say are left out."""
    told = notes(plan(SourceConfig(images=str(images), store="unused", max_failure_rate=1)).dataset)
    return sum(int(note.split()[0]) for note in told if "pictures" in note and "left out" in note)


def numbered(number: int) -> bytes:
    """A picture that no other number has."""
    sink = io.BytesIO()
    Image.new("RGB", (3, 2), (number % 256, number // 256 % 256, 77)).save(sink, "PNG")
    return sink.getvalue()


def test_good_rows_are_the_same_with_and_without_a_thousand_bad_ones(tmp_path: Path) -> None:
    rng = random.Random(5)
    for folder in ("alone", "among"):
        for number in range(20):
            path = tmp_path / folder / "train" / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(numbered(number))
    bad = [data for kind in ENCODED for data in damaged(ENCODED[kind], rng, 100)] + [b"", b"\0", b"text"]
    for number, data in enumerate(bad):
        (tmp_path / "among" / "train" / "a" / f"bad {number}.jpg").write_bytes(data)
    alone = ingested(tmp_path / "alone", tmp_path / "store 1", shard_rows=50)
    among = ingested(tmp_path / "among", tmp_path / "store 2", shard_rows=50)
    assert len(among) == 20 + len(bad)
    assert {key: row for key, row in among.items() if "bad" not in key} == alone
    failed = [row for row in among.values() if row["error"] is not None]
    assert len(failed) > 300 and all(row["image"] is None and row["width"] is None for row in failed)


ODD_NAMES = [
    b"x.tar#512-20",
    b"x#g0-1",
    b"#",
    b"#0-1",
    b"%41",
    b"50%25",
    b"%",
    b"a?b=c",
    b"[a]",
    b"*",
    b"~",
    b"~root",
    b"a:b",
    b"s3:",
    b"-",
    b"--help",
    b"\xff\xfe",
    b"<ff>",
    b"<3c>",
    b"<d800>",
    "\u202e".encode(),
    "e\u0301".encode(),
    "\u00e9".encode(),
    b"\n\n",
    b"NUL",
    b"C:\\x",
    b"a" * 120,
    b" ",
    b"$(id)",
    b"'\"",
    b"{label}",
    b"\xed\xa0\x80",
    b"train",
]


@pytest.mark.parametrize("pack", [True, False])
def test_every_name_that_a_file_system_allows_is_a_row_that_can_be_read(pack: bool, tmp_path: Path) -> None:
    """Every byte alone and in the middle of a name, as the name of a file, and as the name of a class."""
    parts = sorted({bytes([byte]) for byte in range(1, 256) if byte not in b"/."} | set(ODD_NAMES))
    names = [(b"class", part + b".png") for part in parts] + [
        (b"class", b"a" + part + b"z.PNG") for part in parts
    ]
    names += [(part, b"1.png") for part in parts] + [
        (b"deep " + part, part + b"/" + part + b".jpg") for part in parts
    ]
    for number, (folder, name) in enumerate(names):
        path = os.path.join(os.fsencode(tmp_path / "in"), b"train", folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as stream:
            stream.write(numbered(number))
    rows = ingested(tmp_path / "in", tmp_path / "store", pack=pack)
    assert {row["error"] for row in rows.values()} == {None}
    store = Store(str(tmp_path / "store"))
    pictures = [store.picture(row["image"], row["uri"], row["content_hash"]) for row in rows.values()]
    assert sorted(pictures) == sorted(map(numbered, range(len(names))))
    assert len(store.dataset.classes) == 1 + 2 * len(parts)
    places = {
        row["uri"]: store.picture(row["image"], row["uri"], row["content_hash"]) for row in rows.values()
    }
    read = IngestShard(str(tmp_path / "store"))._read  # as a retry reads them, from what is on record
    assert all(read(place, 10**6) == data for place, data in places.items())


def test_odd_members_of_tars_have_rows_or_are_counted(tmp_path: Path) -> None:
    rng = random.Random(11)
    words = [
        "a",
        "b",
        "cat/a",
        "./dog/b",
        "/abs/c",
        "../up/d",
        "..",
        "",
        "caf\udce9",
        "x.tar#512-20",
        "\n",
        "e" * 150,
        "日本",
        "._m",
    ]
    endings = [
        "jpg",
        "png",
        "PNG",
        "depth.png",
        "b.c.jpg",
        "cls",
        "json",
        "CLS",
        "txt",
        "",
        "jpg.bak",
        "seg.cls",
    ]
    sides = [
        b"0",
        b"1",
        b"dog",
        b"",
        b"\xff\xfe",
        b"{",
        b"[1]",
        b'{"label": 3}',
        b'{"label": null}',
        b'{"cls": ["x"]}',
        b"[" * 9999,
    ]
    for number in range(60):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        contents: dict[str, bytes] = {"always.png": numbered(0), "always.cls": b"here"}
        count = 1
        with tarfile.open(
            folder / "x.tar", "w", format=rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
        ) as tar:
            for place in range(rng.randrange(1, 30)):
                name = f"{rng.choice(words)}.{rng.choice(endings)}"
                picture = name.lower().endswith((".jpg", ".png"))
                member = tarfile.TarInfo(name)
                member.type = rng.choice(
                    (
                        *[tarfile.REGTYPE] * 9,
                        tarfile.SYMTYPE,
                        tarfile.DIRTYPE,
                        tarfile.CHRTYPE,
                        tarfile.LNKTYPE,
                    )
                )
                if member.type in (tarfile.DIRTYPE, tarfile.CHRTYPE):
                    # A name of its own right: it stands for no picture, and replaces none.
                    tar.addfile(member)
                    continue
                count += picture
                if member.type == tarfile.REGTYPE:
                    contents[name] = numbered(1000 * number + place + 1) if picture else rng.choice(sides)
                    member.size = len(contents[name])
                    tar.addfile(member, io.BytesIO(contents[name]))
                else:
                    contents.pop(name, None)
                    member.linkname = "/etc/passwd"
                    tar.addfile(member)
            for name in ("always.png", "always.cls"):
                member = tarfile.TarInfo(name)
                member.size = len(contents[name])
                tar.addfile(member, io.BytesIO(contents[name]))
        rows = ingested(folder, folder / "store")
        pictures = [data for name, data in contents.items() if name.lower().endswith((".jpg", ".png"))]
        assert len(rows) + left_out(folder) == count, sorted(contents)
        good = [row["image"] for row in rows.values() if row["error"] is None]
        assert len(set(good)) == len(good) and set(good) <= set(pictures) and numbered(0) in good


def test_a_damaged_tar_is_read_or_refused_by_name(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(5):
            for name, data in ((f"größe/{number}.png", numbered(number)), (f"größe/{number}.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    whole = (tmp_path / "x.tar").read_bytes()
    rng = random.Random(2)
    refused = 0
    for number, data in enumerate(damaged(whole, rng, 400)):
        checked = bytearray(data)
        if number % 2:  # a header that its checksum does not betray
            for start in range(0, len(checked) - 511, 512):
                header = bytearray(checked[start : start + 512])
                if header[257:262] == b"ustar":
                    header[148:156] = b" " * 8
                    checked[start + 148 : start + 156] = b"%06o\0 " % sum(header)
        (tmp_path / "x.tar").write_bytes(checked)
        try:
            assert plan(
                SourceConfig(images=str(tmp_path / "x.tar"), store="unused", max_failure_rate=1)
            ).dataset.rows
        except ValueError as error:
            refused += 1
            assert "x.tar: cannot be read as a tar" in str(error) or "no pictures found" in str(error), error
    assert refused > 50


SHAPES = [
    b"{",
    b"[]",
    b"[1]",
    b"1",
    b'"x"',
    b"null",
    b"NaN",
    b"{}",
    b'{"path": null, "label": "x"}',
    b'{"path": 3, "label": "x"}',
    b'{"path": [], "label": "x"}',
    b'{"path": "", "label": "x"}',
    b'{"path": "g.png", "label": {"a": 1}}',
    b"[" * 100_000,
    b'{"path": "g.png"}',
    b'{"path": "g.png", "label": null}',
    b'{"path": "g.png", "label": ""}',
    b'{"path": "g", "label": [[]]}',
    b'{"path": "nul\\u0000.png", "label": "a"}',
    b'{"path": "g.png", "label": "\\u0000"}',
    b'{"path": "\\ud800", "label": "a"}',
    b'{"path": "\xff.png", "label": "\xff"}',
    b'{"path": "g.png", "label": 1e999}',
    b'{"path": "g.png", "label": true}',
    b'{"path": "g.png", "label": "a", "id": []}',
    b'{"path": "g.png", "label": "a", "id": ""}',
    b'{"path": ".", "label": "a"}',
    b'{"path": "g.png", "label": "a", "id": null}',
    b'{"path": "g.png", "label": "a", "split": 7}',
    b'{"path": "~"}',
    b'{"path": "g.png", "label": "a", "split": ["train"]}',
    b'{"path": "g.png", "label": "a", "bytes": -5}',
    b"\x00",
    b"\xff\xfe",
    b'{"path": "g.png", "label": "a", "bytes": "many"}',
    b'{"path": "g.png", "label": "a", "bytes": 1e400}',
    b'{"path": "g"}}',
    b'{"path": "g.png", "label": "a", "id": "good 1"}',
    b'{"path": "0.jsonl", "label": "a"}',
    b'{"path": "g.png/", "label": "a"}',
    b'{"path": "/etc/passwd", "label": "a"}',
    b'{"path": "../x", "label": "a"}',
    b'{"path": "http://x/y", "label": "a"}',
    b'{"path": "' + b"x" * 5000 + b'", "label": "a"}',
    b'{"path": "g.png", "label": ' + b"9" * 5000 + b"}",
    b'{"path": "g.png", "label": "a", "bytes": ' + b"9" * 400 + b"}",
    b'{"path": "g.png", "label": "a", "split": "holdout"}',
]


def test_lines_of_every_shape_are_rows_and_good_ones_are_as_they_were(tmp_path: Path) -> None:
    rng = random.Random(3)
    good = [
        json.dumps({"path": "g.png", "label": "ab"[n % 2], "id": f"good {n}", "split": "train"}).encode()
        for n in range(20)
    ]
    (tmp_path / "g.png").write_bytes(numbered(1))

    def listed(name: str, lines: list[bytes]) -> dict[str, dict[str, Any]]:
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join(lines))
        rows = ingested(tmp_path / f"{name}.jsonl", tmp_path / f"store {name}")
        assert len(rows) + left_out(tmp_path / f"{name}.jsonl") == len(lines), name
        classes = Store(str(tmp_path / f"store {name}")).dataset.classes
        return {
            key: row | {"label": classes[row["label"]] if row["label"] >= 0 else ""}
            for key, row in rows.items()
        }

    alone = listed("alone", good)
    for number in range(30):
        lines = [*good, *rng.sample(SHAPES, rng.randrange(1, len(SHAPES)))]
        if number % 2:
            lines += [
                b"".join(damaged(rng.choice(good), rng, 1)).replace(b"\n", b"") or b"x" for _ in range(20)
            ]
        if number < 15:
            rng.shuffle(lines)  # a line with an id that is there already may now come first, and takes it
            assert len(listed(f"{number}", lines)) <= len(lines)
        else:
            rows = listed(f"{number}", lines)
            assert {key: row for key, row in rows.items() if key in alone} == alone


def test_parquet_rows_of_every_shape_are_rows(tmp_path: Path) -> None:
    picture = numbered(4)
    (tmp_path / "beside.png").write_bytes(picture)
    extra = pa.struct([("bytes", pa.binary()), ("path", pa.string()), ("more", pa.list_(pa.int8()))])
    columns: dict[str, pa.Array] = {
        "struct": pa.array(
            [
                None,
                {},
                {"bytes": b""},
                {"bytes": picture, "path": "/etc/passwd"},
                {"path": "beside.png"},
                {"path": "../x.png"},
                {"path": "x\0y"},
                {"path": "s3://b/k"},
                {"bytes": picture, "more": [1]},
                {"path": ""},
                {"path": "a#1-2"},
            ],
            extra,
        ),
        "binary": pa.array([None, b"", b"x", picture], pa.binary()),
        "large": pa.array([None, picture], pa.large_binary()),
        "text": pa.array([None, "", "beside.png", "/etc/passwd", "\0"], pa.string()),
        "numbers": pa.array([1, 2, None]),
        "bools": pa.array([True, None]),
        "lists": pa.array([[1, 2], None, [300], list(picture)]),
        "nested": pa.array([[[b"x"]], None]),
        "other": pa.array([{"x": 1}, {"x": None}]),
        "nothing": pa.nulls(3),
    }
    good = {"struct": 3, "binary": 1, "large": 1, "text": 1, "lists": 1}
    for name, column in columns.items():
        pq.write_table(
            pa.table({"image": column, "label": ["a"] * len(column)}),
            tmp_path / f"{name}.parquet",
            row_group_size=2,
        )
        rows = ingested(tmp_path / f"{name}.parquet", tmp_path / f"store {name}")
        assert len(rows) == len(column)
        found = [row["image"] for row in rows.values() if row["error"] is None]
        assert found == [picture] * good.get(name, 0), name
    labels: list[pa.Array] = [
        pa.array([None, "", "a", "\0"]),
        pa.array([b"\xff", b"a", None, b""]),
        pa.array([1.0, float("nan"), float("inf"), -0.0]),
        pa.array([[1], None, [], [2]]),
        pa.array([{"a": 1}, None, None, None]),
        pa.array([True, None, False, True]),
        pa.array([-1, 0, 1, 2**40]),
        pa.array([None, None, None, "a"]).dictionary_encode(),
        pa.nulls(4),
    ]
    for number, column in enumerate(labels):
        table = pa.table(
            {"image": [picture] * 4, "label": column, "split": ["train", None, "nonsense", "TEST"]}
        )
        pq.write_table(table, tmp_path / f"l{number}.parquet")
        try:
            rows = ingested(tmp_path / f"l{number}.parquet", tmp_path / f"store l{number}")
            assert len(rows) + left_out(tmp_path / f"l{number}.parquet") == 4
        except ValueError as error:
            assert "none of 4 pictures can be used" in str(error) and number in (3, 4, 8)


def test_damaged_pages_of_a_parquet_file_are_errors_of_its_rows(tmp_path: Path) -> None:
    table = pa.table({"image": [numbered(n) for n in range(40)], "label": ["ab"[n % 2] for n in range(40)]})
    pq.write_table(
        table,
        tmp_path / "x.parquet",
        row_group_size=10,
        compression="zstd",
        column_encoding="PLAIN",
        use_dictionary=False,
    )
    whole = (tmp_path / "x.parquet").read_bytes()
    chunk = pq.ParquetFile(tmp_path / "x.parquet").metadata.row_group(1).column(0)
    rng = random.Random(9)
    for number in range(40):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 3, 20))):
            data[chunk.data_page_offset + rng.randrange(chunk.total_compressed_size)] = rng.randrange(256)
        (tmp_path / "x.parquet").write_bytes(data)
        rows = ingested(tmp_path / "x.parquet", tmp_path / f"store {number}")
        assert len(rows) == 40
        assert all(
            row["error"] is None for key, row in rows.items() if int(key.rpartition("#")[2]) // 10 != 1
        )
