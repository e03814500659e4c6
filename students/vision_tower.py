"""CLIP and InternViT checkpoints as timm weights of one geometry."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from students.images import nearest_sizes
from students.layouts import Kind, convert_to_timm, find_layout
from students.timm_encoder import build_timm_model, download_timm_weights
from students.weight_files import read_state_dict

ARCHITECTURES: dict[Kind, str] = {
    "clip": "vit_large_patch14_clip_quickgelu_336",
    "internvit": "vit_intern300m_patch14_448",
}
"""timm's name of each network; the geometry is given by arguments."""

PRETRAINED_CLIP = "vit_large_patch14_clip_quickgelu_336.openai"
"""timm's hub copy of OpenAI's CLIP-ViT-L/14-336, fetched for the weights named "pretrained"."""

_DEFAULT_HEADS = {"clip": 12, "clip_vision_model": 12, "internvl_vision": 16}
"""Heads of a transformers configuration that names none, by its model_type."""


def check_geometry(*, img_size: int, patch_size: int, embed_dim: int, num_heads: int) -> None:
    """Refuse sizes that no ViT can have, before anything is built.

    Raises:
        ValueError: `img_size` is no multiple of `patch_size`, or `embed_dim` none of `num_heads`.
    """
    if img_size % patch_size or img_size <= 0:
        raise ValueError(
            f"img_size {img_size} is not a multiple of patch_size {patch_size}; "
            f"use {nearest_sizes(img_size, patch_size)}."
        )
    if embed_dim % num_heads:
        raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}; change one of them.")


def read_vision_tower(
    weights: str,
    geometry: dict[str, Any],
    kinds: Collection[Kind],
    *,
    act: str | None = None,
    norm_eps: float | None = None,
) -> tuple[Kind, dict[str, Tensor]]:
    """Return a checkpoint's vision tower under timm's names, float32, with the positions it has.

    Args:
        weights: path of a file or directory, or "pretrained" for timm's hub copy of CLIP-ViT-L/14-336.
        geometry: timm arguments of the student; every tensor but the positions must fit them.
        kinds: which networks are accepted.
        act: activation that a configuration beside the weights must not contradict; none accepts any.
        norm_eps: epsilon of LayerNorm, likewise.

    Returns:
        Which network it is, and its weights.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the layout is unknown or of another network, a tensor is missing, left over or of another
            shape, or a configuration beside the weights says other heads, activation or epsilon.
    """
    state = _download_clip() if weights == "pretrained" else read_state_dict(weights)
    layout, prefix = find_layout(state, weights)
    if layout.kind not in kinds:
        raise ValueError(
            f"The weights {weights} are of the layout {layout.title}; this student can begin from "
            f"{' or '.join(kinds)} weights only. Name such a file, or use the student class of that network."
        )
    template = build_timm_model(ARCHITECTURES[layout.kind], geometry, device="meta").state_dict()
    shapes = {key: value.shape for key, value in template.items()}
    converted = convert_to_timm(state, layout, prefix, shapes, weights)
    if weights != "pretrained":
        _check_configs(Path(weights), {"num_heads": geometry["num_heads"], "act": act, "norm_eps": norm_eps})
    return layout.kind, converted


def _download_clip() -> dict[str, Tensor]:
    return download_timm_weights(PRETRAINED_CLIP, {"num_classes": 0})


def _check_configs(directory: Path, student: Mapping[str, object]) -> None:
    """Refuse a weight directory whose configuration describes another function than the student computes.

    Heads, activation and epsilon leave no trace in the shapes of the weights.
    """
    for name, read in (("config.json", _transformers_settings), ("open_clip_config.json", _open_clip_settings)):
        file = directory / name
        if not file.is_file():
            continue
        try:
            settings = read(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{file} is not a model configuration: {error}. Fetch the directory again.") from error
        for setting, (key, stored) in settings.items():
            if student[setting] is not None and stored is not None and stored != student[setting]:
                raise ValueError(
                    f"{file} says {key} {stored!r}; the student has {setting} {student[setting]!r}, with which these "
                    f"weights compute something else. Set {setting} to it where the student has that argument, or name "
                    "other weights."
                )


def _transformers_settings(config: dict[str, Any]) -> dict[str, tuple[str, object]]:
    """Return key and value of what transformers writes, by the student's name; no value where it says nothing."""
    vision: dict[str, Any] = config.get("vision_config") or config
    # transformers leaves out of a saved configuration what is the default of its class.
    heads = _DEFAULT_HEADS.get(cast(str, vision.get("model_type", config.get("model_type"))))
    return {
        "num_heads": ("num_attention_heads", vision.get("num_attention_heads", heads)),
        "act": ("hidden_act", vision.get("hidden_act")),
        "norm_eps": ("layer_norm_eps", vision.get("layer_norm_eps")),
    }


def _open_clip_settings(config: dict[str, Any]) -> dict[str, tuple[str, object]]:
    """Return key and value of what open_clip writes, with its defaults (`CLIPVisionCfg` in `open_clip/model.py`)."""
    model: dict[str, Any] = config.get("model_cfg") or config
    vision: dict[str, Any] = model.get("vision_cfg") or {}
    heads = vision["width"] // vision.get("head_width", 64) if "width" in vision else None
    return {
        "num_heads": ("width / head_width", heads),
        "act": ("quick_gelu, which makes its activation", "quick_gelu" if model.get("quick_gelu") else "gelu"),
        "norm_eps": ("norm_kwargs.eps", (vision.get("norm_kwargs") or {}).get("eps")),
    }
