"""Secrets that a run uses are found in nothing that it leaves behind or prints."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from cluster import packing
from pipeline.store import locations
from tests.pipeline.test_openai import FaultyServer

pytestmark = pytest.mark.alone
ROOT = Path(__file__).resolve().parent.parent.parent
SECRETS = {
    "OPENAI_API_KEY": "sk-canary-of-the-server",
    "AWS_ACCESS_KEY_ID": "AKIACANARYOFTHEBUCKET",
    "AWS_SECRET_ACCESS_KEY": "canary/of+the/bucket",
    "HF_TOKEN": "hf_canaryOfTheHub",
    "MLFLOW_TRACKING_USERNAME": "canary-user-of-mlflow",
    "MLFLOW_TRACKING_PASSWORD": "canary-password-of-mlflow",
    "RAY_AUTH_TOKEN": "canary" * 8,
}


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    server = FaultyServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def left_behind(root: Path, uri: str) -> Iterator[tuple[str, bytes]]:
    """Every file below the folder and the address; Parquet as what it holds, which is compressed."""
    filesystem, path = locations.resolve(uri)
    places: list[tuple[fs.FileSystem, str]] = [(filesystem, path), (fs.LocalFileSystem(), str(root))]
    for system, top in places:
        for info in system.get_file_info(fs.FileSelector(top, recursive=True)):
            if info.type != fs.FileType.File:
                continue
            with system.open_input_stream(info.path, compression=None) as stream:
                data = stream.read()
            if info.path.endswith(".parquet"):
                table = pq.read_table(pa.BufferReader(data))  # type: ignore[no-untyped-call]
                data = (
                    b"".join(
                        str(value).encode(errors="replace")
                        for row in table.to_pylist()
                        for name, value in row.items()
                        if name != "embedding"
                    )
                    + str(table.schema.metadata).encode()
                )
            yield info.path, data


def test_no_secret_is_printed_recorded_or_stored(
    tmp_path: Path, picture_folder: Callable[..., Path], bucket: str, server: FaultyServer
) -> None:
    images = picture_folder({"train/a": 10, "train/b": 10, "val/a": 4, "val/b": 4})
    left = tmp_path / "left"
    left.mkdir()
    store, run = f"{bucket}/secrets/store", str(left / "run")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= SECRETS | {"MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false"}
    commands = [
        f"describe --images {images} --store {store} --captioner openai --base-url {server.url} --model tiny",
        f"train --store {store} --run {run} --preset smoke --batch-size 8 --workers 1 --log-artifacts model"
        f" --tracking-uri sqlite:///{left}/mlflow.db",
        f"evaluate {run} --to {left}/evaluation",
        f"export {run} --to {left}/model",
        f"inspect {store} --to {left}/inspect.html",
    ]
    printed = b""
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "cluster.cli", *command.split()],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout.decode()[-3000:]
        printed += done.stdout
    # They were in use: the server was asked with the key, the bucket signed with the other.
    assert server.authorization == {f"Bearer {SECRETS['OPENAI_API_KEY']}"}

    packing.pack(str(ROOT), str(left / "sent"), packing.names_of(str(ROOT), ()))
    everything = [("what was printed", printed), *left_behind(left, f"{bucket}/secrets")]
    names = {name.rsplit("/", 1)[-1] for name, _ in everything}
    assert {"dataset.json", "variant.json", "config.json", "mlflow.db", "metrics.jsonl"} <= names
    for name, secret in SECRETS.items():
        forms = (secret.encode(), base64.b64encode(secret.encode()))
        assert [place for place, data in everything if any(form in data for form in forms)] == [], name
