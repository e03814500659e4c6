"""The holder that keeps teachers out of everything that is saved, copied, optimised or synchronised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from distill.checkpoint import read_weights
from distill.encoder import Encoder, Layer
from distill.errors import ConfigError
from distill.teacher_sharding import Company, shard_teachers


class FrozenTeachers:
    """Teachers by name, outside the module registry.

    It is no `nn.Module`, so a LightningModule that owns one has no teacher tensor in its `state_dict`, optimiser or
    DDP buckets. It refuses to be deep-copied, so an EMA callback that copies the whole module shares the teachers
    instead of doubling them.

    Args:
        teachers: encoders by name.
        micro_batch: images a teacher sees at a time; None means all. On a CPU 1 is fastest, since attention scores
            stay in the cache; on a GPU it bounds memory.

    Attributes:
        is_sharded: whether the teachers' parameters are spread over the ranks of the run.
    """

    def __init__(self, teachers: Mapping[str, nn.Module], micro_batch: int | None = None) -> None:
        self._modules = {name: teacher.eval().requires_grad_(False) for name, teacher in teachers.items()}
        self.micro_batch = micro_batch
        self.is_sharded = False
        self._company: Company | None = None

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

    def shard(self) -> None:
        """Spread the teachers over all ranks of the run, block by block, before their weights are read.

        Every rank then has to run them equally often; see `begin_uneven`.

        Raises:
            ConfigError: a teacher cannot be sharded.
        """
        self.is_sharded = shard_teachers(self._modules)

    def begin_uneven(self, data: Any) -> None:
        """Say that from now on ranks have equally many batches, but not of equal size; all ranks have to call this.

        Each call of `forward_hidden_states` then returns when it has on all ranks, so that whatever the ranks do
        together between two batches finds them at the same place.

        Args:
            data: its `img_size_px` is the side of the images.
        """
        if not self.is_sharded:
            return
        side = int(data.img_size_px)
        names, image = list(self._modules), torch.zeros(1, 3, side, side, dtype=torch.uint8)
        device = next(self._modules[names[0]].parameters()).device

        def run(number: int) -> None:
            self.encoder(names[number - 1]).forward_hidden_states(image.to(device), 1)

        self._company = Company(run)

    def end_uneven(self) -> None:
        """Say that ranks have batches of equal size again."""
        self._company = None

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
            states = {
                name: chunked(self.encoder(name), images, count, size, before=self._before(name))
                for name, count in layers.items()
            }
        except ValueError as error:  # how an encoder refuses images of a size it cannot take
            raise ConfigError(f"A teacher cannot take these images (data.img_size_px). {error}") from error
        if self._company is not None:
            self._company.leave()
        return states

    def _before(self, name: str) -> Callable[[], None] | None:
        company = self._company
        if company is None:
            return None
        number = 1 + list(self._modules).index(name)
        return lambda: company.join(number)


def chunked(
    teacher: Encoder, images: Tensor, num_layers: int, size: int, *, before: Callable[[], None] | None = None
) -> list[Layer]:
    """Return the last hidden states of `images`, computed `size` at a time, the last chunk filled by repetition.

    Args:
        teacher: the encoder.
        images: `[B, 3, H, W]`.
        num_layers: how many.
        size: images of a forward pass.
        before: called before each forward pass.
    """
    count = images.shape[0]
    missing = -count % size
    if missing:
        images = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)])
    images = images.contiguous(memory_format=torch.channels_last)  # as batches are; kernels round by layout too
    chunks: list[list[Layer]] = []
    for part in images.split(size):
        if before is not None:
            before()
        chunks.append(teacher.forward_hidden_states(part, num_layers))
    if len(chunks) == 1 and not missing:
        return [(prefix.contiguous(), patches.contiguous()) for prefix, patches in chunks[0]]
    return [
        (
            torch.cat([chunk[layer][0] for chunk in chunks])[:count],
            torch.cat([chunk[layer][1] for chunk in chunks])[:count],
        )
        for layer in range(num_layers)
    ]
