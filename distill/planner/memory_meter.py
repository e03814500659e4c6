"""The memory that tensors hold while a step runs: every storage from its making to its end, by what it is for."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from distill.step_meter import HEADS, TARGETS, StepParts

GRADIENTS = "gradients"
CAST_WEIGHTS = "weights cast by autocast"
WORKSPACE = "teacher workspace"
BACKWARD = "backward workspace"
ACTIVATIONS = "student activations"
HEAD_ACTIVATIONS = "head and loss activations"


class MemoryMeter(TorchDispatchMode):
    """Follows all storages that operators make while it is active; works on fake tensors as on real ones.

    Memory that a kernel takes and gives back by itself is not seen.

    Args:
        parts: tells what runs.

    Attributes:
        live: bytes held now, by purpose.
        peaks: for each phase ("teacher", "forward", "backward"), the purposes at its highest instant.
    """

    def __init__(self, parts: StepParts) -> None:
        super().__init__()
        self.parts = parts
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self._highest: dict[str, int] = {}
        self._total = 0
        self._known: dict[int, tuple[str, int, weakref.ref[UntypedStorage]]] = {}
        self._weights: set[int] = set()

    def enter(self, tensor: Tensor, purpose: str) -> None:
        """Follow a tensor's storage from now on; one that is known already keeps its purpose."""
        storage = tensor.untyped_storage()
        key = _identity(storage)
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = (purpose, size, weakref.ref(storage, lambda _: self._leave(key)))
        self._add(purpose, size)

    def enter_weights(self, tensor: Tensor, purpose: str) -> None:
        """Follow a parameter or buffer."""
        self.enter(tensor, purpose)
        self._weights.add(_identity(tensor.untyped_storage()))

    def rename(self, tensor: Tensor, purpose: str) -> None:
        """Give a followed storage another purpose."""
        key = _identity(tensor.untyped_storage())
        if key in self._known:
            before, size, reference = self._known[key]
            self._known[key] = (purpose, size, reference)
            self.live[before] -= size
            self.live[purpose] += size

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, and follow what it made."""
        out = func(*args, **(kwargs or {}))
        purpose = self._purpose()
        if func is torch.ops.aten._to_copy.default and _identity(args[0].untyped_storage()) in self._weights:
            purpose = CAST_WEIGHTS
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self.enter(value, purpose)
        return out

    def _purpose(self) -> str:
        part = self.parts.part
        if self.parts.is_backward:
            return BACKWARD
        if part.startswith("student"):
            return ACTIVATIONS
        return WORKSPACE if part.startswith("teacher") else {HEADS: HEAD_ACTIVATIONS}.get(part, TARGETS)

    def _phase(self) -> str:
        if self.parts.is_backward:
            return "backward"
        return "teacher" if self.parts.part.startswith("teacher") or self.parts.part == TARGETS else "forward"

    def _add(self, purpose: str, size: int) -> None:
        self._total += size
        self.live[purpose] += size
        phase = self._phase()
        if self._total > self._highest.get(phase, -1):
            self._highest[phase] = self._total
            self.peaks[phase] = self.live.copy()

    def _leave(self, key: int) -> None:
        purpose, size, _ = self._known.pop(key)
        self._weights.discard(key)
        self._total -= size
        self.live[purpose] -= size


def _identity(storage: UntypedStorage) -> int:
    # Fake storages have no address; the object behind the Python one is the same for all views.
    return storage._cdata  # pyright: ignore[reportPrivateUsage]
