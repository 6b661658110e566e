"""Frozen vision towers: a picture to one pooled feature and to features of its patches, by transformers or
timm, on a GPU or on CPU cores.

Each tower sees pictures in its own size, crop, interpolation and normalisation. `features` keeps what it says
in the store; a training method may ask it for views of its own.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.encoders.cut import Cut
from pipeline.encoders.models import TIMM, TIMM_FOLDER, TIMM_HUB, ModelRef
from pipeline.errors import SettingsError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

TIMM_FAMILY = "timm"
_CLIP, _SIGLIP = ("clip", "clip_vision_model"), ("siglip", "siglip_vision_model")
# A class token, then others, then patches row by row, behind the last norm. Of other models (Swin, ConvNeXt)
# the first place is a patch like the rest, or there are no places.
_ANY_SIZE = ("dinov2", "dinov2_with_registers", "dinov3_vit")  # which fit their positions unasked
_CLASS_TOKEN = ("vit", "deit", "vit_msn", *_ANY_SIZE)


@dataclass(frozen=True, kw_only=True)
class TowerFacts:
    """What a tower takes and gives, known without its weights."""

    family: str
    """timm, or transformers' type of model."""
    size: int
    """Edge of its square input, in pixels."""
    resize: int
    """See `Cut`."""
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pooling: str
    """Which feature is the pooled one."""
    dim: int
    """D, of the pooled feature."""
    grid: int
    """Patches along an edge; there are grid * grid = N tokens."""
    token_dim: int
    """D', of a token."""

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.grid**2

    @property
    def cut(self) -> Cut:
        """How it wants pictures: each library cuts in its own way."""
        rounds = self.family == TIMM_FAMILY
        return Cut(size=self.size, resize=self.resize, interpolation=self.interpolation, rounds=rounds)


@dataclass(frozen=True)
class Seen:
    """What a tower says of b pictures."""

    pooled: Tensor
    """[b, D] float32 of unit length."""
    tokens: Tensor
    """[b, N, D'] float32, patches of the last layer behind the tower's last norm, row by row; the class token
    is none of them."""


class VisionTower:
    """A frozen tower. No module, so that a module which holds one does not train, move, copy or save it."""

    def __init__(self, model: ModelRef, *, size: int = 0, device: str = "auto") -> None:
        """Loads it; `size`: edge of its input, 0: its own.

        Raises:
            SettingsError: as `describe`, and where its files lack weights.
        """
        import torch

        on_gpu = torch.cuda.is_available() and device != "cpu"
        self._device = torch.device("cuda" if on_gpu else "cpu")
        built = _timm_tower(model, size) if _is_timm(model) else _transformers_tower(model, size)
        self.facts = _facts(model, built)
        self._tower = built.load().to(self._device).eval().requires_grad_(False)
        self._look = built.look
        self._norm = _norm(self.facts, self._device)

    def to(self, device: torch.device) -> Self:
        """The tower, moved where it is not there yet."""
        if device != self._device:
            self._device, self._tower = device, self._tower.to(device)
            self._norm = _norm(self.facts, device)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: nothing of it changes, and a moving average of what holds it needs no second one."""
        return self

    def view(self, picture: Image.Image) -> npt.NDArray[np.uint8]:
        """[S, S, 3] of an RGB picture, resized and cut as the tower wants it."""
        return self.facts.cut(picture)

    def __call__(self, images: Tensor) -> Seen:
        """What it says of [b, 3, H, W] uint8 images (0 to 255), which are resized where H and W are not its
        size; a step's autocast does not reach it."""
        import torch
        from torch.nn.functional import interpolate, normalize

        images = images.to(self._device).float()
        size = (self.facts.size, self.facts.size)
        if images.shape[-2:] != size:
            images = interpolate(images, size, mode="bicubic", antialias=True).clamp_(0, 255)
        mean, std = self._norm
        kind = self._device.type
        with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            pooled, tokens = self._look(self._tower, images.contiguous() / 255 / std - mean / std)
        return Seen(normalize(pooled.float(), dim=-1), tokens.float())


def describe(model: ModelRef, size: int = 0) -> TowerFacts:
    """What a tower takes and gives, from its configuration, without its weights and without arithmetic.

    Raises:
        SettingsError: no vision tower, no square input, or a size that it does not take.
    """
    return _facts(model, _timm_tower(model, size) if _is_timm(model) else _transformers_tower(model, size))


@dataclass(frozen=True, kw_only=True)
class _Built:
    """A tower that can be made, with or without its weights."""

    family: str
    size: int
    resize: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pooling: str
    empty: Any
    """Makes the module on torch's meta device."""
    load: Any
    """Makes it with its weights."""
    look: Any
    """(module, [b, 3, S, S] normalised images) to ([b, D], [b, N, D'])."""


