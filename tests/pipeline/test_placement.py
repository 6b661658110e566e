"""Where actors are placed on clusters of many shapes; whatever is placed fits, since Ray would wait for what
does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline import placement, session
from pipeline.config import CaptionConfig, EmbedConfig
from pipeline.encoders.models import ModelRef
from pipeline.placement import Placement, Pool

GIB = 2**30


@pytest.fixture
def small(tmp_path: Path) -> ModelRef:
    return model(tmp_path / "small", size=2**20)


def model(folder: Path, size: int) -> ModelRef:
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as file:
        file.truncate(size)  # sparse
    return ModelRef(name=str(folder), location=str(folder), revision="files-0")


def cluster(
    patch: pytest.MonkeyPatch,
    *,
    gpus: int = 0,
    cpus: int,
    cores: int,
    largest: int = 0,
    nodes: int = 1,
    joined: bool = False,
    grows: bool = False,
) -> None:
    """Stands for a cluster of that shape."""
    patch.setattr(session, "gpus", lambda: gpus)
    patch.setattr(session, "cpus", lambda: cpus)
    patch.setattr(session, "cores", lambda: cores)
    patch.setattr(session, "largest_node", lambda: largest or cpus)
    patch.setattr(session, "memory", lambda: 64 * GIB)
    patch.setattr(session, "several_nodes", lambda: nodes > 1)
    patch.setattr(session, "is_local", lambda: not joined)
    patch.setattr(session, "grows", lambda: joined and grows)


def captioners(model: ModelRef, rows: int = 10**6, captioner: str = "vllm", **settings: Any) -> Placement:
    chosen: Any = captioner
    config = CaptionConfig(store="-", captioner=chosen, model="any", **settings)
    return placement.captioners(config, model, rows)


def test_a_small_model_has_a_process_on_each_core(monkeypatch: pytest.MonkeyPatch, small: ModelRef) -> None:
    cluster(monkeypatch, cpus=8, cores=2)
    assert captioners(small) == Placement(actors=2, gpus=0.0, cpus=1, decoders=2, crowded=True)
    assert placement.encoders(EmbedConfig(store="-"), small, 10**6) == Placement(
        actors=2, gpus=0.0, cpus=1, crowded=True
    )


def test_what_limits_processes_side_by_side(tmp_path: Path, small: ModelRef) -> None:
    large = model(tmp_path / "large", size=2**29)
    hub = ModelRef(name="a/b", location="a/b", revision="0" * 40)
    shapes = {
        "cores": (small, 16, 1024 * GIB, 10**6),
        "memory": (small, 16, 24 * GIB, 10**6),
        "store": (small, 16, 1024 * GIB, 5000),
    }
    found = {name: placement.side_by_side(*shape) for name, shape in shapes.items()}
    assert found == {"cores": 16, "memory": 3, "store": 2}
    assert placement.side_by_side(large, 16, 1024 * GIB, 10**6) == 1
    assert placement.side_by_side(hub, 16, 1024 * GIB, 10**6) == 1
    assert placement.side_by_side(small, 16, GIB, 1) == 1


def test_cores_named_are_those_of_one_engine(monkeypatch: pytest.MonkeyPatch, small: ModelRef) -> None:
    cluster(monkeypatch, cpus=18, cores=8)
    assert captioners(small, engine_cores=3) == Placement(actors=1, gpus=0.0, cpus=3, decoders=4)
    assert captioners(small, engine_cores=3, replicas=2) == Placement(actors=2, gpus=0.0, cpus=3, decoders=4)
    assert captioners(small, replicas=2) == Placement(actors=2, gpus=0.0, cpus=4, decoders=4, crowded=True)


def test_a_gpu_has_one_engine_and_the_rest_decodes(monkeypatch: pytest.MonkeyPatch, small: ModelRef) -> None:
    cluster(monkeypatch, gpus=8, cpus=64, cores=64)
    assert captioners(small) == Placement(actors=8, gpus=1.0, cpus=1, decoders=32)
    assert captioners(small, replicas=2) == Placement(actors=2, gpus=1.0, cpus=1, decoders=32)


@pytest.mark.parametrize("gpus", [0, 1, 4])
@pytest.mark.parametrize("cpus", [3, 4, 6, 8, 9, 16, 64])
@pytest.mark.parametrize("captioner", ["vllm", "openai"])
def test_models_decoders_and_writer_fit_beside_each_other(
    monkeypatch: pytest.MonkeyPatch, small: ModelRef, gpus: int, cpus: int, captioner: str
) -> None:
    cluster(monkeypatch, gpus=gpus, cpus=cpus, cores=cpus)
    for replicas in (0, 1, 3):
        try:
            placed = captioners(small, captioner=captioner, replicas=replicas)
        except ValueError as error:
            assert "replicas=" in str(error)
            assert replicas > gpus > 0 or (replicas or gpus) + 2 > cpus
        else:
            assert placed.actors == replicas or not replicas
            assert placed.actors * placed.cpus + placed.decoders + 0.5 <= cpus
            assert placed.decoders >= 1 and placed.cpus >= 1


def test_on_several_nodes_a_model_fits_beside_its_share_of_the_decoders(
    monkeypatch: pytest.MonkeyPatch, small: ModelRef
) -> None:
    cluster(monkeypatch, cpus=32, cores=16, largest=16, nodes=2)
    hub = ModelRef(name="a/b", location="a/b", revision="0" * 40)
    assert captioners(hub) == Placement(actors=1, gpus=0.0, cpus=8, decoders=16)
    cluster(monkeypatch, cpus=6, cores=3, largest=3, nodes=2)
    assert captioners(hub) == Placement(actors=1, gpus=0.0, cpus=1, decoders=3)


def test_what_cannot_be_placed_is_said(monkeypatch: pytest.MonkeyPatch, small: ModelRef) -> None:
    cluster(monkeypatch, gpus=2, cpus=3, cores=3)
    with pytest.raises(
        ValueError,
        match=r"replicas=2: takes 2 of the cluster's 3 CPUs, and decoding and writing need 2 beside",
    ):
        captioners(small)
    with pytest.raises(ValueError, match=r"replicas=3: the cluster has 2 GPUs"):
        captioners(small, replicas=3)
    cluster(monkeypatch, cpus=16, cores=8, largest=8)
    with pytest.raises(ValueError, match=r"engine_cores=9: the largest node has 8 CPUs"):
        captioners(small, engine_cores=9)


def test_a_cluster_without_gpus_computes_on_cpus_only_when_told(
    monkeypatch: pytest.MonkeyPatch, small: ModelRef
) -> None:
    cluster(monkeypatch, cpus=16, cores=8, nodes=2, joined=True)
    with pytest.raises(
        ValueError, match=r"device=auto: the cluster has no GPU \(16 CPUs\); pass --device cpu"
    ):
        captioners(small)
    with pytest.raises(ValueError, match="device=cuda: the cluster has no GPU"):
        captioners(small, device="cuda")
    assert captioners(small, device="cpu", replicas=2).gpus == 0
    assert captioners(small, captioner="openai", replicas=2).actors == 2
    cluster(monkeypatch, cpus=16, cores=8)
    assert captioners(small).gpus == 0  # a machine of one's own
    with pytest.raises(ValueError, match="device=cuda: this machine has no GPU"):
        captioners(small, device="cuda")
    cluster(monkeypatch, cpus=16, cores=8, gpus=2)
    assert captioners(small, device="cpu").gpus == 0


def test_a_cluster_that_grows_is_asked_for_what_is_wanted(
    monkeypatch: pytest.MonkeyPatch, small: ModelRef
) -> None:
    cluster(monkeypatch, cpus=0, cores=1, joined=True, grows=True)
    asked = captioners(small, replicas=8)
    assert asked == Placement(actors=8, gpus=1.0, cpus=1, decoders=8, least=1)
    assert asked.pool == Pool(8, least=1, first=8)
    assert asked.no_more_than(3).pool == Pool(3, least=1, first=3)
    assert captioners(small, replicas=8, min_replicas=4).least == 4
    assert captioners(small, replicas=2, device="cpu", engine_cores=4).cpus == 4
    with pytest.raises(ValueError, match="replicas=0: the cluster grows, has no GPU now"):
        captioners(small)
    assert placement.encoders(EmbedConfig(store="-"), small, 10**6).gpus == 1.0
    on_cpus = EmbedConfig(store="-", device="cpu")
    found = [placement.encoders(on_cpus, small, rows) for rows in (100, 10_000, 10**6)]
    assert [each.pool for each in found] == [Pool(1), Pool(4, least=1), Pool(32, least=1)]
    told = EmbedConfig(store="-", device="cpu", encoder_replicas=50)
    assert placement.encoders(told, small, 100) == Placement(actors=50, gpus=0.0, cpus=1, least=1)
    assert placement.ingesters(100) == Pool(32, least=1, first=1)
    cluster(monkeypatch, gpus=4, cpus=64, cores=64, joined=True, grows=True)
    assert captioners(small).actors == 4


def test_engines_of_a_fixed_cluster_may_come_and_go_when_told(
    monkeypatch: pytest.MonkeyPatch, small: ModelRef
) -> None:
    cluster(monkeypatch, gpus=2, cpus=16, cores=16, joined=True)
    with pytest.raises(ValueError, match="replicas=4: the cluster has 2 GPUs"):
        captioners(small, replicas=4)
    assert captioners(small, replicas=4, min_replicas=1).pool == Pool(4, least=1)
    assert captioners(small).pool == Pool(2)
    assert captioners(small).no_more_than(1).actors == 2
    cluster(monkeypatch, gpus=1, cpus=4, cores=4, joined=True)
    few = captioners(small, replicas=8, min_replicas=1)
    assert few.decoders == 2 and few.decoder_pool == Pool(2, least=1, first=1)
    assert captioners(small, captioner="openai", min_replicas=2).pool == Pool(1)
