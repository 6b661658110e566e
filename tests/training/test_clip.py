"""Objective `clip`: two towers from nothing, trained, resumed, evaluated, and read by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.errors import SettingsError
from pipeline.store import Store
from tests.stores import several_captions
from training.config import EvaluateConfig, ExportConfig, TrainConfig
from training.data.texts import tokens as caption_tokens
from training.data.texts.tokens import END, START, CaptionTokens, encode, make_tokenizer, tokenizer_file
from training.engine import checkpoint, loop
from training.evaluation import findings, measures
from training.evaluation.evaluate import evaluate
from training.evaluation.measures import both_ranks
from training.export.export import describe, export
from training.losses.contrast import contrastive_loss
from training.objectives.clip import OBJECTIVE
from training.settings import flat

TINY: dict[str, Any] = {
    "objective": "clip",
    "image_size": 16,
    "patch_size": 8,
    "vision_width": 32,
    "vision_layers": 2,
    "text_width": 32,
    "text_layers": 2,
    "head_width": 16,
    "shared_width": 16,
    "context_tokens": 12,
    "vocabulary": 540,
    "epochs": 3,
    "batch_size": 12,
    "lr": 3e-3,
    "warmup_epochs": 0.0,
    "threads": 1,
    "ema": 0.5,
}


def settings(store: Path, **changes: Any) -> TrainConfig:
    config = TrainConfig.of(store=str(store), **TINY | {"caption_variant": "test"} | changes)
    return config.but(**OBJECTIVE.check(config, Store(config.store)).found)


def trained(config: TrainConfig, folder: Path, resume_from: str | None = None) -> list[dict[str, float]]:
    folder.mkdir(exist_ok=True)

    def report(metrics: Any, take: Callable[[], checkpoint.Snapshot]) -> None:
        snapshot = take()
        snapshot.write(str(folder / f"checkpoint_{snapshot.content['step']}"))

    (folder / "config.json").write_text(json.dumps(flat(config)))
    return loop.fit(config, torch.device("cpu"), 0, resume_from, report)


def test_the_tokenizer_is_clips_reads_anything_and_is_the_same_each_time() -> None:
    captions = [f"a small red circle above a blue square, number {n}." for n in range(50)]
    text = make_tokenizer(iter(captions), 600)
    assert text == make_tokenizer(iter(captions), 600)
    model = json.loads(text)["model"]
    assert 514 < len(model["vocab"]) <= 600 and {START, END} <= model["vocab"].keys()
    pairs = [(pair[0], pair[1]) for pair in model["merges"]]
    words = caption_tokens.as_transformers(model["vocab"], pairs)
    for said in ("a red circle.", "  A Red  circle.", "größe 日本 it's 42", ""):
        ids = words(said)["input_ids"]
        assert encode(words.backend_tokenizer, [said], 40)[0, : len(ids)].tolist() == ids
        assert (ids[0], ids[-1]) == (model["vocab"][START], model["vocab"][END])
        assert (
            words.decode(ids, skip_special_tokens=True).split()
            == said.lower().replace(".", " .").replace("'s", " 's").replace("42", "4 2").split()
        )
    cut = encode(words.backend_tokenizer, ["red " * 60], 8)[0]
    assert cut[-1] == model["vocab"][END] and (cut[1:-1] == cut[1]).all()


def test_the_store_keeps_the_tokenizer_and_a_run_keeps_its_own(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    store = Store(str(make_store(tmp_path / "store", missing_captions=2)))
    file, digest = tokenizer_file(store, "test", "train", 600)
    assert tokenizer_file(store, "test", "train", 600) == (file, digest)
    assert tokenizer_file(store, "test", "train", 700) != (file, digest)
    store.write_file("captions/test/tokenizer-before.json", b"{}")
    assert tokenizer_file(store, "test", "train", 600, "before")[1] == "before"
    with pytest.raises(SettingsError, match="its captions are others than when the run began"):
        tokenizer_file(store, "test", "train", 600, "gone")
    ids = store.read_shard("images", "", 0, ["id"])["id"]
    found = CaptionTokens(variant="test", file=file, several=1, longest=12).read(store, 0, ids)
    groups = found["caption_groups"][:, 0]
    assert found["caption_ids"].shape == (10, 1, 12) and (groups[:2] == -1).all() and (groups[2:] >= 0).all()
    texts = store.read_shard("captions", "test", 0, ["caption"])["caption"].to_pylist()[2:]
    full = max(int((ids != ids[-1]).sum()) + 1 for ids in found["caption_ids"][2:, 0])
    assert caption_tokens.cut(store, "test", 0, file, full) == (0, 8)
    assert caption_tokens.cut(store, "test", 0, file, 3) == (8, 8), "start, a token, end"
    assert len(set(groups[2:].tolist())) == len(set(texts))


def reference(images: Tensor, texts: Tensor, groups: Tensor, scale: Tensor) -> Tensor:
    """By loops, as figure 3 of the paper, with the mass of a row shared by equal captions."""
    pairs = [n for n in range(len(groups)) if groups[n] >= 0]
    total = torch.zeros((), dtype=images.dtype)
    for rows, columns in ((images, texts), (texts, images)):
        for n in pairs:
            logits = torch.stack([scale * rows[n] @ columns[m] for m in pairs])
            own = torch.tensor([bool(groups[m] == groups[n]) for m in pairs])
            total = total - (logits - logits.logsumexp(0))[own].mean()
    return total / (2 * len(pairs))


def test_the_loss_is_the_papers_and_equal_captions_are_positives() -> None:
    torch.manual_seed(0)
    images, texts = (normalize(torch.randn(7, 5), dim=-1).requires_grad_() for _ in range(2))
    groups, scale = torch.tensor([4, 2, 4, -1, 9, 2, 1]), torch.tensor(7.0, requires_grad=True)
    given = (images, texts, scale)
    ours, theirs = contrastive_loss(images, texts, groups, scale), reference(images, texts, groups, scale)
    torch.testing.assert_close(ours, theirs)
    for mine, his in zip(torch.autograd.grad(ours, given), torch.autograd.grad(theirs, given), strict=True):
        torch.testing.assert_close(mine, his)
    none = contrastive_loss(images, texts, torch.full((7,), -1), scale)
    assert float(none.detach()) == 0 and all(bool((g == 0).all()) for g in torch.autograd.grad(none, given))


def test_ranks_of_both_ways_are_those_of_loops() -> None:
    torch.manual_seed(1)
    groups = torch.tensor([3, 1, 3, -1, 5, 1, 7, 8])
    images = normalize(torch.randn(8, 4), dim=-1)
    of_group = {int(group): normalize(torch.randn(4), dim=0) for group in groups.unique()}
    texts = torch.stack([of_group[int(group)] for group in groups])
    of_images, of_texts = both_ranks(images, texts, groups)
    different = [1, 3, 5, 7, 8]
    wanted = []
    for image, group in zip(images, groups.tolist(), strict=True):
        if group >= 0:
            order = sorted(different, key=lambda one, image=image: -float(image @ of_group[one]))  # type: ignore[misc]
            wanted.append(order.index(group) + 1)
    assert of_images.tolist() == wanted
    for group, rank in zip(different, of_texts.tolist(), strict=True):
        best = max(float(images[n] @ of_group[group]) for n in range(8) if groups[n] == group)
        others = [n for n in range(8) if groups[n] not in (-1, group)]
        assert rank == 1 + sum(float(images[n] @ of_group[group]) > best for n in others)
    assert [len(each) for each in both_ranks(images, texts, torch.full((8,), -1))] == [0, 0]
    same = both_ranks(torch.ones(3, 4), torch.ones(3, 4), torch.arange(3))
    assert [each.tolist() for each in same] == [[3, 3, 3], [3, 3, 3]], "ties count against it"


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_learns_and_goes_on_bit_for_bit(
    tmp_path: Path, make_store: Callable[..., Path], accumulate: int
) -> None:
    folder = make_store(tmp_path / "store", missing_captions=3)
    several_captions(Store(str(folder)))
    config = settings(folder, accumulate=accumulate, epochs=6, caption_variant="several")
    straight = trained(config, tmp_path / "straight")
    assert straight[-1]["loss"] < straight[0]["loss"]
    assert {"retrieval_recall1", "image_to_text_recall1", "ema_retrieval_rank"} <= straight[-1].keys()
    assert not {"top1", "cross_entropy"} & straight[-1].keys(), "nothing of labels"
    trained(config, tmp_path / "resumed", str(tmp_path / "straight" / "checkpoint_4"))
    ends = [
        load_file(tmp_path / each / "checkpoint_12" / "model.safetensors") for each in ("straight", "resumed")
    ]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_parts_take_the_step_of_the_whole(tmp_path: Path, make_store: Callable[..., Path]) -> None:
    folder = make_store(tmp_path / "store", missing_captions=3)
    ends = []
    for parts in (1, 3):
        config = settings(folder, accumulate=parts, optimizer="momentum", lr=0.1, epochs=2)
        history = trained(config, tmp_path / str(parts))
        ends.append((load_file(tmp_path / str(parts) / "checkpoint_4" / "model.safetensors"), history))
    for name, value in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert ends[0][1][-1]["loss"] == pytest.approx(ends[1][1][-1]["loss"], rel=1e-4)


def test_evaluate_tells_and_export_is_a_clip_of_transformers(
    tmp_path: Path, make_store: Callable[..., Path]
) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    from pipeline.encoders import models, vision
    from training.models import frozen_clip

    config = settings(make_store(tmp_path / "store"))
    history = trained(config, tmp_path / "run")
    run = str(tmp_path / "run")
    judgement = evaluate(EvaluateConfig(run=run, class_prompts=("a {label}",)))
    told = {each["name"]: each["value"] for each in judgement.summary["findings"]}
    assert told.keys() == {"image to text R@1", "text to image R@1", "zero-shot top-1"}
    assert told["image to text R@1"] == pytest.approx(history[-1]["ema_image_to_text_recall1"])
    assert "image to text R@1" in findings.table(judgement.summary)
    base = evaluate(EvaluateConfig(run=run, class_half="base", class_prompts=("a {label}",)))
    assert base.outputs is not None and set(base.outputs.predicted) <= {0, 1}, "of three classes"
    assert base.summary["findings"][-1]["value"] >= told["zero-shot top-1"] - 100 / 3
    with pytest.raises(SettingsError, match="clip is judged on"):
        evaluate(EvaluateConfig(run=run, store=str(tmp_path / "store")))
    said = export(ExportConfig(run=run, to=str(tmp_path / "model")))
    assert "CLIP 16 x 16" in describe(said) and "tokenizer.json" in said["files"]
    folder = tmp_path / "model"
    model: Any = CLIPModel.from_pretrained(folder)
    weights = load_file(tmp_path / "run" / "checkpoint_6" / "ema.safetensors")
    assert all(torch.equal(v, weights[f"backbone.model.{k}"]) for k, v in model.state_dict().items())
    words, pictures = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    seen = pictures([np.zeros((20, 30, 3), np.uint8)], return_tensors="pt")
    made = words(["class 1", "a much longer caption"], padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        assert model(**seen, **made).logits_per_image.shape == (1, 2)
    ref = models.resolve(str(folder))
    assert vision.describe(ref).grid == 2, "a teacher of mvp"
    clip = frozen_clip.load(ref)
    assert (clip.size, clip.width, clip.words.longest) == (16, 16, 12), "and one for prompts"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"patch_size": 0}, "must divide --image-size 16"),
        ({"image_size": 20}, "must be a multiple of --patch-size 8"),
        ({"vision_width": 40}, "vision_width=40: must be a multiple of --head-width 16"),
        ({"vocabulary": 100}, "vocabulary=100: must be at least 515"),
        ({"mixup": 0.2}, "mixup, cutmix: a mixture of pictures has no caption"),
        ({"label_smoothing": 0.1}, "label_smoothing: are of classifiers"),
        ({"layer_decay": 0.5}, "layer_decay: both towers start from nothing"),
        ({"init_from": "x"}, "init_from: is for models of timm"),
        ({"zero_shot_templates": ("no label",)}, r"must hold \{label\}"),
        ({"caption_variant": "none"}, "none"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(
    tmp_path: Path, make_store: Callable[..., Path], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        settings(make_store(tmp_path / "store"), **changes)


def test_measures_of_one_page_agree(tmp_path: Path) -> None:
    """With one picture a caption, a picture's rank is the one of `caption_ranks`."""
    torch.manual_seed(2)
    images, texts = (normalize(torch.randn(9, 4), dim=-1) for _ in range(2))
    of_images, _ = both_ranks(images, texts, torch.arange(9))
    assert of_images.tolist() == measures.caption_ranks(images.numpy(), texts.numpy(), np.arange(9)).tolist()


def test_the_shipped_clip_is_small_safe_and_knows_what_it_sees(tmp_path: Path) -> None:
    """Freshly drawn scenes, two of each kind; chance is 4 %."""
    import subprocess
    import sys

    root = Path(__file__).resolve().parent.parent.parent
    folder = root / "examples" / "scenes" / "clip"
    files = list(folder.iterdir())
    assert sum(path.stat().st_size for path in files) <= 6_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    code = (
        f"import sys; sys.path.insert(0, {str(folder.parent)!r})\n"
        "from pathlib import Path; from train_clip import exam; import json\n"
        f"print(json.dumps(exam(Path({str(folder)!r}), Path({str(tmp_path)!r}), 0, 2)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["scenes"] == 56 and found["zero-shot top-1, 28 kinds"] > 50
    assert found["image to text R@1"] > 80 and found["text to image R@1"] > 80
