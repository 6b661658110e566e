"""What a training asks of a cluster, of any size: no Ray is started here."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline import session
from pipeline.errors import SettingsError
from training import run
from training.config import TrainConfig
from training.evaluation import remote


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes this process see a cluster: cluster(gpus=4, cpus=32, grows=False)."""

    def make(*, gpus: int, cpus: int = 32, grows: bool = False) -> None:
        seen = {"gpus": gpus, "cpus": cpus, "cores": cpus, "largest_node": cpus, "grows": grows}
        for name, value in seen.items():
            monkeypatch.setattr(session, name, lambda value=value: value)
        monkeypatch.setattr(session, "is_local", lambda: False)

    return make


def asked(**settings: Any) -> tuple[int, dict[str, float], bool]:
    """Workers, what each is given, and whether on GPUs, as Ray Train is told."""
    scaling = run._scaling(*run.placed(TrainConfig.of(store="s", **settings)))
    return scaling.num_workers, scaling.resources_per_worker, scaling.use_gpu


def test_a_worker_has_a_gpu_or_the_share_that_is_asked_for(cluster: Any) -> None:
    cluster(gpus=4)
    assert asked() == (4, {"CPU": 2, "GPU": 1.0}, True)
    assert asked(workers=3) == (3, {"CPU": 2, "GPU": 1.0}, True)
    assert asked(gpu_share=0.25) == (1, {"CPU": 2, "GPU": 0.25}, True), "one worker, whatever there is"
    assert asked(gpu_share=0.5, workers=1) == (1, {"CPU": 2, "GPU": 0.5}, True)
    with pytest.raises(SettingsError, match="workers=5: the cluster has 4 GPUs"):
        asked(workers=5)
    cluster(gpus=0, grows=True)
    assert asked(gpu_share=0.5) == (1, {"CPU": 2, "GPU": 0.5}, True), "asked of the autoscaler"
    with pytest.raises(SettingsError, match="workers=0: the cluster grows"):
        asked()


def test_a_share_of_a_gpu_changes_nothing_where_there_is_none(cluster: Any) -> None:
    cluster(gpus=0, cpus=8)
    assert asked(device="cpu") == (2, {"CPU": 4, "GPU": 0.0}, False)
    assert asked(device="cpu", gpu_share=0.5, threads=3) == (1, {"CPU": 3, "GPU": 0.0}, False)
    with pytest.raises(SettingsError, match="threads=9: no node of the cluster has so many CPUs"):
        asked(device="cpu", threads=9)


def test_an_evaluation_asks_for_what_its_run_computes_on(cluster: Any) -> None:
    config = TrainConfig.of(store="s")
    cluster(gpus=4)
    assert remote.asked(config, 0.5, 7).each == {"CPU": 2, "GPU": 0.5}
    assert remote.asked(config.but(device="cpu"), 0.5, 7).each == {"CPU": 7}
    with pytest.raises(SettingsError, match="gpu_share=0: must be above 0"):
        remote.asked(config, 0, 7)
    cluster(gpus=0)
    assert remote.asked(config.but(device="cpu"), 1, 0).each == {"CPU": 32}
    with pytest.raises(SettingsError, match="device=auto: the cluster has no GPU"):
        remote.asked(config, 1, 7)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gpu_share": 0}, "gpu_share=0: must be above 0 and at most 1"),
        ({"gpu_share": 2.0}, "gpu_share=2.0: must be above 0 and at most 1"),
        ({"gpu_share": 0.5, "workers": 2}, "is for a run of one worker, and --workers is 2"),
    ],
)
def test_a_share_is_of_one_card_and_one_worker(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        TrainConfig.of(store="s", **settings)
