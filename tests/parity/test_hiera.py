"""Hiera's masked autoencoder and classifier against the authors' package: the same weights and mask give the
same loss, gradients and logits."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from training.config import TrainConfig
from training.models import masked_hiera, weights
from training.models.published_hiera import of_backbone, of_decoder
from training.objectives import mae
from training.presets import preset

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # of timm's old module names, which the package uses
    import hiera

NANO: dict[str, Any] = weights.OWN["hiera_nano_64"].arguments | {"input_size": (64, 64)}
del NANO["img_size"]


def ours_of(theirs: Any, recipe: str, **changes: Any) -> mae.MaeTask:
    """Our task with the weights of theirs, through the layout that the package saves."""
    config = TrainConfig.of(store="s", **preset(recipe, "mae") | {"objective": "mae"} | changes)
    task = mae.OBJECTIVE.build(config, mae.OBJECTIVE.check(config, None), 0)  # type: ignore[arg-type]
    tensors = theirs.state_dict()
    task.backbone.load_state_dict(of_backbone(tensors))
    decoder = of_decoder(tensors)
    missing, unexpected = task.load_state_dict(decoder, strict=False)
    assert all(name.startswith("backbone.") for name in missing) and not unexpected
    assert len(of_backbone(tensors)) + len(decoder) == len(tensors)
    return task


def masks(count: int, grid: int, ratio: float) -> Tensor:
    samples = np.array([[0, 0, row, 0] for row in range(count)])
    return torch.from_numpy(mae.seen(grid, ratio, samples, (3, 5)))


def compared(theirs: Any, ours: mae.MaeTask, images: Tensor, keep: Tensor) -> None:
    theirs.zero_grad()
    loss, predicted, label, _ = theirs(images, mask=keep)
    loss.backward()
    mine = ours(mae.Inputs(images, keep))["loss"]
    mine.backward()
    torch.testing.assert_close(mine, loss, rtol=1e-5, atol=1e-5)
    masked = ours.decoder.masked(keep)
    torch.testing.assert_close(ours.predict(images, keep)[masked], predicted, rtol=1e-4, atol=1e-5)
    pixels, _, _ = masked_hiera.normalised(masked_hiera.patches_of(images, ours.decoder.patch))
    torch.testing.assert_close(pixels[masked], label, rtol=1e-5, atol=1e-5)
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    renamed = {f"backbone.{n}": g for n, g in of_backbone(grads).items()} | of_decoder(grads)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, renamed[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("ratio", [0.25, 0.6, 0.9])
def test_a_small_one_has_their_loss_and_gradients(ratio: float) -> None:
    torch.manual_seed(0)
    decoder = {"decoder_embed_dim": 64, "decoder_depth": 2, "decoder_num_heads": 4}
    theirs = hiera.MaskedAutoencoderHiera(**NANO, q_pool=2, **decoder)
    ours = ours_of(theirs, "hiera-scenes-mae", decoder_width=64, decoder_depth=2, decoder_heads=4)
    compared(theirs, ours, torch.randn(3, 3, 64, 64), masks(3, 4, ratio))


def test_the_published_tiny_has_their_loss_and_gradients_and_starts_as_theirs_does() -> None:
    torch.manual_seed(0)
    theirs = hiera.mae_hiera_tiny_224()
    ours = ours_of(theirs, "hiera-t-mae")
    compared(theirs, ours, torch.randn(1, 3, 224, 224), masks(1, 7, 0.6))
    config = TrainConfig.of(store="s", **preset("hiera-t-mae", "mae"), objective="mae", seed=1)
    fresh = mae.OBJECTIVE.build(config, mae.Facts(), 0)
    wanted = {f"backbone.{name}": value for name, value in of_backbone(theirs.state_dict()).items()}
    for name, value in (wanted | of_decoder(theirs.state_dict())).items():
        found, spread = float(fresh.state_dict()[name].std()), float(value.std())
        assert found == pytest.approx(spread, rel=0.1, abs=1e-6), name


def test_the_classifier_has_their_logits_where_they_answer_with_a_softmax() -> None:
    torch.manual_seed(0)
    theirs = hiera.Hiera(**NANO, num_classes=7).eval()
    with torch.no_grad():
        theirs.head.projection.weight.mul_(1000)  # it starts near 0, where all answers are alike
    arguments = weights.OWN["hiera_nano_64"].arguments
    ours = timm.create_model("hiera_tiny_224", num_classes=7, **arguments).eval()
    ours.load_state_dict(of_backbone(theirs.state_dict()))
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        logits = ours(images)
        torch.testing.assert_close(logits.softmax(-1), theirs(images), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(logits, theirs.train()(images), rtol=1e-5, atol=1e-5)


def test_an_unpooled_last_stage_is_timms_own_and_can_be_pooled_again() -> None:
    arguments = weights.OWN["hiera_nano_64"].arguments
    torch.manual_seed(0)
    images, keep = torch.randn(2, 3, 64, 64), masks(2, 4, 0.6)
    pooled = timm.create_model("hiera_tiny_224", num_classes=0, **arguments).eval()
    native = timm.create_model("hiera_tiny_224", num_classes=0, q_pool=2, **arguments).eval()
    assert native.state_dict().keys() == pooled.state_dict().keys()
    native.load_state_dict(pooled.state_dict())
    with torch.no_grad():
        before = pooled(images)
        masked_hiera.set_pooling(pooled, 2)
        for mask in (None, keep):
            (last, stages), (wanted, theirs) = (
                each.forward_features(images, mask=mask, return_intermediates=True)
                for each in (pooled, native)
            )
            assert torch.equal(last, wanted)
            assert all(torch.equal(*both) for both in zip(stages, theirs, strict=True))
        masked_hiera.set_pooling(pooled, 3)
        assert torch.equal(pooled(images), before)
