"""The `gpt4image` command: one door to the verbs of all packages. `gpt4image VERB --help` teaches a verb.

Each verb lives in its package and is also `python -m PACKAGE VERB`, which is what a submitted job runs.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

VERBS: dict[str, tuple[str, str]] = {
    "ingest": ("pipeline", "read an image folder into a store"),
    "caption": ("pipeline", "describe every picture with a vision-language model"),
    "embed": ("pipeline", "turn descriptions into vectors"),
    "describe": ("pipeline", "ingest, caption and embed"),
    "import-captions": ("pipeline", "bring captions made elsewhere"),
    "status": ("pipeline", "what is done, what failed and why"),
    "estimate": ("pipeline", "what describing everything will take"),
    "inspect": ("pipeline", "a page to look at a store with"),
    "retry": ("pipeline", "redo the failed rows only"),
    "train": ("training", "train a backbone, aligned or as the baseline"),
    "evaluate": ("training", "judge a run: accuracy, calibration, retrieval, k-NN, zero-shot"),
    "export": ("training", "a run's backbone as a timm folder, ONNX or torch.export"),
    "tune": ("tuning", "sweep weight x dimension x backbone x seed"),
    "report": ("tuning", "the table of a sweep, and the page"),
    "submit": ("cluster", "run a verb as a job on a Ray cluster"),
    "doctor": ("cluster", "what this machine can do, and how to mend the rest"),
    "demo": ("cluster", "everything, on the embedded default"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hands the arguments to the package of the verb; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    verb = arguments[0]
    if verb not in VERBS:
        print(f"gpt4image: no verb {verb!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    package = importlib.import_module(f"{VERBS[verb][0]}.__main__")
    code: int = package.main(arguments)
    return code


def _usage() -> str:
    lines = ["gpt4image: better small vision models out of large pre-trained ones", "", "usage: gpt4image VERB [FLAGS]", ""]
    for package in dict.fromkeys(package for package, _ in VERBS.values()):
        lines += [f"  {verb:16} {text}" for verb, (owner, text) in VERBS.items() if owner == package] + [""]
    return "\n".join([*lines, "gpt4image VERB --help shows a verb's flags; gpt4image demo does it all."])


if __name__ == "__main__":
    raise SystemExit(main())
