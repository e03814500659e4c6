"""torch.compile for the repeated blocks of an encoder: one compilation serves all blocks of a kind."""

from __future__ import annotations

from typing import Literal

from torch import nn

Compilation = Literal["off", "inductor", "aot_eager"]
"""`inductor` generates kernels; `aot_eager` traces and runs torch's own, to find out whether tracing is to blame."""

_FEWEST = 2


def compile_blocks(encoder: nn.Module, backend: Compilation) -> int:
    """Compile each block of an encoder in place; names in its state dict stay as they are.

    Blocks are the members of the outermost lists of modules whose members are all of one class, as in ViTs.

    Args:
        encoder: with its weights, on its device.
        backend: "off" does nothing.

    Returns:
        How many blocks there are; 0 where the encoder has no such list.
    """
    if backend == "off":
        return 0
    blocks = repeated_blocks(encoder)
    for block in blocks:
        block.compile(backend=backend)
    return len(blocks)


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the members of the outermost `ModuleList`s and `Sequential`s that hold several modules of one class."""
    children = list(module.children())
    is_list = isinstance(module, nn.ModuleList | nn.Sequential)
    if is_list and len(children) >= _FEWEST and len({type(child) for child in children}) == 1:
        return children
    return [block for child in children for block in repeated_blocks(child)]
