"""A CLIP of transformers (`CLIPModel`) that trains, shaped like a model of timm: its feature is a picture's
embedding, and its classifier is made of prompts of the classes."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

TOGETHER = 256
"""Texts that go through the tower together."""


class ClipTowers(nn.Module):
    """`model` is the CLIPModel, of new weights."""

    prompts: Tensor

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        vision: dict[str, int],
        text: dict[str, int],
        shared_width: int,
        temperature: float,
        prompts_CTL: Tensor,
    ) -> None:
        """Makes it.

        Args:
            image_size: edge of pictures in pixels.
            patch_size: edge of patches in pixels.
            vision: `width`, `layers`, `heads` of the tower of pictures.
            text: the same of the tower of texts, and `tokens` that it reads, `vocabulary` and the numbers of
                `start` and `end`.
            shared_width: of the space that both are compared in.
            temperature: at first.
            prompts_CTL: [C, T, L] token ids of each class's prompts.
        """
        from transformers import CLIPConfig, CLIPModel
        from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        super().__init__()
        ends = {"bos_token_id": text["start"], "eos_token_id": text["end"], "pad_token_id": text["end"]}
        config = CLIPConfig(
            vision_config={**_sizes(vision), "image_size": image_size, "patch_size": patch_size},
            text_config={
                **_sizes(text),
                **ends,
                "vocab_size": text["vocabulary"],
                "max_position_embeddings": text["tokens"],
            },
            projection_dim=shared_width,
            logit_scale_init_value=-torch.tensor(temperature).log().item(),
        )
        self.model: Any = CLIPModel(config)
        self.register_buffer("prompts", prompts_CTL, persistent=False)
        self._classes: Tensor | None = None
        self.pretrained_cfg = {
            "input_size": (3, image_size, image_size),
            "mean": tuple(OPENAI_CLIP_MEAN),
            "std": tuple(OPENAI_CLIP_STD),
            "crop_pct": 1.0,
            "interpolation": "bicubic",
        }

    @property
    def scale(self) -> Tensor:
        """1 / temperature."""
        scale: Tensor = self.model.logit_scale.exp()
        return scale

    @property
    def end(self) -> int:
        """Number of the token behind a text."""
        return int(self.model.config.text_config.eos_token_id)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Computes activations of both towers again in the backward pass."""
        self.model.gradient_checkpointing_enable() if enable else self.model.gradient_checkpointing_disable()

    def train(self, mode: bool = True) -> Self:
        """Forgets the embeddings of classes, which will be others."""
        self._classes = None
        return super().train(mode)

    def texts(self, ids_nL: Tensor) -> Tensor:
        """[n, d] of unit length, of [n, L] token ids."""
        longest = int((ids_nL == self.end).int().argmax(1).max()) + 1
        pooled = self.model.text_model(input_ids=ids_nL[:, :longest].long()).pooler_output
        project = self.model.get_submodule("text_projection")
        return functional.normalize(project(pooled).float(), dim=-1)

    def forward_features(self, images: Tensor) -> Tensor:
        """[b, d] of unit length, of normalised images [b, 3, S, S]."""
        pooled = self.model.vision_model(pixel_values=images).pooler_output
        return functional.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    def forward_head(self, features: Tensor, pre_logits: bool = True) -> Tensor:
        """The features as they are."""
        return features

    def get_classifier(self) -> Any:
        """What makes logits of features."""
        return self.classify

    def classify(self, features: Tensor) -> Tensor:
        """[b, C] cosines with the classes' embeddings over the temperature."""
        if self._classes is None or torch.is_grad_enabled():
            self._classes = self.class_embeddings(self.prompts)
        return self.scale * features.float() @ self._classes.T

    def class_embeddings(self, prompts_CTL: Tensor) -> Tensor:
        """[C, d] of unit length: of each class the mean over its prompts."""
        parts = [self.texts(part) for part in torch.split(prompts_CTL.flatten(0, 1), TOGETHER)]
        each = torch.cat(parts).view(*prompts_CTL.shape[:2], -1)
        return functional.normalize(each.mean(1), dim=-1)


def _sizes(tower: dict[str, int]) -> dict[str, int]:
    return {
        "hidden_size": tower["width"],
        "intermediate_size": 4 * tower["width"],
        "num_hidden_layers": tower["layers"],
        "num_attention_heads": tower["heads"],
    }
