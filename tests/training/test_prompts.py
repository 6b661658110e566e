"""Learned prompts against transformers' own text tower, whole and one picture at a time: the same numbers and
gradients, whatever is shared, cut off, or computed in chunks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel

from pipeline.encoders.cut import Cut
from pipeline.errors import SettingsError
from tests import towers
from training.models import frozen_clip
from training.models.frozen_clip import FrozenClip, Words
from training.models.prompts import PromptedClip, PromptSettings, zero_shot

NAMES = ["red ball", "blue", "big green old box", "small"]
WORDS = "a photo of a"


class Tokenizer:
    """Words to numbers from 10 on; 98 and 99 around them."""

    all_special_ids = (98, 99)

    def __len__(self) -> int:
        return 100

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [10 + sum(map(ord, word)) % 80 for word in re.findall(r"\w+|\.", text)]
        return {"input_ids": [98, *ids, 99] if add_special_tokens else ids}


def clip_of(text: int = 32, space: int = 32, layers: int = 3, **more: Any) -> FrozenClip:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": layers, "num_attention_heads": 4}
    words = {"vocab_size": 100, "max_position_embeddings": 24, "bos_token_id": 98, "eos_token_id": 99, **more}
    config = CLIPConfig(
        text_config={**sizes, **words, "hidden_size": text, "intermediate_size": 4 * text},
        vision_config={
            **sizes,
            "hidden_size": 32,
            "intermediate_size": 64,
            "image_size": 32,
            "patch_size": 8,
        },
        projection_dim=space,
        initializer_factor=2.0,
    )
    longest = config.text_config.max_position_embeddings
    return FrozenClip(
        model=CLIPModel(config).eval(),
        words=Words.of(Tokenizer(), longest),
        pictures={"input_size": (3, 32, 32)},
        cut=Cut(size=32, resize=32, interpolation="bicubic", rounds=False),
    )


def whole(clip: FrozenClip, prompts: list[str]) -> Tensor:
    """[c, D] by transformers, each prompt by itself."""
    ids = [torch.tensor([Tokenizer()(prompt)["input_ids"]]) for prompt in prompts]
    found = torch.cat([clip.model.get_text_features(each).pooler_output for each in ids])
    return functional.normalize(found, dim=-1)


@pytest.mark.parametrize("of_class", [False, True])
@pytest.mark.parametrize(
    ("position", "form"),
    [("end", "a photo of a {}."), ("middle", "a photo {} of a."), ("front", "{} a photo of a.")],
)
def test_prompts_of_words_are_those_of_the_whole_tower(position: Any, form: str, of_class: bool) -> None:
    clip = clip_of()
    wanted = whole(clip, [form.format(name) for name in NAMES])
    for at_once in (2, 100):
        settings = PromptSettings(
            length=4, words=WORDS, position=position, of_class=of_class, at_once=at_once
        )
        model = PromptedClip(clip, NAMES, settings)
        torch.testing.assert_close(model.class_embeddings()[0], wanted, atol=1e-6, rtol=1e-5)
        assert list(model.state_dict()) == ["context"]


def test_an_ensemble_of_prompts_is_the_mean_of_its_own() -> None:
    clip = clip_of()
    forms = ("a photo of a {label}.", "{label} old.")
    each = torch.stack([whole(clip, [form.format(label=name) for name in NAMES]) for form in forms])
    torch.testing.assert_close(zero_shot(clip, NAMES, forms), functional.normalize(each.mean(0), dim=-1))


def plainly(model: PromptedClip, clip: FrozenClip, features: Tensor) -> Tensor:
    """[b, c] CoCoOp's logits as its paper has them: all prompts whole, picture by picture."""
    tower, rows = clip.model.text_model, []
    table = tower.embeddings.token_embedding
    for seen in features:
        context = model.context + model.generator(seen)  # type: ignore[misc]
        texts = []
        for name in NAMES:
            tokens = Tokenizer()(f"{name}.", add_special_tokens=False)["input_ids"]
            own = [table(torch.tensor([98])), context, table(torch.tensor([*tokens, 99]))]
            padding = table(torch.zeros(24 - sum(map(len, own)), dtype=torch.long))
            hidden = tower.embeddings(inputs_embeds=torch.cat([*own, padding])[None])
            mask = torch.full((24, 24), -torch.inf).triu(1)[None, None]
            hidden = tower.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state
            hidden = tower.final_layer_norm(hidden)[0, sum(map(len, own)) - 1]
            texts.append(functional.normalize(clip.model.text_projection(hidden), dim=-1))
        rows.append(clip.model.logit_scale.exp() * torch.stack(texts) @ seen)
    return torch.stack(rows)


