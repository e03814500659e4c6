"""Target `clip-hf`: a directory for transformers' `CLIPVisionModel`, the tower of LLaVA and MobileVLM.

Keys carry the prefix `vision_model.`, which transformers 4 needs and transformers 5 still reads. A file written by
transformers 5's `save_pretrained` lacks it, and every transformers 4 consumer then runs on random weights, silently.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distill.encoder import TimmLayoutEncoder
from distill.errors import ExportError
from distill.export.contract import ConsumerFeatures, Variant, single_variant
from distill.export.hf_directory import write_directory
from distill.export.transformers_loading import (
    AUTO_MODEL_CODE,
    hidden_states,
    load_strictly,
    processor_pixels,
    squash_preprocessor,
)
from distill.export.weights import ViTShape, refuse_leftovers, rename_block_weights

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = "clip-hf"
REQUIRES = ("transformers",)
EXTRA = "export"
CONSUMER_FOLDER: str | None = None
LAYERS = (-2, -1)

_BLOCK_NAMES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_PREFIX = "vision_model."


def check(encoder: TimmLayoutEncoder) -> None:
    """Return when the encoder is of CLIP layout.

    Raises:
        ExportError: it is of another layout.
    """
    if encoder.layout == "clip":
        return
    reason = (
        "CLIPVisionModel normalises every token before the first block, and no weight turns that LayerNorm off; "
        "nor has it a patch bias or LayerScale"
        if encoder.layout == "internvit"
        else "CLIPVisionModel computes CLIP's vision tower and nothing else"
    )
    raise ExportError(
        f"A student of {encoder.layout!r} layout cannot be exported as {FORMAT}: {reason}. "
        f"Use {'internvl-hf or timm' if encoder.layout == 'internvit' else 'timm'}, or train a CLIP-layout student."
    )


def write(encoder: TimmLayoutEncoder, directory: Path) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json for `CLIPVisionModel`.

    Raises:
        ExportError: a weight has no place in that class, or a file cannot be written.
    """
    check(encoder)
    write_directory(encoder, directory, config=_config, rename=_rename, preprocessor=squash_preprocessor(encoder))


def _rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    width = weights["cls_token"].shape[-1]
    renamed = {
        "embeddings.class_embedding": weights.pop("cls_token").reshape(width),
        "embeddings.position_embedding.weight": weights.pop("pos_embed")[0],
        "embeddings.patch_embedding.weight": weights.pop("patch_embed.proj.weight"),
        # transformers spells it so.
        "pre_layrnorm.weight": weights.pop("norm_pre.weight"),
        "pre_layrnorm.bias": weights.pop("norm_pre.bias"),
        # It only touches the pooled output, which distillation does not train; a student without one gets the neutral.
        "post_layernorm.weight": weights.pop("norm.weight", torch.ones(width)),
        "post_layernorm.bias": weights.pop("norm.bias", torch.zeros(width)),
    }
    projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    renamed |= rename_block_weights(weights, _BLOCK_NAMES, "encoder.layers.{}", projections)
    for key in ("head.weight", "head.bias"):
        # CLIP's projection into the text space: CLIPVisionModel has none.
        weights.pop(key, None)
    refuse_leftovers(weights, "transformers' CLIPVisionModel")
    return {_PREFIX + key: value.contiguous() for key, value in renamed.items()}


def _config(encoder: TimmLayoutEncoder, shape: ViTShape) -> dict[str, Any]:
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": shape.num_heads,
        "intermediate_size": shape.mlp_dim,
        "hidden_act": shape.hidden_act,
        "layer_norm_eps": shape.norm_eps,
        # A number, never a pair: LLaVA divides it by the patch size.
        "image_size": encoder.img_size,
        "patch_size": encoder.patch_size,
        "num_channels": 3,
        "projection_dim": encoder.embed_dim,
        "attention_dropout": 0.0,
        "torch_dtype": "float32",
    }


def variants(directory: Path) -> tuple[Variant, ...]:
    """Return the one file, float32."""
    return single_variant(directory)


def consumer_features(directory: Path, variant: str, pixel_values: Tensor, num_layers: int) -> ConsumerFeatures:
    """Return the last hidden states by transformers' `CLIPVisionModel`."""
    from transformers import CLIPVisionModel

    model, missing, unexpected = load_strictly(CLIPVisionModel, directory)
    return hidden_states(model, missing, unexpected, pixel_values, num_layers)


def consumer_pixels(directory: Path, image: Image) -> Tensor:
    """Return the image as transformers' `AutoImageProcessor` prepares it, `[1, 3, H, W]`."""
    return processor_pixels(directory, image)


def loading_code() -> str:
    """Return six lines that load the export by transformers alone."""
    return AUTO_MODEL_CODE.format(model_class="CLIPVisionModel")
