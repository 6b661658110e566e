"""The alignment loss against explicit float64 sums, forward and backward, in one process and in several."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.data.mixing import Mixing, text_targets
from training.data.texts.targets import Targets
from training.losses.alignment import Form, TextGather, Texts, alignment_loss
from training.models.heads import TextProjection

TAU, BIAS = 0.2, -2.0
FEATURES, DIM, TEXT_DIM = 7, 5, 9
FORMS: tuple[Form, ...] = ("symmetric", "image-to-text", "sigmoid", "cosine")
CONTENTS = (
    "plain",
    "repeated",
    "duplicates",
    "missing",
    "one-sided",
    "none",
    "mixup",
    "cutmix",
    "pca",
    "projected",
    "negatives",
    "everything",
    "10",
    "3",
)


@dataclass(frozen=True)
class Case:
    """A form on some content; temperature and bias are learned unless `fixed`."""

    form: Form
    content: str
    fixed: bool = False
    grading: float | None = None

    def __str__(self) -> str:
        graded = f"-graded{self.grading}" if self.grading else ""
        return f"{self.form}-{self.content}{'-fixed' if self.fixed else ''}{graded}"


CASES = [Case(v, c) for v in FORMS for c in CONTENTS if (v, c) != ("cosine", "negatives")]
CASES += [Case(v, "everything", fixed=True) for v in FORMS if v != "cosine"]
CASES += [
    Case(v, content, grading=0.3)
    for v in FORMS
    if v != "cosine"
    for content in ("plain", "duplicates", "one-sided", "none", "mixup", "10", "3")
]


@dataclass(frozen=True)
class Batch:
    """The joint batch of a case: features of images, texts and targets, all in float64."""

    features: Tensor
    texts: Texts
    targets: Tensor
    weights: Tensor
    negatives: Texts | None

    def part(self, rank: int, world: int) -> Batch:
        """One process's share of images; texts as they are before they are gathered."""
        mine = torch.arange(len(self.features)).tensor_split(world)[rank]
        texts = Texts(self.texts.targets_Bd[mine], self.texts.groups_B[mine])
        return replace(
            self,
            features=self.features[mine],
            texts=texts,
            targets=self.targets[mine],
            weights=self.weights[mine],
        )


def batch_of(case: Case) -> Batch:
    name, everything = case.content, case.content == "everything"
    count = int(name) if name.isdigit() else 12
    generator = torch.Generator().manual_seed(7)
    number = torch.arange(count)
    groups = number
    if name == "repeated":
        groups = number % 4  # three views of each picture, on different processes
    if name in ("duplicates", "10", "3") or everything:
        groups = torch.where(number % 5 == 0, 0, number)  # some captions are the same
    if name in ("missing", "10") or everything:
        groups = torch.where(number % 4 == 1, -1, groups)
    if name == "one-sided":
        groups = torch.where(number < 6, -1, groups)  # processes without any text
    if name == "none":
        groups = torch.full_like(groups, -1)
    width = TEXT_DIM if name in ("pca", "projected") or everything else DIM
    every = nn.functional.normalize(torch.randn(30, width, generator=generator, dtype=torch.float64), dim=-1)
    if name == "pca":
        every = reduced(every)

    def texts(groups: Tensor) -> Texts:
        return Texts(torch.where(groups[:, None] >= 0, every[groups.clamp_min(0)], 0), groups)

    targets, weights = text_targets(groups)
    if name in ("mixup", "cutmix") or everything:
        mixing = Mixing(cutmix=1.0, mode="elem") if name == "cutmix" else Mixing(mixup=0.8, mode="elem")
        # Mixed by threes, so that partners are on one process whether there are 1, 2 or 4.
        parts = []
        for place, mine in enumerate(groups.split(3)):
            _, partner, share = mixing(torch.rand(len(mine), 3, 16, 16), (place,))
            parts.append(text_targets(mine, partner, share))
        targets, weights = (torch.cat(column) for column in zip(*parts, strict=True))
    negatives = None
    if case.form != "cosine" and (name == "negatives" or everything):
        # Of the batch, new, none at all, twice the same.
        negatives = texts(torch.tensor([0, 20, 3, -1, 21, 20, 7]))
    features = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64)
    return Batch(features, texts(groups), targets, weights.double(), negatives)


def reduced(vectors: Tensor) -> Tensor:
    """Texts reduced to DIM by PCA as training reads them from a store."""
    mean = vectors.mean(0)
    _, basis = torch.linalg.eigh((vectors - mean).T @ (vectors - mean))
    found = Targets(embeddings="e", captions="c", dim=DIM, mean=mean.numpy(), basis=basis.numpy()[:, -DIM:])
    narrow = torch.from_numpy(found.project(vectors.numpy())).double()
    assert narrow.shape == (len(vectors), DIM) and np.allclose(narrow.norm(dim=1), 1, atol=1e-6)
    return narrow


