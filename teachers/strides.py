"""Strides that a checkpoint was trained with and timm's model of the same weights does not have.

Keras' ResNets stride in the first convolution of a block where timm's stride in the second: the tensors fit, the
features do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

_SIDE_PX = 224


def set_strides(model: nn.Module, strides: Mapping[str, int], name: str) -> None:
    """Change the strides of some convolutions and poolings, in place.

    Args:
        model: a timm model.
        strides: path of a module in it, for example `layer2.0.conv1`, and its stride along both axes.
        name: how the user called the model, for messages.

    Raises:
        ValueError: there is no such module, it has no stride, or a stride is below 1.
    """
    modules = dict(model.named_modules())
    for path, stride in strides.items():
        module = modules.get(path)
        if module is None or not hasattr(module, "stride"):
            what = "no such module" if module is None else f"a {type(module).__name__}, which has no stride"
            raise ValueError(
                f"strides names {path!r}: {what} in timm model {name!r}. Name convolutions or poolings by paths that "
                "`model.named_modules()` gives."
            )
        if stride < 1:
            raise ValueError(f"strides gives {path!r} the stride {stride}; it must be at least 1.")
        cast(Any, module).stride = (stride, stride)


def measure_stride(model: nn.Module) -> int:
    """Return the pixels a side that one cell of the last feature map covers, by a run on the meta device.

    Args:
        model: a timm model on the meta device whose maps have no prefix tokens.

    Raises:
        ValueError: the strides of a block and of its shortcut differ.
    """
    images = torch.empty(1, 3, _SIDE_PX, _SIDE_PX, device="meta")
    try:
        with torch.no_grad():
            maps: list[Tensor] = cast(Any, model).forward_intermediates(
                images, indices=1, norm=False, output_fmt="NCHW", intermediates_only=True
            )
    except RuntimeError as error:
        raise ValueError(f"strides do not fit each other: {error} A shortcut needs the stride of its block.") from error
    return _SIDE_PX // maps[-1].shape[-1]
