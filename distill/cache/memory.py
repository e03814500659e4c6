"""Teacher hidden states kept in memory for the length of one run; for sets small enough to see several times."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distill.encoder import Layer

States = dict[str, list[Layer]]


class HiddenStateMemory:
    """Remembers, for each image, what every teacher said about it, up to a number of bytes.

    Only sound where an image always gives the same view: training without augmentation, and validation. States are
    kept in the teacher's own dtype on the CPU, so what comes back is bit for bit what was computed.

    Args:
        limit_bytes: memory that may be used; images beyond it are computed each time. 0 keeps nothing.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._states: dict[tuple[str, int], States] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> HiddenStateMemory:
        return self

    def __len__(self) -> int:
        return len(self._states)

    def fetch(self, split: str, rows: Tensor, images: Tensor, compute: Callable[[Tensor], States]) -> States:
        """Return the hidden states of a batch, computing those that are not remembered.

        Args:
            split: "train" or "val": rows count from 0 in each.
            rows: which image each one is, int64 `[B]`.
            images: `[B, 3, H, W]`.
            compute: the teachers' forward, for the images still missing.
        """
        if self.limit_bytes == 0:
            return compute(images)
        keys = [(split, int(row)) for row in rows]
        missing = [position for position, key in enumerate(keys) if key not in self._states]
        if len(missing) == len(keys) and self.used_bytes >= self.limit_bytes:
            return compute(images)
        found = {position: self._states[key] for position, key in enumerate(keys) if key in self._states}
        if missing:
            fresh = compute(images[missing])
            for place, position in enumerate(missing):
                found[position] = _one(fresh, place)
                self._remember(keys[position], found[position])
        return _stack([found[position] for position in range(len(keys))], images.device)

    def _remember(self, key: tuple[str, int], states: States) -> None:
        size = sum(part.nbytes for layers in states.values() for layer in layers for part in layer)
        if self.used_bytes + size <= self.limit_bytes:
            self._states[key] = states
            self.used_bytes += size


def _one(states: States, position: int) -> States:
    # A copy: a slice would keep the whole batch alive.
    return {
        name: [(prefix[position].cpu().clone(), patches[position].cpu().clone()) for prefix, patches in layers]
        for name, layers in states.items()
    }


def _stack(items: list[States], device: torch.device) -> States:
    def joined(name: str, layer: int, part: int) -> Tensor:
        return torch.stack([item[name][layer][part] for item in items]).to(device, non_blocking=True)

    return {
        name: [(joined(name, layer, 0), joined(name, layer, 1)) for layer in range(len(layers))]
        for name, layers in items[0].items()
    }
