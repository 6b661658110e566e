"""Caption held-out scenes with the shipped model and count, attribute by attribute, what it says rightly.

Run `python examples/scenes/evaluate_captioner.py --engine both`; with vLLM on a CPU also set
VLLM_CPU_KVCACHE_SPACE=1. A thousand captions take some ten seconds with either engine on two cores; vLLM
needs some seconds more to start.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the sibling modules, however this file is loaded

from draw import jpeg_of
from PIL import Image
from scene import RELATION_CLASSES, caption_of, sample_scene

PROMPTS = {
    "without label": "Describe this image in detail.",
    "with label": "Describe this image of {label} in detail.",
}
THING = r"a (?P<{0}_size>\w+) (?P<{0}_colour>\w+) (?P<{0}_texture>\w+) (?P<{0}_shape>\w+)"
SENTENCE = re.compile(
    THING.format("first")
    + r" (?P<relation>left of|above|inside) "
    + THING.format("second")
    + r" on a (?P<background_colour>(?:dark|light) \w+) (?P<background_kind>\w+) background"
    + r"(?:, with (?P<extras>.*))?\."
)
EXTRA = re.compile(r"a tiny (\w+) (\w+) at the ([a-z ]+?)(?= and |$)")
NAMES = [
    f"{which}_{field}" for which in ("first", "second") for field in ("shape", "colour", "texture", "size")
]
NAMES += ["relation", "background_colour", "background_kind"]


def parsed(caption: str) -> dict[str, Any]:
    """A caption's fields; empty where it is not such a sentence."""
    match = SENTENCE.fullmatch(caption.strip())
    if match is None:
        return {}
    found: dict[str, Any] = match.groupdict()
    return found | {"extras": EXTRA.findall(found["extras"] or "")}


def score(said: str, true: str) -> dict[str, float]:
    """For one caption, 1 or 0 for everything that it should say; words count by position."""
    mine, theirs = parsed(said), parsed(true)
    result = {name: float(mine.get(name) == theirs[name]) for name in NAMES}
    extras = mine.get("extras", [])
    result["number of distractors"] = float(bool(mine) and len(extras) == len(theirs["extras"]))
    result["all distractors"] = float(bool(mine) and extras == theirs["extras"])
    words = list(zip(said.split(), true.split(), strict=False))
    result["every word"] = sum(a == b for a, b in words) / max(len(said.split()), len(true.split()))
    result["whole caption"] = float(said.strip() == true)
    return result


def held_out(count: int, seed: int) -> list[tuple[Image.Image, str, str]]:
    """Pictures, labels and true captions of a split that no training and no `render.py` ever uses."""
    result = []
    for i in range(count):
        scene = sample_scene(
            seed, "captioner-test", RELATION_CLASSES[i % len(RELATION_CLASSES)], i // len(RELATION_CLASSES)
        )
        picture = Image.open(io.BytesIO(jpeg_of(scene))).convert("RGB")
        result.append((picture, scene.label, caption_of(scene)))
    return result


