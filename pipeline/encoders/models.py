"""Which model exactly: a folder or a hub name becomes a location and a revision that can be recorded and
compared.

A hub revision is resolved to its commit once, before the first shard, so that every worker loads the same
files and the variant names them. A folder's revision is the hash of its files. Only safetensors weights are
accepted, and remote code never.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
from dataclasses import dataclass

from pipeline.errors import SettingsError

TIMM, TIMM_HUB, TIMM_FOLDER = "timm:", "hf-hub:", "local-dir:"
"""How a model is named that timm builds: by timm's own name, or by where its config.json lies."""


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """A model: `location` is a folder or hub name, `revision` a commit (hub) or files-<hash> (folder).

    A model that a server holds has the server's name for it and the revision `served`: nothing more is known
    of it.
    """

    name: str
    location: str
    revision: str

    @property
    def hub_revision(self) -> str | None:
        """The revision argument for loaders: the commit of a hub model, None for a folder."""
        return None if self.revision.startswith("files-") else self.revision

    def here(self) -> str:
        """The location on this machine: a folder may lie elsewhere on another node, but must hold the same
        files."""
        if self.hub_revision is not None:
            return self.location
        model = resolve(self.name)
        if model.revision != self.revision:
            message = (
                f"model={self.name!r}: its files on this node differ ({model.revision}) from the driver's "
                f"({self.revision})."
            )
            raise SettingsError(message)
        return model.location


def resolve(name: str, revision: str = "") -> ModelRef:
    """Finds a model: a folder, `package:NAME` (weights carried by an installed package), or a name on the
    hub; of timm's `timm:NAME`, `hf-hub:NAME` or `local-dir:FOLDER`.

    Raises:
        ValueError: nothing by that name can be found, or its weights are not safetensors.
    """
    if name.startswith("package:"):
        return _folder(name, _package_folder(name.removeprefix("package:")))
    if name.startswith((TIMM, TIMM_HUB)):
        return _hub(name, revision or "main")
    path = name.removeprefix(TIMM_FOLDER)
    for folder in (os.path.expanduser(path), _beside_packages(path)):
        if os.path.isdir(folder):
            return _folder(name, os.path.abspath(folder))
    if name.count("/") != 1 or name.startswith((".", "/", "~", TIMM_FOLDER)):
        message = f"model={name!r}: no such folder, and not a hub name (ORGANISATION/NAME)."
        raise SettingsError(message)
    return _hub(name, revision or "main")


def recorded(name: str, revision: str) -> ModelRef:
    """A model by a revision on record; the hub is not asked.

    Raises:
        ValueError: its folder holds other files by now.
    """
    if not revision.startswith("files-"):
        return ModelRef(name=name, location=_repository(name), revision=revision)
    model = resolve(name)
    if model.revision != revision:
        message = (
            f"model={name!r}: its files have changed since they were recorded ({revision}, now "
            f"{model.revision}); put the old ones back, or begin anew with these."
        )
        raise SettingsError(message)
    return model


def _repository(name: str) -> str:
    """The repository on the hub of a model that is named in any way."""
    if not name.startswith(TIMM):
        return name.removeprefix(TIMM_HUB)
    import timm

    known = (
        timm.get_pretrained_cfg(name.removeprefix(TIMM)) if timm.is_model(name.removeprefix(TIMM)) else None
    )
    if known is None or not known.hf_hub_id:
        message = (
            f"model={name!r}: timm {timm.__version__} has no such model with weights on the hub; "
            "timm.list_models(pretrained=True) names all."
        )
        raise SettingsError(message)
    return str(known.hf_hub_id).partition("@")[0]


def _beside_packages(name: str) -> str:
    """Relative model folders may lie beside the packages: the checkout, or what a job uploaded."""
    return os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), name)


def is_installed(name: str) -> bool:
    """Whether a model `package:NAME` is here."""
    return importlib.util.find_spec(name.removeprefix("package:").replace("-", "_")) is not None


def _package_folder(package: str) -> str:
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        message = (
            f"encoder=package:{package}: the package is not installed (it belongs to the CPU environment): "
            f"pip install {package}, or pass --encoder with a hub name or folder."
        )
        raise SettingsError(message)
    root = os.path.dirname(spec.origin)
    for folder, _, names in sorted(os.walk(root)):
        if "config.json" in names and "model.safetensors" in names:
            return folder
    message = f"encoder=package:{package}: holds no folder with config.json and model.safetensors."
    raise SettingsError(message)


def _folder(name: str, folder: str) -> ModelRef:
    files = sorted(
        n for n in os.listdir(folder) if n.endswith((".safetensors", ".json", ".jinja", ".txt", ".model"))
    )
    if "config.json" not in files or not any(n.endswith(".safetensors") for n in files):
        message = (
            f"model={name!r}: the folder {folder} needs config.json and weights as *.safetensors (no "
            "pickles)."
        )
        raise SettingsError(message)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file}\0".encode())
        with open(os.path.join(folder, file), "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return ModelRef(name=name, location=folder, revision=f"files-{digest.hexdigest()[:16]}")


def _hub(name: str, revision: str) -> ModelRef:
    from huggingface_hub import HfApi, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound, HfHubHTTPError, OfflineModeIsEnabled

    location = _repository(name)
    try:
        info = HfApi().model_info(location, revision=revision, timeout=20)
        files_of = {info.sha: [sibling.rfilename for sibling in info.siblings or []]} if info.sha else {}
        reason = "the hub names no commit"
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        files_of, reason = {}, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    except (
        Exception
    ) as error:  # httpx's connection errors are not OSErrors, and httpx is the hub client's choice, not ours
        files_of, reason = {}, f"{type(error).__name__}: {error}"
    with contextlib.suppress(CacheNotFound):
        for repo in scan_cache_dir().repos if not files_of else ():
            for cached in repo.revisions if repo.repo_id == location else ():
                if revision in (cached.commit_hash, *cached.refs):
                    files_of[cached.commit_hash] = [
                        str(file.file_path.relative_to(cached.snapshot_path)) for file in cached.files
                    ]
    if files_of:
        commit, files = next(iter(files_of.items()))
        _check_safetensors(name, commit, files)
        return ModelRef(name=name, location=location, revision=commit)
    message = (
        f"model={name!r}, revision={revision!r}: not found on the hub ({reason}) nor in the local cache. "
        "Check the name and the network; on a machine without one, copy the model's folder there and pass "
        "its path."
    )
    raise SettingsError(message)


def _check_safetensors(name: str, commit: str, files: list[str]) -> None:
    """Refuses, before anything is fetched, a repository whose weights are pickles only: loading those can run
    any code."""
    if any(file.endswith(".safetensors") and "/" not in file for file in files):
        return
    message = (
        f"model={name!r}, revision={commit!r}: has no weights as *.safetensors, and no others are loaded. "
        "Choose a revision that has them, or convert the model and pass its folder."
    )
    raise SettingsError(message)
