"""The bytes of one image's hidden states: all teachers, all layers, one after the other, so that one read gets them.

Legend: B images, P prefix tokens, H x W patches, N tokens, D channels, R bytes of a record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from distill.cache.compression import Basis, Compression, decode, encode
from distill.cache.memory import States
from distill.encoder import Layer
from distill.errors import DataError

ALIGNMENT = 16
"""Each part begins at a multiple of it, so that its bytes can be read as numbers in place."""

LayerName = tuple[str, int]
"""A teacher's name and a layer counted from its end: -1 is the last."""


@dataclass(frozen=True)
class Part:
    """Prefix or patches of one layer within a record.

    Attributes:
        teacher: its name.
        layer: counted from the end, -1 being the last.
        kind: which of the two.
        shape: without the batch: `(P, D)` or `(H, W, D)`.
        dtype: of the teacher's states.
        stored_dtype: of the values as stored.
        stored_width: channels as stored.
        offset: where the values begin.
        scale_offset: where a float32 scale for each token begins; -1 where there is none.
    """

    teacher: str
    layer: int
    kind: Literal["prefix", "patches"]
    shape: tuple[int, ...]
    dtype: str
    stored_dtype: str
    stored_width: int
    offset: int
    scale_offset: int

    @property
    def tokens(self) -> int:
        """N."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True)
class RecordLayout:
    """Where everything lies within a record.

    Attributes:
        compression: how values are stored.
        num_bytes: R, a multiple of `ALIGNMENT`.
        parts: in the order of their offsets.
    """

    compression: Compression
    num_bytes: int
    parts: tuple[Part, ...]

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RecordLayout:
        """Return the layout that `as_json` gave."""
        parts: list[dict[str, Any]] = [{**part, "shape": tuple(part["shape"])} for part in content["parts"]]
        return cls(content["compression"], content["num_bytes"], tuple(Part(**part) for part in parts))

    def layers_of(self, teacher: str) -> int:
        """Return how many layers of a teacher are stored."""
        return len({part.layer for part in self.parts if part.teacher == teacher})


def lay_out(states: States, compression: Compression, dims: int) -> RecordLayout:
    """Return the layout of records for hidden states of such shapes and dtypes.

    Args:
        states: of any images.
        compression: the format.
        dims: channels that "pca" keeps at most.
    """
    parts: list[Part] = []
    offset = 0
    for teacher, layers in states.items():
        for number, layer in enumerate(layers):
            for kind, tensor in zip(("prefix", "patches"), layer, strict=True):
                dtype = str(tensor.dtype).removeprefix("torch.")
                stored = {"none": dtype, "fp16": "float16"}.get(compression, "int8")
                width = min(dims, tensor.shape[-1]) if compression == "pca" else tensor.shape[-1]
                tokens = math.prod(tensor.shape[1:-1])
                after = offset + _aligned(tokens * width * _dtype(stored).itemsize)
                scale_offset = after if stored == "int8" else -1
                entry = (kind, tuple(tensor.shape[1:]), dtype, stored, width, offset, scale_offset)
                parts.append(Part(teacher, number - len(layers), *entry))
                offset = after + (_aligned(4 * tokens) if scale_offset >= 0 else 0)
    return RecordLayout(compression, offset, tuple(parts))


def encode_records(states: States, layout: RecordLayout, bases: Mapping[LayerName, Basis]) -> Tensor:
    """Return the records of a batch, uint8 `[B, R]` on the states' device.

    Raises:
        DataError: the states have other shapes or another dtype than the layout, or do not fit the format.
    """
    first = layout.parts[0]
    like = states[first.teacher][first.layer][1]
    records = torch.zeros(like.shape[0], layout.num_bytes, dtype=torch.uint8, device=like.device)
    for part in layout.parts:
        tensor = states[part.teacher][part.layer][part.kind == "patches"]
        if tuple(tensor.shape[1:]) != part.shape or str(tensor.dtype) != f"torch.{part.dtype}":
            raise DataError(
                f"The teacher {part.teacher!r} gives {part.kind} of shape {tuple(tensor.shape[1:])} in {tensor.dtype} "
                f"for layer {part.layer}; this cache was begun with {part.shape} in {part.dtype}. Set the teacher's "
                "dtype in the recipe, or choose another --out."
            )
        tokens = tensor.reshape(tensor.shape[0], part.tokens, part.shape[-1])
        basis = bases.get((part.teacher, part.layer))
        values, scales = encode(tokens, layout.compression, basis)
        _put(records, part.offset, values)
        if scales is not None:
            _put(records, part.scale_offset, scales)
    return records


def decode_records(
    records: Tensor, layout: RecordLayout, bases: Mapping[LayerName, Basis], layers: Mapping[str, int]
) -> States:
    """Return hidden states of records, on their device and in the teachers' own dtypes.

    Args:
        records: uint8 `[B, R]`.
        layout: of the records.
        bases: for "pca", on the records' device.
        layers: how many last hidden states of which teacher are wanted.
    """
    found: dict[tuple[str, int, str], Tensor] = {}
    for part in layout.parts:
        if part.teacher in layers and -part.layer <= layers[part.teacher]:
            stored = _dtype(part.stored_dtype)
            values = _take(records, part.offset, stored, part.tokens, part.stored_width)
            scales = None
            if part.scale_offset >= 0:
                scales = _take(records, part.scale_offset, torch.float32, part.tokens, 1)
            tokens = decode(values, scales, _dtype(part.dtype), bases.get((part.teacher, part.layer)))
            found[part.teacher, part.layer, part.kind] = tokens.reshape(len(records), *part.shape).contiguous()
    return {name: [_layer(found, name, number - count) for number in range(count)] for name, count in layers.items()}


def _layer(found: Mapping[tuple[str, int, str], Tensor], teacher: str, layer: int) -> Layer:
    return found[teacher, layer, "prefix"], found[teacher, layer, "patches"]


def _put(records: Tensor, offset: int, values: Tensor) -> None:
    if values.numel():
        flat = values.reshape(len(records), -1).view(torch.uint8)
        records[:, offset : offset + flat.shape[1]] = flat


def _take(records: Tensor, offset: int, dtype: torch.dtype, tokens: int, width: int) -> Tensor:
    size = tokens * width * dtype.itemsize
    # A slice of no columns cannot be seen as another dtype.
    if not size:
        return torch.empty(len(records), tokens, width, dtype=dtype, device=records.device)
    return records[:, offset : offset + size].view(dtype).unflatten(1, (tokens, width))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)
