"""What is in cluster/kuberay, as it would be applied: rendered by kubectl, without a cluster."""

from __future__ import annotations

import functools
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from cluster import checks
from cluster.cli import VERBS
from pipeline import verbs
from tests.cluster.custom_kinds import SCHEMAS
from tests.nodes import ROOT

HERE = ROOT / "cluster" / "kuberay"
OVERLAYS = sorted(path.name for path in (HERE / "overlays").iterdir())
GANGS = ("kueue", "volcano")
JOBS = ("describe", "train", "tune")
README = (HERE / "README.md").read_text()
# The releases of Kubernetes that the project speaks for.
RELEASES = ("1.30", "1.37")


@functools.cache
def rendered(overlay: str) -> list[dict[str, Any]]:
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    kubectl = shutil.which("kubectl", path=beside)
    assert kubectl, "the environment brings it on Linux; elsewhere install kubectl 1.27 or later"
    command = [kubectl, "kustomize", str(HERE / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(overlay: str, *kinds: str) -> list[dict[str, Any]]:
    return [each for each in rendered(overlay) if each["kind"] in kinds]


def named(overlay: str, kind: str, name: str) -> dict[str, Any]:
    (found,) = [each for each in of_kind(overlay, kind) if each["metadata"]["name"] == name]
    return found


def clusters(overlay: str) -> dict[str, dict[str, Any]]:
    """The spec of the development cluster, and of each job's."""
    return {
        each["metadata"]["name"]: each["spec"].get("rayClusterSpec", each["spec"])
        for each in of_kind(overlay, "RayCluster", "RayJob")
    }


def groups(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["groupName"]: each for each in cluster["workerGroupSpecs"]}


def templates(overlay: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template, by what it is of."""
    for name, cluster in clusters(overlay).items():
        yield f"{name} head", cluster["headGroupSpec"]["template"]
        for group, spec in groups(cluster).items():
            yield f"{name} {group}", spec["template"]
    for job in of_kind(overlay, "RayJob"):
        yield f"{job['metadata']['name']} submitter", job["spec"]["submitterPodTemplate"]


def limits(template: dict[str, Any]) -> dict[str, float]:
    (container,) = template["spec"]["containers"]
    return {name: number(value) for name, value in container["resources"]["limits"].items()}


def number(quantity: str) -> float:
    value, unit = re.fullmatch(r"([\d.]+)(m|Mi|Gi|Ti)?", str(quantity)).groups()  # type: ignore[union-attr]
    return float(value) * {None: 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}[unit]


def command(job: dict[str, Any]) -> list[str]:
    """A job's verb and its flags."""
    python, m, _, *words = shlex.split(job["spec"]["entrypoint"])
    assert (python, m) == ("python", "-m")
    return words


def flag(job: dict[str, Any], name: str) -> int:
    words = command(job)
    return int(words[words.index(f"--{name}") + 1])


def test_every_file_is_yaml_and_part_of_an_overlay() -> None:
    used: set[Path] = set()

    def follow(folder: Path) -> None:
        file = folder / "kustomization.yaml"
        used.add(file)
        told = yaml.safe_load(file.read_text())
        for entry in told.get("resources", []) + told.get("components", []):
            target = (folder / entry).resolve()
            assert target.exists(), f"{file}: {entry}"
            follow(target) if target.is_dir() else used.add(target)
        for patch in told.get("patches", []):
            assert yaml.safe_load(patch["patch"]), file

    for overlay in OVERLAYS:
        follow(HERE / "overlays" / overlay)
    files = set(HERE.rglob("*.yaml"))
    assert files == used
    for file in files:
        assert list(yaml.safe_load_all(file.read_text())), file


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_is_applied_is_valid(overlay: str) -> None:
    """Kubernetes' kinds by its own schemas, unknown fields refused; the others by ours."""
    for each in rendered(overlay):
        if each["kind"] in SCHEMAS:
            jsonschema.validate(each, SCHEMAS[each["kind"]])
        else:
            for release in RELEASES:
                kubernetes_validate.validate(each, release, strict=True)
    for name, template in templates(overlay):
        whole = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        for release in RELEASES:
            assert kubernetes_validate.validate(whole, release, strict=True), name
    names = [(each["kind"], each["metadata"]["name"]) for each in rendered(overlay)]
    assert len(names) == len(set(names))


def test_the_schemas_refuse_what_a_server_would_drop() -> None:
    cluster = named("plain", "RayCluster", "development")
    wrong = cluster | {"spec": cluster["spec"] | {"authOption": {"mode": "token"}}}
    with pytest.raises(jsonschema.ValidationError, match="authOption"):
        jsonschema.validate(wrong, SCHEMAS["RayCluster"])


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("name", JOBS)
def test_a_jobs_entry_point_parses_with_the_verbs_own_settings(overlay: str, name: str) -> None:
    """As `submit` checks it, with what the pods have in their environment."""
    job = named(overlay, "RayJob", name)
    sent = checks.checked(command(job), [], named(overlay, "ConfigMap", "gpt4image")["data"])
    assert shlex.split(sent.entrypoint) == shlex.split(job["spec"]["entrypoint"])
    assert sent.name.startswith(name)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_jobs_code_comes_from_where_its_stores_are(overlay: str) -> None:
    from ray._common.runtime_env_uri import parse_uri
    from ray._private.runtime_env.protocol import ProtocolsProvider

    for job in of_kind(overlay, "RayJob"):
        environment = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
        assert list(environment) == ["working_dir"]  # no secrets: the job server shows it to whoever asks
        address = environment["working_dir"]
        protocol, _ = parse_uri(address)
        assert protocol.value in ProtocolsProvider.get_remote_protocols()
        assert address.endswith(".zip")
        store = command(job)[command(job).index("--store") + 1]
        assert store.partition("://")[0] == protocol.value or (store[0] == "/" and protocol.value == "file")


def test_a_zip_made_as_told_is_what_ray_unpacks(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import get_top_level_dir_from_compressed_package

    (told,) = re.findall(r"^(git archive .*?)(?: --output \S+)? HEAD$", README, re.MULTILINE)
    git = ["git", "-C", str(ROOT)]
    if subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=False).returncode:
        pytest.skip("a checkout without git")
    packed = subprocess.run([*git, *shlex.split(told)[1:], "HEAD"], capture_output=True, check=True).stdout
    (tmp_path / "code.zip").write_bytes(packed)
    top = get_top_level_dir_from_compressed_package(str(tmp_path / "code.zip"))
    assert top == "gpt4image-ray"
    assert f"{top}/pipeline/__main__.py" in zipfile.ZipFile(io.BytesIO(packed)).namelist()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_pod_runs_as_root_or_with_more_than_it_needs(overlay: str) -> None:
    container_context = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    for name, template in templates(overlay):
        pod = template["spec"]["securityContext"]
        assert pod["runAsNonRoot"] and pod["runAsUser"] == pod["runAsGroup"] == 1000, name
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert [each["securityContext"] for each in template["spec"]["containers"]] == [container_context]
        assert template["spec"]["restartPolicy"] == "Never", name
        assert not any(template["spec"].get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))
        assert all("hostPath" not in volume for volume in template["spec"].get("volumes", []))
        if not name.endswith("head"):
            account = template["spec"].get("serviceAccountName")
            assert account == "gpt4image-worker" or template["spec"]["automountServiceAccountToken"] is False
    assert named(overlay, "ServiceAccount", "gpt4image-worker")["automountServiceAccountToken"] is False
    (namespace,) = of_kind(overlay, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for cluster in clusters(overlay).values():
        assert cluster["authOptions"] == {"mode": "token", "secretName": "gpt4image-token"}
        assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
        assert (
            cluster.get("autoscalerOptions", {}).get("securityContext", container_context)
            == container_context
        )
    assert not of_kind(overlay, "Secret")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_is_reached_that_is_not_named(overlay: str) -> None:
    closed = named(overlay, "NetworkPolicy", "deny-all")["spec"]
    assert closed == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for policy in of_kind(overlay, "NetworkPolicy"):
        for way in ("ingress", "egress"):
            for rule in policy["spec"].get(way, []):
                assert rule.get("from" if way == "ingress" else "to"), policy["metadata"]["name"]
        assert policy["metadata"]["namespace"] == "gpt4image"
    head = clusters(overlay)["development"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    (to_head,) = named(overlay, "NetworkPolicy", "head")["spec"]["ingress"]
    assert [port["port"] for port in to_head["ports"]] == [ports["dashboard"]]
    for monitor in of_kind(overlay, "PodMonitor"):
        scraped = {ports[each["port"]] for each in monitor["spec"]["podMetricsEndpoints"]}
        (open_to,) = named(overlay, "NetworkPolicy", "metrics")["spec"]["ingress"]
        assert scraped == {port["port"] for port in open_to["ports"]}
    for job in of_kind(overlay, "RayJob"):
        labels = job["spec"]["submitterPodTemplate"]["metadata"]["labels"]
        assert labels == named(overlay, "NetworkPolicy", "submitter")["spec"]["podSelector"]["matchLabels"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_machines_come_from_zero_and_of_the_kind_that_a_stage_needs(overlay: str) -> None:
    found = clusters(overlay)
    assert set(found) == {"development", *JOBS}
    assert list(groups(found["development"])) == ["decoders", "captioners", "trainers"]
    assert list(groups(found["describe"])) == ["decoders", "captioners"]
    assert list(groups(found["train"])) == list(groups(found["tune"])) == ["decoders", "trainers"]
    for name, cluster in found.items():
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        gang = overlay in GANGS and name in ("train", "tune")
        assert cluster["enableInTreeAutoscaling"] is not gang
        assert gang or cluster["autoscalerOptions"]["version"] == "v2"
        for group, spec in groups(cluster).items():
            fixed = spec["maxReplicas"] if gang and group == "trainers" else 0
            assert spec["replicas"] == spec["minReplicas"] == fixed <= spec["maxReplicas"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_requests_fit_what_the_stages_ask_ray_for(overlay: str) -> None:
    for name, template in templates(overlay):
        (container,) = template["spec"]["containers"]
        if "submitter" not in name:
            assert container["resources"]["requests"] == container["resources"]["limits"], name
    found = clusters(overlay)
    engine = groups(found["describe"])["captioners"]
    have = limits(engine["template"])
    assert have["nvidia.com/gpu"] == 1 and have["cpu"] >= 1 + 1  # the engine, a decoder beside it
    for name in ("replicas", "encoder-replicas"):
        assert flag(named(overlay, "RayJob", "describe"), name) <= engine["maxReplicas"]
    for name in ("train", "tune"):
        job, trainers = named(overlay, "RayJob", name), groups(found[name])["trainers"]
        have = limits(trainers["template"])
        assert have["cpu"] >= have["nvidia.com/gpu"] * (2 + flag(job, "loader-workers"))  # also as actors
        trials = flag(job, "concurrent") if name == "tune" else 1
        assert trials * flag(job, "workers") <= trainers["maxReplicas"] * have["nvidia.com/gpu"]


@pytest.mark.parametrize("overlay", GANGS)
def test_a_queue_holds_one_run(overlay: str) -> None:
    if overlay == "kueue":
        (group,) = of_kind(overlay, "ClusterQueue")[0]["spec"]["resourceGroups"]
        quota = {each["name"]: each["nominalQuota"] for each in group["flavors"][0]["resources"]}
        assert sorted(quota) == sorted(group["coveredResources"])
    else:
        quota = of_kind(overlay, "Queue")[0]["spec"]["capability"]
    job = named(overlay, "RayJob", "train")
    pods = [job["spec"]["submitterPodTemplate"], job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]]
    for spec in groups(job["spec"]["rayClusterSpec"]).values():
        pods += [spec["template"]] * spec["replicas"]
    for resource in ("cpu", "memory", "nvidia.com/gpu"):
        asked = sum(
            number(pod["spec"]["containers"][0]["resources"]["requests"].get(resource, "0")) for pod in pods
        )
        assert asked <= number(quota[resource]) < asked * 1.1 + 1, resource


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_all_pods_have_one_image_and_the_pinned_ray(overlay: str) -> None:
    images = {template["spec"]["containers"][0]["image"] for _, template in templates(overlay)}
    (image,) = images
    assert re.fullmatch(r"[a-z0-9.-]+(/[a-z0-9.-]+)+:\d+\.\d+\.\d+-cuda", image)
    for kind in ("cpu", "cuda"):
        pins = (ROOT / "environment" / f"constraints-{kind}.txt").read_text().splitlines()
        assert {f"ray=={cluster['rayVersion']}" for cluster in clusters(overlay).values()} <= set(pins)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_is_applied_together_has_a_label_for_it(overlay: str) -> None:
    """The jobs are not to start with the first `kubectl apply`: the README applies by label."""
    for each in rendered(overlay):
        component = each["metadata"]["labels"]["app.kubernetes.io/component"]
        wanted = each["metadata"]["name"] if each["kind"] in ("RayCluster", "RayJob") else "shared"
        assert component == wanted, each["metadata"]["name"]


def test_the_readme_tells_of_every_overlay_option_and_secret() -> None:
    for folder in ("overlays", "options", "clouds"):
        for path in (HERE / folder).iterdir():
            assert f"{folder}/{path.name}" in README, path
    for label in re.findall(r"component=(\S+)", README):
        assert label in {"shared", "development", *JOBS, "$STAGE"}, label
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (HERE / target).exists(), target
    text = "".join(path.read_text() for path in HERE.rglob("*.yaml"))
    for secret in set(re.findall(r"secret(?:KeyRef|Ref|Name): (?:\{ name: )?([a-z0-9-]+)", text)):
        assert f"secret generic {secret}" in README, secret


def test_the_readmes_own_commands_parse() -> None:
    from cluster.__main__ import parse_submit

    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("gpt4image ")]
    assert commands
    for name, *rest in commands:
        if name == "submit":
            _, job = parse_submit(rest)
            checks.checked(job, [], {"MLFLOW_TRACKING_URI": "http://mlflow:5000"})
        else:
            verbs.parse(name, VERBS[name][1], rest)


def test_no_file_holds_what_could_be_a_secret() -> None:
    for path in HERE.rglob("*"):
        if path.is_file() and path.name != "README.md":
            text = path.read_text()
            assert not re.search(r"AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20,}|auth_token:|password: [^{]", text), (
                path
            )
