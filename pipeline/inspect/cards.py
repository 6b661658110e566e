"""The pictures of the page: which are drawn from the store, and what each card says."""

from __future__ import annotations

import base64
import io
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import InspectConfig
from pipeline.inspect.counts import Tally, reason_of
from pipeline.sources import images
from pipeline.store import STAGES, Stage, Store

THUMBNAIL_EDGE = 128
NEAREST = 5
# A picture is read with its whole shard (64 MiB or so), so a sample spread over all shards would read the
# whole store.
SAMPLE_SHARDS = 32
# Pictures stored by reference are fetched one by one, perhaps from afar.
FETCHERS = 8
LONGEST_TEXT = 4000


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What the page says of its sample."""

    cards: int
    rows: int
    failed: int
    shards: int
    of_shards: int


def drawn(store: Store, tally: Tally, config: InspectConfig) -> tuple[list[dict[str, Any]], Drawn]:
    rng = np.random.default_rng(config.seed)
    order = _shard_order(store, tally, rng)
    good = tally.rows - tally.failed_rows
    failed = _draw_failed(tally, order, max(config.sample // 2, config.sample - good))
    drawn, used = _draw_good(tally, order, config.sample - len(failed), rng)
    # Failed rows lie anywhere; beyond this many further shards their pictures are left out.
    needed = Counter(shard for shard, _ in failed if shard not in used)
    packed = bool(store.dataset.source.get("pack", True))
    pictures = used | {shard for shard, _ in needed.most_common(SAMPLE_SHARDS)}
    chosen = failed + drawn
    card_at: dict[tuple[int, int], dict[str, Any]] = {}
    embedding_at: dict[tuple[int, int], np.ndarray] = {}
    rows_of: dict[int, list[int]] = {}
    for shard, row in sorted(chosen):
        rows_of.setdefault(shard, []).append(row)
    for shard, rows in rows_of.items():
        for row, card, embedding in _shard_cards(
            store, tally, shard, rows, with_pictures=shard in pictures or not packed
        ):
            card_at[shard, row] = card
            if embedding is not None:
                embedding_at[shard, row] = embedding
    for (shard, row), card in card_at.items():
        _add_groups(tally, tally.row(shard, row), card)
    cards = [card_at[pair] for pair in chosen]
    _add_nearest(cards, [embedding_at.get(pair) for pair in chosen])
    sample = Drawn(
        cards=len(cards), rows=tally.rows, failed=len(failed), shards=len(used), of_shards=len(tally.shards)
    )
    return cards, sample


def _shard_order(store: Store, tally: Tally, rng: np.random.Generator) -> list[int]:
    """Finished shards in random order, the first of each split in front, so that none is left out."""
    order = [tally.shards[int(index)] for index in rng.permutation(len(tally.shards))]
    split_of = {shard: split for split in store.dataset.splits for shard in store.split_shards(split)}
    front = list({split_of.get(shard, ""): shard for shard in reversed(order)}.values())
    return front + [shard for shard in order if shard not in front]


def _draw_failed(tally: Tally, order: list[int], most: int) -> list[tuple[int, int]]:
    """Failed rows, one of each reason in turn, so that a rare reason is not lost among a common one."""
    rank = {shard: position for position, shard in enumerate(order)}
    piles = [sorted(pairs, key=lambda pair: (rank[pair[0]], pair[1])) for pairs in tally.failures.values()]
    drawn: list[tuple[int, int]] = []
    for turn in range(max(map(len, piles), default=0)):
        drawn += [pile[turn] for pile in piles if turn < len(pile)]
        if len(drawn) >= most:
            break
    return drawn[:most]


def _draw_good(
    tally: Tally, order: list[int], count: int, rng: np.random.Generator
) -> tuple[list[tuple[int, int]], set[int]]:
    """Random rows without an error from few shards, and those shards."""
    sizes = dict(zip(tally.shards, np.diff([*tally.starts, tally.rows]).tolist(), strict=True))
    pool: list[tuple[int, int]] = []
    used: set[int] = set()
    for shard in order:
        if len(used) >= SAMPLE_SHARDS and len(pool) >= count:
            break
        used.add(shard)
        failed = tally.shard_failed.get(shard, set())
        pool += [(shard, row) for row in range(sizes[shard]) if row not in failed]
    return [pool[int(index)] for index in rng.permutation(len(pool))[:count]], used


def _shard_cards(
    store: Store, tally: Tally, shard: int, rows: list[int], *, with_pictures: bool
) -> list[tuple[int, dict[str, Any], np.ndarray | None]]:
    names = ["id", "content_hash", "uri", "label", "split", "width", "height", "error"] + (
        ["image"] if with_pictures else []
    )
    columns: dict[Stage, list[dict[str, Any]]] = {
        "images": _take(store.read_shard("images", "", shard, names), rows)
    }
    embeddings = np.zeros((len(rows), 1), np.float32)
    if shard in tally.captioned:
        names = ["caption", "others", "output_tokens", "finish_reason", "flag", "error"]
        columns["captions"] = _take(store.read_shard("captions", tally.caption_variant, shard, names), rows)
    if shard in tally.embedded:
        names = ["embedding", "tokens", "truncated", "error"]
        table = store.read_shard("embeddings", tally.embedding_variant, shard, names)
        columns["embeddings"] = _take(table.drop_columns("embedding"), rows)
        nested = table["embedding"].combine_chunks()
        embeddings = (
            nested.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)[rows].astype(np.float32)
        )
    with ThreadPoolExecutor(FETCHERS) as pool:
        thumbnails = list(pool.map(lambda record: _thumbnail(store, record), columns["images"]))
    cards = []
    for index, row in enumerate(rows):
        card = (
            _card(shard, {stage: of_stage[index] for stage, of_stage in columns.items()}) | thumbnails[index]
        )
        cards.append((row, card, embeddings[index] if embeddings[index].any() else None))
    return cards


def _take(table: pa.Table, rows: list[int]) -> list[dict[str, Any]]:
    taken: list[dict[str, Any]] = table.take(rows).to_pylist()
    return taken


def _card(shard: int, row: dict[Stage, dict[str, Any]]) -> dict[str, Any]:
    """One row as the page's script reads it; what a row does not have is left out."""
    image_row = row["images"]
    caption_row, embedding_row = row.get("captions", {}), row.get("embeddings", {})
    errors = [
        (stage, row[stage]["error"]) for stage in STAGES if stage in row and row[stage]["error"] is not None
    ]
    caption = caption_row.get("caption") or ""
    card = {
        "id": image_row["id"],
        "uri": image_row["uri"] if image_row["uri"] != image_row["id"] else None,
        # -1: a row that failed for want of one
        "label": image_row["label"] if image_row["label"] >= 0 else None,
        "split": image_row["split"],
        "width": image_row["width"],
        "height": image_row["height"],
        "shard": shard,
        "caption": short(caption),
        "others": [short(other) for other in caption_row.get("others") or [] if other],
        "words": len(caption.split()) if caption else None,
        "outputTokens": caption_row.get("output_tokens"),
        "finish": caption_row.get("finish_reason"),
        "flag": caption_row.get("flag"),
        "encoderTokens": embedding_row.get("tokens"),
        "truncated": bool(embedding_row.get("truncated")),
        "error": short(f"{errors[0][0]}: {errors[0][1]}") if errors else None,
        "reason": reason_of(*errors[0]) if errors else None,
    }
    return {
        name: value
        for name, value in card.items()
        if value is not None and value != "" and value is not False
    }


