"""Settings of training's verbs: one frozen dataclass a verb, filled from a preset and the flags given after
it.

A training's are in groups, each beside the part that reads it; those of `place` and `track` may be others
when a run is resumed.
"""

from __future__ import annotations

import os
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Generic, Literal, Self, cast, get_type_hints

import tyro
from typing_extensions import TypeVar
from tyro.conf import OmitArgPrefixes

from pipeline.errors import SettingsError
from training.data.settings import DataSettings
from training.engine.settings import ComputeSettings, OptimSettings, PlaceSettings
from training.models.settings import ModelSettings
from training.objectives.registry import settings_of
from training.objectives.settings.align import AlignSettings
from training.settings import (
    Free,
    MethodSettings,
    Settings,
    flat,
    is_recordable,
    not_finite,
    restored,
    template_fault,
)
from training.tracking.settings import TrackSettings

NO_SETTINGS = ("version", "recipes", "store_contents", "commit", "variants")
"""What else a run's record tells, see `run_folder.written`: names that no setting may have."""
Method = TypeVar("Method", bound=MethodSettings, default=Any)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Generic[Method]):
    """One training run. The baseline is the same run with --alignment-weight 0."""

    store: str
    """Folder or s3:// address of a store. What it must hold depends on the method."""
    run: str = ""
    """Folder or s3:// address of the run: checkpoints, metrics, settings. The same resumes. Empty: a new one
    below runs/."""
    preset: str = "small-64"
    """Recipe: a value for every other flag here; flags given beside it win. Recipes are named at the top of
    this help."""
    objective: str = "align"
    """Training method: align (GPT4Image; with a weight of 0 its baseline), mae, mvp, coop, cocoop, clip, or
    the import path of a module of one's own (see training/objectives/protocol.py). Each has flags and recipes
    of its own, which --objective NAME --help shows."""
    seed: int = 0
    """Seed of weights, order and augmentation."""

    # Of the objective; see `of`.
    method: OmitArgPrefixes[Method] = field(default_factory=AlignSettings)  # type: ignore[assignment]
    """Settings of the training method."""
    model: OmitArgPrefixes[ModelSettings] = field(default_factory=ModelSettings)
    optim: OmitArgPrefixes[OptimSettings] = field(default_factory=OptimSettings)
    data: OmitArgPrefixes[DataSettings] = field(default_factory=DataSettings)
    compute: OmitArgPrefixes[ComputeSettings] = field(default_factory=ComputeSettings)
    place: OmitArgPrefixes[PlaceSettings] = field(default_factory=PlaceSettings)
    track: OmitArgPrefixes[TrackSettings] = field(default_factory=TrackSettings)

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """From settings by their names alone, as flags, presets and records have them; the rest has its
        default.

        Raises:
            SettingsError: values that do not fit.
            TypeError: a name that is none of a setting.
        """
        groups = cls.groups(settings.get("objective", "align"))
        settings = _own_model(groups) | settings
        given: dict[str, Any] = {name: restored(kind, settings) for name, kind in groups.items()}
        grouped = {own.name for kind in groups.values() for own in fields(kind)}
        return cls(**{name: value for name, value in settings.items() if name not in grouped}, **given)

    @classmethod
    def groups(cls, objective: str) -> dict[str, type[Settings]]:
        """The groups by name, of a training method.

        Raises:
            SettingsError: no such method, or a setting of its that has the name of another one.
        """
        made: dict[str, Any] = {own.name: own.default_factory for own in fields(cls)}
        kinds = {name: kind for name, kind in made.items() if kind is not MISSING}
        method = settings_of(objective)
        kinds["method"] = kinds["method"] if issubclass(kinds["method"], method) else method
        others = {*made, *NO_SETTINGS} - kinds.keys()
        for name, kind in kinds.items():
            others |= {own.name for own in fields(kind)} if name != "method" else set()
        if taken := sorted(others & {own.name for own in fields(kinds["method"])}):
            message = (
                f"objective={objective}: its settings {', '.join(taken)} are names of training's own; rename "
                "them."
            )
            raise SettingsError(message)
        return kinds

    @classmethod
    def defaults(cls, objective: str) -> dict[str, Any]:
        """Every setting by its name with its default, MISSING for those without."""
        groups = cls.groups(objective)
        kinds: list[Any] = [cls, *groups.values()]
        own = [each for kind in kinds for each in fields(kind) if each.name not in groups]
        return {
            each.name: each.default if each.default_factory is MISSING else each.default_factory()
            for each in own
        } | _own_model(groups)

    @classmethod
    def kinds(cls, objective: str) -> dict[str, Any]:
        """Every setting by its name with its type."""
        groups = cls.groups(objective)
        kinds: list[Any] = [cls, *groups.values()]
        hints = {kind: get_type_hints(kind) for kind in kinds}
        return {
            each.name: hints[kind][each.name]
            for kind in kinds
            for each in fields(kind)
            if each.name not in groups
        }

    @classmethod
    def unjudged(cls, **settings: Any) -> Self:
        """What a command line fills: as `of`, but not checked, and `tyro.MISSING` for what has no default."""
        objective = settings.get("objective", "align")
        values = {
            name: tyro.MISSING if value is MISSING else value
            for name, value in (cls.defaults(objective) | settings).items()
        }
        groups = {name: restored(kind, values) for name, kind in cls.groups(objective).items()}
        config = object.__new__(cls)
        config.__dict__.update({own.name: groups.get(own.name, values.get(own.name)) for own in fields(cls)})
        return config

    def but(self, **settings: Any) -> Self:
        """The same with other values, by names alone; see `of`."""
        return self.of(**flat(self) | settings)

    @property
    def without_weights(self) -> Self:
        """The same with a backbone that starts from nothing: a checkpoint has all weights."""
        return self.but(pretrained=False, init_from="")

    @property
    def last_epoch(self) -> int:
        """The epoch that this start ends after: that of --until-epoch, or the run's last."""
        return min(self.place.until_epoch or self.optim.epochs, self.optim.epochs)

    def epoch_samples(self, pictures: int) -> int:
        """Samples of an epoch over so many pictures: --epoch-repeats passes, or what --min-epoch-steps
        take."""
        wanted = self.data.min_epoch_steps * self.optim.batch_size if pictures else 0
        return max(pictures * self.data.epoch_repeats, wanted)

    def deciding(self) -> dict[str, Any]:
        """What decides the results, by names: everything but the groups that are free, and where the run
        lies."""
        free = [
            getattr(self, name)
            for name, kind in self.groups(self.objective).items()
            if issubclass(kind, Free)
        ]
        names = {"run"}.union(*(flat(group) for group in free))
        return {name: value for name, value in flat(self).items() if name not in names}

    def __post_init__(self) -> None:
        faults = not_finite(flat(self))
        for own in fields(self):
            group = getattr(self, own.name)
            faults += group.faults() if isinstance(group, Settings) else []
        if (model := self.method.own_model) and self.model.backbone != model:
            faults.append(
                f"backbone={self.model.backbone}: {self.objective} brings its own model; leave out "
                "--backbone, or a --preset that names one."
            )
        if not isinstance(self.method, settings_of(self.objective)):
            faults.append(f"objective={self.objective}: `method` is of another one; see TrainConfig.of.")
        faults += [
            f"{name}={value!r}: must be a number, a string, or a tuple of such, which a record can hold."
            for name, value in flat(self.method).items()
            if not is_recordable(value)
        ]
        optim, data, place = self.optim, self.data, self.place
        # BatchNorm has no statistics of one.
        if optim.batch_size < 2 * max(place.workers, 1) * optim.accumulate:
            faults.append(
                f"batch_size={optim.batch_size}: fewer than two images for each of {max(place.workers, 1)} "
                f"workers x {optim.accumulate} parts; pass a larger --batch-size, or less --workers or "
                "--accumulate."
            )
        if data.repeats > optim.batch_size:
            faults.append(
                f"repeats={data.repeats}: more views than the {optim.batch_size} images of a batch."
            )
        if place.loader == "threads" and data.needs_processes:
            faults.append("loader=threads: --auto-augment and --color-jitter need --loader actors (or auto).")
        if faults:
            raise SettingsError("\n".join(faults))


