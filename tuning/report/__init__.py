"""`report`: what a sweep found, in words and as a table on the terminal, at any time of it.

`page.py` makes the page of the same sentences and rows. All of it reads the content of a sweep as
`tuning.record.read` gives it.
"""

from __future__ import annotations

from collections.abc import Sequence

from tuning.report import across
from tuning.report.comparison import comparisons, of_sweep
from tuning.report.configurations import Content
from tuning.report.progress import state, winner, winner_is
from tuning.report.table import table
from tuning.report.words import lead, notes, sentence


def text(contents: Sequence[Content]) -> str:
    """The report of one or more sweeps for a terminal."""
    found = comparisons(contents)
    parts = []
    for content in contents:
        own = of_sweep(found, content)
        told = [sentence(each) for each in own] + notes(content, own)
        told += [f"{winner_is(content)}; anew: {command}"] if (command := winner(content)) else []
        parts.append("\n".join([*lead(content, own), state(content), "", table(content), "", *told]).rstrip())
    named = [
        f"{content['sweep']}\n{part}" if len(contents) > 1 else part
        for content, part in zip(contents, parts, strict=True)
    ]
    return "\n\n".join([*named, *across.lines(contents)])
