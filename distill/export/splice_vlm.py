"""What `--into` reads of an existing VLM directory, and whether an encoder fits in place of its tower.

Three layouts: InternVL as OpenGVLab publishes it (`internvl_chat`), transformers' InternVL, and transformers' LLaVA and
LLaVA-NeXT. Nothing is written here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from distill.encoder import TimmLayoutEncoder
from distill.errors import ExportError
from distill.export import clip_hf, dinov2_hf, internvl, internvl_hf
from distill.export.contract import CONFIG_FILE, PREPROCESSOR_FILE, WEIGHTS_FILE, ExportTarget

CHAT = "internvl_chat"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"

# Select layer where config.json names none: the key and the default of the consumer's own configuration class.
_SELECT_LAYER = {
    CHAT: ("select_layer", -1),
    "internvl": ("vision_feature_layer", -1),
    "llava": ("vision_feature_layer", -2),
    "llava_next": ("vision_feature_layer", -2),
}
_TOWERS: dict[str, tuple[ExportTarget, str]] = {
    "intern_vit_6b": (internvl, "embeddings.patch_embedding.weight"),
    "internvl_vision": (internvl_hf, "embeddings.patch_embeddings.projection.weight"),
    "clip_vision_model": (clip_hf, "embeddings.patch_embedding.weight"),
    "dinov2": (dinov2_hf, "embeddings.patch_embeddings.projection.weight"),
}
"""Vision model type -> the target that writes it, and the key by which its tower is found."""

_PROJECTOR_INPUTS = (
    "mlp1.0.weight",
    "multi_modal_projector.layer_norm.weight",
    "multi_modal_projector.linear_1.weight",
)
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""InternVL's chat code normalises by these, whatever its preprocessing file says."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a stored tensor is and what it looks like."""

    file: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Vlm:
    """A VLM directory, as far as its tower is concerned.

    Attributes:
        directory: where it is.
        kind: `model_type` of its config.json.
        config: the whole config.json.
        tensors: every stored tensor by its key.
        tower_prefix: what stands in front of the tower's keys.
        tower: the target that writes towers of its kind.
    """

    directory: Path
    kind: str
    config: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    tower_prefix: str
    tower: ExportTarget

    @property
    def vision_config(self) -> dict[str, Any]:
        """The configuration of its tower."""
        return cast(dict[str, Any], self.config["vision_config"])

    @property
    def tower_keys(self) -> list[str]:
        """Keys of the tensors to be replaced."""
        return [key for key in self.tensors if key.startswith(self.tower_prefix)]

    @property
    def select_layer_key(self) -> str:
        """The key of config.json that says which hidden state is read."""
        return _SELECT_LAYER[self.kind][0]


def read_vlm(directory: Path) -> Vlm:
    """Return what is needed of a VLM directory; only headers of weight files are read.

    Raises:
        ExportError: it is no directory of a known layout, or its files are missing or damaged.
    """
    config = _read_json(directory / CONFIG_FILE)
    kind = str(config.get("model_type"))
    if kind not in _SELECT_LAYER or not isinstance(config.get("vision_config"), dict):
        raise ExportError(
            f"--into {directory}: {CONFIG_FILE} says model_type {kind!r}; an encoder can go into "
            f"{', '.join(_SELECT_LAYER)}. Name the directory of such a model."
        )
    # OpenGVLab's configuration need not name it: that layout has one kind of tower.
    model_type = config["vision_config"].get("model_type") or ("intern_vit_6b" if kind == CHAT else None)
    if model_type not in _TOWERS:
        raise ExportError(
            f"--into {directory}: its tower is of model_type {model_type!r}; this project writes "
            f"{', '.join(_TOWERS)}. Nothing was written."
        )
    tower, marker = _TOWERS[model_type]
    tensors = _read_tensors(directory)
    prefixes = [key.removesuffix(marker) for key in tensors if key.endswith(marker)]
    if len(prefixes) != 1 or not prefixes[0]:
        raise ExportError(
            f"--into {directory}: {len(prefixes)} keys end with {marker}, so its tower cannot be told from the rest; "
            "it must be one, behind a prefix. Nothing was written."
        )
    return Vlm(directory, kind, config, tensors, prefixes[0], tower)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"--into: {path} cannot be read ({error}); name the directory of a whole VLM.") from error
    if not isinstance(value, dict):
        raise ExportError(f"--into: {path} holds no mapping; name the directory of a whole VLM.")
    return cast(dict[str, Any], value)


