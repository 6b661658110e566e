"""Captions by transformers' own `generate`: the twin of the vLLM captioner, for models that vLLM cannot run.

Same model, prompts and processor, interchangeable by `--captioner`; batches of 16, padded on the left. A
batch takes as long as its longest caption.
"""

from __future__ import annotations

from typing import Any

from PIL import Image

from pipeline.captioners.protocol import Caption, finish, in_halves
from pipeline.captioners.vllm import chat_prompt, row_seed
from pipeline.config import CaptionConfig
from pipeline.encoders.models import ModelRef

BATCH = 16  # fits a 7B model beside its activations on a 24 GB card


class TransformersCaptioner:
    """Satisfies `protocol.Captioner`."""

    def __init__(self, config: CaptionConfig, model: ModelRef) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self._config = config
        location = model.here()
        self._processor: Any = AutoProcessor.from_pretrained(
            location, revision=model.hub_revision, trust_remote_code=False
        )
        self._processor.tokenizer.padding_side = "left"  # generation continues on the right
        if self._processor.tokenizer.pad_token_id is None:
            self._processor.tokenizer.pad_token = self._processor.tokenizer.eos_token
        self._device = "cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu"
        auto: Any = AutoModelForImageTextToText
        self._model: Any = auto.from_pretrained(
            location,
            revision=model.hub_revision,
            dtype=torch.bfloat16,
            use_safetensors=True,
            trust_remote_code=False,
        )
        self._model = self._model.to(self._device).eval()

    def __call__(self, pictures: list[Image.Image], prompts: list[str], ids: list[str]) -> list[Caption]:
        """One caption for each picture, in batches of BATCH. A picture that the processor refuses fails
        alone."""
        captions: list[Caption] = []
        size = self._config.engine_batch or BATCH
        for start in range(0, len(pictures), size):
            span = slice(start, start + size)
            rows = list(zip(pictures[span], prompts[span], ids[span], strict=True))
            captions += in_halves(
                rows, lambda some: self._generate(*(list(column) for column in zip(*some, strict=True)))
            )
        return captions

    def _generate(self, pictures: list[Image.Image], prompts: list[str], ids: list[str]) -> list[Caption]:
        import torch

        config = self._config
        texts = [chat_prompt(self._processor, prompt) for prompt in prompts]
        batch = self._processor(images=pictures, text=texts, return_tensors="pt", padding=True).to(
            self._device, torch.bfloat16
        )
        sampling: dict[str, Any] = {"do_sample": False}
        if config.temperature:
            torch.manual_seed(row_seed(config.seed, ids[0]))
            sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p}
            sampling["num_return_sequences"] = config.captions_per_image
        with torch.inference_mode():
            output = self._model.generate(
                **batch,
                max_new_tokens=config.max_tokens,
                pad_token_id=self._processor.tokenizer.pad_token_id,
                **sampling,
            )
        made = output[:, batch["input_ids"].shape[1] :].tolist()
        counts = batch["attention_mask"].sum(dim=1).tolist()
        lengths = [
            len(row) for row in self._processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        ]
        answers = config.captions_per_image
        grouped = [made[start : start + answers] for start in range(0, len(made), answers)]
        return [self._caption(*one) for one in zip(grouped, counts, lengths, strict=True)]

    def _caption(self, answers: list[list[int]], prompt_tokens: int, text_tokens: int) -> Caption:
        stops = _stop_tokens(self._model.generation_config.eos_token_id)
        ends = [
            next((position for position, token in enumerate(row) if token in stops), None) for row in answers
        ]
        return finish(
            [
                self._processor.tokenizer.decode(row[:end], skip_special_tokens=True)
                for row, end in zip(answers, ends, strict=True)
            ],
            prompt_tokens=prompt_tokens,
            # With the stop token, as vLLM counts.
            output_tokens=sum(
                len(row) if end is None else end + 1 for row, end in zip(answers, ends, strict=True)
            ),
            finish_reason="length" if ends[0] is None else "stop",
            text_tokens=text_tokens,
        )


def _stop_tokens(eos: int | list[int] | None) -> set[int]:
    return set(eos) if isinstance(eos, list) else {eos} if eos is not None else set()
