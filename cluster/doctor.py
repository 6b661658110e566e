"""`doctor`: what this machine, or with --address a cluster, can do, part by part, and how to mend what is
missing. Ten seconds; a minute with --deep."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from cluster.config import DoctorConfig, SubmitConfig

MEND_SETUP = "run `make setup` in the checkout"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question (`diagnosis`), and what to do where the answer is no; `needed`: nothing works without."""

    name: str
    question: str
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
        name="machine",
        question="machine",
        mend="the demo wants 8 GiB of memory and 2 GiB of disk",
    ),
    Check(
        name="python",
        question="python",
        mend="install Python 3.11 and run `make setup PYTHON=/path/to/python3.11`",
    ),
    Check(name="ray", question="ray", mend=MEND_SETUP),
    Check(
        name="torch and torchvision",
        question="torch",
        mend=f"if torchvision does not match torch (a CUDA build beside a CPU build): {MEND_SETUP}, "
        "which writes an import hook",
    ),
    Check(
        name="cuda",
        question="cuda",
        mend="on a GPU machine: install the NVIDIA driver, then `make setup ACCELERATOR=cuda`",
        needed=False,
    ),
    Check(
        name="vllm engine",
        question="vllm",
        mend=f"{MEND_SETUP}; until then use --captioner transformers",
    ),
    Check(
        name="captioner",
        question="captioner",
        mend="the shipped model lies in examples/scenes/captioner of the checkout; run from there or "
        "pass --model",
    ),
    Check(
        name="text encoder",
        question="text_encoder",
        mend="part of the CPU environment; elsewhere the same model comes from the hub (network), which "
        "makes another variant",
        needed=False,
    ),
    Check(name="timm", question="timm", mend=MEND_SETUP),
    Check(name="mlflow", question="mlflow", mend=MEND_SETUP),
)

DEEP = (
    Check(
        name="ray starts",
        question="ray_starts",
        mend="see /tmp/ray/session_latest/logs; is /tmp writable and /dev/shm at least 2 GiB?",
    ),
    Check(
        name="vllm captions",
        question="vllm_captions",
        mend="use --captioner transformers, and see the engine's own message above",
    ),
    Check(name="encoder encodes", question="encoder_encodes", mend=MEND_SETUP),
)


def run(config: DoctorConfig) -> int:
    """Prints the findings; 0 when nothing that is needed is missing."""
    if config.address.startswith(("http://", "https://")):
        return _as_a_job(config)
    if config.address:
        from cluster import health

        findings = health.examine(config)
    else:
        checks = QUICK + (DEEP if config.deep else ())
        with ThreadPoolExecutor(max_workers=2) as pool:
            findings = list(pool.map(_examine, checks))
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


def _as_a_job(config: DoctorConfig) -> int:
    """Looks from inside, where the job server is all that can be reached: the checkout is sent along."""
    from cluster import jobs

    flags = ["--address", "auto"]
    for name in ("store", "caption_preset", "encoder_preset"):
        flags += [f"--{name.replace('_', '-')}", value] if (value := getattr(config, name)) else []
    verb = ["doctor", *flags, *(["--json"] if config.json else [])]
    return jobs.submit(SubmitConfig(address=config.address), verb)


def _examine(check: Check) -> Finding:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "cluster.diagnosis", check.question],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
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
