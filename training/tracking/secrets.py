"""Keeps passwords and tokens out of what is recorded and printed."""

from __future__ import annotations

import os
import re
from typing import Any

_NAME = re.compile(
    r"(^|[_.-])(token|password|passwd|secret|api_?key|access_?key|secret_?key|credentials?)$", re.IGNORECASE
)
_MASK = "***"


def masked(text: str) -> str:
    """The text without user and password of addresses, without tokens in their queries, without this
    environment's secrets."""
    text = re.sub(r"://[^/\s]*@", f"://{_MASK}@", text)
    text = re.sub(
        r"([?&][^=&\s]*(?:token|password|secret|key|signature)=)[^&\s]+",
        rf"\1{_MASK}",
        text,
        flags=re.IGNORECASE,
    )
    for name, value in os.environ.items():
        if _NAME.search(name) and len(value) >= 8:
            text = text.replace(value, _MASK)
    return text


def recordable(values: dict[str, Any], longest: int) -> dict[str, str]:
    """Settings as text, cut to a length that MLflow takes, with secrets masked."""
    return {
        _key(name): _MASK if _NAME.search(name) and value else masked(str(value))[:longest]
        for name, value in values.items()
    }


def metric_name(name: str) -> str:
    """A name that MLflow takes: other characters than letters, digits and _-. /: become an underscore."""
    return _key(name)


def _key(name: str) -> str:
    return re.sub(r"[^\w\-. /:]", "_", name)[:250]
