"""The alignment loss and the text projection where what they give is known without a computation."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from training.config import TrainConfig
from training.losses.alignment import TextGather, Texts, alignment_loss
from training.models.heads import TextProjection

TAU = 0.2
DIM, TEXT_DIM = 5, 9


def test_perfect_alignment_of_equal_captions_costs_the_entropy_of_their_share_and_no_more() -> None:
    """Three views of one picture among distinct others: true positives are no negatives of each other."""
    text = torch.eye(4).repeat_interleave(3, 0)
    groups = torch.arange(4).repeat_interleave(3)
    own = (groups[:, None], torch.ones(12, 1))
    texts = Texts(text, groups)
    assert alignment_loss(text.clone(), texts, *own, 0.01).item() == pytest.approx(math.log(3), abs=1e-4)
    assert alignment_loss(text, texts, *own, 0.01, form="cosine").item() == pytest.approx(0, abs=1e-6)
    assert alignment_loss(text, texts, *own, 0.01, form="sigmoid", bias=-50).item() == pytest.approx(
        0, abs=1e-6
    )
    pushed = text.clone().requires_grad_()
    alignment_loss(pushed, texts, *own, 0.01).backward()
    assert pushed.grad is not None and pushed.grad.abs().max() < 1e-4, "nothing left to push"


def test_an_images_own_text_from_the_store_is_no_negative() -> None:
    image, texts = torch.eye(4)[:1], Texts(torch.eye(4)[:1], torch.tensor([0]))
    same = Texts(texts.targets_Bd.repeat(50, 1), torch.zeros(50, dtype=torch.int64))
    own, other = torch.tensor([[0]]), replace(same, groups_B=same.groups_B + 7)
    assert alignment_loss(image, texts, own, torch.ones(1, 1), TAU, negatives=same) == 0, (
        "nothing to tell apart"
    )
    told_apart = alignment_loss(image, texts, own, torch.ones(1, 1), TAU, negatives=other)
    assert told_apart > 1
    # A partner of weight 0 is none: its texts are negatives like all others.
    weightless = alignment_loss(
        image, texts, torch.tensor([[0, 7]]), torch.tensor([[1.0, 0.0]]), TAU, negatives=other
    )
    assert weightless == told_apart


def test_what_a_variant_has_no_use_for_is_refused() -> None:
    texts = Texts(torch.eye(2), torch.arange(2))
    arguments = (torch.eye(2), texts, texts.groups_B[:, None], torch.ones(2, 1), TAU)
    with pytest.raises(ValueError, match="cosine: has no negatives"):
        alignment_loss(*arguments, form="cosine", negatives=texts)
    with pytest.raises(ValueError, match="symmetric: has no bias"):
        alignment_loss(*arguments, bias=0.0)
    for wrong in ({"form": "cosine"}, {"negatives": texts}):
        with pytest.raises(ValueError, match="grading: goes with neither"):
            alignment_loss(*arguments, grading=0.1, **wrong)
    with pytest.raises(ValueError, match="2 texts, but size=1"):
        TextGather(torch.eye(2), torch.arange(2), 1)


def test_the_text_projection_starts_orthogonal_or_from_a_basis_and_keeps_empty_rows() -> None:
    raw = nn.functional.normalize(
        torch.randn(6, TEXT_DIM, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    raw[2] = 0
    random = TextProjection(TEXT_DIM, DIM)
    torch.testing.assert_close(random.weight @ random.weight.T, torch.eye(DIM))
    found = random(raw)
    torch.testing.assert_close(found.norm(dim=1), torch.tensor([1.0, 1, 0, 1, 1, 1]))
    found.sum().backward()
    assert random.weight.grad is not None and random.weight.grad.isfinite().all()
    basis = torch.linalg.qr(torch.randn(TEXT_DIM, DIM)).Q
    torch.testing.assert_close(
        TextProjection(TEXT_DIM, DIM, basis)(raw), nn.functional.normalize(raw @ basis, dim=-1)
    )
    with pytest.raises(ValueError, match=r"must be \(9, 5\)"):
        TextProjection(TEXT_DIM, DIM, basis.T)


def test_graded_positives_are_refused_where_they_mean_nothing() -> None:
    for wrong in (
        {"alignment": "cosine"},
        {"store_negatives": 8},
        {"text_projection": "learned"},
        {"similarity_temperature": 0.0},
    ):
        with pytest.raises(ValueError, match=r"positives=similar|similarity_temperature=0"):
            TrainConfig.of(store="s", positives="similar", **wrong)
