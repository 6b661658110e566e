"""The winner of a sweep: its settings, and its model."""

from __future__ import annotations

import tempfile

from pyarrow import fs

from pipeline.store import locations
from training import run_folder, tracking
from training.config import ExportConfig
from training.run_folder import read_json, write_json
from tuning import record
from tuning.config import TuneConfig
from tuning.record import Content

_NOT_TAKEN = ("run", "parent_run", "tracking_uri", "until_epoch")
"""Settings of the best trial that are no part of best.json: another training has its own."""


def _trial_of(content: Content, name: str) -> record.Trial:
    return next(trial for trial in content["trials"] if trial["name"] == name)


def write_settings(content: Content) -> None:
    """best.json: the settings of the winner, whole, for `train --config`."""
    settings = _trial_of(content, content["best"]["trial"])["config"]
    write_json(
        content["sweep"],
        "best.json",
        {name: value for name, value in settings.items() if name not in _NOT_TAKEN},
    )


def export_model(config: TuneConfig, content: Content) -> Content:
    """Exports the best configuration's best model, unless it is the one that was exported; what sweep.json is
    to say of it."""
    sweep, best = content["sweep"], _trial_of(content, content["best"]["trial"])
    metric = run_folder.judged_by(best["config"])
    score = run_folder.headline(best["result"]["last"], metric.name)
    source = {"trial": best["name"], "run_id": best["result"]["run_id"], "top1": score}
    to = locations.join(sweep, "best")
    if content["exported_from"] == source and read_json(to, "config.json") is not None:
        return {"exported": to, "exported_from": source}
    from training.export.export import export

    with tempfile.TemporaryDirectory(prefix="best-") as temporary:
        folder = to if locations.is_local(sweep) else temporary
        export(ExportConfig(run=locations.join(sweep, best["name"]), to=folder, overwrite=True))
        if folder != to:
            filesystem, path = locations.resolve(to)
            filesystem.delete_dir_contents(path, missing_dir_ok=True)
            fs.copy_files(
                folder, path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=filesystem
            )
        track = config.train.track
        tracker = tracking.Tracker(track.tracking_uri, content["parent_run"], spool=record.spool(sweep))
        same = [t for t in content["trials"] if t["configuration"] == best["configuration"] and t["result"]]
        scores = [
            run_folder.headline(t["result"]["last"], metric.name) for t in same if t["stage"] == "search"
        ]
        tracker.metrics({"best_top1": score, "best_mean": sum(scores) / max(1, len(scores))}, step=0)
        if track.register_as:
            tracker.register(track.register_as, folder, "best")
        else:
            tracker.artifacts(folder, "best")
        tracker.finish()
    return {"exported": to, "exported_from": source}
