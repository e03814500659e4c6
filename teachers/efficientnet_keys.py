"""EfficientNet checkpoints of the `efficientnet-pytorch` family, under timm's names.

Both libraries define the same networks; names differ (`_blocks.3._bn0` and `blocks.2.0.bn1`), and blocks are counted
through in one and by stage in the other. Lite checkpoints in particular exist in this layout only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

_STEM_AND_HEAD = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_EXPANDING_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
}
# A block without expansion has one convolution and one norm less, and timm counts from what is there.
_PLAIN_BLOCK = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
}


def is_efficientnet_pytorch(names: Iterable[str]) -> bool:
    """Whether these are the parameter names of the `efficientnet-pytorch` layout."""
    return "_conv_stem.weight" in names


def to_timm_names(tensors: Mapping[str, Tensor], timm_names: Iterable[str]) -> dict[str, Tensor]:
    """Return `tensors` under timm's names; what has no counterpart keeps its name, for strict loading to refuse.

    Args:
        tensors: a checkpoint in the `efficientnet-pytorch` layout.
        timm_names: parameter names of the timm model, which tell how its blocks divide into stages.
    """
    stages = {(int(m[1]), int(m[2])) for name in timm_names if (m := re.match(r"blocks\.(\d+)\.(\d+)\.", name))}
    blocks = [f"blocks.{stage}.{index}" for stage, index in sorted(stages)]
    expanding = {name.split(".")[1] for name in tensors if "._expand_conv." in name}
    return {_timm_name(name, blocks, expanding): tensor for name, tensor in tensors.items()}


def _timm_name(name: str, blocks: list[str], expanding: set[str]) -> str:
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if match is None:
        module, _, leaf = name.rpartition(".")
        return f"{_STEM_AND_HEAD.get(module, module)}.{leaf}"
    index, module, leaf = match.groups()
    table = _EXPANDING_BLOCK if index in expanding else _PLAIN_BLOCK
    if int(index) >= len(blocks) or module not in table:
        return name
    return f"{blocks[int(index)]}.{table[module]}.{leaf}"
