"""Share of a bare vLLM engine's speed that the captioning pipeline keeps: same pictures, settings and engine
version, one run.

Run `python benchmarks/captioning.py [--rows 6144]`. It draws scenes, ingests them, captions them with a bare
engine (pictures decoded beforehand, all requests at once), through `gpt4image caption`, and through
`ray.data.llm` reading the same Parquet files; each once loaded: the rate from each engine's first finished
part of the work to its last.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import record

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
GOAL = 0.95
CLASSES = 12

BARE = """
import json, os, sys, time
from PIL import Image
from pipeline.sources import images
from pipeline.captioners.vllm import VLLMCaptioner
from pipeline.config import CaptionConfig
from pipeline.encoders.models import resolve
from pipeline.store import Store
store, config = Store(sys.argv[1]), CaptionConfig(store=sys.argv[1], caption_preset="scenes")
captioner = VLLMCaptioner(config, resolve(config.model))
shards = [store.read_shard("images", "", shard, ["id", "image"]) for shard in range(store.dataset.shards)]
rows = [row for shard in shards for row in shard.to_pylist()]
pictures = [images.decode_to_fit(row["image"], config.caption_edge) for row in rows]
captioner(pictures[:64], [config.prompt] * 64, ["warm"] * 64)
start = time.monotonic()
found = captioner(pictures, [config.prompt] * len(rows), [row["id"] for row in rows])
seconds = time.monotonic() - start
tokens = sum(c.output_tokens for c in found)
print(json.dumps({"rows": len(rows), "tokens": tokens, "seconds": seconds}), flush=True)
os._exit(0)  # the engine's own libraries print hundreds of lines when they are torn down in order
"""

# As its documentation has it for pictures: messages with data URLs, its own multimodal, template and engine
# stages.
RAY_LLM = """
import base64, json, logging, os, sys, time
from pipeline.captioners.vllm import _environment
_environment()
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # as it has it by default
from pipeline.session import start_ray
start_ray()
import ray, torch
from ray.data.llm import build_processor, vLLMEngineProcessorConfig
from pipeline.config import CaptionConfig
from pipeline.encoders.models import resolve
from pipeline.store import Store
logging.getLogger("ray.data").setLevel(logging.ERROR)
store, config = Store(sys.argv[1]), CaptionConfig(store=sys.argv[1], caption_preset="scenes")
ray.data.DataContext.get_current().enable_progress_bars = False
gpu = torch.cuda.is_available()

def messages(row):
    url = "data:image/jpeg;base64," + base64.b64encode(row["image"]).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": config.prompt}]
    return {"messages": [{"role": "user", "content": content}],
            "sampling_params": {"temperature": 0, "max_tokens": config.max_tokens}}