def _read_tensors(directory: Path) -> dict[str, StoredTensor]:
    index = directory / INDEX_FILE
    stale = sorted(path.name for path in directory.glob("pytorch_model*.bin"))
    if stale:
        raise ExportError(
            f"--into {directory}: {stale[0]} would keep the old tower beside the new one. Remove the .bin weights from "
            "a copy that has safetensors, or convert them."
        )
    weight_map = cast(dict[str, str], _read_json(index).get("weight_map") or {}) if index.is_file() else {}
    stray = sorted({path.name for path in directory.glob("*.safetensors")} - set(weight_map.values()))
    if index.is_file() and stray:
        # transformers prefers model.safetensors to an index, and so would go on with the old tower.
        raise ExportError(
            f"--into {directory}: {stray[0]} lies beside {INDEX_FILE}, which does not list it; programs may load the "
            "one or the other. Remove the file that is out of date from a copy."
        )
    files = sorted(set(weight_map.values())) or [WEIGHTS_FILE]
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        try:
            with safe_open(directory / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - it is no mapping
                    part = file.get_slice(key)
                    tensors[key] = StoredTensor(name, tuple(part.get_shape()), str(part.get_dtype()))
        except (OSError, SafetensorError) as error:
            raise ExportError(
                f"--into: {directory / name} cannot be read as safetensors ({error}). Fetch the directory again; "
                "weights in .bin files have to be converted first."
            ) from error
    return tensors


def tower_dtype(vlm: Vlm) -> torch.dtype:
    """Return the one precision that the tower is stored in.

    Raises:
        ExportError: there are several, or it is none that an encoder can be written in.
    """
    stored = sorted({vlm.tensors[key].dtype for key in vlm.tower_keys if vlm.tensors[key].dtype != "I64"})
    if len(stored) != 1 or stored[0] not in _DTYPES:
        raise ExportError(
            f"--into {vlm.directory}: its tower is stored as {', '.join(stored)}; it must be one of "
            f"{', '.join(_DTYPES)} throughout. Quantised models have to be spliced before they are quantised."
        )
    return _DTYPES[stored[0]]


def check_fit(vlm: Vlm, encoder: TimmLayoutEncoder, trained_layers: int) -> int:
    """Return which hidden state the VLM reads, counted from the end, when the encoder fits.

    Args:
        vlm: the directory.
        encoder: what goes into it.
        trained_layers: how many of its last hidden states were trained.

    Raises:
        ExportError: layout, width, token count, image size, normalisation or select layer do not fit; nothing is lost.
    """
    vlm.tower.check(encoder)
    _check_projector(vlm, encoder)
    _check_tokens(vlm, encoder)
    _check_normalisation(vlm, encoder)
    return _check_select_layer(vlm, encoder, trained_layers)


def _shuffle(vlm: Vlm) -> int:
    """Return how many tokens, along a side, InternVL's pixel shuffle makes one of; LLaVA has none."""
    return round(1 / float(vlm.config.get("downsample_ratio", 0.5))) if vlm.kind in (CHAT, "internvl") else 1


def _check_projector(vlm: Vlm, encoder: TimmLayoutEncoder) -> None:
    found = [(key, tensor) for key, tensor in vlm.tensors.items() if key.endswith(_PROJECTOR_INPUTS)]
    if not found:
        raise ExportError(f"--into {vlm.directory}: no projector, none of {', '.join(_PROJECTOR_INPUTS)}, is there.")
    key, tensor = min(found)
    takes, gives = tensor.shape[-1], encoder.embed_dim * _shuffle(vlm) ** 2
    if takes != gives:
        raise ExportError(
            f"--into {vlm.directory}: the projector no longer fits. {key} has shape {list(tensor.shape)} and takes "
            f"{takes} channels a token; the encoder (embed_dim {encoder.embed_dim}) gives {gives}. Take a student of "
            f"embed_dim {takes // _shuffle(vlm) ** 2}, or train a new projector first. Nothing was written."
        )


def _side(value: Any) -> int:
    """Return pixels a side of what configurations write as a number or as a pair."""
    return int(value[0] if isinstance(value, list) else value)


def _check_tokens(vlm: Vlm, encoder: TimmLayoutEncoder) -> None:
    image, patch = _side(vlm.vision_config.get("image_size", 0)), _side(vlm.vision_config.get("patch_size", 14))
    forced = vlm.config.get("force_image_size") if vlm.kind == CHAT else None
    image = _side(forced) if forced else image
    theirs, ours = (image // patch) ** 2, (encoder.img_size // encoder.patch_size) ** 2
    if (image, theirs) != (encoder.img_size, ours):
        raise ExportError(
            f"--into {vlm.directory}: it makes {theirs} patch tokens of a {image} px image, the encoder {ours} of a "
            f"{encoder.img_size} px one; both must be equal. Give --img_size {image}, or take another student. "
            "Nothing was written."
        )
    if math.isqrt(ours) % _shuffle(vlm):
        raise ExportError(
            f"--into {vlm.directory}: a grid of {math.isqrt(ours)} tokens a side cannot be shuffled by {_shuffle(vlm)}."
        )


def _check_normalisation(vlm: Vlm, encoder: TimmLayoutEncoder) -> None:
    ours = (tuple(encoder.image_mean), tuple(encoder.image_std))
    for name in (PREPROCESSOR_FILE, "processor_config.json"):
        if not (vlm.directory / name).is_file():
            continue
        settings = _read_json(vlm.directory / name)
        settings = cast(dict[str, Any], settings.get("image_processor") or settings)
        if "image_mean" in settings and "image_std" in settings:
            _refuse_other(vlm, name, (tuple(settings["image_mean"]), tuple(settings["image_std"])), ours)
    if vlm.kind == CHAT:
        _refuse_other(vlm, "InternVL's chat code", _IMAGENET, ours)


def _refuse_other(vlm: Vlm, name: str, theirs: tuple[Any, Any], ours: tuple[Any, Any]) -> None:
    pairs = zip((*theirs[0], *theirs[1]), (*ours[0], *ours[1]), strict=True)
    if not all(math.isclose(a, b, abs_tol=1e-6) for a, b in pairs):
        raise ExportError(
            f"--into {vlm.directory}: {name} normalises images by mean {list(theirs[0])} and std {list(theirs[1])}, "
            f"the encoder by {list(ours[0])} and {list(ours[1])}. Correct that file in a copy of the directory, or "
            "take a student with its mean and std. Nothing was written."
        )


def _check_select_layer(vlm: Vlm, encoder: TimmLayoutEncoder, trained_layers: int) -> int:
    key, default = _SELECT_LAYER[vlm.kind]
    stored: Any = vlm.config.get(key, default)
    # Counted from the embeddings, which are hidden state 0, when it is not negative.
    layer = stored - encoder.depth - 1 if isinstance(stored, int) and stored >= 0 else stored
    if not isinstance(layer, int) or not -trained_layers <= layer <= -1:
        raise ExportError(
            f"--into {vlm.directory}: it reads hidden state {stored} ({key} in {CONFIG_FILE}), and of this encoder of "
            f"{encoder.depth} layers the last {trained_layers} (-{trained_layers} to -1) were trained. Set {key} to -1 "
            "in a copy of the directory, or keep fewer blocks by --layers. Nothing was written."
        )
    return layer
