"""The mmproj file: llama.cpp's names, keys and precisions for an InternViT and an InternVL projector.

Legend: N patch tokens, D the encoder's width, L the language model's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from distill.encoder import TimmLayoutEncoder
from distill.errors import ExportError
from distill.export.files import cannot_write
from distill.export.libmtmd import TESTED_VERSION
from distill.export.weights import ViTShape, refuse_leftovers

SCALE_FACTOR = 2
"""Patches a side that InternVL's pixel shuffle makes one token of."""

MIN_TILES, MAX_TILES = 1, 12
"""InternVL's own range of tiles at inference."""

PROJECTOR_NORM_EPS = 1e-5
PROJECTOR_WEIGHTS = tuple(f"mlp1.{number}.{kind}" for number in (0, 1, 3) for kind in ("weight", "bias"))
ACTIVATION_KEYS: dict[str, dict[str, bool]] = {
    # llama.cpp takes a file that names neither for quick_gelu; its gelu is the exact one.
    "gelu": {"clip.use_gelu": True, "clip.use_silu": False},
    "quick_gelu": {"clip.use_gelu": False, "clip.use_silu": False},
}
QUANTUM = 32
"""Weights of a row that q8_0 packs together."""

TESTED_KEY = "distill.tested_llama_cpp_python"
"""GGUF key that names the llama-cpp-python release whose libmtmd reproduced the features."""

_STEM_NAMES = {
    "cls_token": "v.class_embd",
    "patch_embed.proj.weight": "v.patch_embd.weight",
    "patch_embed.proj.bias": "v.patch_embd.bias",
}
_BLOCK_NAMES = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


def read_projector(path: Path, embed_dim: int) -> dict[str, Tensor]:
    """Return the weights of an InternVL projector, float32: LayerNorm of 4 D, Linear to L, GELU, Linear L to L.

    Args:
        path: a safetensors file with `mlp1.{0,1,3}.{weight,bias}`, alone or among other weights.
        embed_dim: D.

    Raises:
        ExportError: the file is no such file, or is for an encoder of another width.
    """
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"--projector {path} cannot be read: {error}. Give a safetensors file.") from error
    missing = [name for name in PROJECTOR_WEIGHTS if name not in stored]
    if missing:
        raise ExportError(
            f"--projector {path} lacks {', '.join(missing)}; an InternVL projector has {', '.join(PROJECTOR_WEIGHTS)}."
        )
    weights = {name: stored[name].float() for name in PROJECTOR_WEIGHTS}
    wide = embed_dim * SCALE_FACTOR**2
    width = len(weights["mlp1.1.weight"])
    shapes = {"mlp1.0.weight": (wide,), "mlp1.1.weight": (width, wide), "mlp1.3.weight": (width, width)}
    shapes |= {"mlp1.0.bias": (wide,), "mlp1.1.bias": (width,), "mlp1.3.bias": (width,)}
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise ExportError(
                f"--projector {path}: {name} has shape {tuple(weights[name].shape)}, an encoder of width {embed_dim} "
                f"needs {shape}. Give the projector that was trained on this student."
            )
    if width % QUANTUM:
        raise ExportError(f"--projector {path}: its width {width} is no multiple of {QUANTUM}, as q8_0 needs.")
    return weights


