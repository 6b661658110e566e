"""Train the shipped captioner from nothing on freshly drawn scenes and write its folder.

Run `python examples/scenes/train_captioner.py --to examples/scenes/captioner`; `--help` explains the knobs.
The defaults take about three quarters of an hour and 3 GB of memory on two CPU cores.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the sibling modules, however this file is loaded

import torch
from captioner_data import PATCH_FIELDS, PROMPTS, Lessons, draw_lessons, learning_rate, prompt_for
from captioner_model import ASSISTANT, END, USER, build_model, build_processor, build_tokenizer, export
from scene import CLASSES
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

Batch = dict[str, torch.Tensor]


class Muon(torch.optim.Optimizer):
    """Momentum whose every matrix is replaced by the nearest orthogonal one: fewer steps than AdamW needs here."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Matrices of one shape go through the iteration together, which small matrices need to be fast."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                shapes[parameter.shape].append(parameter)
            for (rows, columns), parameters in shapes.items():
                updates = orthogonal(torch.stack([self._direction(p, group["momentum"]) for p in parameters]))
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - 0.01 * group["lr"]).add_(update, alpha=-rate)

    def _direction(self, parameter: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        state = self.state[parameter]
        if not state:
            state["average"] = torch.zeros_like(parameter)
        state["average"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["average"], momentum)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Push all singular values of a stack of matrices towards one by five steps of a quintic iteration."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(5):
        square = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.transpose(1, 2) if tall else x


class Trainee(torch.nn.Module):
    """The captioner, plus a linear layer that names what lies under each patch; that layer is not shipped."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.captioner = model
        self.parts = [len(options) for options in PATCH_FIELDS.values()]
        self.namer = torch.nn.Linear(model.config.vision_config.hidden_size, sum(self.parts))

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits at the positions that predict a caption token, and the patches' logits."""
        inner = self.captioner.model
        features = inner.vision_tower(batch["pixels"]).last_hidden_state[:, 1:]
        words = inner.get_input_embeddings()(batch["tokens"])
        # Every sequence is <|user|>, the image, the rest; padding at the end needs no mask under causal attention.
        joined = torch.cat([words[:, :1], inner.multi_modal_projector(features), words[:, 1:]], dim=1)
        hidden = inner.language_model(inputs_embeds=joined, use_cache=False).last_hidden_state
        hidden = hidden[:, features.shape[1] :]
        return self.captioner.lm_head(hidden[:, :-1][batch["asked"]]), self.namer(features)

    def patch_loss(self, logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        """The mean over the fields of how badly the patches are named."""
        losses = [
            F.cross_entropy(part.flatten(0, 1), answers[..., i].flatten(), ignore_index=-1)
            for i, part in enumerate(logits.split(self.parts, dim=-1))
        ]
        return torch.stack(losses).mean()


class Batches:
    """Cuts lessons into batches; prompts are drawn anew each time a lesson comes round."""

    def __init__(self, lessons: Lessons, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.lessons, self.tokenizer, self.chance = lessons, tokenizer, random.Random(seed)
        self.known: dict[str, list[int]] = {}
        self.user, self.assistant, self.end = tokenizer.convert_tokens_to_ids([USER, ASSISTANT, END])

    def forever(self, size: int) -> Iterator[Batch]:
        """Shuffled passes over all lessons without end."""
        order = list(range(len(self.lessons.captions)))
        while True:
            self.chance.shuffle(order)
            for start in range(0, len(order) - size + 1, size):
                numbers = order[start : start + size]
                yield self.batch(numbers, [prompt_for(self.lessons.labels[i], self.chance) for i in numbers])

    def batch(self, numbers: Sequence[int], prompts: Sequence[str]) -> Batch:
        """Tokens without the image's own, which target they ask for, the pixels and the patches' answers."""
        fronts = [[self.user, *self._encode(prompt), self.assistant] for prompt in prompts]
        captions = [[*self._encode(self.lessons.captions[i]), self.end] for i in numbers]
        longest = max(len(front) + len(caption) for front, caption in zip(fronts, captions, strict=True))
        tokens = torch.full((len(fronts), longest), self.end)
        asked = torch.zeros((len(fronts), longest - 1), dtype=torch.bool)
        for row, (front, caption) in enumerate(zip(fronts, captions, strict=True)):
            tokens[row, : len(front) + len(caption)] = torch.tensor(front + caption)
            asked[row, len(front) - 1 : len(front) + len(caption) - 1] = True
        pixels = torch.from_numpy(self.lessons.images[list(numbers)]).permute(0, 3, 1, 2).float()
        patches = torch.from_numpy(self.lessons.patches[list(numbers)]).long()
        return {"tokens": tokens, "asked": asked, "pixels": pixels / 63.75 - 2, "patches": patches}

    def _encode(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.known[text]


def optimisers_for(trainee: Trainee, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, norms, biases and the patch namer."""
    named = list(trainee.named_parameters())
    inner = [p for name, p in named if p.ndim == 2 and ("layers." in name or "projector" in name)]
    chosen = {id(p) for p in inner}
    rest = [p for _, p in named if id(p) not in chosen and p.requires_grad]
    result = [Muon(inner, lr=10 * rate), torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)]
    for optimiser in result:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return result


@torch.no_grad()
def exam(trainee: Trainee, batches: Batches, count: int) -> tuple[float, float]:
    """Shares of tokens and of whole captions that greedy decoding gets right, without a label in the prompt."""
    trainee.eval()
    right, tokens, exact = 0, 0, 0
    for start in range(0, count, 64):
        batch = batches.batch(range(start, start + 64), [PROMPTS[0]] * 64)
        hits = trainee(batch)[0].argmax(-1) == batch["tokens"][:, 1:][batch["asked"]]
        right, tokens = right + int(hits.sum()), tokens + hits.numel()
        # With the true beginning given, all tokens right is the same as greedy decoding being right.
        exact += sum(bool(part.all()) for part in hits.split(batch["asked"].sum(1).tolist()))
    trainee.train()
    return right / tokens, exact / count


def train(trainee: Trainee, batches: Batches, held_out: Batches, options: argparse.Namespace) -> None:
    """The loop: caption loss plus patch loss, clipped, at a rate that rises and then falls to nothing."""
    optimisers, supply = optimisers_for(trainee, options.rate), batches.forever(options.batch)
    started = time.perf_counter()
    for step in range(options.steps):
        batch = next(supply)
        words, patches = trainee(batch)
        caption_loss = F.cross_entropy(words, batch["tokens"][:, 1:][batch["asked"]])
        patch_loss = trainee.patch_loss(patches, batch["patches"])
        (caption_loss + options.patch_weight * patch_loss).backward()
        torch.nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * learning_rate(step, options.steps, warm_up=100)
            optimiser.step()
            optimiser.zero_grad()
        if step % 50 == 49:
            pace = (time.perf_counter() - started) / (step + 1)
            losses = f"caption loss {caption_loss:.4f}  patch loss {patch_loss:.4f}"
            print(f"step {step + 1}/{options.steps}  {losses}  {pace:.2f} s a step", flush=True)
        if step % 500 == 499 or step + 1 == options.steps:
            tokens, exact = exam(trainee, held_out, 512)
            print(f"step {step + 1}  held out: tokens {tokens:.2%}  whole captions {exact:.2%}", flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    result.add_argument("--to", type=Path, required=True, help="folder of the finished model; replaced in one move")
    result.add_argument("--steps", type=int, default=4000, help="batches to learn from; 700 give a first usable model")
    result.add_argument("--batch", type=int, default=64, help="pictures a step")
    result.add_argument("--pool", type=int, default=80_000, help="different pictures to draw; passed over repeatedly")
    result.add_argument("--rate", type=float, default=2e-3, help="peak learning rate of AdamW; Muon's is ten times it")
    result.add_argument("--patch-weight", type=float, default=0.5, help="weight of the patch-naming lesson; 0 is none")
    result.add_argument("--seed", type=int, default=0, help="of weights, pictures and prompts")
    result.add_argument("--threads", type=int, default=2, help="CPU threads, and processes that draw")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the lessons, train, export."""
    options = parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    # Splits of their own: no picture that `render.py` ever writes is among the lessons.
    lessons = draw_lessons(options.pool, options.seed, "captioner-train", options.threads)
    held_out = draw_lessons(512, options.seed, "captioner-exam", options.threads)
    tokenizer = build_tokenizer(lessons.captions[:5000], CLASSES)
    trainee = Trainee(build_model(tokenizer))
    count = sum(p.numel() for p in trainee.captioner.parameters())
    print(f"{len(lessons.captions)} lessons, {len(tokenizer)} tokens, {count:,} parameters", flush=True)
    train(trainee, Batches(lessons, tokenizer, options.seed), Batches(held_out, tokenizer, options.seed), options)
    export(trainee.captioner, build_processor(tokenizer), options.to)
    print(f"wrote {options.to}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