def _add_groups(tally: Tally, row: int, card: dict[str, Any]) -> None:
    """Notes how many rows share the card's picture and its caption, where there are several, and the group's
    number."""
    for kind, groups in tally.groups.items():
        number = groups.number(row)
        if number is not None:
            card[f"same{kind.capitalize()}"] = {"group": number, "count": int(groups.counts[number])}


def short(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " … (cut for this page)"


def _thumbnail(store: Store, row: dict[str, Any]) -> dict[str, str]:
    """A small JPEG in base 64, or why there is none; nothing where there are no bytes at hand."""
    limit = int(store.dataset.source.get("max_pixels", images.DEFAULT_MAX_PIXELS))
    sink = io.BytesIO()
    try:
        image_bytes = _image_bytes(store, row)
        if image_bytes is None:
            return {}
        images.decode_to_fit(image_bytes, THUMBNAIL_EDGE, max_pixels=limit).save(sink, "JPEG", quality=75)
    except images.ImageError as error:
        return {"pictureError": str(error)}
    except OSError as error:
        return {"pictureError": f"cannot be read ({error.strerror or error})"}
    return {"picture": base64.b64encode(sink.getvalue()).decode()}


def _image_bytes(store: Store, row: dict[str, Any]) -> bytes | None:
    """The encoded picture of a row; None for a failed one, and where pictures were not read with the shard.

    Raises:
        OSError: the picture is stored by reference and its place cannot be read, or holds another picture
            now.
    """
    if row["error"] is not None or "image" not in row:
        return None
    return store.picture(row["image"], row["uri"], row["content_hash"])


def _add_nearest(cards: list[dict[str, Any]], embeddings: list[np.ndarray | None]) -> None:
    """Gives each card with an embedding `near`: [card, cosine] of the nearest cards with another caption,
    nearest first."""
    first: dict[str, int] = {}
    for index, card in enumerate(cards):
        if embeddings[index] is not None and "caption" in card:
            first.setdefault(card["caption"], index)
    if len(first) < 2:
        return
    indices = list(first.values())
    matrix = np.stack([embedding for index in indices if (embedding := embeddings[index]) is not None])
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    near: dict[str, list[list[float]]] = {}
    count = min(NEAREST, len(indices) - 1)
    block = max(1, 2**23 // len(indices))  # 32 MiB of similarities at a time
    for start in range(0, len(indices), block):
        cosines = matrix[start : start + block] @ matrix.T
        cosines[np.arange(len(cosines)), np.arange(start, start + len(cosines))] = -np.inf
        best = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        for line, columns in enumerate(best):
            ranked = sorted(columns, key=lambda column: (-cosines[line, column], column))
            caption = cards[indices[start + line]]["caption"]
            near[caption] = [[indices[column], round(float(cosines[line, column]), 3)] for column in ranked]
    for index, card in enumerate(cards):
        if embeddings[index] is not None and "caption" in card:
            card["near"] = near[card["caption"]]
