"""Another depth, another image size, LayerScale folded away: an encoder changed once, before any target writes it.

The changed encoder is a `TimmLayoutEncoder` again, and is compared with the student it was made of. Golden features are
computed from it, so every target is verified as it is exported, and no consumer has to resize, cut or fold anything for
itself.

Legend: B images, P prefix tokens, G the patch grid's side, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from distill.encoder import Layer, TimmLayoutEncoder
from distill.errors import ConfigError, ExportError
from distill.export.reshape_check import check_same_features
from distill.export.weights import read_timm_weights, set_strides, strides_of, timm_skeleton

POSITION_METHOD = "bicubic, antialias, float32"
"""timm's filter: what the student itself does with images of another size, and so what it was evaluated with."""

LAYER_SCALE_TARGETS = {"ls1": "attn.proj", "ls2": "mlp.fc2"}


@dataclass(frozen=True)
class Changes:
    """What is changed on export.

    Attributes:
        layers: how many blocks are kept, from the first; None keeps all.
        img_size: pixels a side that the positions are resized for; None leaves them.
        fold_layer_scale: multiply LayerScale into the weights in front of it, and leave ones.
    """

    layers: int | None = None
    img_size: int | None = None
    fold_layer_scale: bool = False


class ReshapedEncoder(nn.Module):
    """An encoder after its changes; offers `distill.encoder.TimmLayoutEncoder`. Made by `reshape`.

    Attributes:
        changes: what was changed; a field that changed nothing is None or False.
        original_img_size: pixels a side before.
        original_depth: blocks before.
    """

    def __init__(self, source: TimmLayoutEncoder, changes: Changes, model: nn.Module, model_args: dict[str, Any]):
        super().__init__()
        self.model = model
        self.changes = changes
        self.original_img_size, self.original_depth = source.img_size, source.depth
        self.layout: Literal["internvit", "clip", "timm"] = source.layout
        self.timm_architecture, self.timm_model_args = source.timm_architecture, model_args
        self.timm_strides = strides_of(source)
        self.layer_dims = source.layer_dims[: changes.layers]
        self.depth, self.embed_dim = len(self.layer_dims), self.layer_dims[-1]
        self.img_size = changes.img_size or source.img_size
        self.patch_size, self.num_prefix_tokens = source.patch_size, source.num_prefix_tokens
        self.image_mean, self.image_std = source.image_mean, source.image_std

    def timm_state_dict(self) -> dict[str, Tensor]:
        """Return every weight under timm's key names."""
        return {key: value.detach() for key, value in self.model.state_dict().items()}

    def load_weights(self) -> None:
        """Do nothing: the weights came with the encoder that was changed."""

    def forward_hidden_states(self, images: Tensor, num_layers: int) -> list[Layer]:
        """Return the last `num_layers` hidden states of the changed encoder, oldest first; see `Encoder`.

        Args:
            images: `[B, 3, H, W]`, uint8 in [0, 255] or float in [0, 1].
            num_layers: from 1 to `depth`.

        Raises:
            ValueError: `num_layers` is out of range, or H or W is no multiple of the patch size.
        """
        if not 1 <= num_layers <= self.depth:
            raise ValueError(f"num_layers is {num_layers}; this encoder has 1 to {self.depth} hidden states.")
        if images.shape[-1] % self.patch_size or images.shape[-2] % self.patch_size:
            raise ValueError(f"images of {tuple(images.shape)} are no multiple of the patch size {self.patch_size}.")
        scaled = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.image_mean, self.image_std))
        return _timm_layers(self.model, (scaled - mean) / std, num_layers, self.num_prefix_tokens)


def _timm_layers(model: nn.Module, pixels: Tensor, num_layers: int, num_prefix_tokens: int) -> list[Layer]:
    options: dict[str, Any] = {"indices": num_layers, "norm": False, "output_fmt": "NCHW", "intermediates_only": True}
    if not num_prefix_tokens:
        maps: list[Tensor] = cast(Any, model).forward_intermediates(pixels, **options)
        return [(x.new_zeros(x.shape[0], 0, x.shape[1]), x.permute(0, 2, 3, 1)) for x in maps]
    pairs: list[tuple[Tensor, Tensor]] = cast(Any, model).forward_intermediates(
        pixels, return_prefix_tokens=True, **options
    )
    return [(prefix, patches.permute(0, 2, 3, 1)) for patches, prefix in pairs]


