"""What a small VLM is fed: one sample, and samples collated into a batch, packed or not.

Legend: B rows, L tokens of a row, T tiles, S pixels a side of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.errors import ConfigError, DataError
from distill.vlm.packing import pack_first_fit

IGNORED_LABEL = -100
"""The label of a token that takes no part in the loss: PyTorch's and transformers' convention."""


@dataclass(frozen=True)
class VLMSample:
    """One conversation or document, encoded.

    Attributes:
        input_ids: token ids; the image token stands once for each embedding that the connector yields.
        labels: as long as `input_ids`: the same id where the loss counts it, else -100. Not shifted: position i is
            predicted from the tokens before i.
        tiles: uint8 `[T, 3, S, S]`, in the order of their placeholders; T may be 0.
        record_id: says where the sample is from, in messages.

    Raises:
        DataError: ids and labels differ in length, there is no token, or the tiles have another layout.
    """

    input_ids: list[int]
    labels: list[int]
    tiles: Tensor
    record_id: str

    def __post_init__(self) -> None:
        if not self.input_ids or len(self.input_ids) != len(self.labels):
            raise DataError(
                f"Sample {self.record_id} has {len(self.input_ids)} tokens and {len(self.labels)} labels: "
                "give one label for each token, and at least one token."
            )
        shape = tuple(self.tiles.shape)
        if self.tiles.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
            raise DataError(
                f"Sample {self.record_id} has tiles of {self.tiles.dtype} {list(shape)}: they are uint8 [T, 3, S, S]."
            )


@dataclass
class VLMBatch:
    """Samples as one model call takes them, padded on the right.

    Attributes:
        input_ids: int64 `[B, L]`.
        labels: int64 `[B, L]`, -100 where the loss does not count; the first token of every sample is never counted,
            since in a packed row it would be predicted from another sample.
        position_ids: int64 `[B, L]`, from 0 in every sample; 0 in the padding.
        segment_ids: int64 `[B, L]`: 0 is padding, 1, 2, ... the samples of a row. A token attends to its own segment.
        tiles: uint8 `[T, 3, S, S]` of all samples, in the order in which their placeholders stand in the rows.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    tiles: Tensor

    def to(self, device: torch.device | str) -> VLMBatch:
        """Return the batch on another device."""
        return VLMBatch(
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            position_ids=self.position_ids.to(device),
            segment_ids=self.segment_ids.to(device),
            tiles=self.tiles.to(device),
        )


def collate(samples: Sequence[VLMSample], pad_id: int, max_length: int, pack: bool) -> VLMBatch:
    """Return samples as one batch, as long as its longest row.

    Args:
        samples: at least one. Their tiles have one size.
        pad_id: token id of the padding; any id of the vocabulary, for nothing attends to it.
        max_length: most tokens of a row.
        pack: put several samples into a row where they fit, first fit; else one sample a row.

    Returns:
        A batch whose tiles follow the rows: row by row, and within a row sample by sample.

    Raises:
        DataError: no sample; a sample longer than a row; tiles of different sizes.
        ConfigError: `max_length` is below 1.
    """
    if max_length < 1:
        raise ConfigError(f"max_length {max_length} leaves no room for a token: give at least 1.")
    if not samples:
        raise DataError("There is no sample to collate: a batch has at least one.")
    rows = pack_first_fit([len(sample.input_ids) for sample in samples], max_length)
    if not pack:
        rows = [[position] for position in range(len(samples))]
    ordered = [[samples[position] for position in row] for row in rows]
    width = max(sum(len(sample.input_ids) for sample in row) for row in ordered)
    columns = [_row_tensors(row, pad_id, width) for row in ordered]
    input_ids, labels, position_ids, segment_ids = (torch.stack(tensors) for tensors in zip(*columns, strict=True))
    tiles = _join_tiles([sample for row in ordered for sample in row])
    return VLMBatch(input_ids, labels, position_ids, segment_ids, tiles)


def _row_tensors(row: Sequence[VLMSample], pad_id: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ids, labels, positions and segments of one row, each int64 `[width]`."""
    ids = torch.full((width,), pad_id, dtype=torch.int64)
    labels = torch.full((width,), IGNORED_LABEL, dtype=torch.int64)
    positions = torch.zeros(width, dtype=torch.int64)
    segments = torch.zeros(width, dtype=torch.int64)
    start = 0
    for number, sample in enumerate(row, start=1):
        end = start + len(sample.input_ids)
        ids[start:end] = torch.tensor(sample.input_ids)
        labels[start:end] = torch.tensor(sample.labels)
        # Nothing of its own sample stands before it: packed, the neighbour's last token would predict it.
        labels[start] = IGNORED_LABEL
        positions[start:end] = torch.arange(end - start)
        segments[start:end] = number
        start = end
    return ids, labels, positions, segments


def _join_tiles(samples: Sequence[VLMSample]) -> Tensor:
    """Return all tiles in the order of the samples, `[T, 3, S, S]`; samples without tiles do not fix the size."""
    sizes = {sample.tiles.shape[-1]: sample.record_id for sample in samples if len(sample.tiles)}
    if len(sizes) > 1:
        listed = ", ".join(f"{size} px (as {record})" for size, record in sorted(sizes.items()))
        raise DataError(f"Tiles of one batch differ in size: {listed}. Cut all images with one tiling.")
    if not sizes:
        return samples[0].tiles
    return torch.cat([sample.tiles for sample in samples if len(sample.tiles)])
