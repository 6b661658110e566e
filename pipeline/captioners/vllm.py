"""Captions by a vLLM engine in this process: continuous batching over a whole shard, on a GPU or on CPU
cores.

One engine a GPU. The engine runs in-process, so that a shard's requests are always scheduled alike: the same
shard gives the same captions, whatever was done before it. Loading takes 25 s for the shipped model on two
cores, minutes for a 7B model.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

from PIL import Image

from pipeline.captioners.protocol import Caption, finish, in_halves
from pipeline.config import CaptionConfig
from pipeline.encoders.models import ModelRef
from pipeline.errors import SettingsError


class VLLMCaptioner:
    """Satisfies `protocol.Captioner`. Pictures go to the engine as pixels, never as addresses to fetch."""

    def __init__(self, config: CaptionConfig, model: ModelRef) -> None:
        self._config = config
        _refuse_cpu(config.device)
        _environment()
        from transformers import AutoProcessor
        from vllm import LLM

        location = model.here()
        self._processor: Any = AutoProcessor.from_pretrained(
            location, revision=model.hub_revision, trust_remote_code=False
        )
        extra: dict[str, Any] = {"max_model_len": config.context_length} if config.context_length else {}
        if config.engine_batch:
            extra["max_num_seqs"] = config.engine_batch
        self._engine = LLM(
            model=location,
            revision=model.hub_revision,
            tokenizer_revision=model.hub_revision,
            load_format="safetensors",  # else a folder without them would be searched for pickles
            trust_remote_code=False,
            dtype="bfloat16",
            # Graph capture and compilation pay on GPUs; on a CPU they cost minutes and give nothing.
            enforce_eager=not _has_cuda(),
            gpu_memory_utilization=config.gpu_memory_utilization,
            limit_mm_per_prompt={"image": 1},
            # Pictures do not repeat: caching their prefixes or processor outputs costs memory and copies for
            # nothing.
            enable_prefix_caching=False,
            mm_processor_cache_gb=0,
            # vLLM 0.29 on a CPU dies of a seeded prompt that is read in chunks ("CPU Generator does not use
            # offset").
            enable_chunked_prefill=_has_cuda(),
            disable_log_stats=True,
            seed=config.seed,
            **extra,
        )

    def __call__(self, pictures: list[Image.Image], prompts: list[str], ids: list[str]) -> list[Caption]:
        """One caption for each picture. A request that the engine refuses (a prompt too long, say) fails
        alone.

        One bad request makes the engine refuse the whole call.
        """
        from vllm.exceptions import VLLMClientError

        requests: list[dict[str, Any]] = [
            {"prompt": chat_prompt(self._processor, prompt), "multi_modal_data": {"image": picture}}
            for picture, prompt in zip(pictures, prompts, strict=True)
        ]
        params = [self._sampling(key) for key in ids]
        lengths = self._text_tokens([request["prompt"] for request in requests])
        rows = list(zip(requests, params, lengths, strict=True))
        # A processor's; and vLLM's own, of a prompt that is too long.
        refusals = (ValueError, VLLMClientError)
        return in_halves(
            rows, lambda some: self._generate(*(list(column) for column in zip(*some, strict=True))), refusals
        )

    def is_dead(self) -> bool:
        """vLLM's own watch marks an engine as dead and wakes nobody who waits for its answer (in 0.29)."""
        client = getattr(getattr(self._engine, "llm_engine", None), "engine_core", None)
        return bool(getattr(getattr(client, "resources", None), "engine_dead", False))

    def _text_tokens(self, prompts: list[str]) -> list[int]:
        """Tokens of the prompts with one placeholder for the picture: what they would count if it did not
        reach the model."""
        different = list(dict.fromkeys(prompts))
        ids = self._processor.tokenizer(different, add_special_tokens=False)["input_ids"]
        lengths = {prompt: len(row) for prompt, row in zip(different, ids, strict=True)}
        return [lengths[prompt] for prompt in prompts]

    def _generate(self, requests: list[Any], params: list[Any], lengths: list[int]) -> list[Caption]:
        outputs = self._engine.generate(requests, params, use_tqdm=False)
        return [
            finish(
                [made.text for made in output.outputs],
                prompt_tokens=len(output.prompt_token_ids or []),
                output_tokens=sum(len(made.token_ids) for made in output.outputs),
                finish_reason=output.outputs[0].finish_reason,
                text_tokens=length,
            )
            for output, length in zip(outputs, lengths, strict=True)
        ]

    def _sampling(self, key: str) -> Any:
        from vllm import SamplingParams

        config = self._config
        return SamplingParams(
            n=config.captions_per_image,
            temperature=config.temperature,
            top_p=config.top_p,
            max_tokens=config.max_tokens,
            seed=row_seed(config.seed, key) if config.temperature else None,
        )


def chat_prompt(processor: Any, prompt: str) -> str:
    """The model's own chat template around one picture and one question."""
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return text


def row_seed(seed: int, key: str) -> int:
    """A sampling seed that depends on the row and not on its neighbours, so a retried row gets the same
    draw."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:4], "big")


def _environment() -> None:
    """vLLM reads these when it is imported; whoever set them already keeps their choice."""
    defaults = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    if not _has_cuda():
        defaults |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _refuse_cpu(device: str) -> None:
    """A CUDA build would take a card that Ray has not given it."""
    if device == "cpu" and _has_cuda():
        message = "device=cpu: this build of vLLM computes on GPUs; use --captioner transformers."
        raise SettingsError(message)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
