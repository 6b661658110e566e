"""The cluster's own verbs: `python -m cluster doctor | demo | submit`.

Exit codes: 0 done; 2 wrong settings or input, nothing was started; 1 anything else.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from cluster import config


def main(argv: Sequence[str] | None = None) -> int:
    """Parses and runs one verb."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbs = {"doctor": _doctor, "demo": _demo, "submit": _submit}
    if not arguments or arguments[0] not in verbs:
        print("usage: python -m cluster doctor | demo | submit   (VERB --help shows its flags)", file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    try:
        return verbs[arguments[0]](arguments[1:])
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        print(f"gpt4image {arguments[0]}: {error}", file=sys.stderr)
        return 2


def _doctor(arguments: list[str]) -> int:
    settings = tyro.cli(config.DoctorConfig, args=arguments, prog="gpt4image doctor")
    from cluster import doctor

    return doctor.run(settings)


def _demo(arguments: list[str]) -> int:
    settings = tyro.cli(config.DemoConfig, args=arguments, prog="gpt4image demo")
    from cluster import demo

    return demo.run(settings)


def _submit(arguments: list[str]) -> int:
    place = arguments.index("--") if "--" in arguments else len(arguments)
    own, verb = arguments[:place], arguments[place + 1 :]
    settings = tyro.cli(config.SubmitConfig, args=own, prog="gpt4image submit")
    from cluster import jobs

    return jobs.submit(settings, verb)


if __name__ == "__main__":
    raise SystemExit(main())
