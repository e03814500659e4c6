"""Reading the hidden states of any timm model: the one way for timm teachers and for timm towers in open_clip."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn


@dataclass(frozen=True)
class TimmFeatures:
    """What a timm model's hidden states look like.

    Args:
        layer_dims: width of each, oldest first: one per block of a ViT, one per stage of a convolutional model.
        patch_size: pixels a side that one cell of the last one covers.
        num_prefix_tokens: class token and registers; 0 where the model gives plain feature maps.
        fixed_size: the only image size (height, width) in pixels that the model takes; None if it takes any.
    """

    layer_dims: tuple[int, ...]
    patch_size: int
    num_prefix_tokens: int
    fixed_size: tuple[int, int] | None


def describe_features(model: nn.Module, name: str, img_size: object = None) -> TimmFeatures:
    """Return what `model` declares about its feature maps.

    Args:
        model: a timm model; the meta device will do.
        name: how the user called it, for the message.
        img_size: the size it was built for, if that was said: pixels a side, or height and width.

    Raises:
        ValueError: the model gives no intermediate features.
    """
    info: Any = getattr(model, "feature_info", None)
    entries = cast(list[dict[str, Any]], getattr(info, "info", info))
    forward = getattr(model, "forward_intermediates", None)
    if not entries or forward is None:
        raise ValueError(
            f"timm model {name!r} ({type(model).__name__}) has no forward_intermediates, so its hidden states cannot "
            "be read; choose a model for which timm.create_model(..., features_only=True, feature_cls='getter') works."
        )
    has_prefix = "return_prefix_tokens" in inspect.signature(forward).parameters
    return TimmFeatures(
        layer_dims=tuple(int(entry["num_chs"]) for entry in entries),
        patch_size=int(entries[-1]["reduction"]),
        num_prefix_tokens=int(getattr(model, "num_prefix_tokens", 0)) if has_prefix else 0,
        fixed_size=_fixed_size(model, img_size),
    )


def _fixed_size(model: nn.Module, img_size: object) -> tuple[int, int] | None:
    """Return the one size a model takes, as it declares: some would fail deep inside at another, some would not."""
    recorded = cast(dict[str, Any], getattr(model, "pretrained_cfg", {}))
    patch_embed: Any = getattr(model, "patch_embed", None)
    if not recorded.get("fixed_input_size") or not getattr(patch_embed, "strict_img_size", True):
        return None
    size = getattr(patch_embed, "img_size", None) or img_size or recorded["input_size"][1:]
    height, width = (size, size) if isinstance(size, int) else cast(tuple[int, int], size)
    return int(height), int(width)


def read_hidden_states(
    model: nn.Module, images: Tensor, num_layers: int, num_prefix_tokens: int
) -> list[tuple[Tensor, Tensor]]:
    """Return the last `num_layers` hidden states of normalised images, oldest first, before any final norm.

    Args:
        model: a timm model.
        images: `[B, 3, H, W]`, normalised.
        num_layers: how many.
        num_prefix_tokens: as `describe_features` says; if 0, no prefix is asked of the model.

    Returns:
        Pairs `(prefix [B, P, D], patches [B, H', W', D])`.
    """
    options = {"return_prefix_tokens": True} if num_prefix_tokens else {}
    forward = cast(Any, model).forward_intermediates
    outputs = forward(images, indices=num_layers, norm=False, output_fmt="NCHW", intermediates_only=True, **options)
    if num_prefix_tokens:
        return [(prefix, channels_last(maps)) for maps, prefix in outputs]
    return [without_prefix(maps) for maps in outputs]


def channels_last(maps: Tensor) -> Tensor:
    """Turn feature maps `[B, D, H, W]` into patches `[B, H, W, D]`."""
    return maps.permute(0, 2, 3, 1)


def without_prefix(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return feature maps `[B, D, H, W]` as a hidden state with no prefix token."""
    return maps.new_zeros(maps.shape[0], 0, maps.shape[1]), channels_last(maps)


def check_fixed_size(height: int, width: int, fixed_size: tuple[int, int] | None) -> None:
    """Refuse an image size that a model with a fixed one cannot take.

    Raises:
        ValueError: the size differs.
    """
    if fixed_size is not None and (height, width) != fixed_size:
        raise ValueError(
            f"image size {height} x {width} px: this model takes {fixed_size[0]} x {fixed_size[1]} px only; set "
            f"img_size: {max(height, width)} in its init_args to have its position embedding resized."
        )
