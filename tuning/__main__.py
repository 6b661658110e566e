"""Tuning's command line: `python -m tuning VERB`, the same as `gpt4image VERB`.

Exit codes: 0 done; 2 wrong settings or input, nothing was started; 1 anything else, failed trials included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import tyro

from pipeline import verbs
from pipeline.errors import SettingsError
from pipeline.verbs import Verb
from training.presets import preset, preset_name
from tuning import config


def main(argv: Sequence[str] | None = None) -> int:
    """Parses and runs one verb; returns its exit code."""
    return verbs.main("tuning", VERBS, argv)


def parse_tune(arguments: list[str]) -> config.TuneConfig:
    """The settings of a command line: the preset's, overruled by the flags beside it.

    Raises:
        SettingsError: a flag of `train` that the sweep sets for each trial.
    """
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        if flag in config.INSTEAD:
            message = f"{flag}: a sweep sets this for each trial; {config.INSTEAD[flag]}."
            raise SettingsError(message.replace("?.", "?"))
    train = config.SharedConfig(**{**preset(preset_name(arguments)), "store": "?"})
    object.__setattr__(train, "store", tyro.MISSING)  # the one flag without a default
    return tyro.cli(
        config.TuneConfig, args=arguments, prog="gpt4image tune", default=config.TuneConfig(train=train)
    )


def _tune(settings: config.TuneConfig) -> int:
    from training import tracking
    from tuning import run

    # The file of the default is one of this machine, also for a sweep on an object store.
    runs = "" if "://" in settings.sweep else settings.sweep.rstrip("/").rpartition("/")[0]
    uri = tracking.tracking_uri(settings.train.tracking_uri, runs or "runs")
    content = run.tune(replace(settings, train=replace(settings.train, tracking_uri=uri)))
    _print(content)
    if content["exported"]:
        load = "copy it here, then " if "://" in content["exported"] else ""
        source = content["exported_from"]["trial"]
        print(
            f"\nbest model, of {source}: {content['exported']} ({load}timm.create_model('local-dir:...', "
            "pretrained=True))"
        )
    run.require_results(content)
    return 0


def _report(settings: config.ReportConfig) -> int:
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


VERBS = {
    "tune": Verb("sweep weight x dimension x backbone x seed", parse_tune, _tune),
    "report": Verb("the table of a sweep, and the page", config.ReportConfig, _report),
}


if __name__ == "__main__":
    raise SystemExit(main())
