"""What the alignment loss costs: beside the plain gathered form, and as a share of a ResNet-50 training step.

Run `python benchmarks/alignment_loss.py [--batches 1024 ...] [--turns 5] [--small]`; about five minutes on
two cores.

(a) Forward and backward of one process's share of the loss at W = 8 processes and global batch B, each point
in a process of its own. "Ours" is `training.losses.alignment.alignment_loss` for b = B / 8 images and all
texts; "plain" computes the full B x B symmetric loss on gathered image features with autograd, as every
process of open_clip does with `gather_with_grad` (here against constant texts, which is kinder to it).
Nothing is communicated: the loss is told that W = 8, and its all-reduces, of 4 B + 2 numbers in all, return
what they are given. So "ours" does the arithmetic of one process on numbers that lack the other processes'
part; the parity tests show that the gradients of real processes are right. Memory is the peak above the
inputs: of the process's resident set, or on CUDA of torch's allocator. Points whose plain form would need
more than 6 GiB are left out.

(b) A training step with and without alignment (projection head 2048 - 512 - 256 with BatchNorm, normalising,
loss, backward, optimizer), in turns; and the extra parts alone. The second is less noisy, and is held against
the goal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch
from torch import Tensor
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from training.losses import alignment  # noqa: E402
from training.models import backbones  # noqa: E402
from training.models.heads import ProjectionHead  # noqa: E402

WORLD, DIM, TAU = 8, 256, 0.05
LIMIT_GIB = 6.0
PLAIN_MATRICES = 5  # of B x B, that the plain form holds at once; measured at B = 4096
GOALS = {"cpu": 0.03, "cuda": 0.02}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> int:
    """Prints a table and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=[1024 << n for n in range(6)],
        help="global batches (default 1024 to 32768)",
    )
    parser.add_argument(
        "--turns", type=int, default=5, help="repetitions of a training step; the median counts (default 5)"
    )
    parser.add_argument(
        "--small", action="store_true", help="ResNet-50 steps of 4 images at 64 px, to see that it works"
    )
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/alignment_loss.md")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(_point(options.point[0], int(options.point[1]))), flush=True)
        return 0
    table = [f"(a) one process of {WORLD}, d = {DIM}, {DEVICE}: forward and backward", ""]
    table.append(
        f"{'B':>7}{'ours ms':>10}{'plain ms':>10}{'faster':>8}{'ours MiB':>10}{'plain MiB':>11}{'smaller':>9}"
    )
    ratios: dict[int, dict[str, float]] = {}
    for batch in options.batches:
        ours = _in_process("ours", batch)
        line = f"{batch:>7}{ours['ms']:>10.1f}"
        if (need := PLAIN_MATRICES * 4 * batch**2 / 2**30) > LIMIT_GIB:
            table.append(f"{line}{'-':>10}{'-':>8}{ours['mib']:>10.1f}  left out: about {need:.0f} GiB")
        else:
            plain = _in_process("plain", batch)
            ratios[batch] = {
                "time": round(plain["ms"] / ours["ms"], 2),
                "memory": round(plain["mib"] / max(ours["mib"], 0.1), 2),
            }
            times, sizes = (
                f"{plain['ms']:>10.1f}{ratios[batch]['time']:>7.1f}x",
                f"{ours['mib']:>10.1f}{plain['mib']:>11.1f}",
            )
            table.append(f"{line}{times}{sizes}{ratios[batch]['memory']:>8.1f}x")
        print(table[-1], file=sys.stderr, flush=True)
    step = _steps(options.turns, small=options.small)
    with_over_without = step["with"] / step["without"] - 1
    alone, goal = step["alone"] / step["without"], GOALS[DEVICE]
    table += [
        "",
        f"(b) ResNet-50, {step['images']:.0f} images at {step['size']:.0f} px: step {step['without']:.1f} ms "
        f"without, {step['with']:.1f} ms with alignment (medians of {options.turns})",
        f"extra, of the step without: {with_over_without:.4f} by the two steps, {alone:.4f} by the extra "
        f"parts alone ({step['alone']:.2f} ms; goal at most {goal})",
    ]
    record.publish(
        "alignment_loss",
        "Alignment loss: beside the gathered form, and in a training step",
        "python benchmarks/alignment_loss.py",
        table,
        ("torch", "timm"),
        save=options.save,
        value={
            "share_alone": round(alone, 4),
            "share_of_steps": round(with_over_without, 4),
            "plain_over_ours": {str(batch): ratio for batch, ratio in ratios.items()},
        },
        unit="share of a ResNet-50 step; ratios of time and memory of one process of 8",
        goal={"share_alone": goal},
        holds=alone <= goal,
    )
    return 0


