"""Shared fixtures: one Ray and one described store for the whole run; everything is written below pytest's
temporary folders."""

from __future__ import annotations

import io
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
# Nothing is fetched: a test that needs the hub is a test that is wrong.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What a shell runs in the background is deaf to Ctrl-C, and so would be all that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


RAY = "the session's Ray"


@cache
def group_of(file: str) -> str:
    """Of test processes side by side one runs all files that need the session's Ray; any other file stays in
    one, too."""
    text = (ROOT / file).read_text(encoding="utf-8")
    return RAY if "ray_session" in text or "described:" in text else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.partition("::")[0])

    return Groups(config, log)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """Toy models in this process: the threads of their small steps would mostly wait for each other, and for
    each other's core where a machine has other work. What Ray starts has the threads that Ray gives it."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """A bucket of a real S3 protocol server on loopback; every process started from here finds it through the
    environment."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request, otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    boto3.client("s3").create_bucket(Bucket="pictures")
    yield "s3://pictures"
    server.stop()
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})


# A server of its own process, since pyarrow's client for it waits with the interpreter's lock held; of many
# threads, since it would otherwise answer nobody while one client reads a part of a file.
GOOGLE = """
import sys
from http.server import ThreadingHTTPServer
from types import SimpleNamespace
from gcp_storage_emulator import server
server.server = SimpleNamespace(HTTPServer=ThreadingHTTPServer)
server.RequestHandler.log_message = lambda *_: None
server.create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="pictures").start()
print("ready", flush=True)
"""


@pytest.fixture(scope="session")
def gs_bucket() -> Iterator[str]:
    """A bucket of a server on loopback that speaks Google Cloud Storage's protocol."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-c", GOOGLE, str(port)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert server.stdout is not None and server.stdout.readline() == b"ready\n"
    os.environ["STORAGE_EMULATOR_HOST"] = f"http://127.0.0.1:{port}"
    yield "gs://pictures"
    server.kill()
    server.wait()
    del os.environ["STORAGE_EMULATOR_HOST"]


@pytest.fixture(scope="session")
def ray_session(bucket: str, gs_bucket: str) -> Iterator[None]:
    """One local Ray for all tests that need it; verbs called in this process join it. Its workers know the
    buckets."""
    from pipeline.session import start_ray

    start_ray()
    yield
    import ray

    ray.shutdown()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rendered image folder: 12 classes, 16 training and 8 validation pictures of each."""
    folder = tmp_path_factory.mktemp("scenes")
    script = ROOT / "examples" / "scenes" / "render.py"
    counts = ["--task", "relations", "--train-per-class", "16", "--val-per-class", "8", "--workers", "1"]
    subprocess.run(
        [sys.executable, str(script), "--to", str(folder), *counts], check=True, capture_output=True
    )
    return folder


@pytest.fixture(scope="session")
def described(ray_session: None, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that the real engine captioned and the real encoder embedded, in shards of 64."""
    from cluster import cli

    store = tmp_path_factory.mktemp("described") / "store"
    describe = ["describe", "--caption-preset", "scenes", "--images", str(scenes), "--store", str(store)]
    assert cli.main([*describe, "--shard-rows", "64"]) == 0
    return store


@pytest.fixture
def picture_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes an image folder of noise: picture_folder({"train/a": 3, "train/b": 2})."""

    def make(counts: dict[str, int], name: str = "pictures") -> Path:
        rng = np.random.default_rng(0)
        for folder, count in counts.items():
            target = tmp_path / name / folder
            target.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                (target / f"{number:03}.jpg").write_bytes(jpeg(rng, 20 + number, 30))
        return tmp_path / name

    return make


def jpeg(rng: np.random.Generator, width: int, height: int) -> bytes:
    """An encoded picture of noise."""
    sink = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(sink, "JPEG")
    return sink.getvalue()


@pytest.fixture(scope="session")
def make_store() -> Callable[..., Path]:
    """Builds a small complete store by hand, without Ray or models: images, captions and random
    embeddings."""
    return build_store


def build_store(
    folder: Path,
    *,
    classes: int = 3,
    train: int = 24,
    val: int = 9,
    test: int = 0,
    dim: int = 8,
    shard_rows: int = 10,
    size: int = 40,
    missing_captions: int = 0,
) -> Path:
    """Pictures whose colour is their class; captions repeat, so that some are equal; the first training rows
    may lack one."""
    import pyarrow as pa

    from pipeline.store import CAPTIONS, IMAGES, Dataset, Split, Store, embeddings_table

    rng = np.random.default_rng(1)
    splits, shards, first = {}, [], 0
    for split, count in (("train", train), ("val", val), *([("test", test)] if test else [])):
        sizes = [min(shard_rows, count - start) for start in range(0, count, shard_rows)]
        splits[split] = Split(rows=count, first_shard=first, num_shards=len(sizes))
        shards += [(split, rows) for rows in sizes]
        first += len(sizes)
    names = [f"class {n}" for n in range(classes)]
    source = {"kind": "test", "max_pixels": 10**6}
    dataset = Dataset(
        schema_version=1, classes=names, splits=splits, rows=train + val, shards=len(shards), source=source
    )
    store = Store.create(str(folder), dataset)
    settings = {"engine": "imported", "versions": {}}
    store.write_variant("captions", "test", settings)
    store.write_variant(
        "embeddings", "test", {"captions": "test", "encoder": "none", "pooling": "mean", "versions": {}}
    )
    vectors = rng.normal(size=(classes * 2, dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for shard, (split, rows) in enumerate(shards):
        images, captions, embeddings = [], [], []
        for row in range(rows):
            label = int(rng.integers(classes))
            kind = label * 2 + int(rng.integers(2))
            pixels = np.clip(rng.normal(80 * label, 30, (size, size + row, 3)), 0, 255).astype(np.uint8)
            sink = io.BytesIO()
            Image.fromarray(pixels).save(sink, "JPEG")
            key = f"{split}/{label}/{shard}-{row}.jpg"
            error = "no caption" if split == "train" and shard == 0 and row < missing_captions else None
            images.append(
                {
                    "id": key,
                    "image": sink.getvalue(),
                    "label": label,
                    "split": split,
                    "width": size + row,
                    "height": size,
                }
            )
            captions.append({"id": key, "caption": None if error else f"caption {kind}", "error": error})
            embeddings.append(
                {"id": key, "error": error} | {"embedding": vectors[kind], "tokens": 3, "truncated": False}
            )
        store.write_shard("images", "", shard, pa.Table.from_pylist(images, schema=IMAGES), seconds=0)
        store.write_shard(
            "captions", "test", shard, pa.Table.from_pylist(captions, schema=CAPTIONS), seconds=0
        )
        store.write_shard("embeddings", "test", shard, embeddings_table(embeddings, dim), seconds=0)
    return folder
