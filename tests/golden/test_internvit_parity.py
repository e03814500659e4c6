"""InternViT against two independent implementations: transformers' own, and timm's for the LayerNorm variant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from teachers import InternViT, InternViTConfig

transformers = pytest.importorskip("transformers", reason="the reference implementation is an optional extra")

# Float32 rounding of sums of 64 to 128 terms on hidden states of size 15. Measured: 0 with the same attention kernel as
# the reference, 2e-6 with another.
TOLERANCE = 1e-5

SIX_B = InternViTConfig(embed_dim=64, depth=3, num_heads=4, mlp_dim=128, img_size=56)
THREE_HUNDRED_M = InternViTConfig(
    embed_dim=64,
    depth=3,
    num_heads=4,
    mlp_dim=128,
    img_size=56,
    norm_type="layer_norm",
    qk_norm=False,
    qkv_bias=True,
)
BOTH = pytest.mark.parametrize("config", [SIX_B, THREE_HUNDRED_M], ids=["rms_norm_qk_norm", "layer_norm_qkv_bias"])


def random_release_tensors(config: InternViTConfig) -> dict[str, Tensor]:
    """Draw every tensor of a release, by its published name, far from any initial value: no norm at 1, no bias at 0."""
    generator = torch.Generator().manual_seed(0)
    dim, tokens, patch = config.embed_dim, config.grid_size**2 + 1, config.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (1, 1, dim),
        "embeddings.position_embedding": (1, tokens, dim),
        "embeddings.patch_embedding.weight": (dim, 3, patch, patch),
        "embeddings.patch_embedding.bias": (dim,),
    }
    for layer in range(config.depth):
        block = {
            "attn.qkv.weight": (3 * dim, dim),
            "attn.proj.weight": (dim, dim),
            "attn.proj.bias": (dim,),
            "norm1.weight": (dim,),
            "norm2.weight": (dim,),
            "ls1": (dim,),
            "ls2": (dim,),
            "mlp.fc1.weight": (config.mlp_dim, dim),
            "mlp.fc1.bias": (config.mlp_dim,),
            "mlp.fc2.weight": (dim, config.mlp_dim),
            "mlp.fc2.bias": (dim,),
        }
        if config.qkv_bias:
            block["attn.qkv.bias"] = (3 * dim,)
        if config.qk_norm:
            block |= {"attn.q_norm.weight": (dim,), "attn.k_norm.weight": (dim,)}
        if config.norm_type == "layer_norm":
            block |= {"norm1.bias": (dim,), "norm2.bias": (dim,)}
        shapes |= {f"encoder.layers.{layer}.{name}": shape for name, shape in block.items()}
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        is_scale = ("norm" in name and name.endswith("weight")) or name.endswith(("ls1", "ls2"))
        tensors[name] = 1 + 0.3 * value if is_scale else value * (0.5 if len(shape) == 3 else 0.1)
    return tensors


def write_release(directory: Path, config: InternViTConfig, tensors: dict[str, Tensor]) -> None:
    """Write a checkpoint as the releases come: config.json, two shards and their index."""
    directory.mkdir(exist_ok=True)
    release_config = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "hidden_act": "gelu",
        "norm_type": config.norm_type,
        "layer_norm_eps": config.norm_eps,
        "qk_normalization": config.qk_norm,
        "qkv_bias": config.qkv_bias,
        "patch_size": config.patch_size,
        "image_size": config.img_size,
        "initializer_factor": config.init_values,
        "initializer_range": 1e-10,
        "use_flash_attn": True,
    }
    (directory / "config.json").write_text(json.dumps(release_config))
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: tensors[name].contiguous() for name in members}, directory / shard)
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def to_transformers_names(tensors: dict[str, Tensor], dim: int) -> dict[str, Tensor]:
    renames = {
        "encoder.layers.": "encoder.layer.",
        "class_embedding": "cls_token",
        "position_embedding": "position_embeddings",
        "patch_embedding": "patch_embeddings.projection",
        ".ls1": ".lambda_1",
        ".ls2": ".lambda_2",
        "attn.proj.": "attention.projection_layer.",
        "attn.": "attention.",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
    }
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for old, new in renames.items():
            name = name.replace(old, new)
        if ".qkv." in name:
            for part, piece in zip(("q_proj", "k_proj", "v_proj"), tensor.split(dim), strict=True):
                converted[name.replace("qkv", part)] = piece
        else:
            converted[name] = tensor
    return converted


def reference_hidden_states(config: InternViTConfig, tensors: dict[str, Tensor], pixels: Tensor) -> list[Tensor]:
    """Run transformers' InternVLVisionModel and return the output of every block, `[B, 1 + N, D]` each."""
    reference_config = transformers.InternVLVisionConfig(
        hidden_size=config.embed_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_dim,
        attention_bias=config.qkv_bias,
        use_qk_norm=config.qk_norm,
        norm_type=config.norm_type,
        layer_norm_eps=config.norm_eps,
        image_size=[config.img_size] * 2,
        patch_size=[config.patch_size] * 2,
        use_mean_pooling=True,
    )
    model = transformers.InternVLVisionModel(reference_config).eval()
    model.load_state_dict(to_transformers_names(tensors, config.embed_dim), strict=True)
    with torch.no_grad():
        outputs = model(pixel_values=pixels, output_hidden_states=True)
    return list(outputs.hidden_states[1:])