def _own_model(groups: dict[str, type[Settings]]) -> dict[str, Any]:
    own = cast(type[MethodSettings], groups["method"]).own_model
    return {"backbone": own} if own else {}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What a run's model can do on a split: accuracy, calibration, confusions; aligned ones also retrieval
    and zero-shot."""

    run: tyro.conf.Positional[str]
    """Folder or s3:// address of a run."""
    more_runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Further ones, such as the same with other seeds: each is judged, then all by mean and deviation."""
    split: str = ""
    """Split to measure on; empty: the run's --eval-split."""
    checkpoint: Literal["last", "best"] = "last"
    """The last epoch's model, or the one that was judged best (chosen on the eval split, so its figure there
    is optimistic)."""
    weights: Literal["auto", "raw", "ema"] = "auto"
    """The weights themselves or their moving average; auto: the average where the run kept one."""
    store: str = ""
    """Another store to judge on, whose classes learned prompts (coop, cocoop) are bound to; empty: the
    run's."""
    class_half: Literal["", "all", "base", "new"] = ""
    """Classes to judge with, see train; empty: the run's."""
    retrieval: bool = True
    """Of aligned runs: how well an image finds its own caption among all different ones of the split."""
    knn: bool = False
    """k-NN accuracy of the backbone's features (k = 20, T = 0.07, as DINO's); costs a pass over the train
    split."""
    linear_probe: bool = False
    """Accuracy of a linear classifier on the backbone's features, fitted to the pictures that the run was
    trained on; costs a pass over them."""
    zero_shot: bool = False
    """Of aligned runs: accuracy of class prompts, through the encoder of the embeddings. The two flags below
    imply it."""
    class_prompts: tuple[str, ...] = ()
    """Prompt templates, averaged for each class; {label} becomes its name. Empty: "a photo of a {label}"."""
    classes_file: str = ""
    """Classes to choose from, one name a line (or CLASS, a tab, and another name for it); empty: the
    store's."""
    to: str = ""
    """Folder for evaluation.json, per_class.csv, predictions.parquet, confusion.png and reliability.png (of
    several runs, one in it for each); empty: none."""
    json: bool = False
    """One JSON object on standard output, and nothing else."""

    @property
    def asks_zero_shot(self) -> bool:
        """Whether zero-shot is wanted, by its flag or by those that say how."""
        return self.zero_shot or bool(self.class_prompts or self.classes_file)

    def __post_init__(self) -> None:
        faults = [
            fault for template in self.class_prompts if (fault := template_fault("class_prompts", template))
        ]
        if "://" in self.to:
            faults.append(f"to={self.to}: must be a folder of this machine.")
        runs = (self.run, *self.more_runs)
        if twice := sorted({run for run in runs if runs.count(run) > 1}):
            faults.append(f"run={twice[0]}: name each run once.")
        if faults:
            raise SettingsError("\n".join(faults))

    def each(self) -> list[EvaluateConfig]:
        """The same question for each run alone; what it writes, in a folder of the run's name, or of its
        number where runs are called alike."""
        runs = (self.run, *self.more_runs)
        if len(runs) == 1:
            return [self]
        names = [run.rstrip("/").rpartition("/")[2] for run in runs]
        if len(set(names)) < len(names):
            names = [f"{number}-{name}" for number, name in enumerate(names, 1)]
        return [
            replace(self, run=run, more_runs=(), to=os.path.join(self.to, name) if self.to else "")
            for run, name in zip(runs, names, strict=True)
        ]


