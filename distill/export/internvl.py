"""Target `internvl`: InternViT as OpenGVLab publishes it, for InternVL's code, vLLM, SGLang, lmdeploy and llama.cpp.

Weights and configuration carry the release's names. Two files of Python travel along for `AutoModel` with
`trust_remote_code`: the release's own `modeling_intern_vit.py` does not load under transformers 5, because its
constructor leaves out `post_init`. The consumers named above have classes of their own and ignore them.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import Tensor

from distill.encoder import TimmLayoutEncoder
from distill.export.contract import ConsumerFeatures, Variant, single_variant
from distill.export.files import cannot_write
from distill.export.hf_directory import require_internvit, write_directory
from distill.export.transformers_loading import hidden_states, load_strictly, processor_pixels, squash_preprocessor
from distill.export.weights import ViTShape, refuse_leftovers

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = "internvl"
REQUIRES = ("transformers",)
EXTRA = "export"
CONSUMER_FOLDER: str | None = None
LAYERS = (-2, -1)

CODE_FILES = ("configuration_intern_vit.py", "modeling_intern_vit.py")
_CODE_FOLDER = Path(__file__).parent / "internvl_code"
_STEM_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
}
_BLOCK_MODULES = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def check(encoder: TimmLayoutEncoder) -> None:
    """Return when the encoder is of InternViT layout.

    Raises:
        ExportError: it is of another layout.
    """
    require_internvit(encoder, FORMAT, "InternVisionModel", "InternViT")


def write(encoder: TimmLayoutEncoder, directory: Path) -> None:
    """Write config.json, model.safetensors, preprocessor_config.json and the two files of code.

    Raises:
        ExportError: a weight has no place in that layout, or a file cannot be written.
    """
    check(encoder)
    write_directory(
        encoder, directory, config=vision_config, rename=release_names, preprocessor=squash_preprocessor(encoder)
    )
    for name in CODE_FILES:
        try:
            shutil.copyfile(_CODE_FOLDER / name, directory / name)
        except OSError as error:
            raise cannot_write(directory / name, error) from error


def release_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return timm's InternViT weights under the release's names.

    Args:
        weights: all of them; the mapping is emptied.

    Raises:
        ExportError: one has no place in that layout.
    """
    renamed = {name: weights.pop(key) for key, name in _STEM_NAMES.items() if key in weights}
    for key in [key for key in weights if key.startswith("blocks.")]:
        _, number, name = key.split(".", 2)
        # LayerScale is a bare parameter there, a module here.
        release = name.removesuffix(".gamma") if name in ("ls1.gamma", "ls2.gamma") else name
        if release != name or name.rpartition(".")[0] in _BLOCK_MODULES:
            renamed[f"encoder.layers.{number}.{release}"] = weights.pop(key)
    refuse_leftovers(weights, "InternVL's InternVisionModel")
    return renamed


def vision_config(encoder: TimmLayoutEncoder, shape: ViTShape) -> dict[str, Any]:
    """Return the release's configuration: its own keys, and those its consumers read without a default."""
    return {
        # llama.cpp's converter and vLLM choose their class by this name.
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "auto_map": {
            "AutoConfig": "configuration_intern_vit.InternVisionConfig",
            "AutoModel": "modeling_intern_vit.InternVisionModel",
        },
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": shape.num_heads,
        "intermediate_size": shape.mlp_dim,
        "hidden_act": shape.hidden_act,
        "norm_type": "layer_norm",
        "layer_norm_eps": shape.norm_eps,
        # The class's defaults for these two, False and True, are those of the 6B.
        "qkv_bias": True,
        "qk_normalization": False,
        # A number, never a pair: CLIP-like readers divide it.
        "image_size": encoder.img_size,
        "patch_size": encoder.patch_size,
        "num_channels": 3,
        "drop_path_rate": 0.0,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "use_flash_attn": True,
        "initializer_factor": 0.1,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
    }


@contextmanager
def temporary_module_cache() -> Generator[None]:
    """Let transformers keep its copies of an export's code in a folder that vanishes, and forget what it imported."""
    from transformers import dynamic_module_utils

    cache, search_path = dynamic_module_utils.HF_MODULES_CACHE, sys.path.copy()
    with TemporaryDirectory(prefix="distill-code-") as folder:
        dynamic_module_utils.HF_MODULES_CACHE = folder
        try:
            yield
        finally:
            dynamic_module_utils.HF_MODULES_CACHE = cache
            sys.path[:] = search_path
            for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
                del sys.modules[name]


def variants(directory: Path) -> tuple[Variant, ...]:
    """Return the one file, float32."""
    return single_variant(directory)


def consumer_features(directory: Path, variant: str, pixel_values: Tensor, num_layers: int) -> ConsumerFeatures:
    """Return the last hidden states by `AutoModel`, with the export's own code."""
    from transformers import AutoModel

    with temporary_module_cache():
        model, missing, unexpected = load_strictly(AutoModel, directory, trust_remote_code=True)
        return hidden_states(model, missing, unexpected, pixel_values, num_layers)


def consumer_pixels(directory: Path, image: Image) -> Tensor:
    """Return the image as transformers' `AutoImageProcessor` prepares it, `[1, 3, H, W]`."""
    return processor_pixels(directory, image)


def loading_code() -> str:
    """Return the lines that load the export by transformers and the code beside it."""
    return """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained(directory)
model = AutoModel.from_pretrained(directory, trust_remote_code=True)
pixel_values = processor(Image.open("photo.jpg").convert("RGB"), return_tensors="pt")["pixel_values"]
with torch.inference_mode():
    features = model(pixel_values).last_hidden_state[:, 1:]  # [B, N, D]; row 0 is the class token
"""
