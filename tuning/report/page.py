"""The page: one self-contained HTML file of what was found, how sure it is, the search, and pictures with
captions.

Nothing is fetched when it is opened, and it has no scripts: drawings are inline SVG, pictures are data URIs.
Captions and names come from models and users, so the template escapes all of it. The numbers that matter
stand in data attributes, too, for programs that read the page.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Sequence
from importlib import resources
from typing import Any

from pipeline.captioners.prompts import class_name
from pipeline.sources import images
from pipeline.store import Store, locations
from training.objectives.registry import settings_of
from tuning.report import across, landscape, plots, progress, significance, words
from tuning.report.comparison import Comparison, comparisons, of_sweep
from tuning.report.configurations import Configuration, Content, configurations, headings, legend, metric_of
from tuning.report.table import cost_shown, rows, value_shown

_MOST_COMPARED = 24
"""Rows of a drawing of comparisons; the table has all, the rest of them unfolded on demand and in print."""


def write(path: str, sweeps: Sequence[Content], *, pictures: int) -> None:
    """Writes the page of one or more sweeps over the same store."""
    import jinja2

    template = resources.files("tuning.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"datum": _datum, "p": words.p_shown}
    found = comparisons(sweeps)
    told = [_sweep(content, of_sweep(found, content)) for content in sweeps]
    text = environment.from_string(template).render(
        sweeps=told,
        leads=sorted(told, key=_strength),
        across=across.lines(sweeps),
        title=words.title(sweeps),
        tested=sum(not math.isnan(each.p) for each in found),
        fewest=significance.FEWEST_SEEDS,
        **_described(sweeps, pictures),
    )
    locations.check_writable("html", os.path.dirname(os.path.abspath(path)))
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(text)


def _datum(value: float) -> str:
    """A number as an attribute: exact; empty where there is none."""
    return repr(float(value)) if math.isfinite(value) else ""


def _sweep(content: Content, found: list[Comparison]) -> dict[str, Any]:
    table = rows(content)
    # By seed where there are few comparisons; of many the drawing has the seeds as points.
    is_detailed = len(found) == 1 or any(each.is_final for each in found)
    return {
        "name": os.path.basename(content["sweep"].rstrip("/")),
        "lead": words.lead(content, found),
        "state": progress.state(content),
        "plan": progress.plan(content),
        "provenance": progress.provenance(content),
        "notes": words.notes(content, found),
        "trouble": progress.trouble(content),
        "winner": progress.winner(content),
        "winner_is": progress.winner_is(content),
        "runs": content["state"] == "running",
        "heading": _heading(found),
        "comparisons": (told := [_comparison(each) for each in found]),
        "tables": [table for table in (told[:_MOST_COMPARED], told[_MOST_COMPARED:]) if table],
        "pairs": [_safe(plot) for plot in _pairs(found)] if not is_detailed else [],
        "is_detailed": is_detailed,
        "metric": metric_of(content),
        "headings": headings(content),
        "legend": legend(content),
        "rows": table,
        "shown": {
            row.name: (value_shown(row.metric, content), value_shown(row.test, content)) for row in table
        },
        "best_shown": {row.name: value_shown(row.best, content) for row in table},
        "cost": cost_shown,
        "has_tests": any(math.isfinite(row.test) for row in table),
        "test_split": content["test_split"],
        "eval_split": content["eval_split"],
        "backbones": _backbones(content),
        "cost_plot": _safe(plots.cost_plot(configurations(content))),
        "exported": content["exported"],
        "for_timm": not settings_of(content["objective"]).own_model,
        "tracking": _tracking(content),
        "parent": content["parent_run"],
    }


def _heading(found: list[Comparison]) -> str:
    if any(each.is_final for each in found):
        return "The final comparison, on fresh seeds"
    chosen = any(each.among > 1 for each in found)
    return "The search's own comparisons" if chosen else "The comparison with the plain model"


def _strength(sweep: dict[str, Any]) -> int:
    """Sweeps whose comparison counts more are told of first."""
    found = [each["of"] for each in sweep["comparisons"]]
    tested = any(not math.isnan(each.adjusted) for each in found)
    return -2 if tested and found[0].is_final else -int(tested)


def _comparison(each: Comparison) -> dict[str, Any]:
    shown, digits = each.metric.shown, each.metric.digits
    low, high = each.interval
    drawn = significance.bootstrap_interval(each.differences)
    return {
        "of": each,
        "sentence": words.sentence(each),
        "low": low,
        "wide": each.over_pictures,
        "high": high,
        "interval": f"{low:+.{digits}f} to {high:+.{digits}f}" if math.isfinite(low) else "-",
        "bootstrap": f"{drawn[0]:+.{digits}f} to {drawn[1]:+.{digits}f}" if math.isfinite(drawn[0]) else "-",
        "plot": _safe(plots.paired_plot([each])) if len(each.seeds) > 1 else "",
        "mean": f"{each.mean:+.{digits}f}",
        "pairs": [
            (seed, shown(before), shown(after), f"{after - before:+.{digits}f}", after - before)
            for seed, before, after in zip(each.seeds, each.befores, each.afters, strict=True)
        ],
        "digits": digits,
    }


def _pairs(found: list[Comparison]) -> list[str]:
    """A drawing of the search's comparisons for each backbone."""
    shown = [each for each in found if len(each.seeds) > 1 and not each.is_final]
    backbones = dict.fromkeys(each.method.backbone for each in shown)
    groups = [[each for each in shown if each.method.backbone == name] for name in backbones]
    return [plots.paired_plot(group[:_MOST_COMPARED]) for group in groups]