def project(patches: Tensor, projector: Mapping[str, Tensor]) -> Tensor:
    """Return InternVL's projection of patch tokens: pixel shuffle (`ps_version` v2), then the projector.

    Args:
        patches: `[1, H, W, D]` float32, H and W even.
        projector: see `read_projector`.

    Returns:
        `[1, H/2, W/2, L]`.
    """
    batch, rows, columns, width = patches.shape
    cells = patches.reshape(batch, rows // 2, 2, columns // 2, 2, width).permute(0, 1, 3, 2, 4, 5).flatten(3)
    normed = F.layer_norm(
        cells, (cells.shape[-1],), projector["mlp1.0.weight"], projector["mlp1.0.bias"], PROJECTOR_NORM_EPS
    )
    hidden = F.gelu(F.linear(normed, projector["mlp1.1.weight"], projector["mlp1.1.bias"]))
    return F.linear(hidden, projector["mlp1.3.weight"], projector["mlp1.3.bias"])


def llama_names(weights: dict[str, Tensor], projector: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an InternViT's and its projector's weights under llama.cpp's names.

    Args:
        weights: the encoder's, under timm's names; the mapping is emptied.
        projector: see `read_projector`.

    Raises:
        ExportError: a weight has no place in llama.cpp's InternViT.
    """
    named = {name: weights.pop(key) for key, name in _STEM_NAMES.items() if key in weights}
    named["v.class_embd"] = named["v.class_embd"].flatten()
    positions = weights.pop("pos_embed")[0]
    # llama.cpp puts the class token behind the patches and reads its position there.
    named["v.position_embd.weight"] = torch.cat([positions[1:], positions[:1]])
    for key in [key for key in weights if key.startswith("blocks.")]:
        _, number, name = key.split(".", 2)
        module, _, kind = name.rpartition(".")
        if module == "attn.qkv":
            for part, tensor in zip("qkv", weights.pop(key).chunk(3, dim=0), strict=True):
                named[f"v.blk.{number}.attn_{part}.{kind}"] = tensor
        elif module in ("ls1", "ls2"):
            named[f"v.blk.{number}.{module}.weight"] = weights.pop(key)
        elif module in _BLOCK_NAMES:
            named[f"v.blk.{number}.{_BLOCK_NAMES[module]}.{kind}"] = weights.pop(key)
    refuse_leftovers(weights, "llama.cpp's InternViT")
    return named | {name.replace("mlp1.", "mm.model.mlp."): tensor for name, tensor in projector.items()}


def write_mmproj(
    path: Path, encoder: TimmLayoutEncoder, shape: ViTShape, tensors: Mapping[str, Tensor], *, quantised: bool
) -> None:
    """Write one mmproj file.

    Args:
        path: the file.
        encoder: whose sizes and normalisation are written.
        shape: of its blocks.
        tensors: see `llama_names`.
        quantised: the encoder's matrices in q8_0 rather than float16. The projector's stay float16, norms, biases,
            positions and the patch convolution float32: they are small, and every feature passes through them.

    Raises:
        ExportError: the file cannot be written.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
    from gguf.quants import quantize

    writer = GGUFWriter(str(path), "clip")
    writer.add_type("mmproj")
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0 if quantised else LlamaFileType.MOSTLY_F16)
    _write_keys(writer, encoder, shape, projection_dim=len(tensors["mm.model.mlp.3.bias"]))
    for name, tensor in tensors.items():
        values: NDArray[np.float32] = tensor.contiguous().numpy()
        if not _is_matrix(name, values):
            writer.add_tensor(name, values)
        elif quantised and name.startswith("v.blk."):
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values.astype(np.float16))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        writer.close()


def _is_matrix(name: str, values: NDArray[np.float32]) -> bool:
    return values.ndim == 2 and name != "v.position_embd.weight"


def _write_keys(writer: Any, encoder: TimmLayoutEncoder, shape: ViTShape, *, projection_dim: int) -> None:
    numbers = {
        "image_size": encoder.img_size,
        "patch_size": encoder.patch_size,
        "embedding_length": encoder.embed_dim,
        "feed_forward_length": shape.mlp_dim,
        "block_count": encoder.depth,
        "projection_dim": projection_dim,
        "attention.head_count": shape.num_heads,
        "projector.scale_factor": SCALE_FACTOR,
        "preproc_min_tiles": MIN_TILES,
        "preproc_max_tiles": MAX_TILES,
    }
    # Another llama.cpp may read the class token's position elsewhere: whoever meets the file can see what was tested.
    writer.add_string(TESTED_KEY, TESTED_VERSION)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "internvl")
    for key, flag in ACTIVATION_KEYS[shape.hidden_act].items():
        writer.add_bool(key, flag)
    for key, number in numbers.items():
        writer.add_uint32(f"clip.vision.{key}", number)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", shape.norm_eps)
    writer.add_array("clip.vision.image_mean", list(encoder.image_mean))
    writer.add_array("clip.vision.image_std", list(encoder.image_std))


def read_fields(path: Path) -> dict[str, Any]:
    """Return the keys of a GGUF file and their values.

    Raises:
        ExportError: the file is missing or damaged.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        raise ExportError(f"{path} is missing or no GGUF file ({error}); export again.") from error
    return {name: field.contents() for name, field in reader.fields.items()}
