"""Pairing hidden states: which layer of the student meets which of the teacher, and on which grid. Pure functions.

Legend: B images, P prefix tokens, H x W a patch grid, N tokens, D channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distill.encoder import Layer


def pair_last_layers(student: list[Layer], teacher: list[Layer], num_layers: int) -> list[tuple[Layer, Layer]]:
    """Pair the last `num_layers` hidden states of both sides, oldest first: last with last, and so on back.

    Raises:
        ValueError: one side has fewer.
    """
    if min(len(student), len(teacher)) < num_layers:
        raise ValueError(
            f"num_layers {num_layers} asks for more hidden states than there are: "
            f"{len(student)} of the student, {len(teacher)} of the teacher."
        )
    return list(zip(student[-num_layers:], teacher[-num_layers:], strict=True))


def match_grids(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Bring two patch grids `[B, H, W, D]` of the same image to the smaller height and width of the two.

    The finer grid is averaged over the cells that each coarser cell covers (adaptive average pooling), so nothing is
    invented where a grid has no information. Widths D may differ. Grids that agree are returned untouched.
    """
    height = min(student.shape[1], teacher.shape[1])
    width = min(student.shape[2], teacher.shape[2])
    return _pool(student, height, width), _pool(teacher, height, width)


def _pool(patches: Tensor, height: int, width: int) -> Tensor:
    if patches.shape[1:3] == (height, width):
        return patches
    return F.adaptive_avg_pool2d(patches.permute(0, 3, 1, 2), (height, width)).permute(0, 2, 3, 1)


def patch_tokens(patches: Tensor) -> Tensor:
    """Return a patch grid `[B, H, W, D]` as tokens `[B, H * W, D]`, row by row."""
    return patches.flatten(1, 2)


def shared_prefix(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the prefix tokens both sides have, or None.

    With equal counts all are paired; otherwise only the first of each, the class token, since registers have no
    counterpart.

    Args:
        student: `[B, P, D]`.
        teacher: `[B, Q, E]`.
    """
    if student.shape[1] == 0 or teacher.shape[1] == 0:
        return None
    if student.shape[1] == teacher.shape[1]:
        return student, teacher
    return student[:, :1], teacher[:, :1]
