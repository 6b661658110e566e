"""Training's command line: `python -m training VERB`, the same as `gpt4image VERB`.

Exit codes: 0 done; 2 wrong settings or input, nothing was started; 1 anything else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

import tyro

from pipeline import verbs
from pipeline.errors import SettingsError
from pipeline.verbs import Verb, value_of
from training import config
from training.objectives.registry import metric_named, settings_of
from training.presets import ABOUT, chosen

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class _Command(Generic[Config]):
    # Without a name of its own its flags stand, and are grouped, as if there were no `config` beside it.
    settings: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.OmitArgPrefixes]
    config: str = ""
    """FILE of settings, JSON by their names, such as RUN/config.json (of which it takes all but where the run
    lies): they win over the recipe's, flags over both, and this help shows them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parses and runs one verb; returns its exit code."""
    return verbs.main("training", VERBS, argv)


def parse_train(arguments: list[str]) -> config.TrainConfig:
    """The settings of a command line: the preset's, overruled by those of --config, and by the flags beside.

    Raises:
        SettingsError: no such preset, or a file that cannot be read or holds what is no setting.
        SystemExit: flags that do not fit; said on stderr.
    """
    file = value_of("--config", arguments, "")
    found = _of_file(file, arguments) if file else _of_preset({}, arguments)
    default: Any = _Command(settings=config.TrainConfig.unjudged(**found), config=file)
    about = f"Trains one model, or goes on with one. {ABOUT}"
    kind: Any = _Command[config.TrainConfig[settings_of(found["objective"])]]  # type: ignore[misc]
    try:
        parsed = tyro.cli(kind, args=arguments, prog="gpt4image train", default=default, description=about)
    except SettingsError as error:
        where = f"config={file}, with the flags beside it: " if file else ""
        print(f"gpt4image train: {where}{error}", file=sys.stderr)
        raise SystemExit(2) from None
    settings: config.TrainConfig = parsed.settings
    return settings


def _of_preset(given: dict[str, Any], arguments: list[str]) -> dict[str, Any]:
    """The settings of the preset and the method that flags name, or else `given`."""
    return chosen(
        value_of("--preset", arguments, given.get("preset", "")),
        value_of("--objective", arguments, given.get("objective", "")),
    )


def _of_file(file: str, arguments: list[str]) -> dict[str, Any]:
    """The settings of a file over those of the preset.

    Raises:
        SettingsError: see `run_folder.of_file`; every message names the file.
    """
    from training import run_folder

    content = run_folder.read_file(file)
    try:
        recipe = _of_preset({n: content[n] for n in ("objective", "preset") if n in content}, arguments)
        return run_folder.of_file(content, recipe)
    except SettingsError as error:
        message = "\n".join(f"config={file}: {line}" for line in str(error).splitlines())
        raise SettingsError(message) from None


def _train(settings: config.TrainConfig) -> int:
    from training import run, run_folder, tracking

    # The file of the default is one of this machine, also for a run on an object store.
    runs = "" if "://" in settings.run else settings.run.rstrip("/").rpartition("/")[0]
    uri = tracking.tracking_uri(settings.track.tracking_uri, runs or "runs")
    result = run.train(settings.but(tracking_uri=uri))
    last, metric = result["last"], metric_named(settings.objective)
    top5 = f", top-5 {run_folder.headline(last, 'top5'):.2f}" if "top5" in last else ""
    score, best = metric.shown(run_folder.headline(last, metric.name)), metric.shown(result["best_top1"])
    of = "" if result["complete"] else f" of {settings.optim.epochs}"
    print(
        f"{result['run']}: {result['epochs']}{of} epochs, {metric.title} {score} (best {best} in epoch "
        f"{result['best_epoch']}){top5}"
    )
    if not result["complete"]:
        print(
            f"train: ended by --until-epoch {settings.place.until_epoch}; the same command with a larger "
            f"one, or without it, goes on (--run {result['run']})",
            file=sys.stderr,
        )
    return 0


def _evaluate(settings: config.EvaluateConfig) -> int:
    from training.evaluation import findings, spread
    from training.evaluation.evaluate import evaluate

    summaries = []
    for each in settings.each():
        summaries.append(evaluate(each).summary)
        if not settings.json:
            print(findings.table(summaries[-1]), flush=True)
    if settings.json:
        told = summaries[0] if len(summaries) == 1 else {"runs": summaries, **spread.of_runs(summaries)}
        print(json.dumps(told))
    elif len(summaries) > 1:
        print(spread.table(summaries))
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
