"""CLIP's weights as the first weights of an InternViT student: pure functions on state dicts under timm's names.

CLIP-ViT-L/14-336 and InternViT-300M have the same blocks and differ around them. What each difference costs, and
which choice is the default, is measured by `scripts/measure_init.py` and told in `docs/initialisation.md`:

| CLIP | InternViT | transfer |
|---|---|---|
| LayerNorm in front of the first block | none | linearised around its mean scale, or dropped |
| no LayerScale | LayerScale, 0.1 at birth | set to 1, or kept with the branches multiplied by 10: the same function |
| CLIP's mean and std | ImageNet's | folded into the patch convolution, exactly |
| no bias in the patch convolution | bias | receives the fold, else 0 |
| 24 x 24 positions | 32 x 32 | bicubic, float32, without antialias |
| LayerNorm after the last block | none | left out |
| quick_gelu | gelu | an option of the student; the weights are the same |

Legend: B images, N patches, C width, p patch size.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from students.images import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, RGB
from students.layouts import grid_size

LayerScale = Literal["one", "rescaled"]
PreNorm = Literal["drop", "linearised"]
State = dict[str, Tensor]

LAYER_SCALE_INIT = 0.1
"""LayerScale of a new InternViT (`initializer_factor` of its released configuration)."""

PRE_NORM_EPS = 1e-5
"""Epsilon of every LayerNorm in CLIP."""


def resize_position_embedding(pos_embed: Tensor, grid: int, num_prefix: int = 1) -> Tensor:
    """Return the position embedding for a `grid` x `grid` image; the rows of prefix tokens are kept as they are.

    Bicubic in float32, without antialias, as InternViT's own code and transformers resize it (timm resamples with
    antialias, which differs even when it enlarges).

    Args:
        pos_embed: `[1, num_prefix + g * g, C]`.
        grid: patches a side.
        num_prefix: leading rows that are no patch's: 1 for a class token, more with registers, 0 without either.

    Returns:
        `[1, num_prefix + grid * grid, C]`, float32; `pos_embed` itself when the grid is already that size.

    Raises:
        ValueError: the rows of `pos_embed` are not `num_prefix` and a square grid.
    """
    old = grid_size(pos_embed, "the state dict", num_prefix)
    if old == grid:
        return pos_embed.float()
    prefix, patches = pos_embed[:, :num_prefix].float(), pos_embed[:, num_prefix:].float()
    square = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False, antialias=False)
    return torch.cat([prefix, resized.permute(0, 2, 3, 1).reshape(1, grid * grid, -1)], dim=1)


def fold_normalisation(
    weight: Tensor, bias: Tensor, *, trained_mean: RGB, trained_std: RGB, fed_mean: RGB, fed_std: RGB
) -> tuple[Tensor, Tensor]:
    """Return a patch convolution that gives the same output on images normalised another way.

    An image normalised by `(fed_mean, fed_std)` is an affine map, per channel, of the one the convolution was
    trained on; the map goes into weight and bias. Exact, because the convolution has no padding. Computed in float64.

    Args:
        weight: `[C, 3, p, p]`.
        bias: `[C]`.
        trained_mean: channel means the convolution expects.
        trained_std: channel standard deviations the convolution expects.
        fed_mean: channel means of what it will be fed.
        fed_std: channel standard deviations of what it will be fed.

    Returns:
        Weight and bias, in the dtype of the input.
    """
    mean, std, to_mean, to_std = (
        torch.tensor(v, dtype=torch.float64).reshape(1, 3, 1, 1) for v in (trained_mean, trained_std, fed_mean, fed_std)
    )
    wide = weight.double()
    offset = (wide * ((to_mean - mean) / std)).sum(dim=(1, 2, 3))
    return (wide * to_std / std).to(weight.dtype), (bias.double() + offset).to(bias.dtype)


def pre_norm_scale(state: State, images: Tensor) -> float:
    """Return the number that replaces `1 / std` of the LayerNorm in front of CLIP's blocks.

    The LayerNorm centres a token, divides it by its standard deviation, and applies gain and bias. All but the
    division is linear. The number is the geometric mean of `1 / std` over patch tokens: too large for one token as
    often, and by as great a factor, as it is too small for another. The least-squares choice is worse, because busy
    patches outweigh plain ones in it (figures in `docs/initialisation.md`).

    Args:
        state: CLIP's weights under timm's names, with positions already of the grid of `images`.
        images: `[B, 3, H, W]`, float in [0, 1], RGB: images like those the student will see.

    Returns:
        A positive number.
    """
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    weight = state["patch_embed.proj.weight"]
    log_sum = 0.0
    for image in images.float().split(1):
        patches = F.conv2d((image - mean) / std, weight, stride=weight.shape[-1]).flatten(2).mT
        variance = (patches + state["pos_embed"][:, 1:]).var(dim=-1, correction=0)
        log_sum += float((variance + PRE_NORM_EPS).rsqrt().log().mean())
    return math.exp(log_sum / len(images))


def linearise_pre_norm(state: State, scale: float) -> State:
    """Return CLIP's weights with the LayerNorm in front of the blocks folded into embedding and positions.

    `LN(x) = g * (x - mean(x)) / std(x) + b` with `1 / std(x)` replaced by `scale`: centring and gain go into the patch
    convolution, the class token and the positions, the bias into the positions. The class token does not depend on
    the image, so its own standard deviation is known and its fold is exact.

    Args:
        state: CLIP's weights under timm's names.
        scale: from `pre_norm_scale`.

    Returns:
        A new state dict without `norm_pre`; other tensors are shared with `state`.
    """
    gain, bias = state["norm_pre.weight"].double(), state["norm_pre.bias"].double()
    weight, positions = state["patch_embed.proj.weight"].double(), state["pos_embed"].double()
    class_token = state["cls_token"].double() + positions[:, :1]
    exact = F.layer_norm(class_token, class_token.shape[-1:], gain, bias, PRE_NORM_EPS)
    patches = scale * gain * (positions[:, 1:] - positions[:, 1:].mean(dim=-1, keepdim=True)) + bias
    folded = {key: value for key, value in state.items() if not key.startswith("norm_pre.")}
    folded["patch_embed.proj.weight"] = (
        scale * gain.reshape(-1, 1, 1, 1) * (weight - weight.mean(dim=0, keepdim=True))
    ).float()
    folded["pos_embed"] = torch.cat([torch.zeros_like(exact), patches], dim=1).float()
    folded["cls_token"] = exact.float()
    return folded


def clip_to_internvit(
    state: State,
    *,
    grid: int,
    layer_scale: LayerScale,
    should_fold_normalisation: bool,
    pre_norm: PreNorm,
    calibration_images: Tensor | None,
) -> State:
    """Return the first weights of an InternViT student from CLIP's.

    Args:
        state: CLIP's weights under timm's names; left unchanged.
        grid: patches a side of the student.
        layer_scale: "one" sets LayerScale to 1; "rescaled" keeps InternViT's 0.1 and multiplies `attn.proj` and
            `mlp.fc2` by 10. Both are the same function; they differ in how fast the optimiser moves the branches.
        should_fold_normalisation: fold CLIP's mean and std into the patch convolution, which is then fed images
            normalised by ImageNet's.
        pre_norm: "linearised" folds the LayerNorm in front of the blocks as `linearise_pre_norm`; "drop" leaves it
            out.
        calibration_images: `[B, 3, H, W]` in [0, 1] with H = W = grid * patch size; needed for "linearised" only.

    Returns:
        Weights of timm's `vit_intern300m_patch14_448` of the same width and depth, float32.

    Raises:
        ValueError: `pre_norm` is "linearised" and there are no calibration images.
    """
    source = {**state, "pos_embed": resize_position_embedding(state["pos_embed"], grid)}
    if pre_norm == "linearised":
        if calibration_images is None:
            raise ValueError("pre_norm `linearised` needs calibration_images to measure the scale of the LayerNorm.")
        source = linearise_pre_norm(source, pre_norm_scale(source, calibration_images))
    weight = source["patch_embed.proj.weight"]
    bias = torch.zeros(weight.shape[0])
    if should_fold_normalisation:
        weight, bias = fold_normalisation(
            weight,
            bias,
            trained_mean=CLIP_MEAN,
            trained_std=CLIP_STD,
            fed_mean=IMAGENET_MEAN,
            fed_std=IMAGENET_STD,
        )
    target = {key: value for key, value in source.items() if not key.startswith(("norm_pre.", "norm."))}
    target |= {"patch_embed.proj.weight": weight, "patch_embed.proj.bias": bias}
    return add_layer_scale(target, layer_scale)


def add_layer_scale(state: State, layer_scale: LayerScale) -> State:
    """Return a state dict with LayerScale in every block that computes what the block did without it.

    Args:
        state: a ViT's weights under timm's names, without LayerScale.
        layer_scale: "one" or "rescaled", as in `clip_to_internvit`.
    """
    scale = 1.0 if layer_scale == "one" else LAYER_SCALE_INIT
    scaled = dict(state)
    for key in state:
        branch = {"attn.proj": "ls1", "mlp.fc2": "ls2"}.get(".".join(key.split(".")[2:4]))
        if not key.startswith("blocks.") or branch is None:
            continue
        scaled[key] = state[key] / scale
        block = ".".join(key.split(".")[:2])
        scaled[f"{block}.{branch}.gamma"] = torch.full_like(state[f"{block}.norm1.weight"], scale)
    return scaled
