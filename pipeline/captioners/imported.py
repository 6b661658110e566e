"""Captions made elsewhere, read from a file: JSONL of {"path", "caption"} (or "captions", a list of several),
or the paper's list of strings by position.

The GPT4Image release ships `minigpt4_caption_imagenet_train_0_1281166.pth`: item i belongs to item i of
torchvision's `ImageFolder(train)`. Matching by position goes wrong silently, so the length is checked and
everything is kept by id after.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Sequence

from pipeline.errors import SettingsError
from pipeline.store import locations

Captions = tuple[str, ...]
"""Of one picture."""


def read_jsonl(path: str) -> dict[str, Captions]:
    """Captions by path.

    Raises:
        ValueError: a line is not an object with the string "path" and the string "caption" or the list of
            strings "captions", or a path occurs twice.
    """
    captions: dict[str, Captions] = {}
    with open(path, "rb") as lines:
        for number, raw in enumerate(lines, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                message = f"{path}:{number}: is not UTF-8 ({error}); save the list in that encoding."
                raise SettingsError(message) from None
            if not line.strip():
                continue
            key, caption = _parse_line(line, f"{path}:{number}")
            if captions.setdefault(key, caption) != caption:
                message = (
                    f"{path}:{number}: a second, different caption for {key!r}; keep one line a picture, "
                    'with all of its captions as "captions": ["...", "..."].'
                )
                raise SettingsError(message)
    return captions


def _parse_line(line: str, where: str) -> tuple[str, Captions]:
    try:
        row = json.loads(line)
        key, found = row["path"], row["captions"] if "captions" in row else row["caption"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        message = f'{where}: not an object with "path" and "caption", or a list "captions" ({what}).'
        raise SettingsError(message) from None
    several = found if "captions" in row else [found]
    if not isinstance(several, list) or not all(isinstance(part, str) for part in [key, *several]):
        message = f'{where}: "path" and "caption" must be strings, and "captions" a list of strings.'
        raise SettingsError(message)
    if "captions" in row and "caption" in row:
        message = f'{where}: has both "caption" and "captions"; keep one of them.'
        raise SettingsError(message)
    return key, tuple(several)


def matched(captions: dict[str, Captions], known: set[str]) -> dict[str, Captions]:
    """Captions by the store's ids: by the path as it is written, else with `./` and `\\` understood, else as
    it is written."""

    def key_of(path: str) -> str:
        if path in known:
            return path
        plain = posixpath.normpath(path.replace("\\", "/"))
        return plain if plain in known else path

    by_id: dict[str, Captions] = {}
    for path, caption in captions.items():
        if by_id.setdefault(key_of(path), caption) != caption:
            message = (
                f"a second, different caption for {key_of(path)!r}, as {path!r}; keep one line a picture."
            )
            raise SettingsError(message)
    return by_id


def read_positional(path: str, ids: Sequence[str], label_depth: int) -> dict[str, Captions]:
    """Captions of a .pth list, matched to `ids` in ImageFolder order.

    Args:
        path: file written by torch.save of a list of strings; loaded with weights_only=True.
        ids: every id of the split, in any order.
        label_depth: number of leading path parts up to and with the class folder (2 for train/cat/1.jpg).

    Raises:
        ValueError: not a list of strings, or not as long as `ids`.
    """
    import torch

    try:
        captions = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the bytes provoke; none of it is ours
        message = (
            f"{path}: not a .pth that loads with weights_only=True ({type(error).__name__}); nothing of it "
            "was run."
        )
        raise SettingsError(message) from None
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        message = f"{path}: holds {type(captions).__name__}, expected a list of strings."
        raise SettingsError(message)
    if len(captions) != len(ids):
        message = (
            f"{path}: {len(captions)} captions for {len(ids)} images of the split; a list matched by "
            "position must have one for each, or every pair is wrong. Was the store ingested from the same "
            "folder?"
        )
        raise SettingsError(message)
    in_order = sorted(ids, key=lambda key: image_folder_key(key, label_depth))
    return {key: (caption,) for key, caption in zip(in_order, captions, strict=True)}


def image_folder_key(key: str, label_depth: int) -> tuple[str, str, str]:
    """Sorts ids as torchvision's ImageFolder does: by class, then by directory, then by file name."""
    # As torchvision sees it: of names that are not UTF-8 the escapes would sort elsewhere.
    name = locations.unescaped(key)
    parts = name.split("/")
    label = parts[label_depth - 1]
    return label, posixpath.dirname(name), parts[-1]