class Model(nn.Module):
    """What learns through the loss: an image head, and if wanted a projection of texts, temperature and
    bias."""

    def __init__(self, case: Case, text_dim: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.form, self.grading = case.form, case.grading
        self.head = nn.Linear(FEATURES, DIM, bias=False)
        self.text = TextProjection(TEXT_DIM, DIM) if text_dim != DIM else None
        # DDP waits for parameters that nothing uses, so there are none.
        self.log_tau = (
            nn.Parameter(torch.tensor(TAU).log()) if not case.fixed and case.form != "cosine" else None
        )
        self.bias = nn.Parameter(torch.tensor(BIAS)) if not case.fixed and case.form == "sigmoid" else None
        self.double()

    def tau(self) -> Tensor | float:
        return TAU if self.log_tau is None else self.log_tau.exp()

    def offset(self) -> Tensor | float | None:
        return self.bias if self.bias is not None else BIAS if self.form == "sigmoid" else None

    def forward(
        self, features: Tensor, texts: Texts, targets: Tensor, weights: Tensor, negatives: Texts | None
    ) -> Tensor:
        if self.text is not None:
            texts = replace(texts, targets_Bd=self.text(texts.targets_Bd))
            negatives = negatives and replace(negatives, targets_Bd=self.text(negatives.targets_Bd))
        z = nn.functional.normalize(self.head(features), dim=-1)
        return alignment_loss(
            z,
            texts,
            targets,
            weights,
            self.tau(),
            form=self.form,
            negatives=negatives,
            bias=self.offset(),
            grading=self.grading,
        )


def explicit(model: Model, features: Tensor, batch: Batch) -> Tensor:
    """The loss by loops over single images and texts, straight from the definitions."""
    image = [model.head.weight @ row / (model.head.weight @ row).norm() for row in features]

    def vector(raw: Tensor) -> Tensor:
        narrow = raw if model.text is None else model.text.weight @ raw
        return narrow / narrow.norm()

    text = {
        j: vector(batch.texts.targets_Bd[j]) for j in range(len(features)) if batch.texts.groups_B[j] >= 0
    }
    group = batch.texts.groups_B.tolist()
    tau, bias = model.tau(), model.offset() or 0.0
    logit = {(i, j): image[i] @ text[j] / tau + bias for i in range(len(image)) for j in text}
    # The weight of each of an image's groups, of those that have a text.
    aims: list[dict[int, float]] = []
    for targets, weights in zip(batch.targets.tolist(), batch.weights.tolist(), strict=True):
        found: dict[int, float] = {}
        for g, w in zip(targets, weights, strict=True):
            if g in [group[j] for j in text] and w > 0:
                found[g] = found.get(g, 0) + w
        aims.append({g: w / sum(found.values()) for g, w in found.items()})
    pull = {(i, j): aims[i].get(group[j], 0.0) for i in range(len(image)) for j in text}
    if model.grading is not None:
        own = {g: text[group.index(g)] for g in group if g >= 0}
        near = {(g, j): math.exp((own[g] @ text[j] - 1) / model.grading) for g in own for j in text}
        if model.form != "sigmoid":
            near = {(g, j): value / sum(near[g, k] for k in text) for (g, j), value in near.items()}
        pull = {(i, j): sum(w * near[g, j] for g, w in aims[i].items()) for i, j in pull}
    images = [i for i in range(len(image)) if aims[i]]
    zero = 0 * features.sum()
    if not images:
        return zero
    mass = {
        (i, j): pull[i, j] / (group.count(group[j]) if model.grading is None else 1)
        for i in images
        for j in text
    }
    further: dict[int, list[Tensor]] = {i: [] for i in images}
    if batch.negatives is not None:
        for raw, g in zip(batch.negatives.targets_Bd, batch.negatives.groups_B.tolist(), strict=True):
            for i in images:
                # A text of a group of weight 0 is nobody's target; one of a group without a text in the batch
                # still is a target.
                own = [
                    t
                    for t, w in zip(batch.targets[i].tolist(), batch.weights[i].tolist(), strict=True)
                    if w > 0
                ]
                if g >= 0 and g not in own:
                    further[i].append(image[i] @ vector(raw) / tau + bias)

    def logsumexp(values: list[Tensor]) -> Tensor:
        return sum((value.exp() for value in values), start=zero).log()

    loss = zero
    if model.form == "cosine":
        for i in images:
            loss = loss + sum(mass[i, j] * (2 - 2 * image[i] @ text[j]) for j in text) / len(images)
        return loss
    if model.form == "sigmoid":
        for i in images:
            for j in text:
                q = pull[i, j]
                p = 1 / (1 + torch.exp(-logit[i, j]))
                loss = loss - (q * p.log() + (1 - q) * (1 - p).log()) / len(images)
            for value in further[i]:
                loss = loss - (1 - 1 / (1 + torch.exp(-value))).log() / len(images)
        return loss
    share = 0.5 if model.form == "symmetric" else 1.0
    for i in images:
        whole = logsumexp([logit[i, j] for j in text] + further[i])
        loss = loss + share * sum(mass[i, j] * (whole - logit[i, j]) for j in text) / len(images)
    if model.form == "symmetric":
        aimed = [j for j in text if sum(mass[i, j] for i in images) > 0]
        for j in aimed:
            whole, column = logsumexp([logit[i, j] for i in images]), sum(mass[i, j] for i in images)
            loss = loss + share * sum(mass[i, j] / column * (whole - logit[i, j]) for i in images) / len(
                aimed
            )
    return loss


Found = dict[str, Tensor]


def gradients(model: nn.Module, loss: Tensor, features: Tensor) -> Found:
    loss.backward()
    assert features.grad is not None
    named = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}
    assert None not in named.values()
    return {"loss": loss.detach(), "features": features.grad, **named}  # type: ignore[dict-item]


