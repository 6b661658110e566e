"""The cluster's own verbs: `python -m cluster doctor | demo | submit | logs | stop`.

Exit codes: 0 done; 2 wrong settings or input, nothing was started; 1 anything else.
"""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from cluster import config
from pipeline import verbs
from pipeline.errors import SettingsError
from pipeline.verbs import Verb


def main(argv: Sequence[str] | None = None) -> int:
    """Parses and runs one verb; returns its exit code."""
    return verbs.main("cluster", VERBS, argv)


def parse_submit(arguments: list[str]) -> tuple[config.SubmitConfig, list[str]]:
    """Submit's own settings, and the command line of the job behind `--`."""
    separator = arguments.index("--") if "--" in arguments else len(arguments)
    own, job = arguments[:separator], arguments[separator + 1 :]
    if not job and (verb := next((word for word in own if word in _verbs()), "")):
        message = f"put -- in front of {verb}: gpt4image submit [FLAGS] -- {verb} [ITS FLAGS]."
        raise SettingsError(message)
    return tyro.cli(config.SubmitConfig, args=own, prog="gpt4image submit"), job


def _verbs() -> frozenset[str]:
    from cluster.cli import VERBS as all_verbs  # which has this module's among them

    return frozenset(all_verbs)


def _doctor(settings: config.DoctorConfig) -> int:
    from cluster import doctor

    return doctor.run(settings)


def _demo(settings: config.DemoConfig) -> int:
    from cluster import demo

    return demo.run(settings)


def _submit(settings: tuple[config.SubmitConfig, list[str]]) -> int:
    from cluster import jobs

    return jobs.submit(*settings)


def _logs(settings: config.LogsConfig) -> int:
    from cluster import jobs

    return jobs.logs(settings)


def _stop(settings: config.StopConfig) -> int:
    from cluster import jobs

    return jobs.stop(settings)


VERBS = {
    "submit": Verb("run a verb as a job on a Ray cluster", parse_submit, _submit),
    "logs": Verb("follow a job's log", config.LogsConfig, _logs),
    "stop": Verb("end a job", config.StopConfig, _stop),
    "doctor": Verb("what this machine can do, and how to mend the rest", config.DoctorConfig, _doctor),
    "demo": Verb("everything, on the embedded default", config.DemoConfig, _demo),
}


if __name__ == "__main__":
    raise SystemExit(main())