def images_and_pixels(height: int, width: int) -> tuple[Tensor, Tensor]:
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return images, (images - mean[:, None, None]) / std[:, None, None]


def largest_difference(ours: list[tuple[Tensor, Tensor]], reference: list[Tensor]) -> float:
    tokens = [torch.cat([prefix, patches.flatten(1, 2)], dim=1) for prefix, patches in ours]
    return max(float((a - b).abs().max()) for a, b in zip(tokens, reference, strict=True))


@BOTH
@pytest.mark.parametrize("size", [(56, 56), (84, 84), (28, 28), (42, 70)], ids=["native", "larger", "smaller", "wide"])
def test_every_hidden_state_equals_transformers_from_a_sharded_release(
    tmp_path: Path, config: InternViTConfig, size: tuple[int, int]
) -> None:
    tensors = random_release_tensors(config)
    write_release(tmp_path, config, tensors)
    teacher = InternViT.from_directory(tmp_path, dtype="float32")
    teacher.load_weights()
    images, pixels = images_and_pixels(*size)
    ours = teacher.forward_hidden_states(images, num_layers=config.depth)
    assert largest_difference(ours, reference_hidden_states(config, tensors, pixels)) < TOLERANCE


@BOTH
def test_the_comparison_notices_one_permuted_block(tmp_path: Path, config: InternViTConfig) -> None:
    tensors = random_release_tensors(config)
    images, pixels = images_and_pixels(56, 56)
    reference = reference_hidden_states(config, tensors, pixels)
    qkv = tensors["encoder.layers.1.attn.qkv.weight"]
    tensors["encoder.layers.1.attn.qkv.weight"] = qkv.roll(config.embed_dim, dims=0)
    write_release(tmp_path, config, tensors)
    teacher = InternViT.from_directory(tmp_path, dtype="float32")
    teacher.load_weights()
    ours = teacher.forward_hidden_states(images, num_layers=config.depth)
    assert largest_difference(ours[:1], reference[:1]) < TOLERANCE
    assert largest_difference(ours[1:], reference[1:]) > 100 * TOLERANCE


@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
def test_every_hidden_state_of_the_layer_norm_variant_equals_timm(tmp_path: Path, attention: str) -> None:
    config = THREE_HUNDRED_M
    tensors = random_release_tensors(config)
    write_release(tmp_path, config, tensors)
    renames = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj",
        "encoder.layers.": "blocks.",
        ".ls1": ".ls1.gamma",
        ".ls2": ".ls2.gamma",
    }
    timm_tensors: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for old, new in renames.items():
            name = name.replace(old, new)
        timm_tensors[name] = tensor
    reference = timm.create_model(
        "vit_intern300m_patch14_448", embed_dim=64, depth=3, num_heads=4, mlp_ratio=2.0, img_size=56
    ).eval()
    reference.load_state_dict(timm_tensors, strict=True)
    images, pixels = images_and_pixels(56, 56)
    with torch.no_grad():
        layers = reference.forward_intermediates(
            pixels, return_prefix_tokens=True, norm=False, output_fmt="NLC", intermediates_only=True
        )
    teacher = InternViT(str(tmp_path), config, dtype="float32", attention=attention)
    teacher.load_weights()
    ours = teacher.forward_hidden_states(images, num_layers=3)
    assert largest_difference(ours, [torch.cat([prefix, patches], dim=1) for patches, prefix in layers]) < TOLERANCE
