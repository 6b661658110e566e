"""The image of the cluster's pods, as far as it can be judged without building it."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.nodes import ROOT

IMAGE = ROOT / "cluster" / "image" / "Dockerfile"
# One instruction a line: what continues is joined, comments are left out.
LINES = re.sub(r"\\\n\s*", " ", re.sub(r"^\s*#.*\n", "", IMAGE.read_text(), flags=re.MULTILINE)).splitlines()
STEPS = [line.split(None, 1) for line in LINES if line.strip()]


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in STEPS:
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = list(found.get(base, []))
            found[name].append(("FROM", base))
        else:
            found[name].append((word, rest))
    return found


def test_the_linter_finds_nothing() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([str(linter), str(IMAGE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_what_it_starts_from_is_pinned_and_has_the_python_of_the_pins() -> None:
    named = set(stages())
    (base,) = {rest.split()[0] for word, rest in STEPS if word == "FROM" and rest.split()[0] not in named}
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", base)
    uv = re.search(r"^UV_VERSION=(\S+)$", (ROOT / "environment" / "setup.sh").read_text(), re.MULTILINE)
    assert uv and f"uv=={uv[1]}" in IMAGE.read_text()


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_target_runs_as_the_user_of_the_manifests_and_holds_no_code_of_ours(kind: str) -> None:
    steps = stages()[kind]
    assert [rest for word, rest in steps if word == "USER"] == ["1000:1000"]
    assert steps[-1][0] == "USER"
    copied = [rest for word, rest in steps if word == "COPY"]
    assert copied == [f"--from=install-{kind} /usr/local /usr/local"]
    installed = [rest for word, rest in stages()[f"install-{kind}"] if word == "RUN"][-1]
    assert f"--constraint environment/constraints-{kind}.txt" in installed
    assert f"--extra {kind}" in installed and "--extra dev" not in installed
    assert not re.search(r"\s(-e|--editable|\.)(\s|\[|$)", installed), "the project itself"
    assert ("community-cpu.txt" in installed) is (kind == "cpu")


def test_what_the_build_reads_is_there_and_no_more_is_sent_to_it() -> None:
    read = [rest.split()[:-1] for word, rest in STEPS if word == "COPY" and "--from" not in rest]
    names = [name.removeprefix("./") for names in read for name in names]
    assert names == ["pyproject.toml", "environment"]
    ignored = (IMAGE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    patterns = [line for line in ignored if line and not line.startswith("#")]
    assert patterns == ["*", *(f"!{name}" for name in names)]
    for path in re.findall(r"environment/\S+\.txt", IMAGE.read_text()):
        assert (ROOT / path).is_file(), path


def test_nothing_secret_and_nothing_unpinned_gets_in() -> None:
    assert not [word for word, _ in STEPS if word in ("ADD", "ARG", "ENTRYPOINT")]
    for word, rest in STEPS:
        if word == "ENV":
            names = re.findall(r"([A-Z_]+)=", rest)
            secret = ("*TOKEN*", "*SECRET*", "*PASSWORD*", "*KEY*")
            assert not [n for n in names for pattern in secret if fnmatch.fnmatch(n, pattern)], rest
        if "apt-get install" in rest:
            assert "--no-install-recommends" in rest and "rm -rf /var/lib/apt/lists/*" in rest
        assert not re.search(r":latest|curl [^|]*\||index-url|find-links|trusted-host", rest), rest
