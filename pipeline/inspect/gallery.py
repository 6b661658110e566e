"""A page to look at a store with: pictures with captions, failures, repeated rows, nearest captions,
distributions.

`gpt4image inspect STORE --to inspect.html` writes one self-contained file that fetches nothing. Counts are
over all rows, taken shard by shard from small columns; pictures are a sample. What models and file names
wrote reaches the page as escaped data only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from importlib import resources
from typing import Any

import jinja2
import markupsafe
import numpy as np

from pipeline.config import InspectConfig
from pipeline.errors import SettingsError
from pipeline.inspect import cards, charts
from pipeline.inspect.counts import Tally, count_rows
from pipeline.store import STAGES, Stage, Store, locations


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
    shown, drawn = cards.drawn(store, tally, config)
    data = {"classes": store.dataset.classes, "cards": shown}
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
        charts=charts.histograms(tally),
        lists=charts.lists(store, tally),
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
                "largest": [
                    _group(store, tally, kind, number) for number in range(min(charts.MOST, len(groups)))
                ],
            }
        )
    return tables


def _group(store: Store, tally: Tally, kind: str, number: int) -> dict[str, Any]:
    groups = tally.groups[kind]
    members = groups.members(number)
    if kind == "captions":
        shard, row = tally.shard_and_row(int(members[0]))
        example = cards.short(
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
            used = variant == shown.get(stage)
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
