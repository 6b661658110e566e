"""The page: one self-contained HTML file of pictures with captions, curves, the sweep, and the comparison
over seeds.

Nothing is fetched when it is opened: plots are inline SVG, pictures are data URIs. Captions and names come
from models and users, so the template escapes all of it.
"""

from __future__ import annotations

import base64
import io
import os
from importlib import resources
from typing import Any

from pipeline.captioners.prompts import class_name
from pipeline.sources import images
from pipeline.store import Store, locations
from tuning import report
from tuning.plots import curves_plot, heat_maps, lengths_plot, paired_plot
from tuning.significance import Paired, paired


def write(path: str, sweeps: list[dict[str, Any]], *, pictures: int) -> None:
    """Writes the page of one or more sweeps over the same store."""
    import jinja2

    template = resources.files("tuning").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    store = Store(sweeps[0]["store"])
    captions = _caption_variant(store, sweeps)
    results = [result for content in sweeps for result in paired(report.finished(content))]
    text = environment.from_string(template).render(
        store=store.uri,
        dataset=store.dataset,
        captions_variant=captions,
        gallery=_gallery(store, captions, pictures) if captions else [],
        lengths=_safe(lengths_plot(store, captions)) if captions else "",
        stages=_stages(store),
        sweeps=[_sweep(content) for content in sweeps],
        metrics=list(dict.fromkeys(report.metric_of(content) for content in sweeps)),
        comparisons=[_comparison(result) for result in results if len(result.seeds) > 1],
    )
    locations.check_writable("html", os.path.dirname(os.path.abspath(path)))
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(text)


def _sweep(content: dict[str, Any]) -> dict[str, Any]:
    trials = report.finished(content)
    return {
        "name": os.path.basename(content["sweep"]),
        "rows": report.rows(content),
        "headings": report.headings(content),
        "metric": report.metric_of(content),
        "exported": content["exported"],
        "unfinished": report.unfinished(content),
        "curves": _safe(curves_plot(trials)),
        "heat": [_safe(plot) for plot in heat_maps(trials)],
        "tracking": _tracking(content),
        "parent": content["parent_run"],
    }


def _comparison(result: Paired) -> dict[str, Any]:
    shown, digits = result.metric.shown, result.metric.digits
    pairs = [
        (seed, shown(baseline), shown(method), f"{method - baseline:+.{digits}f}")
        for seed, baseline, method in zip(result.seeds, result.baseline, result.method, strict=True)
    ]
    return {
        "sentence": report.sentence(result),
        "setting": result.cell.words,
        "pairs": pairs,
        "verdict": result.verdict,
        "plot": _safe(paired_plot(result)),
    }


def _tracking(content: dict[str, Any]) -> dict[str, str]:
    uri, run = content["tracking_uri"], content["parent_run"]
    if uri.startswith("http"):
        return {
            "link": f"{uri.rstrip('/')}/#/search?searchFilter=tags.mlflow.parentRunId%3D'{run}'",
            "command": "",
        }
    return {"link": "", "command": f"mlflow ui --backend-store-uri {uri} --host 127.0.0.1"}


def _stages(store: Store) -> list[dict[str, Any]]:
    from pipeline.inspect.status import summary

    stages: list[dict[str, Any]] = summary(store)["stages"]
    for stage in stages:
        settings = store.variant(stage["stage"], stage["variant"]) if stage["variant"] else {}
        told = ("engine", "model", "prompt", "encoder", "pooling")
        stage["settings"] = ", ".join(f"{name} {settings[name]}" for name in told if name in settings)
    return stages


def _caption_variant(store: Store, sweeps: list[dict[str, Any]]) -> str:
    """The captions that the aligned trials were trained on."""
    names = {trial["config"].get("embeddings", "") for content in sweeps for trial in content["trials"]}
    embeddings = next(iter(names - {""}), "") or next(iter(store.variants("embeddings")), "")
    return str(store.variant("embeddings", embeddings)["captions"]) if embeddings else ""


def _gallery(store: Store, captions: str, count: int) -> list[dict[str, str]]:
    """Pictures of as many classes as there is room for; rows are in hashed order, so the first are a random
    sample."""
    shown: list[dict[str, str]] = []
    seen: dict[int, int] = {}
    for shard in range(store.dataset.shards):
        columns = ["content_hash", "image", "uri", "label", "error"]
        rows = store.read_shard("images", "", shard, columns).to_pylist()
        texts = store.read_shard("captions", captions, shard, ["caption", "finish_reason"]).to_pylist()
        share = -(-count // len(store.dataset.classes))
        for row, text in zip(rows, texts, strict=True):
            if len(shown) == count:
                return shown
            if row["error"] is None and text["caption"] and seen.get(row["label"], 0) < share:
                try:
                    source = _data_uri(store.picture(row["image"], row["uri"], row["content_hash"]))
                except (OSError, images.ImageError):
                    continue  # stored by reference, and not there any more: the page shows others
                seen[row["label"]] = seen.get(row["label"], 0) + 1
                cut = " (cut at the token limit)" if text["finish_reason"] == "length" else ""
                label = class_name(store.dataset.classes[row["label"]])
                shown.append({"label": label, "caption": text["caption"] + cut, "source": source})
    return shown


def _data_uri(data: bytes) -> str:
    sink = io.BytesIO()
    images.fit(images.decode(data, max_pixels=2**62), 224).save(sink, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(sink.getvalue()).decode()}"


def _safe(svg: str) -> Any:
    """Our own plot, exempt from escaping; the texts in it come from matplotlib, which escapes them."""
    import markupsafe

    return markupsafe.Markup(svg)
