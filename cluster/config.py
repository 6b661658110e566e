"""Settings of the cluster's verbs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import tyro

from pipeline.errors import SettingsError
from pipeline.presets import CAPTION_PRESETS, ENCODER_PRESETS


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What this machine, or with --address a cluster, can do, and how to mend what it cannot."""

    address: str = ""
    """A cluster instead of this machine: http://... is its job server, to which the checkout is sent with the
    question; host:port or auto joins it from one of its nodes. (With --env and such: gpt4image submit
    [FLAGS] -- doctor --address auto ...)"""
    store: str = ""
    """With --address: folder or URI that every node must be able to write to and see alike."""
    caption_preset: str = ""
    """With --address: whether cards are large enough for this captioner, and its weights there."""
    encoder_preset: str = ""
    """With --address: whether this encoder's weights are there."""
    deep: bool = False
    """Also start Ray, load the shipped captioner into vLLM and encode a sentence (about a minute)."""
    json: bool = False
    """One JSON object on standard output, and nothing else."""

    def __post_init__(self) -> None:
        faults = [
            f"{name}={value!r}: unknown; choose one of {', '.join(known)}."
            for name, value, known in (
                ("caption_preset", self.caption_preset, CAPTION_PRESETS),
                ("encoder_preset", self.encoder_preset, ENCODER_PRESETS),
            )
            if value and value not in known
        ]
        if not self.address and (self.store or self.caption_preset or self.encoder_preset):
            faults.append("store and presets: are for a cluster; pass --address, too.")
        if self.address and self.deep:
            faults.append("deep: is for this machine; leave out --address.")
        if faults:
            raise SettingsError("\n".join(faults))


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The main job on the embedded default: scenes, captions, embeddings, sweep, five seeds, page; or what
    another training method does with the scenes."""

    to: str = ""
    """Folder of everything that the demo makes; the same folder again goes on where it stopped. Empty:
    runs/demo, of another method runs/demo-NAME."""
    objective: Literal["align", "mae", "mvp", "coop", "cocoop", "clip"] = "align"
    """Training method. align: descriptions, a sweep, a comparison over five seeds; 12 minutes on two cores.
    mae and mvp: learn from pictures alone, then with labels, beside the same from nothing, in some 25
    minutes; coop and cocoop: prompts for the small CLIP that comes along; clip: such a one from nothing."""
    task: Literal["kinds", "relations"] = "kinds"
    """What the scenes' classes are: kinds that descriptions tell apart, or relations that they do not help
    with."""
    train_per_class: int = 0
    """Training pictures of each class (28 kinds, or 12 relations); 0: 7, of clip 120, of the others 40."""
    val_per_class: int = 20
    """Validation pictures of each class."""
    epochs: int = 0
    """Epochs of each training; 0: the recipe's, or fewer where that is not a matter of minutes."""

    def __post_init__(self) -> None:
        small = [
            f"{name}={count}: must be at least 4."
            for name, count in (("train_per_class", self.pictures), ("val_per_class", self.val_per_class))
            if count < 4
        ]
        if small:
            raise SettingsError("\n".join(small))

    @property
    def folder(self) -> str:
        """`to`, or what stands for it."""
        return self.to or ("runs/demo" if self.objective == "align" else f"runs/demo-{self.objective}")

    @property
    def pictures(self) -> int:
        """`train_per_class`, or what stands for it."""
        return self.train_per_class or {"align": 7, "clip": 120}.get(self.objective, 40)


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Where jobs are sent to."""

    address: str = ""
    """Job server (the dashboard) of the cluster; empty: RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265."""
    patience: float = 600
    """Seconds for which a lost connection is tried again; the job goes on meanwhile."""


@dataclass(frozen=True, kw_only=True)
class SubmitConfig(JobConfig):
    """Runs a verb as a job on a Ray cluster: gpt4image submit [FLAGS] -- VERB [FLAGS OF THE VERB].

    The verb's flags are checked here, before anything is sent. A second job for the same place is
    refused while the first one runs; Ctrl-C leaves it running.
    """

    working_dir: str = ""
    """Checkout to send: what is submitted is what runs. Empty: the one that you are in."""
    exclude: tuple[str, ...] = ()
    """Names of files and folders, patterns as of a shell, that are not sent; what git ignores never is."""
    env: tuple[str, ...] = ()
    """Names of variables that the job gets from here, such as AWS_ACCESS_KEY_ID; addresses of MLflow and S3
    it gets in any case. Whoever may see the cluster's jobs can read them: secrets of the cluster are
    safer."""
    detach: bool = False
    """Print the job's id and leave; without it the log is followed, and the exit code is the job's."""
    job_id: str = ""
    """The job's id; empty: made of the place that it writes to, and a number for each try."""

    def __post_init__(self) -> None:
        if self.job_id and not re.fullmatch(r"\w[\w.-]*", self.job_id):
            message = f"job_id={self.job_id}: letters, digits, points, dashes and underscores only."
            raise SettingsError(message)


@dataclass(frozen=True, kw_only=True)
class LogsConfig(JobConfig):
    """Follows a job's log; the exit code is the job's, 130 if it was stopped."""

    job: tyro.conf.Positional[str] = ""
    """Its id, as `submit` said it; left out: the jobs that there are."""
    follow: bool = True
    """Until the job ends; --no-follow: what there is now, and 0."""


@dataclass(frozen=True, kw_only=True)
class StopConfig(JobConfig):
    """Ends a job; what it has finished is kept, and the same command goes on with it."""

    job: tyro.conf.Positional[str]
    """Its id, as `submit` said it."""