def _norm(facts: TowerFacts, device: torch.device) -> tuple[Tensor, Tensor]:
    import torch

    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (facts.mean, facts.std))
    return mean, std


def _facts(model: ModelRef, built: _Built) -> TowerFacts:
    import torch

    with torch.device("meta"), torch.no_grad():
        try:
            tower = built.empty().eval()
            pooled, tokens = built.look(tower, torch.empty(1, 3, built.size, built.size))
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            message = f"tower={model.name!r}, size={built.size}: cannot run so ({reason}); pass another size."
            raise SettingsError(message) from None
        except (AttributeError, TypeError, IndexError):  # several resolutions, say, in a list
            pooled = tokens = torch.empty(())
    if (pooled.ndim, tokens.ndim) != (2, 3):
        message = (
            f"tower={model.name!r}: gives no pooled feature and one map or row of patches; choose another."
        )
        raise SettingsError(message)
    grid = math.isqrt(tokens.shape[1])
    if grid**2 != tokens.shape[1]:
        message = (
            f"tower={model.name!r}: gives {tokens.shape[1]} tokens of a picture, which are no square grid of "
            "patches; choose another."
        )
        raise SettingsError(message)
    return TowerFacts(
        family=built.family,
        size=built.size,
        resize=built.resize,
        interpolation=built.interpolation,
        mean=built.mean,
        std=built.std,
        pooling=built.pooling,
        dim=pooled.shape[1],
        grid=grid,
        token_dim=tokens.shape[2],
    )


def _is_timm(model: ModelRef) -> bool:
    return model.name.startswith((TIMM, TIMM_HUB, TIMM_FOLDER))


# transformers


