"""What one training step costs: floating-point operations by part, counted as the step's operators are dispatched.

The formulas are those of `torch.utils.flop_counter`, which lacks one for the fused attention of CPUs: without it a
ViT's attention would count as nothing there. A multiplication and an addition are two operations; elementwise work,
norms and softmax count as none, as everywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from distill.encoder import Layer

Direction = Literal["forward", "backward", "recompute"]
HEADS = "heads and loss"
TARGETS = "targets"
_METHOD = "forward_hidden_states"

Formula = Callable[..., int]


def _cpu_attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **settings: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _cpu_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **settings: Any
) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


_FORMULAS: dict[Any, Formula] = {
    **cast(dict[Any, Formula], flop_registry),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


class StepParts:
    """Tells which part of a training step runs, by watching the encoders' `forward_hidden_states`.

    Attributes:
        part: "teacher NAME", "student NAME", `HEADS`, or `TARGETS` before the first student.
        is_backward: whether the backward pass runs; the caller sets it.
    """

    def __init__(self) -> None:
        self.part = TARGETS
        self.is_backward = False

    @property
    def direction(self) -> Direction:
        """What runs now. Within a backward pass only a checkpointed forward, run again, has gradients enabled."""
        if not self.is_backward:
            return "forward"
        return "recompute" if torch.is_grad_enabled() else "backward"

    @contextmanager
    def watching(self, teachers: Mapping[str, nn.Module], students: Mapping[str, nn.Module]) -> Generator[None]:
        """Follow the forward and backward passes of these encoders while the context is open."""
        named = [(f"teacher {name}", module) for name, module in teachers.items()]
        named += [(f"student {name}", module) for name, module in students.items()]
        before = [(module, vars(module).get(_METHOD)) for _, module in named]
        try:
            for part, module in named:
                setattr(module, _METHOD, self._watched(getattr(module, _METHOD), part))
            yield
        finally:
            for module, own in before:
                delattr(module, _METHOD)
                if own is not None:  # a sharding strategy may have put its own there
                    setattr(module, _METHOD, own)

    def begin_backward(self) -> None:
        """Say that the backward pass begins, from the loss."""
        self.is_backward, self.part = True, HEADS

    def end_backward(self) -> None:
        """Say that the step is over."""
        self.is_backward, self.part = False, TARGETS

    def _watched(self, forward: Callable[..., list[Layer]], part: str) -> Callable[..., list[Layer]]:
        def enter(gradient: Tensor) -> None:
            self.part = part

        def run(*arguments: Any, **settings: Any) -> list[Layer]:
            before, self.part = self.part, part
            try:
                layers = forward(*arguments, **settings)
            finally:
                self.part = HEADS if part.startswith("student") else before
            for tensor in (tensor for layer in layers for tensor in layer):
                if tensor.requires_grad:
                    # A gradient that arrives here has left the heads: they came later in the forward pass.
                    tensor.register_hook(enter)
            return layers

        return run


class FlopMeter(TorchDispatchMode):
    """Counts floating-point operations by part and direction while it is active.

    Args:
        parts: tells what runs.

    Attributes:
        flops: operations by `(part, direction)`.
    """

    def __init__(self, parts: StepParts) -> None:
        super().__init__()
        self.parts = parts
        self.flops: Counter[tuple[str, Direction]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, and add its operations."""
        out = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops[self.parts.part, self.parts.direction] += formula(*args, **(kwargs or {}), out_val=out)
        return out

    @property
    def useful(self) -> int:
        """Operations without those that gradient checkpointing does a second time: what MFU counts."""
        return sum(count for (_, direction), count in self.flops.items() if direction != "recompute")