@pytest.mark.parametrize("at_once", [1, 3, 8, 1000])
def test_in_batches_and_chunks_it_is_the_plain_form_with_its_gradients(at_once: int) -> None:
    clip = clip_of()
    torch.manual_seed(1)
    model = PromptedClip(clip, NAMES, PromptSettings(length=3, conditioned=True, at_once=at_once))
    features = functional.normalize(torch.randn(5, 32), dim=-1)
    labels = torch.tensor([0, 3, 1, 2, 2])
    found: list[list[Tensor]] = []
    for logits in (plainly(model, clip, features), model.logits(features)):
        loss = functional.cross_entropy(logits, labels)
        found.append([logits, loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert len(found[0]) == 7  # context, and two layers of the generator
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_under_autocast_logits_stay_those_of_single_precision() -> None:
    clip = clip_of()
    torch.nn.init.constant_(clip.model.logit_scale, 4.6)  # CLIP's bound: a factor of a hundred
    model = PromptedClip(clip, NAMES, PromptSettings(length=2))
    embeddings, features = model.class_embeddings(), functional.normalize(torch.randn(8, 32), dim=-1)
    exact = model.logits(features, embeddings)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.logits(features, embeddings), exact)


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_prompts() -> None:
    clip = clip_of()

    def kept(names: int, at_once: int) -> int:
        model = PromptedClip(clip, NAMES * names, PromptSettings(length=3, conditioned=True, at_once=at_once))
        features, bytes_ = functional.normalize(torch.randn(6, 32), dim=-1), 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal bytes_
            bytes_ += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.logits(features)
        return bytes_

    assert kept(8, 10**6) > 3 * kept(2, 10**6), "all at once: with the number of prompts"
    assert kept(8, 24) < 0.2 * kept(8, 10**6)


def test_it_has_as_many_parameters_as_published() -> None:
    with torch.device("meta"):  # the widths of ViT-B/16
        clip = clip_of(512, 512, layers=1, max_position_embeddings=77)
        counts = [
            sum(each.numel() for each in PromptedClip(clip, NAMES, settings).parameters())
            for settings in (
                PromptSettings(length=4),
                PromptSettings(length=4, conditioned=True),
                PromptSettings(length=16, of_class=True),
            )
        ]
    assert counts == [2_048, 35_360, 4 * 16 * 512]


def test_a_copy_shares_the_clip_and_moves_it_along() -> None:
    import copy

    clip = clip_of()
    model = PromptedClip(clip, NAMES, PromptSettings(length=2))
    other = copy.deepcopy(model)
    assert other.frozen is model.frozen and other.context is not model.context
    assert not any(each.requires_grad for each in clip.model.parameters())
    other.to(torch.float64)
    assert other.class_embeddings().dtype == torch.float32  # logits are float32, whatever the towers are
    assert clip.model.text_projection.weight.dtype == torch.float64 and not clip.model.training


def test_a_clip_is_loaded_from_its_folder_and_refused_in_words(tmp_path: Path) -> None:
    towers.clip(tmp_path / "clip")
    with pytest.raises(SettingsError, match="has no tokenizer that puts a token behind a text"):
        frozen_clip.load(frozen_clip.pinned(str(tmp_path / "clip")))
    towers.tokenizer(tmp_path / "clip")
    model = frozen_clip.pinned(str(tmp_path / "clip"))
    clip = frozen_clip.load(model)
    assert (clip.size, clip.width, clip.words.start, clip.words.stop) == (32, 16, (1,), (2,))
    context = PromptedClip(clip, ["red ball"], PromptSettings(length=0, words=WORDS))
    assert [each[0] for each in context.nearest_words(clip.words, 1)[0:3]] == [
        ("a", 0.0),
        ("photo", 0.0),
        ("of", 0.0),
    ]
    with pytest.raises(SettingsError, match=r"context_length=12: the prompt of class 'red ball' has 17"):
        PromptedClip(clip, ["red ball"], PromptSettings(length=12))
    with pytest.raises(SettingsError, match=r"context_length=3: 'a photo of a' has 4 tokens"):
        PromptedClip(clip, ["red ball"], PromptSettings(length=3, words=WORDS))
    with pytest.raises(SettingsError, match=r"has 22 tokens, the text tower reads 16"):
        zero_shot(clip, ["ball"], [" ".join(["a"] * 19) + " {label}"])
    config = tmp_path / "clip" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(SettingsError, match=r"its files are others \(files-\w+\) than when the run began"):
        frozen_clip.pinned(str(tmp_path / "clip"), model.revision)
    towers.siglip(tmp_path / "siglip")
    with pytest.raises(SettingsError, match="is a siglip; pass a CLIPModel"):
        frozen_clip.load(frozen_clip.pinned(str(tmp_path / "siglip")))
