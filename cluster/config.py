"""Settings of the cluster's verbs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What this machine can do, and how to mend what it cannot."""

    deep: bool = False
    """Also start Ray, load the shipped captioner into vLLM and encode a sentence (about a minute)."""
    json: bool = False
    """One JSON object on standard output, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The main job on the embedded default: scenes, captions, embeddings, sweep, five seeds, page."""

    to: str = "runs/demo"
    """Folder of everything that the demo makes; the same folder again goes on where it stopped."""
    task: Literal["kinds", "relations"] = "kinds"
    """What the scenes' classes are: kinds that descriptions tell apart, or relations that they do not help
    with."""
    train_per_class: int = 7
    """Training pictures of each class (28 kinds, or 12 relations)."""
    val_per_class: int = 20
    """Validation pictures of each class."""
    epochs: int = 0
    """Epochs of each training, of four passes over the pictures each; 0: the recipe's."""

    def __post_init__(self) -> None:
        small = [
            f"{n}={getattr(self, n)}: must be at least 4."
            for n in ("train_per_class", "val_per_class")
            if getattr(self, n) < 4
        ]
        if small:
            raise SettingsError("\n".join(small))


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """Runs a verb as a job on a Ray cluster: gpt4image submit [FLAGS] -- VERB [FLAGS OF THE VERB]."""

    address: str = "http://127.0.0.1:8265"
    """Job server (the dashboard) of the cluster; RAY_API_SERVER_ADDRESS overrides the default."""
    working_dir: str = "."
    """Checkout to upload: what is submitted is what runs."""
    wait: bool = True
    """Follow the job's log until it ends, and exit with its result; with --no-wait print its id and leave."""
