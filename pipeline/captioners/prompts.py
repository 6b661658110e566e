"""Prompt templates: the question asked of a picture, with or without its class name.

Class-conditioned prompts give better descriptions and a stronger alignment (GPT4Image v3, arXiv 2306.00693).
"""

from __future__ import annotations

import re


def class_name(label: str) -> str:
    """A folder name as words: drops a leading WordNet id and turns separators into spaces."""
    name = re.sub(r"^n\d{8}[_-]", "", label)
    return re.sub(r"[_\s]+", " ", name).strip() or label


def fill(template: str, label: str) -> str:
    """The prompt for one picture; {label} becomes the class name."""
    return template.format(label=class_name(label))
