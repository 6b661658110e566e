"""How a benchmark ends: its table, one JSON line with machine and versions, and on request a page in
results/."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def publish(
    name: str,
    title: str,
    command: str,
    table: list[str],
    packages: tuple[str, ...],
    *,
    save: bool,
    **found: Any,
) -> None:
    """Prints the table and the line of `found` (value, unit, goal, holds); with `save` writes results/NAME.md
    too."""
    line = {
        "benchmark": name,
        **found,
        "machine": machine(),
        "versions": {package: version(package) for package in packages},
    }
    print("\n".join(table))
    print(json.dumps(line))
    if save:
        text = [
            f"# {title}",
            "",
            f"`{command}`",
            "",
            "```",
            *table,
            "",
            json.dumps(line, indent=1),
            "```",
            "",
        ]
        (RESULTS / f"{name}.md").write_text("\n".join(text))


def machine() -> str:
    """Processor, cores and GPUs, as the figures depend on them."""
    import torch

    gpus = [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())]
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return ", ".join([names[0] if names else platform.machine(), f"{os.cpu_count()} cores", *gpus])


def version(package: str) -> str:
    """The version installed; a package's CPU build may have a name of its own."""
    for name in (package, f"{package}-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "none"
