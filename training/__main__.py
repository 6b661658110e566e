"""Training's command line: `python -m training VERB`, the same as `gpt4image VERB`.

Exit codes: 0 done; 2 wrong settings or input, nothing was started; 1 anything else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from pipeline import verbs
from pipeline.verbs import Verb
from training import config
from training.objectives.settings import metric_named, settings_of
from training.presets import ABOUT, preset, value_of


def main(argv: Sequence[str] | None = None) -> int:
    """Parses and runs one verb; returns its exit code."""
    return verbs.main("training", VERBS, argv)


def parse_train(arguments: list[str]) -> config.TrainConfig:
    """The settings of a command line: the preset's, overruled by the flags beside it."""
    objective = value_of("--objective", arguments, "align")
    settings = preset(value_of("--preset", arguments, "small-64"), objective)
    default = config.TrainConfig.unjudged(**settings | {"objective": objective})
    about = f"Trains one model, or goes on with one. {ABOUT}"
    kind: Any = config.TrainConfig[settings_of(objective)]  # type: ignore[misc]
    parsed: config.TrainConfig = tyro.cli(
        kind, args=arguments, prog="gpt4image train", default=default, description=about
    )
    return parsed


def _train(settings: config.TrainConfig) -> int:
    from training import run, run_folder, tracking

    # The file of the default is one of this machine, also for a run on an object store.
    runs = "" if "://" in settings.run else settings.run.rstrip("/").rpartition("/")[0]
    uri = tracking.tracking_uri(settings.track.tracking_uri, runs or "runs")
    result = run.train(settings.but(tracking_uri=uri))
    last, metric = result["last"], metric_named(settings.objective)
    top5 = f", top-5 {run_folder.headline(last, 'top5'):.2f}" if "top5" in last else ""
    score, best = metric.shown(run_folder.headline(last, metric.name)), metric.shown(result["best_top1"])
    print(
        f"{result['run']}: {result['epochs']} epochs, {metric.title} {score} (best {best} in epoch "
        f"{result['best_epoch']}){top5}"
    )
    return 0


def _evaluate(settings: config.EvaluateConfig) -> int:
    from training.evaluation import findings
    from training.evaluation.evaluate import evaluate

    summary = evaluate(settings).summary
    print(json.dumps(summary) if settings.json else findings.table(summary))
    if settings.to:
        print(f"written: {settings.to}", file=sys.stderr)
    return 0


def _export(settings: config.ExportConfig) -> int:
    from training.export.export import describe, export

    print(describe(export(settings)))
    return 0


VERBS = {
    "train": Verb("train a backbone, aligned or as the baseline", parse_train, _train),
    "evaluate": Verb(
        "judge a run: accuracy, calibration, retrieval, k-NN, zero-shot", config.EvaluateConfig, _evaluate
    ),
    "export": Verb("a run's backbone as a timm folder, ONNX or torch.export", config.ExportConfig, _export),
}


if __name__ == "__main__":
    raise SystemExit(main())
