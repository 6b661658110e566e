"""Tuning's command line: `python -m tuning VERB`, the same as `gpt4image VERB`.

Exit codes: 0 done; 2 wrong settings or input, nothing was started; 1 anything else, failed trials included.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import tyro

from training import config as training_config
from training.presets import preset, preset_name
from tuning import config

VERBS = {"tune": "sweep weight x dimension x backbone x seed", "report": "the table of a sweep, and the page"}


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, runs one verb, and turns the known errors into a message and an exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in VERBS:
        print("usage: python -m tuning VERB ...   (VERB --help shows its flags)\n", file=sys.stderr)
        print("\n".join(f"  {verb:16} {text}" for verb, text in VERBS.items()), file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    verb, rest = arguments[0], arguments[1:]
    try:
        return _tune(rest) if verb == "tune" else _report(rest)
    except (ValueError, FileNotFoundError) as error:
        print(f"gpt4image {verb}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "TrialsFailedError":
            raise
        print(f"gpt4image {verb}: {error}", file=sys.stderr)
        return 1


def parse_tune(arguments: list[str]) -> config.TuneConfig:
    """The settings of a command line: the preset's, overruled by the flags beside it."""
    train = training_config.TrainConfig(**{**preset(preset_name(arguments)), "store": "?"})
    object.__setattr__(train, "store", tyro.MISSING)
    return tyro.cli(config.TuneConfig, args=arguments, prog="gpt4image tune", default=config.TuneConfig(train=train))


def _tune(arguments: list[str]) -> int:
    settings = parse_tune(arguments)
    from training import tracking
    from tuning import run

    runs = settings.sweep.rstrip("/").rpartition("/")[0] or "runs"
    uri = tracking.tracking_uri(settings.train.tracking_uri, runs)
    content = run.tune(replace(settings, train=replace(settings.train, tracking_uri=uri)))
    _print(content)
    if content["exported"]:
        print(f"\nbest model: {content['exported']} (timm.create_model('local-dir:...', pretrained=True))")
    return 0


def _report(arguments: list[str]) -> int:
    settings = tyro.cli(config.ReportConfig, args=arguments, prog="gpt4image report")
    from tuning import report

    sweeps = [report.read_sweep(folder) for folder in settings.sweeps]
    for content in sweeps:
        print(f"\n{content['sweep']}")
        _print(content)
    if settings.html:
        from tuning import page

        page.write(settings.html, sweeps, pictures=settings.pictures)
        print(f"\npage: {settings.html}")
    return 0


def _print(content: dict[str, Any]) -> None:
    from tuning.report import comparisons, table

    print(table(content))
    print(f"\n{comparisons(content)}")


if __name__ == "__main__":
    raise SystemExit(main())
