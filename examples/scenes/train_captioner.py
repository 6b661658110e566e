"""Train the shipped captioner from nothing on freshly drawn scenes and write its folder.

Run `python examples/scenes/train_captioner.py --to examples/scenes/captioner`; `--help` explains the knobs.
The defaults take about three quarters of an hour and 3 GB of memory on two CPU cores.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the sibling modules, however this file is loaded

import torch
from captioner_data import PATCH_FIELDS, PROMPTS, Batch, Batches, draw_lessons, pixels_of, sample_captions
from captioner_model import build_model, build_processor, build_tokenizer, export, start_well
from muon import Muon
from scene import RELATION_CLASSES
from torch import distributed, multiprocessing
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration


class Trainee(torch.nn.Module):
    """The captioner, plus a linear layer that names what lies under each patch; that layer is not shipped."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.captioner = model
        self.parts = [len(options) for options in PATCH_FIELDS.values()]
        self.namer = torch.nn.Linear(model.config.vision_config.hidden_size, sum(self.parts))

    def look(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The tower's view of the patches, and how badly it names them: the mean over the fields."""
        features = self.captioner.model.vision_tower(batch["pixels"]).last_hidden_state[:, 1:]
        losses = []
        for i, part in enumerate(self.namer(features).split(self.parts, dim=-1)):
            weight = torch.ones(self.parts[i])
            if i < 4:
                weight[0] = 0.15  # most patches hold no object, and would drown those that do
            answers = batch["patches"][..., i].flatten()
            losses.append(F.cross_entropy(part.flatten(0, 1), answers, weight=weight, ignore_index=-1))
        return features, torch.stack(losses).mean()

    def say(self, batch: Batch, features: torch.Tensor) -> torch.Tensor:
        """Logits at the positions that predict a caption token."""
        inner = self.captioner.model
        words = inner.get_input_embeddings()(batch["tokens"])
        # Every sequence is <|user|>, the image, the rest; padding at the end needs no mask under causal
        # attention.
        joined = torch.cat([words[:, :1], inner.multi_modal_projector(features), words[:, 1:]], dim=1)
        hidden = inner.language_model(inputs_embeds=joined, use_cache=False).last_hidden_state
        return self.captioner.lm_head(hidden[:, features.shape[1] : -1][batch["asked"]])


def optimisers_for(trainee: Trainee, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, norms, biases and the patch namer."""
    named = list(trainee.named_parameters())
    inner = [p for name, p in named if p.ndim == 2 and ("layers." in name or "projector" in name)]
    chosen = {id(p) for p in inner}
    rest = [p for _, p in named if id(p) not in chosen and p.requires_grad]
    result = [
        Muon(inner, lr=10 * rate),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    for optimiser in result:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return result


@torch.no_grad()
def exam(trainee: Trainee, batches: Batches, count: int) -> tuple[float, float]:
    """Shares of tokens and of whole captions that greedy decoding gets right, without a label in the
    prompt."""
    trainee.eval()
    right, tokens, exact = 0, 0, 0
    for start in range(0, count, 64):
        batch = batches.batch(range(start, start + 64), [PROMPTS[0]] * 64)
        words = trainee.say(batch, trainee.look(batch)[0])
        hits = words.argmax(-1) == batch["tokens"][:, 1:][batch["asked"]]
        right, tokens = right + int(hits.sum()), tokens + hits.numel()
        # With the true beginning given, all tokens right is the same as greedy decoding being right.
        exact += sum(bool(part.all()) for part in hits.split(batch["asked"].sum(1).tolist()))
    trainee.train()
    return right / tokens, exact / count


def share_gradients(trainee: Trainee, processes: int) -> None:
    """Average the gradients of all processes in one message."""
    gradients = [p.grad for p in trainee.parameters() if p.grad is not None]
    if processes > 1:
        joined = torch.cat([g.flatten() for g in gradients])
        distributed.all_reduce(joined)
        for gradient, mean in zip(gradients, joined.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient) / processes)


def learning_rate(step: int, steps: int, warm_up: int = 60) -> float:
    """The share of the peak rate: a linear rise, then half a cosine down to nothing."""
    if step < warm_up:
        return step / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def one_step(trainee: Trainee, batch: Batch, talking: bool, options: argparse.Namespace) -> str:
    """Forward and backward; returns the losses in words."""
    features, patch_loss = trainee.look(batch)
    loss, text = options.patch_weight * patch_loss, f"patch loss {patch_loss:.4f}"
    if talking:
        caption_loss = F.cross_entropy(trainee.say(batch, features), batch["tokens"][:, 1:][batch["asked"]])
        loss, text = loss + caption_loss, f"{text}  caption loss {caption_loss:.4f}"
    loss.backward()
    share_gradients(trainee, options.processes)
    torch.nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
    return text


def train(trainee: Trainee, batches: Batches, held_out: Batches | None, options: argparse.Namespace) -> None:
    """First looking alone, then looking and talking; whoever holds the exam also prints and exports."""
    optimisers = optimisers_for(trainee, options.rate)
    sizes = (options.look_batch // options.processes, options.batch // options.processes)
    looks, talks = (batches.forever(size) for size in sizes)
    started, total = time.perf_counter(), options.look_steps + options.steps
    for step in range(1, total + 1):
        talking = step > options.look_steps
        losses = one_step(trainee, next(talks if talking else looks), talking, options)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * learning_rate(step, total)
            optimiser.step()
            optimiser.zero_grad()
        if held_out and step % 50 == 0:
            print(
                f"step {step}/{total}  {losses}  {(time.perf_counter() - started) / 60:.1f} minutes",
                flush=True,
            )
        if held_out and (step % 250 == 0 or step == total):
            tokens, exact = exam(trainee, held_out, 512 if step == total else 128)
            print(f"step {step}  held out: tokens {tokens:.2%}  whole captions {exact:.2%}", flush=True)
            export(trainee.captioner, build_processor(batches.tokenizer), options.to)


def learn(rank: int, options: argparse.Namespace, meeting: str) -> None:
    """One process: draw a share of the lessons, learn in step with the others; the first one exports."""
    torch.set_num_threads(1 if options.processes > 1 else options.threads)
    if options.processes > 1:
        # A patient limit: a machine that pauses a long training should not end it.
        patience, count = timedelta(hours=12), options.processes
        distributed.init_process_group(
            "gloo", timeout=patience, init_method=meeting, rank=rank, world_size=count
        )
    share = options.pool // options.processes
    # Splits of their own: no picture that `render.py` ever writes is among the lessons.
    lessons = draw_lessons(rank * share, share, options.seed, "captioner-train")
    held_out = None if rank else draw_lessons(0, 512, options.seed, "captioner-exam")
    tokenizer = build_tokenizer(sample_captions(6000, options.seed), RELATION_CLASSES)
    torch.manual_seed(options.seed)  # every process starts from the same weights
    trainee = Trainee(build_model(tokenizer))
    start_well(trainee.captioner, pixels_of(draw_lessons(0, 512, options.seed, "captioner-words").images))
    batches = Batches(lessons, tokenizer, options.seed * 100 + rank)
    if rank == 0:
        count = sum(p.numel() for p in trainee.captioner.parameters())
        print(f"{options.pool} lessons, {len(tokenizer)} tokens, {count:,} parameters", flush=True)
    train(trainee, batches, held_out and Batches(held_out, tokenizer, 0), options)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    result.add_argument(
        "--to", type=Path, required=True, help="folder of the model; replaced in one move every 250 steps"
    )
    result.add_argument(
        "--look-steps", type=int, default=1400, help="batches for the vision tower alone, at first"
    )
    result.add_argument(
        "--look-batch", type=int, default=64, help="pictures in each of these, over all processes"
    )
    result.add_argument("--steps", type=int, default=1000, help="batches for the whole model, after that")
    result.add_argument("--batch", type=int, default=32, help="pictures in each of these, over all processes")
    result.add_argument(
        "--pool", type=int, default=48_000, help="different pictures to draw; passed over repeatedly"
    )
    result.add_argument(
        "--rate", type=float, default=1e-3, help="peak learning rate of AdamW; Muon's is ten times it"
    )
    result.add_argument("--patch-weight", type=float, default=3.0, help="weight of the patch-naming lesson")
    result.add_argument("--seed", type=int, default=0, help="of weights, pictures and prompts")
    result.add_argument(
        "--processes", type=int, default=2, help="each learns from its share of a batch on one core"
    )
    result.add_argument("--threads", type=int, default=2, help="cores to use where --processes is 1")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the lessons, train, export."""
    options = parser().parse_args(argv)
    if options.processes == 1:
        learn(0, options, "")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        # Small models on few cores: processes with a thread each waste less than one process with threads.
        multiprocessing.spawn(learn, args=(options, f"file://{folder}/meeting"), nprocs=options.processes)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
