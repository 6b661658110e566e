"""Tuning's command line: `python -m tuning VERB`, the same as `gpt4image VERB`.

Exit codes: 0 done; 2 wrong settings or input, nothing was started; 1 anything else, failed trials included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import tyro

from pipeline import verbs
from pipeline.errors import SettingsError
from pipeline.verbs import Verb
from training.objectives.registry import settings_of
from training.presets import ABOUT, chosen, value_of
from tuning import config


def main(argv: Sequence[str] | None = None) -> int:
    """Parses and runs one verb; returns its exit code."""
    return verbs.main("tuning", VERBS, argv)


def parse_tune(arguments: list[str]) -> config.TuneConfig:
    """The settings of a command line: the preset's, overruled by the flags beside it.

    Raises:
        SettingsError: a flag of `train` that the sweep sets for each trial, or no such recipe or method.
    """
    settings = chosen(value_of("--preset", arguments, ""), value_of("--objective", arguments, ""))
    objective = settings["objective"]
    method = settings_of(objective)
    tried = {own.name for own in fields(method.grid)}
    instead = config.SET_BY_SWEEP | {
        axis: f"did you mean --{_flag(axis)}s?" if f"{axis}s" in tried else f"its grid has {', '.join(tried)}"
        for axis in (method.axes if tried else ())
    }
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and name in instead:
            message = f"--{_flag(name)}: a sweep sets this for each trial; {instead[name]}."
            raise SettingsError(message.replace("?.", "?"))
    shared = config.shared(objective)
    train = shared.unjudged(**settings)
    default: Any = config.TuneConfig(train=train, grid=method.grid())
    kind: Any = config.TuneConfig[shared, method.grid]  # type: ignore[valid-type,name-defined]
    about = f"{config.TuneConfig.__doc__} {ABOUT}"
    parsed: config.TuneConfig = tyro.cli(
        kind, args=arguments, prog="gpt4image tune", default=default, description=about
    )
    return parsed


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _tune(settings: config.TuneConfig) -> int:
    from training import tracking
    from tuning import run

    # The file of the default is one of this machine, also for a sweep on an object store.
    runs = "" if "://" in settings.sweep else settings.sweep.rstrip("/").rpartition("/")[0]
    uri = tracking.tracking_uri(settings.train.track.tracking_uri, runs or "runs")
    content = run.tune(replace(settings, train=settings.train.but(tracking_uri=uri)))
    _print(content)
    if content["exported"]:
        load = "copy it here, then " if "://" in content["exported"] else ""
        how = "timm.create_model('local-dir:...', pretrained=True)"
        if settings_of(settings.train.objective).own_model:
            how = "its README.md says how to use it"
        source = content["exported_from"]["trial"]
        print(f"\nbest model, of {source}: {content['exported']} ({load}{how})")
    run.require_results(content)
    return 0


def _report(settings: config.ReportConfig) -> int:
    from tuning import record

    sweeps = [record.read(folder) for folder in settings.sweeps]
    _print(*sweeps)
    if settings.html:
        from tuning.report import page

        page.write(settings.html, sweeps, pictures=settings.pictures)
        print(f"\npage: {settings.html}")
    return 0


def _print(*contents: dict[str, Any]) -> None:
    from tuning import report

    print(report.text(contents))


VERBS = {
    "tune": Verb("sweep weight x dimension x backbone x seed", parse_tune, _tune),
    "report": Verb("what a sweep found, at any time of it: words, table, page", config.ReportConfig, _report),
}


if __name__ == "__main__":
    raise SystemExit(main())
