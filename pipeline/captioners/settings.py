"""Settings of captions: what decides them, and how and where they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.session import ModelRuntime, wait_faults


@dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    """What decides the captions: all of it makes the caption variant (`variants.CaptionVariant`)."""

    captioner: Literal["vllm", "transformers", "openai"] = "vllm"
    """Engine. vllm and transformers take the same model, prompt and processor; openai asks any
    OpenAI-compatible HTTP server."""
    caption_preset: str = ""
    """Model, picture size and lengths in one word, for what the flags leave open. With a GPU and a network:
    smolvlm2-2.2b, qwen2.5-vl-3b, qwen3-vl-4b, internvl3-2b (24 GB), qwen2.5-vl-7b, internvl3-8b, llava-1.5-7b
    (40 GB). scenes: the shipped toy, for drawn shapes only. Not needed with --model or --captioner openai."""
    model: str = ""
    """Hub name or folder of a vision-language model in safetensors; empty: the preset's. openai: the server's
    name for it; empty: the only one that it serves."""
    model_revision: str = ""
    """Commit, tag or branch on the hub; resolved to a commit and recorded. Empty: main. A folder's is the
    hash of its files."""
    prompt: str = "Describe this image in detail."
    """The question asked of each picture; {label} stands for its class name (class-conditioned captions)."""
    caption_edge: int = 0
    """Longer edge of the picture handed to the model, in pixels (shrunk, never enlarged); 0: the preset's,
    without one 448."""
    captions_per_image: int = 1
    """Captions of each picture; above 1 they are sampled (--temperature), and `embed` averages their
    vectors."""
    max_tokens: int = 0
    """Most tokens of a caption; longer ones are cut and recorded with finish_reason=length; 0: the preset's,
    without one 128."""
    temperature: float = 0.0
    """0: greedy and repeatable; above 0: sampling, seeded by seed and row id."""
    top_p: float = 1.0
    """Nucleus sampling: smallest set of tokens with this probability mass; only with a temperature."""
    seed: int = 0
    """Seed of sampling."""
    context_length: int = 0
    """Most tokens of prompt, picture and caption together; 0: the preset's, without one the model's own,
    whose cache of keys and values may be larger than a card."""


@dataclass(frozen=True, kw_only=True)
class CaptionRuntime(ModelRuntime):
    """How and where captions are made: nothing of it changes what is stored, and nothing of it is in the
    variant's name."""

    store: str
    """Folder of a store that `ingest` filled."""
    replicas: int = 0
    """Engines; 0: one for each GPU (a cluster that grows from none must be told). Without GPUs: one for each
    core if the model is small (and the store is not), else one with all cores."""
    min_replicas: int = 0
    """Begin with as few engines, grow to --replicas as nodes come, shrink as the queue empties (for spot
    machines). 0: --replicas from the start; on a cluster that grows, 1."""
    engine_cores: int = 0
    """CPU cores of an engine without a GPU; 0: the cores shared out. A number and no --replicas: one engine,
    and the other cores are left to decoding and to you."""
    engine_batch: int = 0
    """Most pictures that an engine works on at a time; 0: vllm's own choice, 16 for transformers."""
    gpu_memory_utilization: float = 0.85
    """Share of a GPU's memory that a vLLM engine may take."""
    base_url: str = "http://127.0.0.1:8000/v1"
    """openai: address of the server; the key comes from OPENAI_API_KEY, never from a flag or an address."""
    http_concurrency: int = 32
    """openai: requests under way at a time, for each actor."""
    http_timeout: float = 120.0
    """openai: seconds that one request may take."""
    http_retries: int = 6
    """openai: further tries after a refused connection, a time-out, 408, 409, 429 or 5xx, with growing
    pauses."""
    budget_tokens: int = 0
    """openai: tokens (of prompts and captions) that each actor may spend in this run; the rest is left
    undone. 0: no limit."""
    max_failure_rate: float = 0.01
    """Stop (exit code 3) when more than this share of all rows has failed."""


def runtime_faults(config: CaptionRuntime) -> list[str]:
    """What is wrong with how and where captions are made."""
    faults = wait_faults(config)
    if (
        config.http_concurrency < 1
        or config.http_timeout <= 0
        or config.http_retries < 0
        or config.budget_tokens < 0
    ):
        faults.append(
            "http_concurrency must be at least 1, http_timeout above 0, http_retries and budget_tokens at "
            "least 0."
        )
    if not 0 < config.gpu_memory_utilization <= 1:
        faults.append(f"gpu_memory_utilization={config.gpu_memory_utilization}: a share between 0 and 1.")
    if config.engine_batch < 0:
        faults.append(f"engine_batch={config.engine_batch}: must be 0 (the engine's choice) or more.")
    if config.replicas < 0:
        faults.append(f"replicas={config.replicas}: must be 0 (the machine's share) or more.")
    if config.min_replicas < 0 or config.min_replicas > config.replicas > 0:
        faults.append(
            f"min_replicas={config.min_replicas}: must be 0 or more, and at most --replicas (now "
            f"{config.replicas})."
        )
    if config.engine_cores < 0:
        faults.append(f"engine_cores={config.engine_cores}: must be 0 (shared out) or more.")
    return faults


def address_faults(base_url: str) -> list[str]:
    """What is wrong with a server's address. One that may hold a secret is not repeated: it would be printed
    and recorded."""
    if any(sign in base_url for sign in "@?#"):
        return [
            "base_url: holds a user name, a password or a query such as ?api-key=..., which would be "
            "recorded with the captions; pass the bare address, such as http://127.0.0.1:8000/v1, and the "
            "key in OPENAI_API_KEY."
        ]
    if not base_url.startswith(("http://", "https://")):
        return [f"base_url={base_url!r}: an http:// or https:// address, such as http://127.0.0.1:8000/v1."]
    return []
