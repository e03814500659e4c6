"""Target `internvl-hf`: a directory for transformers' native `internvl_vision`, `InternVLVisionModel`.

The key names are those of transformers' `models/internvl/convert_internvl_weights_to_hf.py`. The weights are written
here rather than by `save_pretrained`, whose names changed between releases.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from distill.encoder import TimmLayoutEncoder
from distill.export.contract import ConsumerFeatures, Variant, single_variant
from distill.export.hf_directory import require_internvit, write_directory
from distill.export.transformers_loading import AUTO_MODEL_CODE, hidden_states, load_strictly, processor_pixels
from distill.export.weights import ViTShape, refuse_leftovers, rename_block_weights

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = "internvl-hf"
REQUIRES = ("transformers",)
EXTRA = "export"
CONSUMER_FOLDER: str | None = None
LAYERS = (-2, -1)

_BLOCK_NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.projection_layer",
    "ls1.gamma": "lambda_1",
    "ls2.gamma": "lambda_2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_EMBEDDING_NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
}
# Tiles at most, thumbnail apart: the value InternVL's own code evaluates with. Only read when crop_to_patches is set.
_MAX_TILES = 12


def check(encoder: TimmLayoutEncoder) -> None:
    """Return when the encoder is of InternViT layout.

    Raises:
        ExportError: it is of another layout.
    """
    require_internvit(encoder, FORMAT, "InternVLVisionModel", "InternViT")


def write(encoder: TimmLayoutEncoder, directory: Path) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json for `InternVLVisionModel`.

    Raises:
        ExportError: a weight has no place in that class, or a file cannot be written.
    """
    check(encoder)
    write_directory(encoder, directory, config=_config, rename=_rename, preprocessor=_preprocessor(encoder))


def _rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {name: weights.pop(key) for key, name in _EMBEDDING_NAMES.items()}
    projections = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
    renamed |= rename_block_weights(weights, _BLOCK_NAMES, "encoder.layer.{}", projections)
    refuse_leftovers(weights, "transformers' InternVLVisionModel")
    return renamed


def _config(encoder: TimmLayoutEncoder, shape: ViTShape) -> dict[str, Any]:
    return {
        "architectures": ["InternVLVisionModel"],
        "model_type": "internvl_vision",
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": shape.num_heads,
        "intermediate_size": shape.mlp_dim,
        "hidden_act": shape.hidden_act,
        "layer_norm_eps": shape.norm_eps,
        "norm_type": "layer_norm",
        # The class's default, False, would drop nine biases of three layers without an error.
        "attention_bias": True,
        "use_qk_norm": False,
        # True means no norm after the last block; False would add one with random weights.
        "use_mean_pooling": True,
        "use_mask_token": False,
        "use_absolute_position_embeddings": True,
        "layer_scale_init_value": 0.1,
        "image_size": [encoder.img_size, encoder.img_size],
        "patch_size": [encoder.patch_size, encoder.patch_size],
        "num_channels": 3,
        "hidden_dropout_prob": 0.0,
        "attention_dropout": 0.0,
        "projection_dropout": 0.0,
        "torch_dtype": "float32",
    }


def _preprocessor(encoder: TimmLayoutEncoder) -> dict[str, Any]:
    return {
        # The class InternVL's processor uses; its own defaults are CLIP's mean and 384 px, so all is spelt out.
        "image_processor_type": "GotOcr2ImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": encoder.img_size, "width": encoder.img_size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(encoder.image_mean),
        "image_std": list(encoder.image_std),
        "crop_to_patches": False,
        "min_patches": 1,
        "max_patches": _MAX_TILES,
    }


def variants(directory: Path) -> tuple[Variant, ...]:
    """Return the one file, float32."""
    return single_variant(directory)


def consumer_features(directory: Path, variant: str, pixel_values: Tensor, num_layers: int) -> ConsumerFeatures:
    """Return the last hidden states by transformers' `InternVLVisionModel`."""
    from transformers import InternVLVisionModel

    model, missing, unexpected = load_strictly(InternVLVisionModel, directory)
    return hidden_states(model, missing, unexpected, pixel_values, num_layers)


def consumer_pixels(directory: Path, image: Image) -> Tensor:
    """Return the image as transformers' `AutoImageProcessor` prepares it, `[1, 3, H, W]`."""
    return processor_pixels(directory, image)


def loading_code() -> str:
    """Return six lines that load the export by transformers alone."""
    return AUTO_MODEL_CODE.format(model_class="AutoModel")
