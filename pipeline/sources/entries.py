"""One `Entry` for each picture of a source: its key, its label, its split, its place, or what is wrong with
it.

Every picture has an entry or is counted in a note. What one line, row or member lacks or gets wrong is its
entry's `error`, and never ends the listing:

- No label (null, an empty text, NaN, or -1 among whole numbers): an error. Where no row of a split has one,
  as in test sets whose labels are kept secret, the split is left out, with a note.
- A split of another name than train, val, test and their synonyms, or a path that leads out of a list's
  folder: an error.

This is where names come in: those that are not UTF-8 are written as `locations.escaped` does, here and
nowhere else.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from pipeline.config import SourceConfig
from pipeline.errors import SettingsError
from pipeline.store.locations import escaped

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
# Understood where something is said to be a split; a folder of this name alone may as well be a class.
SYNONYMS = {"dev": "val", "development": "val", "eval": "val", "evaluation": "val"}
ALL_SPLIT_NAMES = SPLIT_NAMES | SYNONYMS
LABEL_COLUMNS = ("label", "labels", "class", "cls", "fine_label")
STRAY = 0.02  # share of labels that are not numbers, up to which they are taken for faults and not for names
MOST_CLASSES = 100_000  # a single row's label must not make a classifier larger than any


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One picture of the source, before classes are numbered.

    `id` is its key within the source, `place` where its bytes are (see `locations`; for Parquet FILE#g<row
    group>-<row>), `row_group` what keeps rows of Parquet together in the order (empty where nothing has to).
    `split` is empty where the source tells none, `label` where it has none, `place` where `error` says what
    is wrong.
    """

    id: str
    label: str
    split: str
    size: int
    place: str
    row_group: str = ""
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a source holds; `keys` are the classes, in order, also those without a picture; `notes` tell what
    is left out."""

    entries: list[Entry]
    keys: list[str]
    skipped: int = 0
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def make_entry(
    *, id: str, place: str, size: int, label: object, split: object = "", row_group: str = "", error: str = ""
) -> Entry:
    """An entry in valid UTF-8, whatever the source holds; what cannot be understood is its error."""
    named, text = _split(split), _label(label)
    if named is None:
        error = (
            error
            or f"split {str(split)[:80]!r} is none of train, val and test: mend it, and ingest into a new "
            "store"
        )
    if text is None:
        error = (
            error
            or f"a label must be a text or a number, not {type(label).__name__}: mend it, and ingest into a "
            "new store"
        )
    return Entry(
        id=escaped(id),
        label="" if error else escaped(text or ""),
        split=named or "",
        size=size,
        place="" if error else place,
        row_group=row_group,
        error=escaped(error),
    )


def _split(value: object) -> str | None:
    """train, val or test; empty where nothing is said; None where it is not understood."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return ""
    return ALL_SPLIT_NAMES.get(str(value).strip().lower())


def _label(value: object) -> str | None:
    """A label as text, empty where there is none; None where it is neither a text nor a number."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # whole numbers beside a null are written as 3.0 by many tools
    if isinstance(value, bytes):
        value = value.decode(errors="surrogateescape")
    if isinstance(value, (list, dict)):
        return None
    return str(value)


def some_of(names: Iterable[str]) -> str:
    distinct = sorted({escaped(name) for name in names})
    return ", ".join(distinct[:5]) + (f" and {len(distinct) - 5} more" if len(distinct) > 5 else "")


def with_labels(
    config: SourceConfig, entries: list[Entry], skipped: int, notes: Iterable[str] = ()
) -> Listing:
    """Classes from the labels themselves: whole numbers in their order, from 0; names in theirs."""
    if not entries:
        message = f"images={config.images}: no pictures found."
        raise SettingsError(message)
    entries = [replace(entry, label="") if entry.label == "-1" else entry for entry in entries]
    counts = Counter(entry.label for entry in entries if entry.label)
    numbers = {label: int(label) for label in counts if re.fullmatch("[0-9]{1,18}", label)}
    odd = counts.total() - sum(counts[label] for label in numbers)
    # Where nearly all labels are numbers, classes are numbered, and a stray other label is its row's error:
    # by name, all rows would be numbered anew (0, 1, 10, 2), and none the wiser.
    if numbers and odd <= STRAY * counts.total():
        most = max(MOST_CLASSES, 10 * len(numbers))
        entries = [_numbered(entry, numbers, most) if entry.label else entry for entry in entries]
        labels = {entry.label for entry in entries} - {""}
        keys = [str(number) for number in range(max(map(int, labels), default=-1) + 1)]
        if len(keys) > 2 * len(labels) + 1:
            notes = [
                *notes,
                f"labels up to {len(keys) - 1} make {len(keys)} classes, of which {len(labels)} have a "
                "picture",
            ]
    else:
        labels = set(counts)
        keys = sorted(labels)
    if not labels:
        first = next(
            (f"{entry.id}: {entry.error}" for entry in entries if entry.error),
            f"no label, such as {entries[0].id}",
        )
        message = f"images={config.images}: none of {len(entries)} pictures can be used: {first}."
        raise SettingsError(message)
    labelled = {entry.split for entry in entries if entry.label}
    listed, left_out = [], Counter[str]()
    for entry in entries:
        if entry.label or entry.error:
            listed.append(entry)
        elif entry.split in labelled:
            listed.append(
                replace(entry, place="", error="no label: give it one, and ingest into a new store")
            )
        else:
            left_out[entry.split] += 1
    unlabelled = [
        f"{count} pictures of split {split or 'train'} are left out: none has a label"
        for split, count in left_out.items()
    ]
    return Listing(entries=listed, keys=keys, skipped=skipped, notes=(*notes, *unlabelled))


def _numbered(entry: Entry, numbers: dict[str, int], most: int) -> Entry:
    number = numbers.get(entry.label)
    if number is not None and number < most:
        return replace(entry, label=str(number))
    flaw = (
        "is no class number, as those of the other rows are"
        if number is None
        else f"would make more than {most} classes"
    )
    error = f"label {entry.label[:80]!r} {flaw}: mend it, and ingest into a new store"
    return replace(entry, label="", place="", error=error)
