"""The page: one self-contained HTML file of pictures with captions, curves, the sweep, and the comparison over seeds.

Nothing is fetched when it is opened: plots are inline SVG, pictures are data URIs. Captions and names come from models and
users, so the template escapes all of it.
"""

from __future__ import annotations

import base64
import io
import os
from importlib import resources
from typing import Any

from pipeline import images, locations
from pipeline.prompts import class_name
from pipeline.store import Store
from training.record import headline
from tuning import report
from tuning.significance import Paired, paired

BASELINE, ALIGNED = "#7a7f87", "#1f6feb"


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
        lengths=_safe(_lengths_plot(store, captions)) if captions else "",
        stages=_stages(store),
        sweeps=[_sweep(content) for content in sweeps],
        comparisons=[_comparison(result) for result in results if len(result.seeds) > 1],
    )
    locations.check_writable("html", os.path.dirname(os.path.abspath(path)))
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(text)


def _sweep(content: dict[str, Any]) -> dict[str, Any]:
    trials = report.finished(content)
    return {
        "name": os.path.basename(content["sweep"]), "rows": report.rows(content), "exported": content["exported"],
        "unfinished": report.unfinished(content), "curves": _safe(_curves_plot(trials)),
        "heat": [_safe(plot) for plot in _heat_maps(trials)], "tracking": _tracking(content), "parent": content["parent_run"],
    }  # fmt: skip


def _comparison(result: Paired) -> dict[str, Any]:
    pairs = list(zip(result.seeds, result.baseline, result.aligned, strict=True))
    return {"sentence": report.sentence(result), "pairs": pairs, "verdict": result.verdict, "plot": _safe(_paired_plot(result))}


def _tracking(content: dict[str, Any]) -> dict[str, str]:
    uri, run = content["tracking_uri"], content["parent_run"]
    if uri.startswith("http"):
        return {"link": f"{uri.rstrip('/')}/#/search?searchFilter=tags.mlflow.parentRunId%3D'{run}'", "command": ""}
    return {"link": "", "command": f"mlflow ui --backend-store-uri {uri} --host 127.0.0.1"}


def _stages(store: Store) -> list[dict[str, Any]]:
    from pipeline.store import summary

    stages: list[dict[str, Any]] = summary(store)["stages"]
    for stage in stages:
        settings = store.variant(stage["stage"], stage["variant"]) if stage["variant"] else {}
        told = ("engine", "model", "prompt", "encoder", "pooling")
        stage["settings"] = ", ".join(f"{name} {settings[name]}" for name in told if name in settings)
    return stages


def _caption_variant(store: Store, sweeps: list[dict[str, Any]]) -> str:
    """The captions that the aligned trials were trained on."""
    names = {trial["config"]["embeddings"] for content in sweeps for trial in content["trials"]}
    embeddings = next(iter(names - {""}), "") or next(iter(store.variants("embeddings")), "")
    return str(store.variant("embeddings", embeddings)["captions"]) if embeddings else ""


def _gallery(store: Store, captions: str, count: int) -> list[dict[str, str]]:
    """Pictures of as many classes as there is room for; rows are in hashed order, so the first are a random sample."""
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


def _lengths_plot(store: Store, captions: str, most_shards: int = 200) -> str:
    """Caption lengths in words, over at most 200 shards."""
    words: list[int] = []
    for shard in store.finished("captions", captions)[:most_shards]:
        texts = store.read_shard("captions", captions, shard, ["caption"])["caption"].to_pylist()
        words += [len(text.split()) for text in texts if text]
    figure, axes = _figure(5.2, 2.4)
    axes.hist(words, bins=range(0, max(words, default=1) + 2), color=ALIGNED)
    axes.set_xlabel("words in a caption")
    axes.set_ylabel("captions")
    return _svg(figure)