def _transformers_tower(model: ModelRef, size: int) -> _Built:
    from transformers import AutoConfig, AutoModel, CLIPVisionModelWithProjection, SiglipVisionModel

    where: Any = {"revision": model.hub_revision, "trust_remote_code": False}
    location = model.here()
    with _as_settings(model), quiet():
        whole: Any = AutoConfig.from_pretrained(location, **where)
        processor = _processor(location, where)
    config = getattr(whole, "vision_config", whole)
    if config is not whole and hasattr(whole, "projection_dim"):
        config.projection_dim = whole.projection_dim  # the vision part may not repeat it
    kind: Any = AutoModel
    pooling = "class token"
    # Some save the vision part of a CLIP without its projection.
    projects = config.model_type in _CLIP and "CLIPVisionModel" not in (whole.architectures or [])
    if projects:
        kind, pooling = CLIPVisionModelWithProjection, "projected image embedding"
    elif config.model_type in _SIGLIP:
        kind, pooling = SiglipVisionModel, "attention-pooled image embedding"
    own, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    known = config.model_type in (*_CLIP, *_SIGLIP, *_CLASS_TOKEN)
    if not known or not isinstance(own, int) or not isinstance(patch, int):
        message = (
            f"tower={model.name!r}: {config.model_type} has no square pictures whose patches and pooled "
            f"feature are known here; take one of clip, siglip, {', '.join(_CLASS_TOKEN)}, or one of timm's "
            "as timm:NAME, hf-hub:NAME or local-dir:FOLDER."
        )
        raise SettingsError(message)
    edge = size or _edge(processor, "crop_size" if processor.do_center_crop else "size") or own
    if edge % patch:
        message = (
            f"tower={model.name!r}, size={edge}: no multiple of its patches of {patch} pixels; pass "
            f"{edge // patch * patch or patch} or {(edge // patch + 1) * patch}."
        )
        raise SettingsError(message)
    resize = 0
    if processor.do_center_crop:
        crop = _edge(processor, "crop_size") or edge
        resize = round(edge * (_edge(processor, "size") or crop) / crop)

    def load() -> nn.Module:
        with _as_settings(model), quiet():
            module, told = kind.from_pretrained(
                # In float32, as `training.models.frozen_clip`: files of half precision would be computed so.
                location,
                config=config,
                dtype="float32",
                use_safetensors=True,
                output_loading_info=True,
                **where,
            )
        # Of a model that was saved without it; nothing here asks for it.
        if missing := sorted(name for name in told["missing_keys"] if "pooler" not in name):
            message = f"tower={model.name!r}: its files have no weights for {', '.join(missing[:3])}."
            raise SettingsError(message)
        loaded: nn.Module = module
        return loaded

    def look(tower: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        fits = edge == own or config.model_type in _ANY_SIZE
        more = {} if fits else {"interpolate_pos_encoding": True}
        output = tower(pixel_values=images, **more)
        hidden = output.last_hidden_state
        others = hidden.shape[1] - (edge // patch) ** 2
        if hidden.ndim != 3 or others < (config.model_type not in _SIGLIP):
            message = f"{config.model_type} gives {tuple(hidden.shape[1:])}, no class token and patches"
            raise ValueError(message)
        tokens = hidden[:, others:]
        if projects:
            return output.image_embeds, tower.vision_model.post_layernorm(tokens)
        if config.model_type in _CLIP:
            return output.pooler_output, tower.post_layernorm(tokens)
        if config.model_type in _SIGLIP:
            return output.pooler_output, tokens
        return hidden[:, 0], tokens

    return _Built(
        family=config.model_type,
        size=edge,
        resize=resize,
        interpolation=Image.Resampling(processor.resample).name.lower(),
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        pooling=pooling,
        empty=lambda: AutoModel.from_config(config) if kind is AutoModel else kind(config),
        load=load,
        look=look,
    )


def _processor(location: str, where: dict[str, Any]) -> Any:
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(location, **where)


def _edge(processor: Any, name: str) -> int:
    """The (shorter) edge that a processor makes; 0: it does not say."""
    told = getattr(processor, name, None)
    if told is None:
        return 0
    edges = [getattr(told, key, None) for key in ("shortest_edge", "height", "width")]
    return min((int(edge) for edge in edges if edge), default=0)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the list of a whole model's other weights, and without bars."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _as_settings(model: ModelRef) -> Iterator[None]:
    """What a library cannot read is a wrong setting."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = (
            f"tower={model.name!r}: transformers reads no vision tower from it ({reason}); it needs "
            "config.json, preprocessor_config.json and model.safetensors. A model of timm's is named "
            "timm:NAME, hf-hub:NAME or local-dir:FOLDER."
        )
        raise SettingsError(message) from None


# timm


def _timm_tower(model: ModelRef, size: int) -> _Built:
    import timm
    from timm.data import resolve_data_config
    from timm.models import resolve_model_input_args

    folder = os.path.dirname(_file(model, "config.json"))
    try:
        arguments = resolve_model_input_args(f"{TIMM_FOLDER}{folder}")
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        message = (
            f"tower={model.name!r}: its config.json describes no model of timm {timm.__version__} "
            f"({type(error).__name__}: {error}); one of transformers is named without a prefix."
        )
        raise SettingsError(message) from None
    name, known = arguments.pop("model_name"), arguments.pop("pretrained_cfg")
    arguments.pop("num_classes", None)
    data = resolve_data_config(pretrained_cfg=known)
    own = int(arguments.get("img_size") or data["input_size"][-1])
    edge = size or own
    if known.get("fixed_input_size") or "img_size" in arguments:
        arguments["img_size"] = edge

    def load() -> nn.Module:
        file = _file(model, "model.safetensors")
        # Where else its weights might come from is left out: timm would look there first.
        source = {key: value for key, value in known.items() if key not in _SOURCES}
        try:
            loaded: nn.Module = timm.create_model(
                name, pretrained=True, pretrained_cfg={**source, "file": file}, num_classes=0, **arguments
            )
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[:2][-1].strip()
            message = f"tower={model.name!r}: its weights do not fit timm's {name} ({reason})."
            raise SettingsError(message) from None
        return loaded

    def look(tower: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        features = tower.forward_features(images)
        pooled: Tensor = tower.forward_head(features, pre_logits=True)
        if features.ndim == 4:  # a map
            last = str(getattr(tower, "output_fmt", "NCHW")).upper().endswith("NHWC")
            return pooled, features.flatten(1, 2) if last else features.flatten(2).mT
        return pooled, features[:, int(getattr(tower, "num_prefix_tokens", 0)) :]

    squash = data["crop_mode"] == "squash"
    return _Built(
        family=TIMM_FAMILY,
        size=edge,
        resize=0 if squash else math.floor(edge / float(data["crop_pct"])),
        interpolation=str(data["interpolation"]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        pooling="input of the classifier",
        empty=lambda: timm.create_model(name, pretrained=False, num_classes=0, **arguments),
        load=load,
        look=look,
    )


_SOURCES = ("source", "url", "file", "hf_hub_id", "hf_hub_filename", "custom_load", "state_dict")


def _file(model: ModelRef, name: str) -> str:
    """A file of a model on this machine, fetched if need be."""
    if model.hub_revision is None:
        return os.path.join(model.here(), name)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return str(hf_hub_download(model.location, name, revision=model.revision))
    except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
        message = (
            f"tower={model.name!r}: {name} is not to be had ({str(error).splitlines()[0]}). On a machine "
            f"without a network copy the model's folder there and pass {TIMM_FOLDER}FOLDER."
        )
        raise SettingsError(message) from None