processor = build_processor(
    vLLMEngineProcessorConfig(
        model_source=resolve(config.model).location, batch_size=64, concurrency=(1, 1),
        log_engine_metrics=False,
        prepare_multimodal_stage=True, tokenize_stage=False, detokenize_stage=False,
        placement_group_config=None if gpu else {"bundle_per_worker": {"CPU": os.cpu_count()}},
        engine_kwargs={"dtype": "bfloat16", "enforce_eager": not gpu, "limit_mm_per_prompt": {"image": 1},
                       "max_model_len": config.context_length or None, "enable_prefix_caching": False,
                       "mm_processor_cache_gb": 0, "gpu_memory_utilization": config.gpu_memory_utilization},
    ),
    preprocess=messages,
    postprocess=lambda row: {"tokens": row["num_generated_tokens"]},
)
files = [f"{sys.argv[1]}/images/part-{k:05d}.parquet" for k in range(store.dataset.shards)]
blocks = max(2, store.dataset.rows // 128)
source = ray.data.read_parquet(files).select_columns(["id", "image"]).repartition(blocks)
times, tokens = [], []
for row in processor(source).iter_rows():
    times.append(time.monotonic())
    tokens.append(row["tokens"])
first = sum(at < times[0] + 0.5 for at in times)  # the rows that came with the first ones
found = {"rows": len(times) - first, "tokens": sum(tokens[first:]), "seconds": times[-1] - times[first - 1]}
print(json.dumps(found), flush=True)
os._exit(0)
"""


def main() -> int:
    """Prints a table and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=6144, help="pictures (default 6144)")
    parser.add_argument(
        "--shard-rows", type=int, default=512, help="pictures a shard (default 512, the product's own)"
    )
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/captioning.md")
    options = parser.parse_args()
    import torch

    # Without a GPU engines compute on the cores that decode, too: first one engine that has a core for
    # itself, as a GPU's has its device; then all cores, which the pipeline gives to one engine each, beside
    # one bare engine with all and as many at once.
    gpu, cores = torch.cuda.is_available(), os.cpu_count() or 1
    found: dict[str, dict[str, float]] = {}
    shares: dict[str, float] = {}

    def compare(name: str, bare: Callable[[], dict[str, float]], **settings: int) -> None:
        # The bare engine before and after: a machine that is shared changes its speed by more than what is
        # looked for.
        before, piped, after = bare(), _pipeline(store, **settings), bare()
        mean = {key: (before[key] + after[key]) / 2 for key in before}
        found.update({f"bare, {name}": mean, f"pipeline beside {name}": piped})
        shares[name] = piped["rows_per_s"] / mean["rows_per_s"]
        rates = [round(speed["rows_per_s"], 1) for speed in (before, piped, after)]
        print(f"{name}: bare, pipeline, bare: {rates} images/s", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        store = _ingested(Path(folder), options)
        if gpu:
            compare("one GPU", lambda: _script(BARE, store), replicas=1)
        else:
            compare("1 engine on 1 core", lambda: _script(BARE, store, 1), engine_cores=1)
            compare(f"1 engine on {cores} cores", lambda: _script(BARE, store, cores))
            compare(f"{cores} engines on {cores} cores", lambda: _side_by_side(store, cores))
        found["ray.data.llm"] = llm = _script(RAY_LLM, store)
    table = [f"{'':40}{'images/s':>10}{'tokens/s':>10}"]
    table += [
        f"{name:40}{speed['rows_per_s']:>10.1f}{speed['tokens_per_s']:>10.0f}"
        for name, speed in found.items()
    ]
    said = ", ".join(f"{share:.3f} of {name}" for name, share in shares.items())
    table.append(f"the pipeline makes {said} (goal {GOAL}); {options.rows} pictures")
    best = max(speed["rows_per_s"] for name, speed in found.items() if name.startswith("bare"))
    table.append(f"ray.data.llm makes {llm['rows_per_s'] / best:.3f} of the best of them on the same files")
    record.publish(
        "captioning",
        "Captioning: share of the bare engine's speed",
        f"python benchmarks/captioning.py --rows {options.rows}",
        table,
        ("ray", "torch", "transformers", "vllm"),
        save=options.save,
        value={name: round(share, 3) for name, share in shares.items()},
        unit="of the bare engine's images/s",
        goal=GOAL,
        ray_data_llm=round(llm["rows_per_s"] / best, 3),
        holds=min(shares.values()) >= GOAL,
    )
    return 0


def _ingested(folder: Path, options: argparse.Namespace) -> str:
    import ray

    from cluster import cli

    counts = [
        "--task",
        "relations",
        "--train-per-class",
        str(-(-options.rows // CLASSES)),
        "--val-per-class",
        "0",
    ]
    script = str(ROOT / "examples" / "scenes" / "render.py")
    subprocess.run(
        [sys.executable, script, "--to", str(folder / "scenes"), *counts], check=True, stdout=sys.stderr
    )
    store = str(folder / "store")
    assert (
        cli.main(
            [
                "ingest",
                "--images",
                str(folder / "scenes"),
                "--store",
                store,
                "--shard-rows",
                str(options.shard_rows),
            ]
        )
        == 0
    )
    ray.shutdown()  # it would take from the contenders' cores
    return store


def _script(code: str, store: str, cores: int = 0) -> dict[str, float]:
    return _rates([_start(code, store, cores)])


def _side_by_side(store: str, count: int) -> dict[str, float]:
    """So many bare engines of one core at once, each with all pictures; the sum of their rates."""
    return _rates([_start(BARE, store, 1) for _ in range(count)])


def _start(code: str, store: str, cores: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores)} if cores else None
    command = [sys.executable, "-c", code, store]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


def _rates(processes: list[subprocess.Popen[str]]) -> dict[str, float]:
    rates = {"rows_per_s": 0.0, "tokens_per_s": 0.0}
    for process in processes:
        said = process.communicate()[0]
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, "a contender")
        found = json.loads(said.splitlines()[-1])
        rates["rows_per_s"] += found["rows"] / found["seconds"]
        rates["tokens_per_s"] += found["tokens"] / found["seconds"]
    return rates


def _pipeline(store: str, **settings: int) -> dict[str, float]:
    """Rate between the engines' first receipts and their last, so that loading does not count."""
    import ray

    from cluster import cli
    from pipeline import placement
    from pipeline.config import CaptionConfig
    from pipeline.encoders import models
    from pipeline.inspect.estimate import seconds_per_row
    from pipeline.store import Store

    shutil.rmtree(Path(store) / "captions", ignore_errors=True)
    flags = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    assert cli.main(["caption", "--store", store, "--caption-preset", "scenes", *flags]) == 0
    opened, config = Store(store), CaptionConfig(store=store, caption_preset="scenes", **settings)  # type: ignore[arg-type]
    engines = placement.captioners(config, models.resolve(config.model), opened.dataset.rows).actors
    ray.shutdown()
    variant = opened.only_variant("captions")
    receipts = Path(store) / "captions" / variant / "receipts"
    counts = opened.receipts("captions", variant)
    written = sorted(
        (path.stat().st_mtime, counts[int(path.stem.split("-")[1])].rows)
        for path in receipts.glob("part-*.json")
    )
    rate = 1 / seconds_per_row(written, engines)
    tokens = [
        tokens
        for shard in range(opened.dataset.shards)
        for tokens in opened.read_shard("captions", variant, shard, ["output_tokens"])[
            "output_tokens"
        ].to_pylist()
    ]
    return {"rows_per_s": rate, "tokens_per_s": rate * sum(tokens) / len(tokens)}


if __name__ == "__main__":
    start = time.monotonic()
    code = main()
    print(f"{time.monotonic() - start:.0f} s in all", file=sys.stderr)
    raise SystemExit(code)