def _backbones(content: Content) -> list[dict[str, Any]]:
    found = configurations(content)
    finals = configurations(content, "final")
    return [
        _backbone(
            name,
            [each for each in found if each.backbone == name],
            [each for each in finals if each.backbone == name],
            content["rungs"],
        )
        for name in dict.fromkeys(each.backbone for each in found)
    ]


def _backbone(
    name: str, found: list[Configuration], finals: list[Configuration], rungs: Sequence[int]
) -> dict[str, Any]:
    shares, epoch = landscape.importance(found, rungs)
    tried = sum(not each.is_baseline for each in found)
    why = ""
    if tried > 1 and not shares:
        why = (
            f"How much each setting matters is not shown: that takes {landscape.FEWEST_CONFIGURATIONS} "
            f"configurations that came equally far, and {tried} were begun."
        )
    heat = landscape.heat_map(found, list(shares))
    drawn = [
        plots.curves_plot(found),
        plots.curves_plot(finals) if finals else "",
        heat,
        landscape.importance_plot(shares, name, epoch) if shares else "",
    ]
    return {
        "name": name,
        "has_map": bool(heat),
        "has_importance": bool(shares),
        "plots": [_safe(plot) for plot in drawn if plot],
        "parallel": _safe(landscape.parallel_plot(found)),
        "why": why,
    }


def _tracking(content: Content) -> dict[str, str]:
    uri, run = content["tracking_uri"], content["parent_run"]
    if uri.startswith("http"):
        return {
            "link": f"{uri.rstrip('/')}/#/search?searchFilter=tags.mlflow.parentRunId%3D'{run}'",
            "command": "",
        }
    return {"link": "", "command": f"mlflow ui --backend-store-uri {uri} --host 127.0.0.1"}


def _described(sweeps: Sequence[Content], pictures: int) -> dict[str, Any]:
    """What the store holds; of one that is gone only its name."""
    uri = sweeps[0]["store"]
    if not Store.exists(uri):
        return {"store": uri, "dataset": None, "gallery": [], "lengths": "", "stages": []}
    store = Store(uri)
    captions = _caption_variant(store, sweeps)
    return {
        "store": store.uri,
        "dataset": store.dataset,
        "captions_variant": captions,
        "gallery": _gallery(store, captions, pictures) if captions else [],
        "lengths": _safe(plots.lengths_plot(store, captions)) if captions else "",
        "stages": _stages(store),
    }


def _stages(store: Store) -> list[dict[str, Any]]:
    from pipeline.inspect.status import summary

    stages: list[dict[str, Any]] = summary(store)["stages"]
    for stage in stages:
        settings = store.variant(stage["stage"], stage["variant"]) if stage["variant"] else {}
        told = ("engine", "model", "prompt", "encoder", "pooling")
        stage["settings"] = ", ".join(f"{name} {settings[name]}" for name in told if name in settings)
    return stages


def _caption_variant(store: Store, sweeps: Sequence[Content]) -> str:
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
