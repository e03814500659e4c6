"""The encoder's weights under timm's names, checked against timm's own model before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from distill.encoder import TimmLayoutEncoder
from distill.errors import ExportError

ACTIVATION_NAMES = {
    ("GELU", "none"): "gelu",
    ("GELU", "tanh"): "gelu_pytorch_tanh",
    ("QuickGELU", "none"): "quick_gelu",
}
"""Activation class and its `approximate` mode -> the name in transformers' `ACT2FN`."""


@dataclass(frozen=True)
class ViTShape:
    """The numbers of a plain vision transformer that its weight shapes do not tell."""

    num_heads: int
    mlp_dim: int
    hidden_act: str
    norm_eps: float


def timm_skeleton(encoder: TimmLayoutEncoder) -> nn.Module:
    """Return the timm model that the encoder claims to be, on the meta device: shapes without memory.

    Raises:
        ExportError: timm does not know the architecture or refuses an argument.
    """
    import timm

    try:
        with torch.device("meta"):
            return timm.create_model(encoder.timm_architecture, **encoder.timm_model_args)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ExportError(
            f"timm {timm.__version__} cannot build {encoder.timm_architecture!r} with {encoder.timm_model_args}: "
            f"{error}. The student's timm_architecture and timm_model_args must rebuild it."
        ) from error


def strides_of(encoder: TimmLayoutEncoder) -> dict[str, int]:
    """Return the strides that differ from timm's model, by module; empty for an encoder that has no `timm_strides`."""
    return dict(getattr(encoder, "timm_strides", {}))


def set_strides(model: nn.Module, encoder: TimmLayoutEncoder) -> None:
    """Give a model that was rebuilt by timm the strides that its encoder computes with."""
    for path, stride in strides_of(encoder).items():
        cast(Any, model.get_submodule(path)).stride = (stride, stride)


def read_timm_weights(encoder: TimmLayoutEncoder, skeleton: nn.Module) -> dict[str, Tensor]:
    """Return every weight under timm's names, float32, on the CPU, contiguous and sharing no memory.

    Args:
        encoder: the student.
        skeleton: its `timm_skeleton`.

    Raises:
        ExportError: a tensor is missing, left over, of another shape, not float32 or not finite.
    """
    try:
        state, expected = encoder.timm_state_dict(), skeleton.state_dict()
    except RuntimeError as error:
        raise ExportError(f"The encoder gives no weights to export: {error}") from error
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    wrong = [key for key in sorted(expected.keys() & state.keys()) if expected[key].shape != state[key].shape]
    if missing or unexpected or wrong:
        raise ExportError(
            f"The student's weights do not fit timm's {encoder.timm_architecture!r}: missing {missing[:3]}, "
            f"left over {unexpected[:3]}, of another shape {wrong[:3]}. Nothing was written."
        )
    for key, value in state.items():
        if value.is_floating_point() and value.dtype != torch.float32:
            raise ExportError(f"{key} is {value.dtype}; exports are written in float32. Call student.float() first.")
        if not torch.isfinite(value).all():
            raise ExportError(f"{key} holds values that are not finite: this student diverged. Export an older one.")
    return {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}


def read_vit_shape(skeleton: nn.Module) -> ViTShape:
    """Return heads, MLP width, activation and norm epsilon of a timm vision transformer's blocks.

    Raises:
        ExportError: the activation has no name in transformers.
    """
    block = cast(Any, skeleton).blocks[0]
    act = block.mlp.act
    key = (type(act).__name__, str(getattr(act, "approximate", "none")))
    if key not in ACTIVATION_NAMES:
        raise ExportError(
            f"The activation {key[0]} (approximate={key[1]}) has no counterpart here; "
            f"known are {', '.join(sorted(ACTIVATION_NAMES.values()))}."
        )
    return ViTShape(
        num_heads=int(block.attn.num_heads),
        mlp_dim=int(block.mlp.fc1.out_features),
        hidden_act=ACTIVATION_NAMES[key],
        norm_eps=float(block.norm1.eps),
    )


def check_position_grid(encoder: TimmLayoutEncoder, pos_embed: Tensor) -> None:
    """Return when the stored positions are exactly the grid of `img_size`: consumers resize them differently.

    Raises:
        ExportError: they are for another grid, or the class token has no position.
    """
    tokens = (encoder.img_size // encoder.patch_size) ** 2 + 1
    if encoder.img_size % encoder.patch_size or pos_embed.shape[1] != tokens:
        raise ExportError(
            f"The position embedding has {pos_embed.shape[1]} rows, img_size {encoder.img_size} at patch "
            f"{encoder.patch_size} needs {tokens} with the class token. Resize the student's positions first: "
            "transformers and timm resize them by different filters."
        )


def rename_block_weights(
    weights: dict[str, Tensor], renames: dict[str, str], block_prefix: str, qkv: tuple[str, str, str]
) -> dict[str, Tensor]:
    """Return timm block weights under a consumer's names, with `attn.qkv` split in three.

    Args:
        weights: keys `blocks.<i>.<name>`; removed from this mapping as they are used.
        renames: `<name>` without `.weight`/`.bias` -> the consumer's name; a parameter without suffix keeps none.
        block_prefix: the consumer's prefix of one block, with `{}` for its number.
        qkv: the consumer's names of the query, key and value projections.
    """
    renamed: dict[str, Tensor] = {}
    for key in [key for key in weights if key.startswith("blocks.")]:
        _, number, name = key.split(".", 2)
        prefix = block_prefix.format(number)
        module, _, kind = name.rpartition(".")
        if module == "attn.qkv":
            for part, tensor in zip(qkv, weights.pop(key).chunk(3, dim=0), strict=True):
                renamed[f"{prefix}.{part}.{kind}"] = tensor.contiguous()
        elif module in renames:
            renamed[f"{prefix}.{renames[module]}.{kind}"] = weights.pop(key)
        elif name in renames:
            renamed[f"{prefix}.{renames[name]}"] = weights.pop(key)
    return renamed


def refuse_leftovers(weights: dict[str, Tensor], consumer: str) -> None:
    """Return when every weight found its place.

    Raises:
        ExportError: naming weights that the consumer's layout has no place for.
    """
    if weights:
        names = ", ".join(sorted(weights)[:4])
        raise ExportError(f"{consumer} has no place for {len(weights)} weights of this student (first: {names}).")
