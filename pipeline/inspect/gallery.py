"""A page to look at a store with: pictures with captions, failures, repeated rows, nearest captions,
distributions.

`gpt4image inspect STORE --to inspect.html` writes one self-contained file that fetches nothing. Counts are
over all rows, taken shard by shard from small columns; pictures are a sample. What models and file names
wrote reaches the page as escaped data only.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from typing import Any
from urllib.parse import quote

import jinja2
import markupsafe
import numpy as np
import pyarrow as pa

from pipeline.config import InspectConfig
from pipeline.errors import SettingsError
from pipeline.inspect.counts import Tally, count_rows, reason_of
from pipeline.sources import images
from pipeline.store import STAGES, Stage, Store, locations

THUMBNAIL_EDGE = 128
NEAREST = 5
# A picture is read with its whole shard (64 MiB or so), so a sample spread over all shards would read the
# whole store.
SAMPLE_SHARDS = 32
# Pictures stored by reference are fetched one by one, perhaps from afar.
FETCHERS = 8
GROUPS = 20
LONGEST_TEXT = 4000
BINS = 40


def write(config: InspectConfig) -> str:
    """Writes the page and returns its path.

    Raises:
        FileNotFoundError: there is no store, or no variant of the name given.
        ValueError: several variants of a stage exist and none was named, or the two named do not belong
            together.
    """
    store = Store(config.store)
    caption_variant, embedding_variant = _variants(store, config)
    tally = count_rows(store, caption_variant, embedding_variant)
    cards, drawn = _cards(store, tally, config)
    data = {"classes": store.dataset.classes, "cards": cards}
    template = resources.files("pipeline.inspect").joinpath("gallery.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(template).render(
        store=config.store,
        dataset=store.dataset,
        tally=tally,
        drawn=drawn,
        data=_json(data),
        stages=_stages(store, tally),
        variants=_settings(store, tally),
        repeats=_repeats(store, tally),
        charts=_charts(tally),
        lists=_lists(store, tally),
        script_hash=_script_hash(template),
    )
    folder = os.path.dirname(os.path.abspath(config.to))
    locations.check_writable("to", folder)
    os.makedirs(folder, exist_ok=True)
    with open(config.to, "w", encoding="utf-8", errors="replace") as stream:
        stream.write(text)
    return config.to


def _variants(store: Store, config: InspectConfig) -> tuple[str, str]:
    """The caption and the embedding variant to show; "" where the store has none."""
    caption_variant = config.captions
    if config.embeddings:
        made_of = str(
            store.variant("embeddings", store.only_variant("embeddings", config.embeddings))["captions"]
        )
        if caption_variant and caption_variant != made_of:
            message = (
                f"embeddings={config.embeddings}: made of captions {made_of}, not {caption_variant}; leave "
                "one of the two flags out."
            )
            raise SettingsError(message)
        return store.only_variant("captions", made_of), config.embeddings
    if caption_variant or store.variants("captions"):
        caption_variant = store.only_variant("captions", caption_variant)
    names = [
        name
        for name in store.variants("embeddings")
        if store.variant("embeddings", name)["captions"] == caption_variant
    ]
    if len(names) > 1:
        message = (
            f"store={store.uri}: several embeddings of {caption_variant} and none named; pass --embeddings "
            "with one of: "
        )
        raise SettingsError(message + ", ".join(names) + ".")
    return caption_variant, "".join(names)


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """What the page says of its sample."""

    cards: int
    rows: int
    failed: int
    shards: int
    of_shards: int


def _cards(store: Store, tally: Tally, config: InspectConfig) -> tuple[list[dict[str, Any]], _Drawn]:
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
    sample = _Drawn(
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
        "caption": _short(caption),
        "others": [_short(other) for other in caption_row.get("others") or [] if other],
        "words": len(caption.split()) if caption else None,
        "outputTokens": caption_row.get("output_tokens"),
        "finish": caption_row.get("finish_reason"),
        "flag": caption_row.get("flag"),
        "encoderTokens": embedding_row.get("tokens"),
        "truncated": bool(embedding_row.get("truncated")),
        "error": _short(f"{errors[0][0]}: {errors[0][1]}") if errors else None,
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


def _short(text: str) -> str:
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


def _repeats(store: Store, tally: Tally) -> list[dict[str, Any]]:
    """What repeats among pictures and among captions, with the largest groups."""
    tables = []
    for kind, title in (("pictures", "Equal pictures"), ("captions", "Equal captions")):
        groups = tally.groups.get(kind)
        if groups is None:
            continue
        tables.append(
            {
                "kind": kind,
                "title": title,
                "groups": len(groups),
                "rows": int(groups.counts.sum()),
                "several_splits": int(groups.several_splits.sum()),
                "several_classes": int(groups.several_classes.sum()),
                "largest": [_group(store, tally, kind, number) for number in range(min(GROUPS, len(groups)))],
            }
        )
    return tables


def _group(store: Store, tally: Tally, kind: str, number: int) -> dict[str, Any]:
    groups = tally.groups[kind]
    members = groups.members(number)
    if kind == "captions":
        shard, row = tally.shard_and_row(int(members[0]))
        example = _short(
            store.read_shard("captions", tally.caption_variant, shard, ["caption"])["caption"][row].as_py()
        )
    else:
        shown = [tally.shard_and_row(int(member)) for member in members[:3]]
        example = ", ".join(
            store.read_shard("images", "", shard, ["id"])["id"][row].as_py() for shard, row in shown
        )
        example += ", …" if len(members) > 3 else ""
    splits = [
        name for code, name in enumerate(store.dataset.splits) if code in set(tally.splits[members].tolist())
    ]
    return {
        "number": number,
        "count": len(members),
        "example": example,
        "splits": ", ".join(splits),
        "classes": len(np.unique(tally.labels[members])),
    }


def _stages(store: Store, tally: Tally) -> list[dict[str, Any]]:
    """Every stage and variant; rows are counted for those shown, of the others only the finished shards are
    listed."""
    shown = {"images": "", "captions": tally.caption_variant, "embeddings": tally.embedding_variant}
    finished = {
        "images": len(tally.shards),
        "captions": len(tally.captioned),
        "embeddings": len(tally.embedded),
    }
    stages: list[dict[str, Any]] = []
    for stage in STAGES:
        for variant in store.variants(stage):
            used = variant == shown[stage]
            shards = finished[stage] if used else len(store.finished(stage, variant))
            counts = {"rows": tally.done[stage], "failed": tally.failed[stage]} if used else {}
            stages.append({"stage": stage, "variant": variant, "used": used, "shards": shards, **counts})
    return stages


def _settings(store: Store, tally: Tally) -> list[dict[str, Any]]:
    pairs: list[tuple[Stage, str]] = [
        ("captions", tally.caption_variant),
        ("embeddings", tally.embedding_variant),
    ]
    variants = [
        {"stage": stage, "name": name, "settings": store.variant(stage, name)}
        for stage, name in pairs
        if name
    ]
    return [
        entry | {"text": json.dumps(entry["settings"], indent=2, ensure_ascii=False)} for entry in variants
    ]


def _charts(tally: Tally) -> list[dict[str, Any]]:
    sizes = np.bincount(tally.labels[tally.labels >= 0])
    of_classes = Counter(sizes.tolist() if len(sizes) > 2 * GROUPS else [])  # fewer are listed by name
    charts = [
        ("Words in a caption", "captions", tally.words),
        ("Tokens written for a picture", "pictures", tally.tokens),
        ("Longer edge of a picture, in pixels", "pictures", tally.edges),
        ("Pictures in a class", "classes", of_classes),
    ]
    return [_histogram(title, what, counts) for title, what, counts in charts if counts]


def _histogram(title: str, what: str, counts: Counter[int]) -> dict[str, Any]:
    """Columns of equal width for whole numbers; the last holds what lies beyond 99.5 % too, so that one giant
    hides nothing."""
    values = np.array(sorted(counts))
    weights = np.array([counts[int(value)] for value in values])
    reached = np.cumsum(weights) / weights.sum()
    low, high, most = int(values[0]), int(values[np.searchsorted(reached, 0.995)]), int(values[-1])
    high = most if most - high <= (most - low) // 4 else high
    width = -(-(high - low + 1) // BINS)
    bins = (high - low) // width + 1
    heights = np.bincount(np.minimum((values - low) // width, bins - 1), weights, bins).astype(int).tolist()
    columns = []
    for index, height in enumerate(heights):
        start = low + index * width
        end = most if index == bins - 1 else start + width - 1
        label = f"{start}" if start == end else f"{start} to {end}"
        columns.append({"label": f"{label}: {height} {what}", "share": round(100 * height / max(heights), 2)})
    beyond = f"{high} and more, up to {most}" if most > low + bins * width - 1 else f"{most}"
    median = int(values[np.searchsorted(reached, 0.5)])
    return {"title": title, "columns": columns, "low": low, "high": beyond, "median": median}


def _lists(store: Store, tally: Tally) -> list[dict[str, Any]]:
    """Bars by name: classes (with many, the largest and the smallest), splits, reasons of failure, flags."""
    sizes = np.bincount(tally.labels[tally.labels >= 0], minlength=len(store.dataset.classes)).tolist()
    classes = sorted(zip(store.dataset.classes, sizes, strict=True), key=lambda pair: (-pair[1], pair[0]))
    splits = np.bincount(tally.splits[tally.splits >= 0], minlength=len(store.dataset.splits)).tolist()
    lists = [("Classes", "class", classes)]
    if len(classes) > 2 * GROUPS:
        lists = [
            ("Largest classes", "class", classes[:GROUPS]),
            ("Smallest classes", "class", classes[-GROUPS:]),
        ]
    lists.append(("Splits", "split", list(zip(store.dataset.splits, splits, strict=True))))
    lists.append(("Why rows failed", "errors", tally.reasons.most_common(GROUPS)))
    lists.append(("Flags", "flag", tally.flags.most_common(GROUPS)))
    return [_bars(title, key, pairs) for title, key, pairs in lists if pairs]


def _bars(title: str, key: str, pairs: list[tuple[str, int]]) -> dict[str, Any]:
    most = max(1, *(count for _, count in pairs))
    bars = [
        {
            "name": name,
            "count": count,
            "share": round(100 * count / most, 2),
            "link": f"#{key}={quote(name, safe='')}",
        }
        for name, count in pairs
    ]
    return {"title": title, "bars": bars, "wide": key == "errors"}


def _json(value: Any) -> markupsafe.Markup:
    """JSON that stays data inside a script element, whatever the texts in it are."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return markupsafe.Markup(text)


def _script_hash(template: str) -> str:
    """Hash of the template's one script, for the page's policy: no other script runs."""
    script = template.split("<script>")[1].split("</script>")[0]
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
