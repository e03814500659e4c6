"""Target `dinov2-hf`: the InternViT student as transformers' own `Dinov2Model`, without remote code, from 4.37 to 5.x.

Both compute the same blocks: class token, biased patches, LayerScale, no norm before the first block. `Dinov2Model`
adds a LayerNorm after the last one, so its features are `hidden_states[-1]` and not `last_hidden_state`. Keys are those
of transformers 4, which 5 reads as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distill.encoder import TimmLayoutEncoder
from distill.errors import ExportError
from distill.export.contract import ConsumerFeatures, Variant, single_variant
from distill.export.hf_directory import require_internvit, write_directory
from distill.export.transformers_loading import hidden_states, load_strictly, processor_pixels, squash_preprocessor
from distill.export.weights import ViTShape, read_vit_shape, refuse_leftovers, rename_block_weights, timm_skeleton

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = "dinov2-hf"
REQUIRES = ("transformers",)
EXTRA = "export"
CONSUMER_FOLDER: str | None = None
LAYERS = (-2, -1)

_BLOCK_NAMES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def check(encoder: TimmLayoutEncoder) -> None:
    """Return when the encoder is of InternViT layout, with an MLP of a whole number of widths.

    Raises:
        ExportError: it is of another layout, or its MLP cannot be told to `Dinov2Config`.
    """
    require_internvit(encoder, FORMAT, "Dinov2Model", "blocks as InternViT's")
    _mlp_ratio(encoder, read_vit_shape(timm_skeleton(encoder)))


def _mlp_ratio(encoder: TimmLayoutEncoder, shape: ViTShape) -> int:
    ratio, rest = divmod(shape.mlp_dim, encoder.embed_dim)
    if rest:
        raise ExportError(
            f"The MLP is {shape.mlp_dim} wide at embed_dim {encoder.embed_dim}, and transformers 5 wants mlp_ratio of "
            f"Dinov2Config to be a whole number, so this student cannot be exported as {FORMAT}. Use internvl or "
            "internvl-hf, which state the width itself."
        )
    return ratio


def write(encoder: TimmLayoutEncoder, directory: Path) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json for `Dinov2Model`.

    Raises:
        ExportError: a weight has no place in that class, or a file cannot be written.
    """
    check(encoder)
    write_directory(encoder, directory, config=_config, rename=_rename, preprocessor=squash_preprocessor(encoder))


def _rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    width = weights["cls_token"].shape[-1]
    renamed = {
        "embeddings.cls_token": weights.pop("cls_token"),
        "embeddings.position_embeddings": weights.pop("pos_embed"),
        "embeddings.patch_embeddings.projection.weight": weights.pop("patch_embed.proj.weight"),
        "embeddings.patch_embeddings.projection.bias": weights.pop("patch_embed.proj.bias"),
        # Only read for masked images. transformers 4.37 has one whatever the configuration says.
        "embeddings.mask_token": torch.zeros(1, width),
        # After the last block, where the student has none: only last_hidden_state and pooler_output pass it.
        "layernorm.weight": torch.ones(width),
        "layernorm.bias": torch.zeros(width),
    }
    projections = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
    renamed |= rename_block_weights(weights, _BLOCK_NAMES, "encoder.layer.{}", projections)
    refuse_leftovers(weights, "transformers' Dinov2Model")
    return renamed


def _config(encoder: TimmLayoutEncoder, shape: ViTShape) -> dict[str, Any]:
    return {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": shape.num_heads,
        "mlp_ratio": _mlp_ratio(encoder, shape),
        "hidden_act": shape.hidden_act,
        "layer_norm_eps": shape.norm_eps,
        "qkv_bias": True,
        "layerscale_value": 1.0,
        "use_swiglu_ffn": False,
        "use_mask_token": True,
        "image_size": encoder.img_size,
        "patch_size": encoder.patch_size,
        "num_channels": 3,
        "drop_path_rate": 0.0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        # For Dinov2Backbone: its feature maps are then the student's, too.
        "apply_layernorm": False,
        "reshape_hidden_states": True,
        "torch_dtype": "float32",
    }


def variants(directory: Path) -> tuple[Variant, ...]:
    """Return the one file, float32."""
    return single_variant(directory)


def consumer_features(directory: Path, variant: str, pixel_values: Tensor, num_layers: int) -> ConsumerFeatures:
    """Return the last hidden states by transformers' `Dinov2Model`."""
    from transformers import Dinov2Model

    model, missing, unexpected = load_strictly(Dinov2Model, directory)
    return hidden_states(model, missing, unexpected, pixel_values, num_layers)


def consumer_pixels(directory: Path, image: Image) -> Tensor:
    """Return the image as transformers' `AutoImageProcessor` prepares it, `[1, 3, H, W]`."""
    return processor_pixels(directory, image)


def loading_code() -> str:
    """Return the lines that load the export by transformers alone."""
    return """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained(directory)
model = AutoModel.from_pretrained(directory)
pixel_values = processor(Image.open("photo.jpg").convert("RGB"), return_tensors="pt")["pixel_values"]
with torch.inference_mode():
    # Not last_hidden_state: Dinov2Model norms it once more.
    features = model(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:]  # [B, N, D]
"""
