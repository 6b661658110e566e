"""What the demo does for each training method: verbs with their flags, as anybody would give them.

All methods but `align` have more pictures of each class: a network with attention learns next to nothing of
seven, pre-trained or not (docs/methods.md). Prompts see the labels of `SHOTS` of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cluster.config import DemoConfig

SWEEP_EPOCHS = "4"  # to see the sweep work; what is compared is trained for as long as the recipe says
SHOTS = "7"
PRETRAINING_EPOCHS = {"mae": "10", "mvp": "12"}  # less than the recipes', for minutes
FINE_TUNING_EPOCHS = {"mae": "3", "mvp": "6"}  # half of what docs/methods.md compares
CLIP = "examples/scenes/clip"


class Step(NamedTuple):
    """A verb of `gpt4image`; of a step that draws the scenes, none."""

    title: str
    arguments: tuple[str, ...] = ()


def steps(config: DemoConfig, root: str) -> list[Step]:
    """All steps, in order; each finds what is done already."""
    store = f"{root}/store"
    scenes = ("--images", f"{root}/scenes", "--store", store)
    if config.objective in ("mae", "coop", "cocoop"):  # which need no captions
        filled = Step("read them into a store", ("ingest", *scenes))
    else:
        filled = Step("describe them", ("describe", *scenes, "--caption-preset", "scenes"))
    common = ["--store", store, "--tracking-uri", f"sqlite:///{root}/mlflow.db"]
    if config.epochs:
        common += ["--epochs", str(config.epochs)]
    make = {
        "align": _align,
        "mae": _pretraining,
        "mvp": _pretraining,
        "coop": _prompts,
        "cocoop": _prompts,
        "clip": _clip,
    }
    own = make[config.objective](config, root, common)
    return [Step("draw scenes"), filled, Step("what the store holds", ("status", "--store", store)), *own]


def _align(config: DemoConfig, root: str, common: Sequence[str]) -> list[Step]:
    """Sweeps two backbones, then compares over five seeds."""
    sweep = [*common, "--preset", "scenes", "--sweep", f"{root}/sweep"]
    sweep += ["--alignment-weights", "0", "0.5", "--projection-dims", "64", "0"]
    sweep += ["--backbones", "test_resnet", "test_vit", "--concurrent", "2", "--no-export"]
    sweep += ["--fresh-seeds", "0", *(() if config.epochs else ("--epochs", SWEEP_EPOCHS))]
    return [
        Step("sweep weight, dimension and backbone", ("tune", *sweep)),
        # The recipe's weight, fixed beforehand, on seeds that the sweep has not seen.
        Step(
            "compare over five seeds",
            _compared(root, "seeds", "1 2 3 4 5", [*common, "--preset", "scenes"]),
        ),
        Step("evaluate", ("evaluate", f"{root}/seeds/test_resnet-w0.5-d0-s1")),
        _report(root, "sweep", "seeds"),
    ]


def _pretraining(config: DemoConfig, root: str, common: Sequence[str]) -> list[Step]:
    """Learns from all pictures without labels, then with them: the same backbone from nothing and from
    there. A Hiera is trained plainly alone, for minutes; a ViT also aligned."""
    backbone = {
        "mae": ["--backbones", "hiera_nano_64", "--image-size", "64"],
        "mvp": ["--backbones", "test_vit2", "--image-size", "64", "--patch-size", "8"],
    }[config.objective]
    weights = {"mae": "0", "mvp": "0 0.5"}[config.objective]
    recipe = {"mae": "hiera-scenes-mae", "mvp": "mvp-scenes"}[config.objective]
    before = f"{root}/{config.objective}"
    learn = [*common, "--preset", recipe, "--run", before]
    fine = [
        *common,
        "--preset",
        "scenes",
        *backbone,
        "--head",  # the recipe's one linear map was chosen for a ResNet
        "mlp",
        "--lr",
        "1e-3",
        "--clip-grad",
        "1",
        "--batch-size",
        "16",
    ]
    if not config.epochs:
        learn += ["--epochs", PRETRAINING_EPOCHS[config.objective]]
        fine += ["--epochs", FINE_TUNING_EPOCHS[config.objective]]
    return [
        Step("learn from pictures alone", ("train", *learn)),
        Step("what it has learned", ("evaluate", before, "--linear-probe", "--to", f"{root}/evaluation")),
        Step("labels, from nothing", _compared(root, "from-nothing", "1 2 3 4", fine, weights)),
        Step(
            "labels, from what was learned",
            _compared(root, f"from-{config.objective}", "1 2 3 4", [*fine, "--init-from", before], weights),
        ),
        _report(root, "from-nothing", f"from-{config.objective}"),
    ]


def _prompts(config: DemoConfig, root: str, common: Sequence[str]) -> list[Step]:
    """Learns prompts of the small CLIP from few pictures of half the classes; judged on both halves."""
    few = [*common, "--preset", f"{config.objective}-scenes", "--shots", SHOTS, "--class-half", "base"]
    runs = {seed: f"{root}/seed-{seed}" for seed in "123"}
    looked = ("features", "--store", f"{root}/store", "--tower", CLIP)
    return [
        Step("what the CLIP says of each picture, once", looked),
        *(
            Step(f"learn prompts, seed {seed}", ("train", *few, "--seed", seed, "--run", run))
            for seed, run in runs.items()
        ),
        Step(
            "judge on classes that were seen and on new ones",
            ("evaluate", *runs.values(), "--to", f"{root}/evaluation"),
        ),
    ]


def _clip(config: DemoConfig, root: str, common: Sequence[str]) -> list[Step]:
    """Trains both towers from nothing."""
    run = f"{root}/clip"
    return [
        Step("train both towers", ("train", *common, "--preset", "clip-scenes", "--run", run)),
        Step("retrieval and zero-shot", ("evaluate", run, "--to", f"{root}/evaluation")),
        Step("export", ("export", run, "--to", f"{root}/model")),
    ]


def _compared(
    root: str, name: str, seeds: str, flags: Sequence[str], weights: str = "0 0.5"
) -> tuple[str, ...]:
    """The recipe's weight beside none, on seeds that nothing is chosen on."""
    weighed = ("--alignment-weights", *weights.split(), "--projection-dims", "0")
    fresh = ("--seeds", *seeds.split(), "--concurrent", "2", "--fresh-seeds", "0")
    return ("tune", *flags, "--sweep", f"{root}/{name}", *weighed, *fresh)


def _report(root: str, *sweeps: str) -> Step:
    return Step("report", ("report", *(f"{root}/{each}" for each in sweeps), "--html", f"{root}/report.html"))
