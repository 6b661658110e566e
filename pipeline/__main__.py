"""The pipeline's command line: `python -m pipeline VERB`, the same as `gpt4image VERB`.

Exit codes: 0 done; 2 wrong settings or input, nothing was started; 3 too many failures; 1 anything else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from pipeline import config, verbs
from pipeline.verbs import Verb


def main(argv: Sequence[str] | None = None) -> int:
    """Parses and runs one verb; returns its exit code."""
    return verbs.main("pipeline", VERBS, argv)


def _ingest(settings: config.SourceConfig) -> int:
    from pipeline import run

    run.ingest(settings)
    return 0


def _caption(settings: config.CaptionConfig) -> int:
    from pipeline import run

    run.caption(settings)
    return 0


def _embed(settings: config.EmbedConfig) -> int:
    from pipeline import run

    run.embed(settings)
    return 0


def _describe(settings: config.DescribeConfig) -> int:
    from pipeline import run

    run.describe(settings)
    return 0


def _features(settings: config.FeatureConfig) -> int:
    from pipeline import run

    run.features(settings)
    return 0


def _retry(settings: config.RetryConfig) -> int:
    from pipeline import run

    run.retry(settings)
    return 0


def _import_captions(settings: config.ImportConfig) -> int:
    from pipeline.stages import import_captions

    import_captions.import_captions(settings)
    return 0


def _status(settings: config.StatusConfig) -> int:
    from pipeline.inspect import status
    from pipeline.stages.failures import commonest_errors, marks
    from pipeline.store import Store

    store = Store(settings.store)
    summary = status.summary(store)
    if settings.verify:
        summary["damaged"] = status.damaged(store)
    code = 1 if summary.get("damaged") else 0
    if settings.json:
        print(json.dumps(summary))
        return code
    print(
        f"{settings.store}: {summary['rows']} rows, {summary['shards']} shards, {len(store.dataset.classes)} "
        "classes"
    )
    for stage in summary["stages"]:
        name = f"{stage['stage']} {stage['variant']}".strip()
        if stage["stage"] == "embeddings":
            record = store.variant("embeddings", stage["variant"])
            name += f" of captions {record['captions']}" + ", each" * record.get("each_caption", False)
        if stage["stage"] == "features":
            record = store.variant("features", stage["variant"])
            name += f" by {record['tower']} at {record['feature_size']} px" + ", tokens" * record["tokens"]
        todo = f", {stage['remaining_shards']} shards to do" if stage["remaining_shards"] else ""
        print(
            f"  {name}: {stage['done_shards']} shards, {stage['rows']} rows, {stage['failed']} failed{todo}"
        )
        for reason, count in (
            commonest_errors(store, stage["stage"], stage["variant"]) if stage["failed"] else []
        ):
            print(f"      {count} x {reason}")
        for mark, count in (
            marks(store, stage["stage"], stage["variant"])
            if stage["stage"] in ("captions", "embeddings")
            else []
        ):
            print(f"      {count} x marked: {mark}")
    for flaw in summary.get("damaged", []):
        print(
            f"  damaged: {flaw['file']}: {flaw['flaw']}; delete {flaw['receipt']}, and the verb that made it "
            "makes it anew"
        )
    if settings.verify and not code:
        print("  every file is the one on its receipt")
    return code


def _estimate(settings: config.EstimateConfig) -> int:
    from pipeline.inspect import estimate

    estimated = estimate.estimate(settings)
    print(json.dumps(estimate.as_json(estimated)) if settings.json else estimate.as_text(estimated))
    return 0


def _inspect(settings: config.InspectConfig) -> int:
    from pipeline.inspect import gallery

    print(gallery.write(settings))
    return 0


VERBS = {
    "ingest": Verb(
        "read pictures (a folder, tars, Parquet, a list) into a store", config.SourceConfig, _ingest
    ),
    "caption": Verb("describe every picture with a vision-language model", config.CaptionConfig, _caption),
    "embed": Verb("turn descriptions into vectors", config.EmbedConfig, _embed),
    "describe": Verb("ingest, caption and embed", config.DescribeConfig, _describe),
    "features": Verb("what a vision tower says of every picture", config.FeatureConfig, _features),
    "import-captions": Verb("bring captions made elsewhere", config.ImportConfig, _import_captions),
    "status": Verb("what is done, what failed and why", config.StatusConfig, _status),
    "estimate": Verb("what describing everything will take", config.EstimateConfig, _estimate),
    "inspect": Verb("a page to look at a store with", config.InspectConfig, _inspect),
    "retry": Verb("redo the failed rows only", config.RetryConfig, _retry),
}


if __name__ == "__main__":
    raise SystemExit(main())
