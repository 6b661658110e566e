"""`python -m training.tracking FOLDER`: sends what a run logged and MLflow has not taken yet."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from training.tracking.tracker import send


@dataclass(frozen=True, kw_only=True)
class SendConfig:
    """Sends what a run logged and MLflow has not taken yet."""

    spool: tyro.conf.Positional[str]
    """Folder of the run's journal, such as RUN/tracking."""
    uri: str = ""
    """Address of MLflow; empty: MLFLOW_TRACKING_URI, else where the run was to be logged."""
    wait_s: float = 600.0
    """Seconds to try."""


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m training.tracking FOLDER`; exit code 0: all has arrived, 1: not all, 2: wrong folder or no
    address."""
    settings = tyro.cli(SendConfig, args=argv, prog="python -m training.tracking")
    try:
        return 0 if send(settings.spool, settings.uri, settings.wait_s) else 1
    except ValueError as error:
        print(f"training.tracking: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