class WithTransformers:
    """Greedy captions by `generate`."""

    def __init__(self, folder: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        said: list[str] = []
        for start in range(0, len(prompts), 64):
            part = slice(start, start + 64)
            inputs = self.processor(
                images=list(pictures[part]),
                text=list(prompts[part]),
                padding=True,
                padding_side="left",
                return_tensors="pt",
            )
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
            tokens = self.model.generate(**inputs, do_sample=False, max_new_tokens=64)
            new = tokens[:, inputs["input_ids"].shape[1] :]
            said += self.processor.batch_decode(new, skip_special_tokens=True)
        return said


class WithVllm:
    """Greedy captions by vLLM's offline engine."""

    def __init__(self, folder: str, dtype: str) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        from transformers import AutoProcessor
        from vllm import LLM, SamplingParams

        self.processor = AutoProcessor.from_pretrained(folder)
        limits = {"limit_mm_per_prompt": {"image": 1}, "max_model_len": 256}
        self.engine = LLM(model=folder, dtype=dtype, enforce_eager=True, **limits)
        self.sampling = SamplingParams(temperature=0, max_tokens=64)

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        requests = [
            {"prompt": prompt, "multi_modal_data": {"image": picture}}
            for picture, prompt in zip(pictures, prompts, strict=True)
        ]
        return [
            output.outputs[0].text for output in self.engine.generate(requests, self.sampling, use_tqdm=False)
        ]


ENGINES = {"transformers": WithTransformers, "vllm": WithVllm}


def run_engine(
    name: str, options: argparse.Namespace, scenes: Sequence[tuple[Image.Image, str, str]]
) -> dict[str, Any]:
    """Captions and speed of one engine under both prompts."""
    engine = ENGINES[name](str(options.model), options.dtype)
    pictures = [picture for picture, _, _ in scenes]
    results: dict[str, Any] = {}
    for kind, prompt in PROMPTS.items():
        asked = []
        for _, label, _ in scenes:
            content = [{"type": "image"}, {"type": "text", "text": prompt.format(label=label)}]
            message = {"role": "user", "content": content}
            asked.append(
                engine.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
            )
        engine(pictures[:8], asked[:8])  # the first call also pays for set-up
        started = time.perf_counter()
        said = engine(pictures, asked)
        results[kind] = {"captions": said, "per_second": len(said) / (time.perf_counter() - started)}
    return results


def summary(results: dict[str, Any], truths: Sequence[str]) -> dict[str, Any]:
    """Shares of right answers by engine and prompt, captions a second, and how often the engines agree."""
    report: dict[str, Any] = {"scenes": len(truths), "accuracy": {}, "per_second": {}}
    for engine, kinds in results.items():
        for kind, result in kinds.items():
            scores = [score(said, true) for said, true in zip(result["captions"], truths, strict=True)]
            key = f"{engine}, {kind}"
            report["accuracy"][key] = {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]}
            report["per_second"][key] = round(result["per_second"], 1)
    if len(results) == 2:
        report["agreement"] = {
            kind: sum(a == b for a, b in zip(*(results[e][kind]["captions"] for e in results), strict=True))
            / len(truths)
            for kind in PROMPTS
        }
    return report


def as_markdown(report: dict[str, Any]) -> str:
    """The accuracies as a table, one column for each engine and prompt."""
    columns = list(report["accuracy"])
    lines = ["| right in % | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name in report["accuracy"][columns[0]]:
        cells = [f"{100 * report['accuracy'][column][name]:.1f}" for column in columns]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    speeds = [str(report["per_second"][column]) for column in columns]
    lines.append("| captions a second | " + " | ".join(speeds) + " |")
    for kind, share in report.get("agreement", {}).items():
        lines.append(f"\nBoth engines say the same, {kind}: {100 * share:.1f} %")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    here = Path(__file__).resolve().parent / "captioner"
    result.add_argument("--model", type=Path, default=here, help="folder of the captioner")
    result.add_argument(
        "--engine", choices=[*ENGINES, "both"], default="transformers", help="what runs the model"
    )
    result.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="arithmetic of the engine"
    )
    result.add_argument("--scenes", type=int, default=600, help="held-out scenes to caption, twice each")
    result.add_argument("--seed", type=int, default=1, help="of the held-out scenes")
    result.add_argument("--json", type=Path, help="also write figures and all captions here")
    result.add_argument(
        "--show", type=int, default=0, help="print that many wrong captions beside the true ones"
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Caption, count, print."""
    options = parser().parse_args(argv)
    scenes = held_out(options.scenes, options.seed)
    truths = [true for _, _, true in scenes]
    chosen = list(ENGINES) if options.engine == "both" else [options.engine]
    results = {name: run_engine(name, options, scenes) for name in chosen}
    report = summary(results, truths)
    print(as_markdown(report))
    wrong = [
        pair
        for pair in zip(results[chosen[0]]["without label"]["captions"], truths, strict=True)
        if len(set(pair)) > 1
    ]
    for said, true in wrong[: options.show]:
        print(f"\nsaid: {said}\ntrue: {true}")
    if options.json:
        captions = {
            name: {kind: r["captions"] for kind, r in kinds.items()} for name, kinds in results.items()
        }
        options.json.write_text(
            json.dumps(report | {"truths": truths, "captions": captions}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
