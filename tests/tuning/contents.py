"""Contents of sweeps as `tuning.record.read` gives them, made up: what reports must be able to tell of."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from typing import Any

Content = dict[str, Any]
Trial = dict[str, Any]


def trial(
    name: str,
    curve: Sequence[float],
    *,
    arm: str = "method",
    configuration: int = 0,
    seed: int = 0,
    values: dict[str, Any] | None = None,
    status: str = "complete",
    backbone: str = "resnet18",
    objective: str = "align",
    metric: str = "top1",
    **told: Any,
) -> Trial:
    """A trial with a metric after each epoch."""
    history = [{"epoch": n, metric: value, "images_per_s": 90.0} for n, value in enumerate(curve, 1)]
    result = {
        "run": f"/sweep/{name}",
        "run_id": hashlib.md5(name.encode()).hexdigest(),
        "epochs": len(curve),
        "last": history[-1] if history else {},
        "best_epoch": len(curve),
        "best_top1": max(curve, default=0.0) if metric == "top1" else min(curve, default=0.0),
        "history": history,
    }
    config = {"objective": objective, "backbone": backbone, "seed": seed, "embeddings": ""}
    if objective == "align" and arm == "baseline":
        config |= {"alignment_weight": 0.0, "projection_dim": 0}
    return {
        "name": name,
        "stage": "search",
        "configuration": configuration,
        "arm": arm,
        "backbone": backbone,
        "seed": seed,
        "values": values or {},
        "config": config | (values or {}),
        "status": status,
        "epochs": len(curve),
        "history": history,
        "result": result if status == "complete" else None,
        "failure": "",
        "seconds": 4.0 * len(curve),
        "gpu_seconds": 0.0,
        "test": None,
        **told,
    }


def finals(trials: list[Trial]) -> list[dict[str, Any]]:
    """The pairs that final trials make."""
    found = []
    for backbone in dict.fromkeys(each["backbone"] for each in trials if each["stage"] == "final"):
        mine = [each for each in trials if (each["stage"], each["backbone"]) == ("final", backbone)]
        numbers = {each["arm"]: each["configuration"] for each in mine}
        seeds = sorted({each["seed"] for each in mine})
        found.append({"backbone": backbone, "seeds": seeds, "baseline": -1, "method": -1, **numbers})
    return found


def content(trials: list[Trial], **told: Any) -> Content:
    """A complete grid of these trials."""
    return {
        "version": 2,
        "shared": {},
        "sweep": "/runs/sweep",
        "store": "/store",
        "objective": "align",
        "preset": "scenes",
        "tracking_uri": "sqlite:///x.db",
        "parent_run": "0123456789abcdef",
        "search": "grid",
        "scheduler": "none",
        "rungs": [30],
        "axes": {},
        "seeds": sorted({each["seed"] for each in trials if each["stage"] == "search"}),
        "fresh_seeds": sorted({each["seed"] for each in trials if each["stage"] == "final"}),
        "eval_split": "val",
        "test_split": "",
        "budget": {"trials": 0, "hours": 0.0, "gpu_hours": 0.0, "max_failed_trials": 0},
        "state": "complete",
        "started": "2026-01-01T10:00:00+00:00",
        "seconds": 4321.0,
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "variants": {"captions": "test", "embeddings": "test"},
        "exported": "",
        "exported_from": {},
        "best": {},
        "final": finals(trials),
        "trials": trials,
        **told,
    }


def curve(top: float, epochs: int, chance: random.Random) -> list[float]:
    """Rises towards `top`."""
    return [round(top * (1 - 0.75 * 0.86**n) + chance.gauss(0, 0.4), 3) for n in range(1, epochs + 1)]


def large(*, final: bool = True, gain: float = 2.6) -> Content:
    """A random search with ASHA over two backbones: early ends, a divergence, a failure, one that runs
    and one that waits, and, of the first backbone, a final comparison on test pictures."""
    chance, trials = random.Random(7), []
    for backbone, plain in (("resnet18", 71.0), ("vit_tiny_patch16_224", 64.0)):
        for number, lr in enumerate((0.001, 0.004)):
            for seed in (0, 1):
                told = curve(plain - number, 30, chance)
                trials.append(
                    trial(
                        f"{backbone}-baseline-lr{lr}-s{seed}",
                        told,
                        arm="baseline",
                        configuration=number,
                        seed=seed,
                        values={"lr": lr},
                        backbone=backbone,
                    )
                )
        for number in range(2, 18):
            lr = float(f"{10 ** chance.uniform(-4, -2):.3g}")
            weight, dim = chance.choice((0.1, 0.3, 0.9)), chance.choice((64, 128, 0))
            values = {"lr": lr, "alignment_weight": weight, "projection_dim": dim}
            top = (
                plain + gain - 4 * abs(weight - 0.3) - 2.5 * abs(math.log10(lr / 0.003)) + 0.3 * (dim == 128)
            )
            epochs = 3 if top < plain + gain - 3 else 10 if top < plain + gain - 1.6 else 30
            for seed in (0, 1):
                status, told = "complete" if epochs == 30 else "stopped", curve(top, epochs, chance)
                failure = ""
                if number == 16:
                    status, told = ("diverged", told[:2]) if seed else ("failed", told[:1])
                    failure = (
                        "step 41: the loss is no finite number." if seed else "worker 0 was killed <oom>"
                    )
                if number == 17 and not final:
                    status, told = ("running", told[:2]) if seed else ("waiting", [])
                trials.append(
                    trial(
                        f"{backbone}-w{weight}-d{dim}-lr{lr}-s{seed}-{number}",
                        told,
                        configuration=number,
                        seed=seed,
                        values=values,
                        backbone=backbone,
                        status=status,
                        failure=failure,
                    )
                )
    whole = [each for each in trials if each["result"] and each["arm"] == "method"]
    best = max((t for t in whole if t["backbone"] == "resnet18"), key=lambda t: t["result"]["last"]["top1"])
    for seed in range(2, 7) if final else ():
        for arm in ("baseline", "method"):
            source = best if arm == "method" else trials[0]
            level = 71.0 + seed / 10 + (gain + chance.gauss(0, 0.5) if arm == "method" else 0)
            told = curve(level, 30, chance)
            right = round((level - 1.1) * 8.4)
            marks = list("1" * right + "0" * (840 - right))
            random.Random(5).shuffle(marks)  # the same pictures are hard to all
            test = {"split": "test", "top1": 100 * right / 840, "images": 840, "right": "".join(marks)}
            made = trial(
                f"final-resnet18-{arm}-s{seed}",
                told,
                arm=arm,
                configuration=source["configuration"],
                seed=seed,
                values=source["values"],
                stage="final",
                test=test,
            )
            trials.append(made)
    return content(
        trials,
        search="random",
        scheduler="asha",
        rungs=[3, 10, 30],
        axes={"lr": "log(0.0001,0.01)", "alignment_weight": "0.1,0.3,0.9", "projection_dim": "64,128,0"},
        test_split="test",
        budget={"trials": 80, "hours": 6.0, "gpu_hours": 0.0, "max_failed_trials": 4},
        best={"trial": best["name"], "configuration": best["configuration"]},
        state="complete" if final else "running",
    )


def single() -> Content:
    """One baseline, one seed."""
    return content([trial("b-s0", [40.0, 51.0], arm="baseline")])


def grid(gains: Sequence[float], seeds: int = 3, base: float = 50.0, noise: float = 0.1) -> Content:
    """A baseline and settings that are so much better, with a little noise."""
    chance = random.Random(3)
    trials = [
        trial(f"b-s{seed}", [base + seed], arm="baseline", configuration=0, seed=seed)
        for seed in range(seeds)
    ]
    for number, gain in enumerate(gains, 1):
        values = {"alignment_weight": 0.1 * number, "projection_dim": 64}
        for seed in range(seeds):
            level = base + seed + gain + chance.uniform(-noise, noise)
            trials.append(
                trial(f"w{number}-s{seed}", [level], configuration=number, seed=seed, values=values)
            )
    return content(trials)


def toy() -> Content:
    """Another method's, without a baseline, of whose metric less is better; needs tests/toy_objective.py."""
    trials = [
        trial(
            f"toy-{noise}-s{seed}",
            [0.02 + noise / 10, 0.004 + noise / 100 + seed / 10000],
            configuration=number,
            seed=seed,
            values={"noise": noise},
            objective="tests.toy_objective",
            metric="colour_error",
        )
        for number, noise in enumerate((0.1, 0.2, 0.5))
        for seed in (0, 1)
    ]
    return content(trials, objective="tests.toy_objective", axes={"noise": "0.1,0.2,0.5"})
