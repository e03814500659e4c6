"""What the targets that are transformers directories share: whom they refuse, and the three files they write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from distill.encoder import TimmLayoutEncoder
from distill.errors import ExportError
from distill.export.contract import CONFIG_FILE, PREPROCESSOR_FILE, WEIGHTS_FILE
from distill.export.files import write_json, write_safetensors
from distill.export.weights import ViTShape, check_position_grid, read_timm_weights, read_vit_shape, timm_skeleton


def require_internvit(encoder: TimmLayoutEncoder, format_name: str, model_class: str, computes: str) -> None:
    """Return when the encoder is of InternViT layout.

    Args:
        encoder: the student.
        format_name: the target's name.
        model_class: the consumer's class.
        computes: what that class computes, for example "InternViT".

    Raises:
        ExportError: it is of another layout.
    """
    if encoder.layout == "internvit":
        return
    is_clip = encoder.layout == "clip"
    reason = (
        f"its LayerNorm in front of the first block is another function, which {model_class} does not have"
        if is_clip
        else f"{model_class} computes {computes} and nothing else"
    )
    raise ExportError(
        f"A student of {encoder.layout!r} layout cannot be exported as {format_name}: {reason}. "
        f"Use {'clip-hf or timm' if is_clip else 'timm'}."
    )


def write_directory(
    encoder: TimmLayoutEncoder,
    directory: Path,
    *,
    config: Callable[[TimmLayoutEncoder, ViTShape], dict[str, Any]],
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    preprocessor: dict[str, Any],
) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json.

    Args:
        encoder: the student.
        directory: existing, empty.
        config: the consumer's configuration for the student and its shape.
        rename: timm's weights under the consumer's names; it may empty the mapping it is given.
        preprocessor: the consumer's preprocessing.

    Raises:
        ExportError: a weight has no place in the consumer's class, or a file cannot be written.
    """
    skeleton = timm_skeleton(encoder)
    weights = read_timm_weights(encoder, skeleton)
    check_position_grid(encoder, weights["pos_embed"])
    write_json(directory / CONFIG_FILE, config(encoder, read_vit_shape(skeleton)))
    write_safetensors(directory / WEIGHTS_FILE, rename(weights))
    write_json(directory / PREPROCESSOR_FILE, preprocessor)
