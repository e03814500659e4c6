"""First weights for a ViT without a checkpoint: timm's own, or self-attention that looks trained.

Everything here draws from its own generator: the same seed gives the same weights, and the global random state
neither matters nor moves.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from students.timm_encoder import build_timm_model

RandomInit = Literal["timm", "mimetic"]

QUERY_KEY_SCALE = 0.7
"""Weight of noise and of identity in W_Q W_K^T, for vision ("Mimetic Initialization", arXiv 2305.09828)."""

VALUE_PROJECTION_SCALE = 0.4
"""Weight of noise and of negative identity in W_V W_proj, for vision (same paper)."""

_SINUSOID_TEMPERATURE = 10_000.0


def build_random_model(architecture: str, model_args: dict[str, Any], *, init: RandomInit, seed: int) -> nn.Module:
    """Return a timm model on the CPU with random weights that depend on the arguments only.

    Args:
        architecture: name that `timm.create_model` takes.
        model_args: its keyword arguments.
        init: "timm" keeps what timm draws; "mimetic" then applies `mimetic_`.
        seed: of every draw.

    Raises:
        ValueError: timm refuses the arguments, or "mimetic" is asked of a model without timm's self-attention.
    """
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed every GPU, which fork_rng(devices=[]) does not restore.
        torch.default_generator.manual_seed(seed)
        model = build_timm_model(architecture, model_args, device="cpu")
    if init == "mimetic":
        mimetic_(model, torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def mimetic_(model: nn.Module, generator: torch.Generator) -> None:
    """Overwrite self-attention and positions of a ViT so that they look like those of a trained one.

    "Mimetic Initialization of Self-Attention Layers" (arXiv 2305.09828): in trained ViTs the product of query and
    key weights is near the identity and the product of value and projection weights near its negative. Both products
    are drawn that way, split by a singular value decomposition, and the position embedding becomes sinusoidal.
    The rank of a head is less than the width, so each head draws its own product and keeps the largest directions.

    Args:
        model: a timm ViT; changed in place. Biases of query, key, value and projection become 0.
        generator: source of every draw.

    Raises:
        ValueError: the model has no self-attention with `qkv` and `proj`, or its width is no multiple of 4.
    """
    attentions = [m for m in model.modules() if _is_self_attention(m)]
    if not attentions:
        raise ValueError(
            f"init `mimetic` sets self-attention with a joint qkv projection, and {type(model).__name__} has none. "
            "Use init `timm`."
        )
    for attention in attentions:
        _mimetic_attention(cast(Any, attention), generator)
    pos_embed = getattr(model, "pos_embed", None)
    if isinstance(pos_embed, nn.Parameter):
        num_prefix = int(getattr(model, "num_prefix_tokens", 0))
        height, width = cast(tuple[int, int], cast(Any, model).patch_embed.grid_size)
        rows = sinusoidal_positions(height, width, pos_embed.shape[-1])
        pos_embed[:, pos_embed.shape[1] - len(rows) :] = rows
        if pos_embed.shape[1] == len(rows) + num_prefix:
            pos_embed[:, :num_prefix] = 0.0


def _is_self_attention(module: nn.Module) -> bool:
    qkv, proj = getattr(module, "qkv", None), getattr(module, "proj", None)
    return (
        isinstance(qkv, nn.Linear)
        and isinstance(proj, nn.Linear)
        and qkv.out_features == 3 * qkv.in_features
        and proj.in_features == proj.out_features == qkv.in_features
        and isinstance(getattr(module, "num_heads", None), int)
    )


def _mimetic_attention(attention: Any, generator: torch.Generator) -> None:
    qkv, proj, heads = cast(nn.Linear, attention.qkv), cast(nn.Linear, attention.proj), int(attention.num_heads)
    dim = qkv.in_features
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    for _ in range(heads):
        left, right = _split_product(dim, QUERY_KEY_SCALE, +1.0, dim // heads, generator)
        queries.append(left.T)
        keys.append(right)
    value, projection = _split_product(dim, VALUE_PROJECTION_SCALE, -1.0, dim, generator)
    # The paper multiplies tokens from the left, `x @ W`; nn.Linear holds the transpose.
    qkv.weight.copy_(torch.cat([*queries, *keys, value.T]))
    proj.weight.copy_(projection.T)
    for linear in (qkv, proj):
        for bias in (p for name, p in linear.named_parameters() if name == "bias"):
            bias.zero_()


def _split_product(dim: int, scale: float, sign: float, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return `[dim, rank]` and `[rank, dim]` whose product approximates `scale * Z + sign * scale * I`."""
    noise = torch.randn(dim, dim, generator=generator) / math.sqrt(dim)
    left, values, right = torch.linalg.svd(scale * noise + sign * scale * torch.eye(dim))
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def sinusoidal_positions(height: int, width: int, dim: int) -> Tensor:
    """Return fixed 2D sine and cosine positions `[height * width, dim]`, float32, in [-1, 1].

    A quarter of the channels each for sine and cosine of column and row, with frequencies from 1 to 1/10000
    ("Attention Is All You Need", arXiv 1706.03762, applied to each axis).

    Raises:
        ValueError: `dim` is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"Sinusoidal positions need a width that is a multiple of 4; embed_dim is {dim}.")
    frequencies = _SINUSOID_TEMPERATURE ** -(torch.arange(dim // 4) / max(dim // 4 - 1, 1))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (columns, rows)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
