"""The alignment loss against explicit float64 sums, forward and backward, in one process and in several."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from training.losses import TextGather, Texts, alignment_loss


def reference(image: Tensor, text: Tensor, groups: Tensor, targets: Tensor, weights: Tensor, tau: Tensor) -> Tensor:
    """Symmetric InfoNCE by loops, straight from the definition; -1 marks rows without a text."""
    count = len(image)
    s = [[(image[i] * text[j]).sum() / tau for j in range(count)] for i in range(count)]
    texts = [j for j in range(count) if groups[j] >= 0]
    mass = [[0.0] * count for _ in range(count)]
    for i in range(count):
        for k in range(targets.shape[1]):
            same = [j for j in texts if targets[i, k] == groups[j]]
            for j in same:
                mass[i][j] += float(weights[i, k]) / len(same)
        total = sum(mass[i])
        mass[i] = [m / total for m in mass[i]] if total else mass[i]
    images = [i for i in range(count) if sum(mass[i]) > 0]
    loss = image.new_zeros(())
    for i in images:
        lse = torch.log(sum((torch.exp(s[i][j]) for j in texts), start=image.new_zeros(())))
        loss = loss + sum(mass[i][j] * (lse - s[i][j]) for j in texts) / len(images) / 2
    aimed = [j for j in texts if sum(mass[i][j] for i in images) > 0]
    for j in aimed:
        lse = torch.log(sum((torch.exp(s[i][j]) for i in images), start=image.new_zeros(())))
        column = sum(mass[i][j] for i in images)
        loss = loss + sum(mass[i][j] / column * (lse - s[i][j]) for i in images) / len(aimed) / 2
    return loss


def case(name: str, count: int = 12, dim: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    image, text = (torch.randn(count, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    groups = torch.arange(count)
    if name in ("duplicates", "everything"):
        groups = groups % 5  # the same captions on several ranks
    if name in ("missing", "everything"):
        groups = torch.where(torch.arange(count) % 4 == 1, -1, groups)
    text = torch.nn.functional.normalize(text, dim=-1)
    text = torch.stack([text[int(group)] if group >= 0 else torch.zeros(dim, dtype=torch.float64) for group in groups])
    targets, weights = groups[:, None], torch.ones(count, 1, dtype=torch.float64)
    if name in ("mixup", "everything"):
        # Partners within quarters of the batch, so that they are local with 1, 2 and 4 processes.
        partner = torch.cat([torch.arange(start, start + 3).roll(1) for start in range(0, count, 3)])
        share = 0.3 + 0.4 * torch.rand(count, 1, generator=generator, dtype=torch.float64)
        targets, weights = torch.stack([groups, groups[partner]], 1), torch.cat([share, 1 - share], 1)
    return {"image": image, "text": text, "groups": groups, "targets": targets, "weights": weights}


CASES = ("plain", "duplicates", "missing", "mixup", "everything")


def reference_gradients(parts: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    raw = parts["image"].clone().requires_grad_()
    log_tau = torch.tensor(math.log(0.2), dtype=torch.float64, requires_grad=True)
    unit = torch.nn.functional.normalize(raw, dim=-1)
    loss = reference(unit, parts["text"], parts["groups"], parts["targets"], parts["weights"], log_tau.exp())
    loss.backward()
    assert raw.grad is not None and log_tau.grad is not None
    return loss.detach(), raw.grad, log_tau.grad


@pytest.mark.parametrize("name", CASES)
def test_one_process_equals_the_explicit_sums(name: str) -> None:
    parts = case(name)
    loss, gradient, tau_gradient = reference_gradients(parts)
    raw = parts["image"].clone().requires_grad_()
    log_tau = torch.tensor(math.log(0.2), dtype=torch.float64, requires_grad=True)
    unit = torch.nn.functional.normalize(raw, dim=-1)
    found = alignment_loss(unit, Texts(parts["text"], parts["groups"]), parts["targets"], parts["weights"], log_tau.exp())
    found.backward()
    torch.testing.assert_close(found.detach(), loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(raw.grad, gradient, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(log_tau.grad, tau_gradient, rtol=1e-10, atol=1e-14)


def _rank(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world)
    results: dict[str, Any] = {}
    for name in CASES:
        parts = case(name)
        size = len(parts["image"]) // world
        mine = slice(rank * size, (rank + 1) * size)
        raw = parts["image"][mine].clone().requires_grad_()
        log_tau = torch.tensor(math.log(0.2), dtype=torch.float64, requires_grad=True)
        gather = TextGather(parts["text"][mine], parts["groups"][mine])
        unit = torch.nn.functional.normalize(raw, dim=-1)
        loss = alignment_loss(unit, gather.wait(), parts["targets"][mine], parts["weights"][mine], log_tau.exp())
        loss.backward()
        assert log_tau.grad is not None and raw.grad is not None
        shared = log_tau.grad.clone()
        dist.all_reduce(shared)
        # What DDP does with the gradient of a shared parameter, and with what comes through an image's own feature.
        results[name] = {"loss": loss.detach(), "image": raw.grad / world, "tau": shared / world}
    torch.save(results, f"{folder}/rank-{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_have_the_gradient_of_one_on_the_joint_batch(world: int, tmp_path: Path) -> None:
    mp.spawn(_rank, args=(world, str(tmp_path)), nprocs=world, join=True)
    ranks = [torch.load(tmp_path / f"rank-{world}-{rank}.pt", weights_only=True) for rank in range(world)]
    for name in CASES:
        loss, gradient, tau_gradient = reference_gradients(case(name))
        joint = torch.cat([rank[name]["image"] for rank in ranks])
        torch.testing.assert_close(joint, gradient, rtol=1e-6, atol=1e-13)
        for rank in ranks:
            torch.testing.assert_close(rank[name]["loss"], loss, rtol=1e-10, atol=0)
            torch.testing.assert_close(rank[name]["tau"], tau_gradient, rtol=1e-6, atol=1e-13)


def test_the_loss_is_float32_under_autocast_and_in_half_precision() -> None:
    parts = case("plain")
    image = torch.nn.functional.normalize(parts["image"], dim=-1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = alignment_loss(image, Texts(parts["text"].float(), parts["groups"]), parts["targets"], parts["weights"], 0.2)
    assert found.dtype == torch.float32


def test_perfect_alignment_of_equal_captions_costs_the_entropy_of_their_share_and_no_more() -> None:
    """Three views of one picture among distinct others: true positives are no negatives of each other."""
    text = torch.eye(4).repeat_interleave(3, 0)
    groups = torch.arange(4).repeat_interleave(3)
    loss = alignment_loss(text.clone(), Texts(text, groups), groups[:, None], torch.ones(12, 1), 0.01)
    assert loss.item() == pytest.approx(math.log(3), abs=1e-4)
    pushed = text.clone().requires_grad_()
    alignment_loss(pushed, Texts(text, groups), groups[:, None], torch.ones(12, 1), 0.01).backward()
    assert pushed.grad is not None and pushed.grad.abs().max() < 1e-4, "nothing left to push"