def _curves_plot(trials: list[dict[str, Any]]) -> str:
    """Top-1 by epoch: a panel a backbone; baselines grey, aligned runs by weight."""
    backbones = sorted({trial["config"]["backbone"] for trial in trials})
    figure, axes = _figure(5.2 * len(backbones), 3.0, len(backbones))
    for panel, backbone in zip([axes] if len(backbones) == 1 else list(axes), backbones, strict=True):
        labels = set()
        for trial in (trial for trial in trials if trial["config"]["backbone"] == backbone):
            weight = trial["config"]["alignment_weight"]
            label = f"weight {weight:g}" if weight else "baseline"
            colour = BASELINE if not weight else {0.3: "#58a6ff"}.get(weight, ALIGNED)
            history = trial["result"]["history"]
            panel.plot(
                [m["epoch"] for m in history], [headline(m) for m in history], color=colour, linewidth=1.4,
                linestyle="-" if weight else "--", label=None if label in labels else label,
            )  # fmt: skip
            labels.add(label)
        panel.set_title(backbone, fontsize=10)
        panel.set_xlabel("epoch")
        panel.set_ylabel("top-1, %")
        panel.legend(fontsize=8, frameon=False)
    return _svg(figure)


def _heat_maps(trials: list[dict[str, Any]]) -> list[str]:
    """Mean top-1 by weight and dimension, one map a backbone; none for a grid of a single column."""
    plots = []
    for backbone in sorted({trial["config"]["backbone"] for trial in trials}):
        cells: dict[tuple[float, int], list[float]] = {}
        base: list[float] = []
        for trial in (trial for trial in trials if trial["config"]["backbone"] == backbone):
            config, score = trial["config"], headline(trial["result"]["last"])
            if config["alignment_weight"]:
                cells.setdefault((config["alignment_weight"], config["projection_dim"]), []).append(score)
            else:
                base.append(score)
        if len(cells) > 1:
            plots.append(_heat_map(backbone, cells, base))
    return plots


def _heat_map(backbone: str, cells: dict[tuple[float, int], list[float]], base: list[float]) -> str:
    import numpy as np

    weights = sorted({weight for weight, _ in cells})
    dims = sorted({dim for _, dim in cells}, key=lambda dim: dim or 10**9)
    grid = np.full((len(weights), len(dims)), np.nan)
    for (weight, dim), values in cells.items():
        grid[weights.index(weight), dims.index(dim)] = sum(values) / len(values)
    figure, axes = _figure(4.2, 2.6)
    axes.imshow(grid, cmap="Blues", aspect="auto")
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color="white" if value > middle else "black")
    axes.set_xticks(range(len(dims)), [str(dim or "D") for dim in dims])
    axes.set_yticks(range(len(weights)), [f"{weight:g}" for weight in weights])
    axes.set_xlabel("projection dimension")
    axes.set_ylabel("weight")
    baseline = f", baseline {sum(base) / len(base):.1f}" if base else ""
    axes.set_title(f"{backbone}: top-1{baseline}", fontsize=10)
    return _svg(figure)


def _paired_plot(result: Paired) -> str:
    """A line a seed from baseline to aligned."""
    figure, axes = _figure(3.2, 2.6)
    for seed, baseline, aligned in zip(result.seeds, result.baseline, result.aligned, strict=True):
        axes.plot([0, 1], [baseline, aligned], marker="o", color=ALIGNED, linewidth=1.2)
        axes.annotate(f"seed {seed}", (1, aligned), xytext=(6, -3), textcoords="offset points", fontsize=8)
    axes.set_xticks([0, 1], ["baseline", f"weight {result.weight:g}"])
    axes.set_xlim(-0.2, 1.5)
    axes.set_ylabel("top-1, %")
    return _svg(figure)


def _figure(width: float, height: float, panels: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes: Any = figure.subplots(1, panels)
    for panel in [axes] if panels == 1 else list(axes):
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    sink = io.StringIO()
    figure.savefig(sink, format="svg", metadata={"Date": None})
    text = sink.getvalue()
    return text[text.index("<svg") :]


def _safe(svg: str) -> Any:
    """Our own plot, exempt from escaping; the texts in it come from matplotlib, which escapes them."""
    import markupsafe

    return markupsafe.Markup(svg)
