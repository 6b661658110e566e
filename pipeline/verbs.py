"""A package's verbs and their command line. A package's table of verbs is the only one; `gpt4image` joins all
four."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tyro

from pipeline import errors


@dataclass(frozen=True)
class Verb:
    """What a verb is for, its settings (or what reads them from a command line), and what it does; returns an
    exit code."""

    about: str
    settings: type | Callable[[list[str]], Any]
    run: Callable[[Any], int]


def parse(name: str, verb: Verb, arguments: Sequence[str]) -> Any:
    """The settings of a command line, without the verb's own name."""
    with _told_plainly(f"gpt4image {name}"):
        if isinstance(verb.settings, type):
            return tyro.cli(verb.settings, args=list(arguments), prog=f"gpt4image {name}")
        return verb.settings(list(arguments))


@contextmanager
def _told_plainly(name: str) -> Iterator[None]:
    """What settings find wrong with themselves is told as every other error is: in lines that say which verb
    and which flag, not in a box that names a class and breaks the lines."""
    try:  # not part of tyro's public interface: without it the box stays
        from tyro._errors import InstantiationFailure, on_parse_error
    except ImportError:
        yield
        return

    def tell(event: Any) -> None:
        if isinstance(event, InstantiationFailure) and event.argument is None:
            print(f"{name}: {event.message}", file=sys.stderr)
            raise SystemExit(2)

    with on_parse_error(tell):
        yield


def run(name: str, verb: Verb, arguments: Sequence[str]) -> int:
    """Parses and runs one verb; errors of ours become a message and an exit code."""
    return errors.reported(f"gpt4image {name}", lambda: verb.run(parse(name, verb, arguments)))


def main(package: str, verbs: Mapping[str, Verb], argv: Sequence[str] | None) -> int:
    """The command line of `python -m PACKAGE VERB`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else ""
    if name in verbs:
        return run(name, verbs[name], arguments[1:])
    asked = name in ("-h", "--help")
    if name and not asked:
        print(f"python -m {package}: {unknown(name, verbs)}\n", file=sys.stderr)
    print(f"usage: python -m {package} VERB ...   (VERB --help shows its flags)\n", file=sys.stderr)
    print("\n".join(f"  {name:16} {verb.about}" for name, verb in verbs.items()), file=sys.stderr)
    return 0 if asked else 2


def unknown(name: str, known: Iterable[str]) -> str:
    """That there is no such verb, and which one may be meant."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"no verb {name!r}" + (f"; did you mean {close[0]}?" if close else "")


def value_of(flag: str, arguments: Sequence[str], default: str) -> str:
    """What a command line gives a flag (the last one counts) that must be known before the others are
    read."""
    value = default
    for number, argument in enumerate(arguments):
        if argument == flag and number + 1 < len(arguments):
            value = arguments[number + 1]
        elif argument.startswith(f"{flag}="):
            value = argument.split("=", 1)[1]
    return value
