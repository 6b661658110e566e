"""Training's command line: `python -m training VERB`, the same as `gpt4image VERB`.

Exit codes: 0 done; 2 wrong settings or input, nothing was started; 1 anything else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import tyro

from training import config
from training.presets import PRESETS, preset, preset_name

VERBS = {
    "train": "train a backbone, aligned or as the baseline",
    "evaluate": "judge a run: accuracy, calibration, retrieval, k-NN, zero-shot",
    "export": "a run's backbone as a timm folder, ONNX or torch.export",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, runs one verb, and turns the known errors into a message and an exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in VERBS:
        print("usage: python -m training VERB ...   (VERB --help shows its flags)\n", file=sys.stderr)
        print("\n".join(f"  {verb:16} {text}" for verb, text in VERBS.items()), file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    verb, rest = arguments[0], arguments[1:]
    try:
        if verb == "train":
            return _train(rest)
        return _evaluate(rest) if verb == "evaluate" else _export(rest)
    except (ValueError, FileNotFoundError) as error:
        if type(error).__name__.startswith("RayTaskError"):
            raise  # a worker's own failure, long after the settings were accepted
        print(f"gpt4image {verb}: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"gpt4image {verb}: {error}", file=sys.stderr)
        return 1


def parse_train(arguments: list[str]) -> config.TrainConfig:
    """The settings of a command line: the preset's, overruled by the flags beside it."""
    default = config.TrainConfig(**{**preset(preset_name(arguments)), "store": "?"})
    object.__setattr__(default, "store", tyro.MISSING)  # the one flag without a default
    about = "Trains one model. Recipes: " + ", ".join(PRESETS) + "."
    return tyro.cli(config.TrainConfig, args=arguments, prog="gpt4image train", default=default, description=about)


def _train(arguments: list[str]) -> int:
    settings = parse_train(arguments)
    from training import run, tracking

    runs = settings.run and settings.run.rstrip("/").rpartition("/")[0]
    object.__setattr__(settings, "tracking_uri", tracking.tracking_uri(settings.tracking_uri, runs or "runs"))
    result = run.train(settings)
    last = result["last"]
    print(
        f"{result['run']}: {result['epochs']} epochs, top-1 {last['top1']:.2f} (best {result['best_top1']:.2f} in epoch "
        f"{result['best_epoch']}), top-5 {last['top5']:.2f}"
    )
    return 0


def _evaluate(arguments: list[str]) -> int:
    settings = tyro.cli(config.EvaluateConfig, args=arguments, prog="gpt4image evaluate")
    from training import findings
    from training.evaluate import evaluate

    summary = evaluate(settings).summary
    print(json.dumps(summary) if settings.json else findings.table(summary))
    if settings.to:
        print(f"written: {settings.to}", file=sys.stderr)
    return 0


def _export(arguments: list[str]) -> int:
    settings = tyro.cli(config.ExportConfig, args=arguments, prog="gpt4image export")
    from training.export import describe, export

    print(describe(export(settings)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