@functools.cache
def expected(case: Case) -> Found:
    batch = batch_of(case)
    features = batch.features.clone().requires_grad_()
    model = Model(case, batch.texts.targets_Bd.shape[1])
    loss = explicit(model, features, batch)
    if not loss:  # nothing takes part: no gradient either
        loss = loss + sum(0 * parameter.sum() for parameter in model.parameters())
    return gradients(model, loss, features)


def compare(found: Found, case: Case) -> None:
    assert found.keys() == expected(case).keys()
    for name, value in expected(case).items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-9, atol=1e-12, msg=lambda text, n=name: f"{case}, {n}: {text}"
        )
        assert found[name].isfinite().all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_process_equals_the_explicit_sums(case: Case) -> None:
    batch = batch_of(case)
    features = batch.features.clone().requires_grad_()
    model = Model(case, batch.texts.targets_Bd.shape[1])
    loss = model(features, batch.texts, batch.targets, batch.weights, batch.negatives)
    found = gradients(model, loss, features)
    compare(found, case)
    if case.content != "none":
        assert all(value.abs().max() > 1e-4 for value in found.values()), "everything learns"


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world
    )
    results: dict[str, Found] = {}
    for case in CASES:
        batch = batch_of(case)
        mine, count = batch.part(rank, world), len(batch.features)
        features = mine.features.clone().requires_grad_()
        model = DistributedDataParallel(Model(case, batch.texts.targets_Bd.shape[1]))
        size = math.ceil(count / world) if count % world else None
        gather = TextGather(mine.texts.targets_Bd, mine.texts.groups_B, size)
        loss = model(features, gather.wait(), mine.targets, mine.weights, batch.negatives)
        results[str(case)] = gradients(model, loss, features)
        results[str(case)]["features"] /= world  # as DDP does for all that is shared
    torch.save(results, f"{folder}/rank-{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_have_the_gradient_of_one_on_the_joint_batch(world: int, tmp_path: Path) -> None:
    """DDP's gradients of all parameters, and each image's own; 10 and 3 images do not divide by 4, and leave
    a process empty."""
    mp.spawn(_rank, args=(world, str(tmp_path)), nprocs=world, join=True)
    ranks = [torch.load(tmp_path / f"rank-{world}-{rank}.pt", weights_only=True) for rank in range(world)]
    for case in CASES:
        joint = torch.cat([rank[str(case)]["features"] for rank in ranks])
        for rank in ranks:
            compare(rank[str(case)] | {"features": joint}, case)
            assert torch.equal(rank[str(case)]["loss"], ranks[0][str(case)]["loss"])


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_is_float32_under_autocast_and_in_half_precision(form: Form) -> None:
    batch = batch_of(Case(form, "duplicates"))
    image = nn.functional.normalize(batch.features[:, :DIM], dim=-1).bfloat16()
    texts = Texts(batch.texts.targets_Bd.float(), batch.texts.groups_B)
    with torch.autocast("cpu", torch.bfloat16):
        found = alignment_loss(image, texts, batch.targets, batch.weights, TAU, form=form)
        projected = TextProjection(DIM, 3)(texts.targets_Bd)
    exact = alignment_loss(image.double(), texts, batch.targets, batch.weights, TAU, form=form)
    assert found.dtype == projected.dtype == torch.float32 and exact.dtype == torch.float64
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def test_graded_positives_lie_between_the_own_text_alone_and_all_alike() -> None:
    batch = batch_of(Case("symmetric", "plain"))
    image = nn.functional.normalize(batch.features[:, :DIM], dim=-1)
    own = (batch.targets, batch.weights, TAU)
    sharp, flat = (alignment_loss(image, batch.texts, *own, grading=at) for at in (1e-3, 1e3))
    torch.testing.assert_close(sharp, alignment_loss(image, batch.texts, *own))
    alike = replace(batch.texts, groups_B=0 * batch.texts.groups_B)
    torch.testing.assert_close(
        flat, alignment_loss(image, alike, 0 * batch.targets, *own[1:]), rtol=1e-3, atol=0
    )