def reshape(encoder: TimmLayoutEncoder, changes: Changes) -> TimmLayoutEncoder:
    """Return the encoder with its changes, or the encoder itself where they change nothing.

    Args:
        encoder: a `torch.nn.Module` on the CPU, in eval mode, float32; it is left as it is.
        changes: what to change.

    Raises:
        ConfigError: a number is out of range; the message names the flag.
        ExportError: the architecture cannot be changed so, or the result computes other features.
    """
    effective = _effective(encoder, changes)
    if effective == Changes():
        return encoder
    skeleton = timm_skeleton(encoder)
    weights = read_timm_weights(encoder, skeleton)
    args = dict(encoder.timm_model_args)
    if effective.layers is not None:
        _keep_blocks(encoder, skeleton, weights, effective.layers)
        args["depth"] = effective.layers
    if effective.img_size is not None:
        _resize_positions(encoder, weights, effective.img_size)
        if "pos_embed" in weights or "img_size" in args:
            args["img_size"] = effective.img_size
    if effective.fold_layer_scale:
        weights = fold_layer_scale(weights)
    model = _rebuild(encoder, args, weights)
    changed = cast(TimmLayoutEncoder, ReshapedEncoder(encoder, effective, model, args).eval())
    check_same_features(encoder, changed)
    return changed


def _effective(encoder: TimmLayoutEncoder, changes: Changes) -> Changes:
    """Return the changes without those that the encoder has already."""
    if changes.layers is not None and not 1 <= changes.layers <= encoder.depth:
        raise ConfigError(f"--layers {changes.layers} is out of range: this student has 1 to {encoder.depth} layers.")
    size, patch = changes.img_size, encoder.patch_size
    if size is not None and (size < patch or size % patch):
        below = max(size // patch, 1) * patch
        raise ConfigError(
            f"--img_size {size} is no multiple of the patch size {patch}; use {below} or {below + patch}."
        )
    return Changes(
        layers=None if changes.layers == encoder.depth else changes.layers,
        img_size=None if size == encoder.img_size else size,
        fold_layer_scale=changes.fold_layer_scale,
    )


def _keep_blocks(encoder: TimmLayoutEncoder, skeleton: nn.Module, weights: dict[str, Tensor], layers: int) -> None:
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(skeleton, VisionTransformer):
        raise ExportError(
            f"--layers needs a plain vision transformer; {encoder.timm_architecture!r} has stages rather than "
            "equal blocks. Export it whole, and read an earlier stage in the consumer."
        )
    for key in [key for key in weights if key.startswith("blocks.") and int(key.split(".")[1]) >= layers]:
        del weights[key]


def _resize_positions(encoder: TimmLayoutEncoder, weights: dict[str, Tensor], img_size: int) -> None:
    from timm.layers import resample_abs_pos_embed

    if "pos_embed" not in weights:
        return
    old, new = encoder.img_size // encoder.patch_size, img_size // encoder.patch_size
    rows = weights["pos_embed"].shape[1] if weights["pos_embed"].ndim == 3 else 0
    num_prefix = rows - old * old
    if not 0 <= num_prefix <= encoder.num_prefix_tokens:
        raise ExportError(
            f"--img_size cannot resize the positions of {encoder.timm_architecture!r}: they have shape "
            f"{tuple(weights['pos_embed'].shape)}, a grid of {old} x {old} was expected. Export it at "
            f"{encoder.img_size} px."
        )
    weights["pos_embed"] = resample_abs_pos_embed(
        weights["pos_embed"],
        [new, new],
        old_size=[old, old],
        num_prefix_tokens=num_prefix,
        interpolation="bicubic",
        antialias=True,
    )


def fold_layer_scale(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return timm ViT weights in which LayerScale is ones and its factors are in the weights in front of it.

    `gamma * (W x + b) = (gamma W) x + gamma b`: the same function. Products are computed in float64.

    Raises:
        ExportError: there is no LayerScale.
    """
    folded = dict(weights)
    gammas = [key for key in weights if key.startswith("blocks.") and key.endswith((".ls1.gamma", ".ls2.gamma"))]
    if not gammas:
        raise ExportError("--fold_layer_scale has nothing to fold: this student has no LayerScale. Leave the flag out.")
    for key in gammas:
        block, scale, _ = key.rsplit(".", 2)
        gamma = weights[key].double()
        for kind in ("weight", "bias"):
            name = f"{block}.{LAYER_SCALE_TARGETS[scale]}.{kind}"
            if name in weights:
                value = weights[name].double()
                folded[name] = (gamma.view(-1, *[1] * (value.ndim - 1)) * value).to(weights[name].dtype)
        folded[key] = torch.ones_like(weights[key])
    return folded


def _rebuild(encoder: TimmLayoutEncoder, args: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    import timm

    try:
        with torch.random.fork_rng(devices=[]):
            model = timm.create_model(encoder.timm_architecture, pretrained=False, **args)
        set_strides(model, encoder)
        model.load_state_dict(weights, strict=True)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ExportError(
            f"timm cannot build {encoder.timm_architecture!r} with {args}, as --layers or --img_size asks: {error}. "
            "Export it without that flag."
        ) from error
    return model