def _in_process(form: str, batch: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--point", form, str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        message = f"{form} at B = {batch} failed ({done.returncode}): {done.stderr[-2000:]}"
        raise RuntimeError(message)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _point(form: str, batch: int) -> dict[str, float]:
    """Milliseconds (median) and peak MiB of one form at one batch."""
    run = {"ours": _ours, "plain": _plain}[form]
    _no_communication()
    _measured(run(64))  # loads kernels and libraries
    work = run(batch)
    _sync()
    before = _peak(reset=True)
    first = _measured(work)
    mib = _peak(reset=False) - before
    turns = 3 if first > 5 else 7
    return {"ms": 1000 * statistics.median(_measured(work) for _ in range(turns)), "mib": mib}


def _no_communication() -> None:
    alignment.world_size = lambda: WORLD
    alignment.dist.all_reduce = lambda *_, **__: None


def _data(images: int, texts: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    image, text = (functional.normalize(torch.randn(n, DIM, device=DEVICE), dim=-1) for n in (images, texts))
    return image.requires_grad_(), text


def _ours(batch: int) -> Callable[[], None]:
    image, text = _data(batch // WORLD, batch)
    groups = torch.arange(batch, device=DEVICE)
    texts, targets = alignment.Texts(text, groups), groups[: batch // WORLD, None]
    weights = torch.ones(batch // WORLD, 1, device=DEVICE)
    log_tau = torch.tensor(TAU, device=DEVICE).log().requires_grad_()

    def work() -> None:
        image.grad = log_tau.grad = None
        alignment.alignment_loss(image, texts, targets, weights, log_tau.exp()).backward()

    return work


def _plain(batch: int) -> Callable[[], None]:
    image, text = _data(batch, batch)
    labels = torch.arange(batch, device=DEVICE)
    log_tau = torch.tensor(TAU, device=DEVICE).log().requires_grad_()

    def work() -> None:
        image.grad = log_tau.grad = None
        logits = image / log_tau.exp() @ text.T
        loss = (functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels)) / 2
        loss.backward()

    return work


def _measured(work: Callable[[], Any]) -> float:
    _sync()
    start = time.perf_counter()
    work()
    _sync()
    return time.perf_counter() - start


def _sync() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _peak(*, reset: bool) -> float:
    """Peak memory in MiB; with `reset` it counts from now on, and what is held now is returned."""
    if DEVICE == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present size
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024


class _Step:
    """A training step of ResNet-50 with synthetic data; `extra` is what alignment adds to it, on features of
    the right shape."""

    def __init__(self, *, small: bool) -> None:
        self.images, self.size = (4, 64) if small else (32, 224) if DEVICE == "cpu" else (256, 224)
        torch.manual_seed(0)
        model: Any = backbones.build("resnet50", num_classes=1000, image_size=self.size).to(DEVICE)
        self.model = model.to(memory_format=torch.channels_last).train()
        self.head = ProjectionHead(2048, DIM, "mlp", batch_norm=True).to(DEVICE).train()
        images = torch.randn(self.images, 3, self.size, self.size, device=DEVICE)
        self.pictures = images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.arange(self.images, device=DEVICE)
        kind = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # what the backbone gives under autocast
        self.features = torch.randn(self.images, 2048, device=DEVICE, dtype=kind, requires_grad=True)
        _, text = _data(1, self.images)
        self.texts = alignment.Texts(text, torch.arange(self.images, device=DEVICE))
        self.weights = torch.ones(self.images, 1, device=DEVICE)
        self.model_optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.head_optimizer = torch.optim.SGD(self.head.parameters(), lr=1e-3, momentum=0.9)

    def whole(self, *, align: bool) -> None:
        self.model_optimizer.zero_grad()
        self.head_optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            features, logits = backbones.features_and_logits(self.model, self.pictures)
            loss = functional.cross_entropy(logits.float(), self.labels)
            if align:
                loss = loss + 0.3 * self._alignment(features)
        loss.backward()
        self.model_optimizer.step()
        if align:
            self.head_optimizer.step()

    def extra(self) -> None:
        self.features.grad = None
        self.head_optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = self._alignment(self.features)
        loss.backward()
        self.head_optimizer.step()

    def _alignment(self, features: Tensor) -> Tensor:
        return alignment.alignment_loss(
            self.head(features), self.texts, self.texts.groups_B[:, None], self.weights, TAU
        )


def _steps(turns: int, *, small: bool) -> dict[str, float]:
    """Medians in milliseconds of a step with and without alignment, taken in turns, and of the extra parts
    alone."""
    step = _Step(small=small)
    ways: dict[str, Callable[[], None]] = {
        "without": lambda: step.whole(align=False),
        "with": lambda: step.whole(align=True),
        "alone": step.extra,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 2):  # the first two warm up
        for name, work in ways.items():
            for _ in range(5 if name == "alone" else 1):
                taken = _measured(work)
                seconds[name] += [taken] if turn >= 2 else []
        print(
            f"turn {turn}: "
            f"{', '.join(f'{name} {found[-1]:.3f} s' for name, found in seconds.items() if found)}",
            file=sys.stderr,
        )
    medians = {name: 1000 * statistics.median(found) for name, found in seconds.items()}
    return medians | {"images": float(step.images), "size": float(step.size)}


if __name__ == "__main__":
    start = time.monotonic()
    code = main()
    print(f"{time.monotonic() - start:.0f} s in all", file=sys.stderr)
    raise SystemExit(code)
