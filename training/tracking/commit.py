"""Which code runs: the commit of its working tree, for a run's record and for MLflow."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

VARIABLE = "GPT4IMAGE_COMMIT"
"""Says it where the code was sent without its repository, as `submit` does."""
TAG = "mlflow.source.git.commit"
"""MLflow's own name for it."""
_PATIENCE_S = 20.0


def commit() -> str:
    """That of the code that runs; see `commit_of`."""
    return os.environ.get(VARIABLE) or commit_of(str(Path(__file__).resolve().parents[2]))


@cache
def commit_of(folder: str) -> str:
    """The commit of a working tree, with `-dirty` where files that git knows differ from it; empty without
    git, or where git does not know the folder's files (as of a package that was installed inside of a
    repository)."""
    git = ["git", "-C", folder]
    describe = [*git, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        for command in ([*git, "ls-files", "--error-unmatch", "pipeline/__main__.py"], describe):
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=_PATIENCE_S, errors="replace"
            )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
