"""The holder that keeps teachers out of everything that is saved, copied, optimised or synchronised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from distill.checkpoint import read_weights
from distill.encoder import Encoder, Layer
from distill.errors import ConfigError


class FrozenTeachers:
    """Teachers by name, outside the module registry.

    It is no `nn.Module`, so a LightningModule that owns one has no teacher tensor in its `state_dict`, optimiser or
    DDP buckets. It refuses to be deep-copied, so an EMA callback that copies the whole module shares the teachers
    instead of doubling them.

    Args:
        teachers: encoders by name.
        micro_batch: images a teacher sees at a time; None means all. On a CPU 1 is fastest, since attention scores
            stay in the cache; on a GPU it bounds memory.
    """

    def __init__(self, teachers: Mapping[str, nn.Module], micro_batch: int | None = None) -> None:
        self._modules = {name: teacher.eval().requires_grad_(False) for name, teacher in teachers.items()}
        self.micro_batch = micro_batch

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeachers:
        return self

    def __getitem__(self, name: str) -> nn.Module:
        return self._modules[name]

    def encoder(self, name: str) -> Encoder:
        """Return one teacher under its protocol."""
        return cast(Encoder, self._modules[name])

    def names(self) -> Iterable[str]:
        """The teachers' names."""
        return self._modules.keys()

    def load_weights(self) -> None:
        """Read every teacher's weights.

        Raises:
            WeightsError: naming the teacher.
        """
        for name, teacher in self._modules.items():
            read_weights(teacher, f"teacher {name!r}")
            teacher.eval().requires_grad_(False)

    def to(self, device: torch.device) -> None:
        """Move every teacher to a device; dtypes stay as each teacher chose."""
        for teacher in self._modules.values():
            teacher.to(device)

    @torch.no_grad()
    def forward_hidden_states(
        self, images: Tensor, layers: Mapping[str, int], *, batch_size: int | None = None
    ) -> dict[str, list[Layer]]:
        """Return the last hidden states of each teacher, computed once for all students.

        Kernels round differently for batches of different size. A teacher sees batches of one size only, the last
        one filled up, so that an image has the same states whichever images are computed beside it.

        Args:
            images: `[B, 3, H, W]`, uint8 or [0, 1].
            layers: for each teacher's name, how many hidden states are wanted.
            batch_size: images of a forward where `micro_batch` says nothing; None means B.

        Raises:
            ConfigError: a teacher cannot take images of this size.
        """
        try:
            size = self.micro_batch or batch_size or images.shape[0]
            return {name: chunked(self.encoder(name), images, count, size) for name, count in layers.items()}
        except ValueError as error:  # how an encoder refuses images of a size it cannot take
            raise ConfigError(f"A teacher cannot take these images (data.img_size_px). {error}") from error


def chunked(teacher: Encoder, images: Tensor, num_layers: int, size: int) -> list[Layer]:
    """Return the last hidden states of `images`, computed `size` at a time, the last chunk filled by repetition."""
    count = images.shape[0]
    missing = -count % size
    if missing:
        images = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)])
    images = images.contiguous(memory_format=torch.channels_last)  # as batches are; kernels round by layout too
    chunks = [teacher.forward_hidden_states(part, num_layers) for part in images.split(size)]
    if len(chunks) == 1 and not missing:
        return [(prefix.contiguous(), patches.contiguous()) for prefix, patches in chunks[0]]
    return [
        (
            torch.cat([chunk[layer][0] for chunk in chunks])[:count],
            torch.cat([chunk[layer][1] for chunk in chunks])[:count],
        )
        for layer in range(num_layers)
    ]
