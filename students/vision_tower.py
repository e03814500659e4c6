"""CLIP and InternViT checkpoints as timm weights of one geometry."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import timm
import torch
from torch import Tensor

from students.images import nearest_sizes
from students.layouts import Kind, convert_to_timm, find_layout
from students.timm_encoder import build_timm_model
from students.weight_files import read_state_dict

ARCHITECTURES: dict[Kind, str] = {
    "clip": "vit_large_patch14_clip_quickgelu_336",
    "internvit": "vit_intern300m_patch14_448",
}
"""timm's name of each network; the geometry is given by arguments."""

PRETRAINED_CLIP = "vit_large_patch14_clip_quickgelu_336.openai"
"""timm's hub copy of OpenAI's CLIP-ViT-L/14-336, fetched for the weights named "pretrained"."""


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
    weights: str, geometry: dict[str, Any], kinds: Collection[Kind]
) -> tuple[Kind, dict[str, Tensor]]:
    """Return a checkpoint's vision tower under timm's names, float32, with the positions it has.

    Args:
        weights: path of a file or directory, or "pretrained" for timm's hub copy of CLIP-ViT-L/14-336.
        geometry: timm arguments of the student; every tensor but the positions must fit them.
        kinds: which networks are accepted.

    Returns:
        Which network it is, and its weights.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the layout is unknown or of another network, or a tensor is missing, left over or of another
            shape.
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
    return layout.kind, convert_to_timm(state, layout, prefix, shapes, weights)


def _download_clip() -> dict[str, Tensor]:
    with torch.device("cpu"):
        return timm.create_model(PRETRAINED_CLIP, pretrained=True, num_classes=0).state_dict()
