"""Whatever is killed, and when: the store ends with the same files and the same rows, nothing lost and
nothing twice.

Two nodes of a real cluster on loopback, the real engine and encoder, drivers in processes of their own. What
is killed when is chosen by what the store holds at that moment, or, with RANDOM_KILLS=20 in the environment,
drawn under fixed seeds, twenty blows and more; everything killed was started here and is named by its id.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.__main__ import main
from pipeline.config import SourceConfig
from pipeline.store import Store, lock
from tests.nodes import ROOT, Driver, TwoNodes
from tests.stores import ingest

pytestmark = pytest.mark.alone
# Small shards: 36 of them, so that there are many moments between the first and the last.
SHARD_ROWS = "8"
# Two engines: while one is struck the other goes on. They have a core each; one alone, with a core too,
# computes the same and is up sooner.
DESCRIBE = ["describe", "--caption-preset", "scenes", "--device", "cpu", "--replicas", "2", "--store"]
ONE_ENGINE = ["--replicas", "1", "--engine-cores", "1"]


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    cluster = TwoNodes()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    """A store with pictures and nothing else, in 36 shards of 8."""
    return ingested(scenes, tmp_path_factory.mktemp("once") / "fresh")


def ingested(images: Path, store: Path, limit: int = 0) -> Path:
    ingest(SourceConfig(images=str(images), store=str(store), shard_rows=int(SHARD_ROWS), limit=limit))
    return store


@pytest.fixture(scope="module")
def uninterrupted(fresh: Path, nodes: TwoNodes) -> dict[str, str]:
    store = fresh.parent / "uninterrupted"
    shutil.copytree(fresh, store)
    assert run(nodes, [*DESCRIBE, str(store), *ONE_ENGINE]).wait(600) == 0
    return files_of(store)


def run(nodes: TwoNodes, arguments: list[str], **settings: str) -> Driver:
    """A driver in a process group of its own."""
    return nodes.run(["-m", "pipeline", *arguments], **settings)


def files_of(store: Path) -> dict[str, str]:
    """Every file with what it must hold: the bytes of shards, the counts and checksums of receipts."""
    found = {}
    for path in sorted(store.rglob("*")):
        if path.is_dir() or path.parent.name == "underway" or path.name == lock.FILE:
            continue
        data = path.read_bytes()
        if path.parent.name == "receipts":
            receipt = json.loads(data)
            assert (
                receipt["checksum"]
                == hashlib.sha256((path.parent.parent / f"{path.stem}.parquet").read_bytes()).hexdigest()
            )
            data = json.dumps(
                [receipt[name] for name in ("shard", "rows", "failed", "bytes", "checksum")]
            ).encode()
        found[str(path.relative_to(store))] = hashlib.sha256(data).hexdigest()
    return found


def check_rows(store: Path) -> None:
    """Each picture has one row in every stage."""
    opened = Store(str(store))
    for stage in ("captions", "embeddings"):
        ids: Counter[str] = Counter()
        for shard in range(opened.dataset.shards):
            images = opened.read_shard("images", "", shard, ["id"])["id"]
            rows = opened.read_shard(stage, opened.only_variant(stage), shard, ["id", "error"])  # type: ignore[arg-type]
            assert rows["id"].equals(images)
            assert rows["error"].null_count == len(rows)
            ids.update(rows["id"].to_pylist())
        assert set(ids.values()) == {1} and len(ids) == opened.dataset.rows


def strike(victim: str, nodes: TwoNodes, driver: Driver) -> bool:
    """Kills one thing; False when there is none of it at the moment."""
    if victim == "raylet":
        nodes.kill_raylet()
        return True
    if victim == "driver":
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        return True
    name = {"actor": "CaptionPictures", "encoder": "EmbedCaptions", "writer": "WriteCaptions"}[victim]
    for process in nodes.actors(name):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            return True
    return False


def receipts(store: Path, stage: str) -> int:
    return sum(path.parts[len(store.parts)] == stage for path in store.rglob("receipts/part-*.json"))


# When a blow falls: told the store, a moment looks at what it holds now and says what to wait for.
Moment = Callable[[Path], Callable[[], bool]]


def after(seconds: float) -> Moment:
    def begin(_: Path) -> Callable[[], bool]:
        end = time.monotonic() + seconds
        return lambda: time.monotonic() >= end

    return begin


def further(stage: str, shards: int) -> Moment:
    """So many more shards of the stage have their receipts."""

    def begin(store: Path) -> Callable[[], bool]:
        wanted = receipts(store, stage) + shards
        return lambda: receipts(store, stage) >= wanted

    return begin


def an_engine_loads(store: Path) -> Callable[[], bool]:
    def notes() -> set[Path]:
        return set(store.glob("captions/*/underway/engine-*.json"))

    before = notes()
    return lambda: bool(notes() - before)


def all_is_captioned(store: Path) -> Callable[[], bool]:
    """And nothing is embedded: the encoder loads."""
    return lambda: receipts(store, "captions") == receipts(store, "images") > 0


# Each thing that can die, in each state in which its death means something else. After the death of a driver
# a receipt is taken away, too, as if the blow had fallen between a shard and its receipt.
CHOSEN: list[tuple[str, Moment]] = [
    ("driver", further("images", 1)),
    ("driver", an_engine_loads),
    ("raylet", an_engine_loads),
    ("actor", further("captions", 1)),
    ("driver", further("captions", 6)),
    ("writer", further("captions", 1)),
    ("raylet", further("captions", 4)),
    ("driver", all_is_captioned),
    ("encoder", further("embeddings", 1)),
    ("driver", further("embeddings", 4)),
]


def drawn(seed: int) -> list[tuple[str, Moment]]:
    """Five blows, each some seconds after the last."""
    rng = random.Random(seed)
    victims = rng.choices(["actor", "raylet", "driver", "writer", "encoder"], [6, 3, 5, 2, 1], k=5)
    return [(victim, after(rng.uniform(0.2, 9))) for victim in victims]


def forget_a_receipt(store: Path) -> None:
    if found := sorted(store.rglob("receipts/part-*.json"), key=lambda path: path.stat().st_mtime):
        found[-1].unlink()


def describe_under_blows(
    command: list[str],
    store: Path,
    nodes: TwoNodes,
    blows: list[tuple[str, Moment]],
    struck: Counter[str],
    endings: Counter[int],
) -> None:
    """Until the command has ended well; leaves in `blows` what it was too late for."""
    driver = run(nodes, command)
    while True:
        if blows:
            victim, moment = blows[0]
            arrived = moment(store)
            while not arrived() and driver.poll() is None:
                time.sleep(0.02)
            if driver.poll() is None and strike(victim, nodes, driver):
                struck[victim] += 1
                blows.pop(0)
        code = driver.poll() if blows else driver.wait(600)
        if code == 0:
            return
        if code is not None:  # a user would give the same command again
            endings[code] += 1
            assert sum(endings.values()) < 60, endings
            forget_a_receipt(store)
            driver = run(nodes, command)


def test_whatever_is_killed_the_files_are_those_of_an_uninterrupted_run(
    fresh: Path,
    scenes: Path,
    nodes: TwoNodes,
    uninterrupted: dict[str, str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """RANDOM_KILLS=20 takes random blows instead of the chosen ones, at least so many, five a store."""
    kills = int(os.environ.get("RANDOM_KILLS", "0"))
    plans = map(drawn, range(kills)) if kills else iter([list(CHOSEN)])
    kills = kills or len(CHOSEN)
    struck: Counter[str] = Counter()
    endings: Counter[int] = Counter()
    blows: list[tuple[str, Moment]] = []
    for attempt in range(20):
        store = fresh.parent / f"struck-{attempt}"
        command = [*DESCRIBE, str(store), "--images", str(scenes), "--shard-rows", SHARD_ROWS]
        blows = next(plans, blows)  # of the chosen ones those that an earlier run was too fast for
        describe_under_blows(command, store, nodes, blows, struck, endings)
        assert main(command) == 0
        assert capfd.readouterr().err.count("nothing to do") == 3, "the second time"
        assert files_of(store) == uninterrupted, (attempt, struck)
        check_rows(store)
        if sum(struck.values()) >= kills:
            break
    print(f"\nkilled {dict(struck)}; drivers that ended before they were done, by exit code: {dict(endings)}")
    assert sum(struck.values()) >= kills and all(
        struck[victim] for victim in ("actor", "raylet", "driver")
    ), struck


def test_of_two_runs_at_the_same_time_one_is_refused_and_the_other_ends_as_ever(
    fresh: Path, nodes: TwoNodes, uninterrupted: dict[str, str]
) -> None:
    store = fresh.parent / "two-at-once"
    shutil.copytree(fresh, store)
    drivers = [run(nodes, [*DESCRIBE, str(store), *ONE_ENGINE]) for _ in range(2)]
    assert sorted(driver.wait(600) for driver in drivers) == [0, 2], [driver.told() for driver in drivers]
    assert files_of(store) == uninterrupted
    check_rows(store)


def test_a_killed_engine_process_is_started_again(scenes: Path, tmp_path: Path, nodes: TwoNodes) -> None:
    """The engine in a process of its own, as vLLM has it by default: its death alone, once it begins, once
    while it loads and once at work, costs a shard, and no row."""
    # One picture at a time: between processes, what is batched together depends on their speed, and words on
    # what is batched.
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "RAY_ADDRESS": "", "THIS_TEST": str(tmp_path)}
    common = ["caption", "--caption-preset", "scenes", "--engine-batch", "1", *ONE_ENGINE, "--store"]
    stores = [ingested(scenes, tmp_path / name, limit=96) for name in ("whole", "killed")]
    beside, driver = (
        run(nodes, [*common, str(store)], **settings, THIS_STORE=str(store)) for store in stores
    )
    killed: set[int] = set()
    seen: set[str] = set()
    notes = f"{stores[1]}/captions/*/underway/part-*.json"
    while len(killed) < 3 and driver.poll() is None:
        for process in engines_of(stores[1], seen):
            if process.pid not in killed and len(killed) < 3:
                time.sleep((0.5, 4.5, 0)[len(killed)])
                while len(killed) == 2 and not glob.glob(notes) and driver.poll() is None:
                    time.sleep(0.1)  # a shard's note is written when its captioning begins
                time.sleep(0.3 if len(killed) == 2 else 0.0)
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
                    killed.add(process.pid)
        time.sleep(0.2)
    assert driver.wait(600) == 0, driver.told()
    assert beside.wait(600) == 0, beside.told()
    assert len(killed) == 3, (killed, seen, driver.told())
    assert files_of(stores[1]) == files_of(stores[0])
    assert not left_of(str(tmp_path)), "a worker of an engine that died while it loaded"


def engines_of(store: Path, seen: set[str]) -> list[psutil.Process]:
    """Engine processes of the run of that store that have a worker, known by their environment: titles are
    set late and cut short. `seen` gains the command lines of all processes of that run."""
    of_run: dict[int, tuple[psutil.Process, int, str]] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("THIS_STORE") == str(store):
                line = " ".join(process.cmdline())
                seen.add(line[:120])
                of_run[process.pid] = process, process.ppid(), line
    spawned = {pid for pid, (*_, line) in of_run.items() if "spawn_main" in line or "EngineCore" in line}
    parents = {of_run[pid][1] for pid in spawned}
    return [of_run[pid][0] for pid in spawned & parents]


def left_of(test: str) -> list[str]:
    """Processes whose environment says that this test started them, once they have had time to end."""
    deadline = time.monotonic() + 30
    while True:
        left = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("THIS_TEST") == test and process.status() != psutil.STATUS_ZOMBIE:
                    left.append(process.name())
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.5)


def test_a_full_disk_stops_with_a_clear_error_and_the_run_goes_on_when_there_is_room(
    fresh: Path, nodes: TwoNodes, uninterrupted: dict[str, str], tmp_path: Path
) -> None:
    """A small file system, really full."""
    small, store = tmp_path / "small", tmp_path / "small" / "store"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(small)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("no file system can be mounted here: this test needs the right to (root)")
    try:
        shutil.copytree(fresh, store)
        free = shutil.disk_usage(small).free
        (small / "ballast").write_bytes(b"\0" * (free - 48 * 1024))
        driver = subprocess.run(
            [sys.executable, "-m", "pipeline", *DESCRIBE, str(store)],
            cwd=ROOT,
            text=True,
            capture_output=True,
            env=os.environ | {"RAY_ADDRESS": nodes.address, "HF_HUB_OFFLINE": "1"},
            check=False,
        )
        assert driver.returncode == 1, driver.stderr[-2000:]
        assert "no space left to write to" in driver.stderr and "What is done is kept" in driver.stderr
        assert "Traceback" not in driver.stderr, driver.stderr[-3000:]
        (small / "ballast").unlink()
        assert run(nodes, [*DESCRIBE, str(store), *ONE_ENGINE]).wait(600) == 0
        assert files_of(store) == uninterrupted
        check_rows(store)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_an_object_store_that_goes_away_stops_the_run_and_it_goes_on_when_it_is_back(
    fresh: Path, nodes: TwoNodes, uninterrupted: dict[str, str], bucket: str, tmp_path: Path
) -> None:
    """An S3 server on loopback that is ended in the middle of a run, and started again with what it held."""
    import boto3
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "RAY_ADDRESS": "", "HF_HUB_OFFLINE": "1"}
    client = boto3.client("s3", endpoint_url=settings["AWS_ENDPOINT_URL"])
    remote = fs.S3FileSystem(endpoint_override=f"{host}:{port}", scheme="http", region="us-east-1")
    fs.copy_files(str(fresh), "pictures/away", destination_filesystem=remote)
    command = [sys.executable, "-m", "pipeline", *DESCRIBE, f"{bucket}/away", *ONE_ENGINE]
    driver = subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, stderr=subprocess.PIPE, text=True)
    while driver.poll() is None and not any(
        "receipts" in key["Key"]
        for key in client.list_objects_v2(Bucket="pictures", Prefix="away/captions").get("Contents", [])
    ):
        time.sleep(0.05)
    server.stop()
    said = driver.communicate(timeout=300)[1]
    assert driver.returncode == 1, said[-3000:]
    assert "What is done is kept" in said and "Traceback" not in said, said[-3000:]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | settings, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr.count("caption ") > 0
        fs.copy_files("pictures/away", str(tmp_path / "back"), source_filesystem=remote)
        assert files_of(tmp_path / "back") == uninterrupted
    finally:
        server.stop()
