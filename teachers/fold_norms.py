"""Batch norms folded into the convolutions before them: the same function in fewer passes over memory.

A frozen teacher's batch norm is a fixed scale and shift for each channel, which its convolution's weights can take
over. On a CPU a quarter of a convolutional teacher's forward is batch norms.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

PROBE_SIZE_PX = 64
RELATIVE_TOLERANCE = 1e-4
"""Rounding of float32 over some fifty layers is about 1e-6; a wrong fold changes everything."""


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """Return a copy of `model` without the batch norms that directly follow a convolution.

    Which norm follows which convolution is seen by running the model once, not guessed from names, and the copy is
    compared with the original.

    Args:
        model: a timm model in float32 on the CPU that takes images of any size; put in eval mode.

    Returns:
        The copy, or `model` itself where nothing can be folded or the copy computes something else.
    """
    model.eval()
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    image = torch.linspace(-2, 2, 3 * PROBE_SIZE_PX**2).view(1, 3, PROBE_SIZE_PX, PROBE_SIZE_PX).sin()
    with torch.no_grad():
        expected, pairs = _run_and_pair(model, image)
        folded = copy.deepcopy(model)
        for conv, norm in pairs:
            _fold(folded, conv, norm)
        result = _feature_maps(folded, image)
    close = all(_is_close(one, other) for one, other in zip(result, expected, strict=True))
    return folded if pairs and close else model


def _is_close(maps: Tensor, expected: Tensor) -> bool:
    return bool((maps - expected).abs().max() <= RELATIVE_TOLERANCE * expected.abs().max())


def _feature_maps(model: nn.Module, image: Tensor) -> list[Tensor]:
    return list(cast(Any, model).forward_intermediates(image, intermediates_only=True))


def _run_and_pair(model: nn.Module, image: Tensor) -> tuple[list[Tensor], list[tuple[str, str]]]:
    """Return the feature maps, and the names of convolutions with the batch norm that takes their output."""
    outputs: list[tuple[Tensor, str]] = []  # kept alive, so that no two have the same identity
    pairs: list[tuple[str, str]] = []

    def hook_conv(name: str) -> Any:
        return lambda module, inputs, output: outputs.append((output, name))

    def hook_norm(name: str) -> Any:
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            pairs.extend((conv, name) for output, conv in outputs if output is inputs[0])

        return before

    handles = [
        module.register_forward_hook(hook_conv(name))
        if isinstance(module, nn.Conv2d)
        else module.register_forward_pre_hook(hook_norm(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d)
    ]
    try:
        maps = _feature_maps(model, image)
    finally:
        for handle in handles:
            handle.remove()
    return maps, pairs


def _fold(model: nn.Module, conv_name: str, norm_name: str) -> None:
    conv, norm = cast(nn.Conv2d, model.get_submodule(conv_name)), model.get_submodule(norm_name)
    batch_norm = cast(nn.BatchNorm2d, norm)
    assert batch_norm.running_mean is not None
    assert batch_norm.running_var is not None
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        batch_norm.running_mean,
        batch_norm.running_var,
        batch_norm.eps,
        batch_norm.weight,
        batch_norm.bias,
    )
    # timm's BatchNormAct2d is a norm with its dropout and activation.
    rest = [getattr(norm, part) for part in ("drop", "act") if hasattr(norm, part)]
    parent, _, attribute = norm_name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.Sequential(*rest))
