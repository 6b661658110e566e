"""Share of a bare vLLM engine's speed that the captioning pipeline keeps: same pictures, settings and engine version, one run.

Run `python benchmarks/captioning.py [--rows 6144]`. It draws scenes, ingests them, captions them with a bare engine (pictures
decoded beforehand, all requests at once), through `gpt4image caption`, and through `ray.data.llm` reading the same Parquet
files; each once loaded: the rate from the first finished part of the work to the last.
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
from pathlib import Path

import record

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
GOAL = 0.95
CLASSES = 12

BARE = """
import json, os, sys, time
from PIL import Image
from pipeline import images
from pipeline.captioners.vllm import VLLMCaptioner
from pipeline.config import CaptionConfig
from pipeline.models import resolve
from pipeline.store import Store
store, config = Store(sys.argv[1]), CaptionConfig(store=sys.argv[1])
captioner = VLLMCaptioner(config, resolve(config.model))
shards = [store.read_shard("images", "", shard, ["id", "image"]) for shard in range(store.dataset.shards)]
rows = [row for shard in shards for row in shard.to_pylist()]
pictures = [images.decode_to_fit(row["image"], config.caption_edge) for row in rows]
captioner(pictures[:64], [config.prompt] * 64, ["warm"] * 64)
start = time.monotonic()
found = captioner(pictures, [config.prompt] * len(rows), [row["id"] for row in rows])
seconds = time.monotonic() - start
print(json.dumps({"rows": len(rows), "tokens": sum(c.output_tokens for c in found), "seconds": seconds}), flush=True)
os._exit(0)  # the engine's own libraries print hundreds of lines when they are torn down in order
"""

# As its documentation has it for pictures: messages with data URLs, its own multimodal, template and engine stages.
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
from pipeline.models import resolve
from pipeline.store import Store
logging.getLogger("ray.data").setLevel(logging.ERROR)
store, config = Store(sys.argv[1]), CaptionConfig(store=sys.argv[1])
ray.data.DataContext.get_current().enable_progress_bars = False
gpu = torch.cuda.is_available()

def messages(row):
    url = "data:image/jpeg;base64," + base64.b64encode(row["image"]).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": config.prompt}]
    return {"messages": [{"role": "user", "content": content}],
            "sampling_params": {"temperature": 0, "max_tokens": config.max_tokens}}

processor = build_processor(
    vLLMEngineProcessorConfig(
        model_source=resolve(config.model).location, batch_size=64, concurrency=(1, 1), log_engine_metrics=False,
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
source = ray.data.read_parquet(files).select_columns(["id", "image"]).repartition(max(2, store.dataset.rows // 128))
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=6144, help="pictures (default 6144)")
    parser.add_argument("--shard-rows", type=int, default=512, help="pictures a shard (default 512, the product's own)")
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/captioning.md")
    options = parser.parse_args()
    import torch

    # Without a GPU the engine computes on the cores that decode, too: once it has one core, as a GPU's engine has its device for
    # itself, and once all, where whatever else runs takes from it.
    cores = [0] if torch.cuda.is_available() else [1, os.cpu_count() or 1]
    found: dict[str, dict[str, float]] = {}
    shares: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = _ingested(Path(folder), options)
        for count in cores:
            name = f", {count} cores" if count > 1 else ", 1 core" if count else ""
            # The bare engine before and after: a machine that is shared changes its speed by more than what is looked for.
            before, piped, after = _script(BARE, store, count), _pipeline(store, count), _script(BARE, store, count)
            bare = {key: (before[key] + after[key]) / 2 for key in before}
            found |= {f"bare engine{name}": bare, f"pipeline{name}": piped}
            shares[count] = piped["rows_per_s"] / bare["rows_per_s"]
            spread = [before["rows_per_s"], after["rows_per_s"]]
            print(f"{name.strip(', ') or 'GPU'}: bare {spread}, pipeline {piped['rows_per_s']}", file=sys.stderr, flush=True)
        found["ray.data.llm"] = llm = _script(RAY_LLM, store)
    table = [f"{'':24}{'images/s':>10}{'tokens/s':>10}"]
    table += [f"{name:24}{speed['rows_per_s']:>10.1f}{speed['tokens_per_s']:>10.0f}" for name, speed in found.items()]
    said = ", ".join(f"{share:.3f}" + f" with {count} cores" * bool(count) for count, share in shares.items())
    table.append(f"share kept: {said} (goal {GOAL}); {options.rows} pictures, from the first shard's receipt to the last's")
    table.append(f"ray.data.llm keeps {llm['rows_per_s'] / bare['rows_per_s']:.3f} on the same files")
    record.publish(
        "captioning", "Captioning: share of the bare engine's speed", f"python benchmarks/captioning.py --rows {options.rows}",
        table, ("ray", "torch", "transformers", "vllm"), save=options.save,
        value={str(count or "GPU"): round(share, 3) for count, share in shares.items()},
        unit="share of the bare engine, by the engine's cores", goal=GOAL,
        ray_data_llm=round(llm["rows_per_s"] / bare["rows_per_s"], 3), holds=min(shares.values()) >= GOAL,
    )  # fmt: skip
    return 0


def _ingested(folder: Path, options: argparse.Namespace) -> str:
    import ray

    from cluster import cli

    counts = ["--train-per-class", str(-(-options.rows // CLASSES)), "--val-per-class", "0"]
    script = str(ROOT / "examples" / "scenes" / "render.py")
    subprocess.run([sys.executable, script, "--to", str(folder / "scenes"), *counts], check=True, stdout=sys.stderr)
    store = str(folder / "store")
    assert (
        cli.main(["ingest", "--images", str(folder / "scenes"), "--store", store, "--shard-rows", str(options.shard_rows)]) == 0
    )
    ray.shutdown()  # it would take from the contenders' cores
    return store


def _script(code: str, store: str, cores: int = 0) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores)} if cores else None
    command = [sys.executable, "-c", code, store]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    return {"rows_per_s": found["rows"] / found["seconds"], "tokens_per_s": found["tokens"] / found["seconds"]}


def _pipeline(store: str, cores: int) -> dict[str, float]:
    """Rate between the first receipt and the last, so that loading the engine does not count."""
    import ray

    from cluster import cli
    from pipeline.store import Store

    shutil.rmtree(Path(store) / "captions", ignore_errors=True)
    assert cli.main(["caption", "--store", store, "--engine-cores", str(cores)]) == 0
    ray.shutdown()
    opened = Store(store)
    variant = opened.only_variant("captions")
    receipts = Path(store) / "captions" / variant / "receipts"
    written = sorted((path.stat().st_mtime, int(path.stem.split("-")[1])) for path in receipts.glob("part-*.json"))
    seconds = written[-1][0] - written[0][0]
    rows = tokens = 0
    for _, shard in written[1:]:
        counts = opened.read_shard("captions", variant, shard, ["output_tokens"])["output_tokens"].to_pylist()
        rows, tokens = rows + len(counts), tokens + sum(counts)
    return {"rows_per_s": rows / seconds, "tokens_per_s": tokens / seconds}


if __name__ == "__main__":
    start = time.monotonic()
    code = main()
    print(f"{time.monotonic() - start:.0f} s in all", file=sys.stderr)
    raise SystemExit(code)
