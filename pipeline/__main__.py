"""The pipeline's command line: `python -m pipeline VERB`, the same as `gpt4image VERB`.

Exit codes: 0 done; 2 wrong settings or input, nothing was started; 3 too many failures; 1 anything else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from pipeline import config

VERBS: dict[str, tuple[type, str]] = {
    "ingest": (config.SourceConfig, "read an image folder into the store"),
    "caption": (config.CaptionConfig, "describe every picture"),
    "embed": (config.EmbedConfig, "turn descriptions into vectors"),
    "describe": (config.DescribeConfig, "ingest, caption and embed"),
    "import-captions": (config.ImportConfig, "bring captions made elsewhere"),
    "status": (config.StatusConfig, "what is done, what failed and why"),
    "estimate": (config.EstimateConfig, "what describing everything will take"),
    "inspect": (config.InspectConfig, "a page to look at a store with"),
    "retry": (config.RetryConfig, "redo the failed rows only"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, runs one verb, and turns the known errors into a message and an exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in VERBS:
        print("usage: python -m pipeline VERB ...   (VERB --help shows its flags)\n", file=sys.stderr)
        print("\n".join(f"  {verb:16} {text}" for verb, (_, text) in VERBS.items()), file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    verb = arguments[0]
    try:
        settings: Any = tyro.cli(VERBS[verb][0], args=arguments[1:], prog=f"gpt4image {verb}")
        return _handlers()[verb](settings)
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        if type(error).__name__.startswith("RayTaskError"):
            raise  # a worker's own failure, long after the settings were accepted
        print(f"gpt4image {verb}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ not in ("TooManyFailuresError", "RunStoppedError"):
            raise
        print(f"gpt4image {verb}: {error}", file=sys.stderr)
        return 3 if type(error).__name__ == "TooManyFailuresError" else 1


def _handlers() -> dict[str, Callable[[Any], int]]:
    from pipeline import bring, run

    def quiet(function: Callable[[Any], Any]) -> Callable[[Any], int]:
        def handler(settings: Any) -> int:
            function(settings)
            return 0

        return handler

    return {
        "ingest": quiet(run.ingest),
        "caption": quiet(run.caption),
        "embed": quiet(run.embed),
        "describe": quiet(run.describe),
        "retry": quiet(run.retry),
        "import-captions": quiet(bring.import_captions),
        "status": _status,
        "inspect": _inspect,
        "estimate": _estimate,
    }


def _status(settings: config.StatusConfig) -> int:
    from pipeline.failures import commonest_errors, marks
    from pipeline.store import Store, summary

    store = Store(settings.store)
    found = summary(store)
    if settings.json:
        print(json.dumps(found))
        return 0
    print(f"{settings.store}: {found['rows']} rows, {found['shards']} shards, {len(store.dataset.classes)} classes")
    for stage in found["stages"]:
        name = f"{stage['stage']} {stage['variant']}".strip()
        todo = f", {stage['remaining_shards']} shards to do" if stage["remaining_shards"] else ""
        print(f"  {name}: {stage['done_shards']} shards, {stage['rows']} rows, {stage['failed']} failed{todo}")
        for reason, count in commonest_errors(store, stage["stage"], stage["variant"]) if stage["failed"] else []:
            print(f"      {count} x {reason}")
        for mark, count in marks(store, stage["stage"], stage["variant"]) if stage["stage"] != "images" else []:
            print(f"      {count} x marked: {mark}")
    return 0


def _estimate(settings: config.EstimateConfig) -> int:
    from pipeline import estimate

    found = estimate.estimate(settings)
    print(json.dumps(estimate.as_json(found)) if settings.json else estimate.as_text(found))
    return 0


def _inspect(settings: config.InspectConfig) -> int:
    from pipeline import gallery

    print(gallery.write(settings))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