FORMATS = ("timm", "onnx", "torch")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A run's backbone as a plain model: no head, no text, the baseline's size and speed."""

    run: tyro.conf.Positional[str]
    """Folder or s3:// address of a run."""
    to: str
    """Folder to write; load it with timm.create_model("local-dir:FOLDER", pretrained=True)."""
    checkpoint: Literal["last", "best"] = "last"
    """Which of the run's models."""
    weights: Literal["auto", "raw", "ema"] = "auto"
    """The weights themselves or their moving average; auto: the average where the run kept one."""
    format: str = "timm"
    """What to write, with commas between: timm (folder), onnx (model.onnx, for ONNX Runtime), torch
    (model.pt2, torch.export)."""
    overwrite: bool = False
    """Replace an earlier export in the folder; other files in it stay."""

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats, each once, in the order of FORMATS."""
        named = {name.strip() for name in self.format.split(",")}
        return tuple(name for name in FORMATS if name in named)

    def __post_init__(self) -> None:
        faults = []
        unknown = [name for name in self.format.split(",") if name.strip() not in FORMATS]
        if unknown:
            known = ", ".join(FORMATS)
            faults.append(
                f"format={self.format!r}: {unknown[0]!r} is unknown; choose from {known}, with commas "
                "between."
            )
        if "://" in self.to:
            faults.append(f"to={self.to}: must be a folder of this machine; copy it from there.")
        if faults:
            raise SettingsError("\n".join(faults))
