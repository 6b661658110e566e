"""The page of a store: its data, its counts, its sample, and that nothing written by a model or a file name
gets out of it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.config import InspectConfig
from pipeline.inspect import gallery
from pipeline.inspect.status import summary
from pipeline.store import CAPTIONS, IMAGES, Dataset, Split, Store, embeddings_table

Make = Callable[..., Path]
HOSTILE = "</script><img src=x onerror=alert(1)>\u2028&amp;<!--"


def page(store: Path, to: Path, **settings: Any) -> tuple[str, list[dict[str, Any]]]:
    """The written page and its cards."""
    path = gallery.write(InspectConfig(store=str(store), to=str(to), **settings))
    text = Path(path).read_text(encoding="utf-8")
    block = text.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    return text, json.loads(block)["cards"]


def rewrite(folder: Path, stage: Any, shard: int, change: Callable[[int, dict[str, Any]], None]) -> None:
    """Changes the rows of a shard of images or captions."""
    store = Store(str(folder))
    variant = "" if stage == "images" else "test"
    rows = store.read_shard(stage, variant, shard).to_pylist()
    for place, row in enumerate(rows):
        change(place, row)
    schema = IMAGES if stage == "images" else CAPTIONS
    store.write_shard(stage, variant, shard, pa.Table.from_pylist(rows, schema=schema), seconds=0)


def tiles(text: str) -> dict[str, str]:
    return {
        name.split(",")[0].split("(")[0].strip(): value
        for value, name in re.findall(r"<b>([^<]*)</b>([^<]*)</div>", text)
    }


def test_a_small_store_is_shown_whole_with_everything_known_of_a_row(
    tmp_path: Path, make_store: Make
) -> None:
    folder = make_store(tmp_path / "store")
    text, cards = page(folder, tmp_path / "pages" / "inspect.html")
    store = Store(str(folder))
    rows = [
        row
        for shard in range(4)
        for row in store.read_shard("images", "", shard, ["id", "label", "split"]).to_pylist()
    ]
    assert sorted((c["id"], c["label"], c["split"]) for c in cards) == sorted(
        (r["id"], r["label"], r["split"]) for r in rows
    )
    assert all(
        card["picture"] and card["caption"].startswith("caption ") and card["words"] == 2 for card in cards
    )
    assert "All 33 rows" in text and tiles(text)["rows ingested"] == "33"
    assert [(s["rows"], s["failed"]) for s in summary(store)["stages"]] == [(33, 0)] * 3
    assert len(re.findall(r"<td>33</td><td>0</td></tr>", text)) == 3


def test_thumbnails_are_at_most_128_pixels(tmp_path: Path, make_store: Make) -> None:
    _, cards = page(make_store(tmp_path / "store", size=300, train=3, val=1), tmp_path / "p.html")
    sizes = [Image.open(io.BytesIO(base64.b64decode(card["picture"]))).size for card in cards]
    assert {max(size) for size in sizes} == {128}


def test_hostile_texts_stay_data(tmp_path: Path, make_store: Make) -> None:
    folder = make_store(tmp_path / "store")

    def spoil(place: int, row: dict[str, Any]) -> None:
        row.update(caption=HOSTILE, others=[HOSTILE], flag=HOSTILE)

    rewrite(folder, "captions", 0, spoil)
    rewrite(
        folder,
        "images",
        0,
        lambda place, row: row.update(id=f"{HOSTILE}{place}", error=HOSTILE if place == 1 else None),
    )
    content = json.loads((folder / "dataset.json").read_text())
    content["classes"][0] = HOSTILE
    (folder / "dataset.json").write_text(json.dumps(content))
    text, cards = page(folder, tmp_path / "p.html")
    assert sum(card["caption"] == HOSTILE for card in cards) == 10, "the text itself is not changed"
    assert "<img" not in text and "<!--" not in text
    assert "\u2028" not in text.split('id="data">')[1], (
        "some readers of scripts take it for the end of a line"
    )
    assert text.count("<script") == text.count("</script>") == 2


def test_the_page_fetches_nothing_and_runs_one_script_only(tmp_path: Path, make_store: Make) -> None:
    text, _ = page(make_store(tmp_path / "store"), tmp_path / "p.html")
    assert not re.search(
        r"https?://|<[^>]*\bsrc\s*=|<link|url\(|@import|innerHTML|insertAdjacent|document\.write|eval\(", text
    )
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    script = text.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None and f"script-src 'sha256-{digest}'" in policy[1].replace("&#43;", "+")
    assert policy[1].startswith("default-src 'none'; img-src data:;")


def test_failures_come_first_with_their_first_reason_and_flags_are_kept(
    tmp_path: Path, make_store: Make
) -> None:
    folder = make_store(tmp_path / "store", missing_captions=2)

    def damage(place: int, row: dict[str, Any]) -> None:
        if place in (4, 5):
            row.update(error=f"damaged JPEG ({place} bytes)", image=None, width=None, height=None)

    def follow(place: int, row: dict[str, Any]) -> None:
        row.update(
            {"caption": None, "error": "no picture: damaged"}
            if place in (4, 5)
            else {"flag": "cut"}
            if place == 6
            else {}
        )

    rewrite(folder, "images", 1, damage)
    rewrite(folder, "captions", 1, follow)
    text, cards = page(folder, tmp_path / "p.html")
    reasons = [card.get("reason") for card in cards]
    assert (
        sorted(filter(None, reasons)) == ["captions: no caption"] * 2 + ["images: damaged JPEG (# bytes)"] * 2
    )
    assert all(reasons[:4]) and not any(reasons[4:])
    assert {card["error"] for card in cards[:4]} >= {
        "images: damaged JPEG (4 bytes)",
        "images: damaged JPEG (5 bytes)",
    }
    assert [card["flag"] for card in cards if "flag" in card] == ["cut"]
    assert tiles(text)["failed"] == "4" and tiles(text)["flagged captions"] == "1"
    assert "images: damaged JPEG (# bytes)</a>" in text


def test_a_picture_that_cannot_be_read_shows_why_and_one_by_reference_is_fetched(
    tmp_path: Path, make_store: Make
) -> None:
    folder = make_store(tmp_path / "store", train=3, val=1)
    content = json.loads((folder / "dataset.json").read_text())
    content["source"] |= {"uri": str(tmp_path), "max_bytes": 10**6, "pack": False}
    (folder / "dataset.json").write_text(json.dumps(content))
    Image.new("RGB", (300, 200)).save(tmp_path / "far.png")
    changes: list[dict[str, Any]] = [
        {"image": b"nonsense"},
        {"image": None, "uri": "far.png"},
        {"image": None, "uri": "gone.png"},
    ]
    rewrite(folder, "images", 0, lambda place, row: row.update(changes[place]))
    _, cards = page(folder, tmp_path / "p.html")
    assert [card["uri"] for card in cards if "uri" in card and "picture" in card] == ["far.png"]
    flaws = sorted(card["pictureError"] for card in cards if "pictureError" in card)
    assert flaws[0] == "cannot be read (No such file or directory)" and flaws[1].startswith(
        "not a picture in any of"
    )
    assert sum("picture" in card for card in cards) == 2


def test_equal_pictures_and_captions_are_grouped_over_all_rows(tmp_path: Path, make_store: Make) -> None:
    folder = make_store(tmp_path / "store")
    for shard in range(4):
        rewrite(
            folder,
            "images",
            shard,
            lambda place, row, shard=shard: row.update(
                content_hash="same" if place == 3 else f"{shard}-{place}"
            ),
        )
    text, cards = page(folder, tmp_path / "p.html", sample=10)
    assert "4 rows are in 1 group of equal pictures" in text
    captions = [
        row
        for k in range(4)
        for row in Store(str(folder)).read_shard("captions", "test", k, ["caption"])["caption"].to_pylist()
    ]
    for card in cards:
        assert card["sameCaptions"]["count"] == captions.count(card["caption"])
        assert card.get("samePictures") in (None, {"group": 0, "count": 4})
    assert len({card["sameCaptions"]["group"] for card in cards}) == len({card["caption"] for card in cards})


def test_nearest_captions_are_those_of_a_plain_search(tmp_path: Path, make_store: Make) -> None:
    folder = make_store(tmp_path / "store", classes=8, train=60)
    _, cards = page(folder, tmp_path / "p.html")
    store = Store(str(folder))
    vectors: dict[str, np.ndarray] = {}
    for shard in range(store.dataset.shards):
        texts = store.read_shard("captions", "test", shard, ["caption"])["caption"].to_pylist()
        found = store.read_shard("embeddings", "test", shard, ["embedding"])["embedding"].to_pylist()
        vectors |= {text: np.array(vector, np.float64) for text, vector in zip(texts, found, strict=True)}
    for card in cards:
        others = sorted(
            (
                (float(vectors[card["caption"]] @ v), text)
                for text, v in vectors.items()
                if text != card["caption"]
            ),
            reverse=True,
        )
        assert [cards[int(place)]["caption"] for place, _ in card["near"]] == [text for _, text in others[:5]]
        assert [cosine for _, cosine in card["near"]] == pytest.approx(
            [cosine for cosine, _ in others[:5]], abs=3e-3
        )


def test_a_sample_says_of_how_many_and_is_at_most_half_failures(tmp_path: Path, make_store: Make) -> None:
    folder = make_store(tmp_path / "store", train=40, val=20, missing_captions=9)
    text, cards = page(folder, tmp_path / "p.html", sample=12)
    assert len(cards) == 12 and sum("error" in card for card in cards) == 6
    assert re.search(
        r"A sample: 12 of 60 rows, 6 failed ones first, then random ones\s+from 6 of 6 shards", text
    )
    assert tiles(text)["failed"] == "9", "counts are over all rows"
    assert page(folder, tmp_path / "q.html", sample=12)[0] == text
    assert {card["id"] for card in page(folder, tmp_path / "r.html", sample=12, seed=1)[1]} != {
        card["id"] for card in cards
    }


def test_stores_that_are_not_finished_are_shown_as_far_as_they_are(tmp_path: Path, make_store: Make) -> None:
    folder = make_store(tmp_path / "store")
    (folder / "images/receipts/part-00003.json").unlink()
    (folder / "captions/test/receipts/part-00000.json").unlink()
    text, cards = page(folder, tmp_path / "p.html")
    assert len(cards) == 24 and sum("caption" in card for card in cards) == 14
    assert re.search(r"1 of 4 shards are not ingested yet and are left out here:\s+9 rows", text)
    shutil.rmtree(folder / "embeddings")
    assert not any("near" in card for card in page(folder, tmp_path / "p.html")[1])
    shutil.rmtree(folder / "captions")
    text, cards = page(folder, tmp_path / "p.html")
    assert "There are no captions yet" in text and not any("caption" in card for card in cards)
    for receipt in (folder / "images/receipts").iterdir():
        receipt.unlink()
    assert page(folder, tmp_path / "p.html")[1] == []


def test_of_several_variants_one_must_be_named(tmp_path: Path, make_store: Make) -> None:
    folder = make_store(tmp_path / "store")
    store = Store(str(folder))
    store.write_variant("embeddings", "second", {"captions": "test"})
    with pytest.raises(
        ValueError,
        match="several embeddings of test and none named; pass --embeddings with one of: second, test",
    ):
        page(folder, tmp_path / "p.html")
    store.write_variant("captions", "other", {"prompt": "Name it."})
    with pytest.raises(ValueError, match="pass --captions with one of: other, test"):
        page(folder, tmp_path / "p.html")
    with pytest.raises(ValueError, match="made of captions test, not other"):
        page(folder, tmp_path / "p.html", captions="other", embeddings="test")
    assert "near" in page(folder, tmp_path / "p.html", embeddings="test")[1][0]
    text, cards = page(folder, tmp_path / "p.html", captions="other")
    assert "Name it." in text and not any("caption" in card for card in cards)


@pytest.mark.alone
def test_the_page_of_a_described_store_counts_what_the_store_counts(described: Path, tmp_path: Path) -> None:
    store = Store(str(described))
    captions = str(store.variants("captions")[0])
    text, cards = page(described, tmp_path / "p.html", captions=captions)
    assert len(cards) == store.dataset.rows == 288
    assert (
        tiles(text)["with a caption"] == tiles(text)["with a vector"] == "288"
        and tiles(text)["failed"] == "0"
    )
    assert all(len(card["near"]) == 5 and card["outputTokens"] > 3 and card["picture"] for card in cards)
    assert json.dumps(store.variant("captions", captions)["prompt"]) in text.replace("&#34;", '"')


@pytest.mark.alone
def test_a_hundred_thousand_rows_are_paged_in_bounded_time_and_size(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    rng = np.random.default_rng(0)
    shards, rows = 200, 500
    splits = {
        "train": Split(rows=95_000, first_shard=0, num_shards=190),
        "val": Split(rows=5000, first_shard=190, num_shards=10),
    }
    classes = [f"class {n}" for n in range(1000)]
    dataset = Dataset(
        schema_version=1, classes=classes, splits=splits, rows=100_000, shards=shards, source={}
    )
    store = Store.create(str(folder), dataset)
    store.write_variant("captions", "test", {})
    store.write_variant("embeddings", "test", {"captions": "test"})
    sink = io.BytesIO()
    # Noise: no picture takes more room.
    Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)).save(sink, "JPEG")
    words = [f"word{n}" for n in range(3000)]
    for shard in range(shards):
        ids = [f"{shard}/{row}.jpg" for row in range(rows)]
        texts = [" ".join(words[n] for n in rng.integers(0, 3000, 40)) for _ in ids]
        errors = [f"empty caption {shard}" if row == 7 else None for row in range(rows)]
        images: dict[str, Any] = {
            "id": ids,
            "content_hash": ids,
            "image": [sink.getvalue()] * rows,
            "uri": ids,
        }
        images |= {
            "label": rng.integers(0, 1000, rows).tolist(),
            "split": ["train" if shard < 190 else "val"] * rows,
        }
        images |= {"width": [128] * rows, "height": [128] * rows, "error": [None] * rows}
        told = [None if error else text for error, text in zip(errors, texts, strict=True)]
        captions = {"id": ids, "caption": told, "output_tokens": [50] * rows, "error": errors}
        full = {name: captions.get(name, [None] * rows) for name in CAPTIONS.names}
        vectors = rng.normal(size=(rows, 384))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        embedded = [
            {"id": key, "embedding": vector, "tokens": 60, "truncated": False, "error": error}
            for key, vector, error in zip(ids, vectors, errors, strict=True)
        ]
        store.write_shard("images", "", shard, pa.table(images, schema=IMAGES), seconds=0)
        store.write_shard("captions", "test", shard, pa.table(full, schema=CAPTIONS), seconds=0)
        store.write_shard("embeddings", "test", shard, embeddings_table(embedded, 384), seconds=0)
    start = time.monotonic()
    text, cards = page(folder, tmp_path / "p.html")
    assert time.monotonic() - start < 60
    assert (tmp_path / "p.html").stat().st_size < 30_000_000
    assert len(cards) == 2000 and sum("error" in card for card in cards) == 200
    assert {card["split"] for card in cards} == {"train", "val"}
    assert "A sample: 2,000 of 100,000 rows" in text and tiles(text)["failed"] == "200"
