"""Samples by number: rows of an index in their order, or positions of a plan with bad images replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from distill.data.decode import decode_image
from distill.data.image_header import ImageError
from distill.data.index import DatasetIndex
from distill.data.plan import SamplePlan
from distill.data.randomness import AUGMENT_STREAM, generator_for
from distill.data.shard_reader import ShardReader
from distill.data.transforms import NO_AUGMENTATION, Augmentation, augment, smallest_source_px, square_view
from distill.errors import ConfigError, DataError

Batch = dict[str, Any]
"""A batch: see `collate`."""

MAX_SUBSTITUTES = 16
"""So many bad images in a row mean a bad domain, not bad luck: at 1 % bad the odds are 1e-32."""


class RowDataset(Dataset[dict[str, Any]]):
    """The samples of an index in its order, as a map-style dataset without any randomness.

    An item is `{"image": uint8 [3, S, S], "label": int, "domain": int, "row": int}`; label -1 means none, and the
    domain is an index into `index.domains`.

    Args:
        index: the samples.
        img_size_px: S, side of the square view.
        min_decoded_px: decode large JPEGs at a fraction of their size that keeps at least so many pixels on both sides;
            None decodes whole.

    Raises:
        ConfigError: `img_size_px` is below 1.
    """

    def __init__(self, index: DatasetIndex, img_size_px: int, min_decoded_px: int | None = None) -> None:
        if img_size_px < 1:
            raise ConfigError(f"img_size_px is {img_size_px}; it must be at least 1.")
        self.index = index
        self.img_size_px = img_size_px
        self.min_decoded_px = min_decoded_px
        self.reader = ShardReader(index.shards, shard_cache=index.shard_cache)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Return one sample.

        Raises:
            IndexError: there is no such row.
            DataError: naming shard and member, when the image or its shard cannot be read.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is not from 0 to {len(self) - 1}.")
        try:
            image = square_view(self.decode(row), self.img_size_px)
        except ImageError as error:
            raise DataError(f"{self.index.name_of(row)}: {error}; mend the image or leave it out.") from error
        return self.item(row, image)

    def decode(self, row: int) -> Tensor:
        """Return one image's pixels, `[3, H, W]` uint8, at their own size unless `min_decoded_px` allows less.

        Raises:
            ImageError: the image cannot be decoded.
            DataError: its shard cannot be read.
        """
        index = self.index
        data = self.reader.read(int(index.shard_ids[row]), int(index.offsets[row]), int(index.sizes[row]))
        return decode_image(data, min_size_px=self.min_decoded_px)

    def item(self, row: int, image: Tensor) -> dict[str, Any]:
        """Return what an item holds, with a given view as its image."""
        return {
            "image": image,
            "label": int(self.index.labels[row]),
            "domain": int(self.index.domain_ids[row]),
            "row": row,
        }


@dataclass(frozen=True)
class BadSample:
    """A planned sample that could not be used.

    Attributes:
        index: its place in the plan.
        attempt: 0 for the planned sample, above 0 for a substitute that was bad too.
        row: its row.
        domain: its domain.
        shard: path or URL of its shard.
        key: its key.
        reason: why.
    """

    index: int
    attempt: int
    row: int
    domain: str
    shard: str
    key: str
    reason: str


class PlannedDataset(Dataset[dict[str, Any]]):
    """The samples of training by their place in the plan: item i is the same in every process and every run.

    An item is that of `RowDataset`, with `"index"` (the place), `"substituted"` (1 when another sample of the same
    domain stands in for a bad one, else 0) and `"bad"` (a list of `BadSample`). `row`, `label` and `domain` are of the
    sample that is there. The endless plan has no length; a sampler says how many items an epoch has.

    Args:
        plan: which row stands where.
        img_size_px: side of the square view.
        augmentation: what happens to an image before it is resized; depends on the plan's seed and the place alone.
        scaled_decoding: decode large JPEGs at a fraction of their size, where no crop could need more.
    """

    def __init__(
        self,
        plan: SamplePlan,
        img_size_px: int,
        augmentation: Augmentation = NO_AUGMENTATION,
        *,
        scaled_decoding: bool = False,
    ) -> None:
        self.plan = plan
        self.augmentation = augmentation
        min_decoded_px = smallest_source_px(augmentation, img_size_px) if scaled_decoding else None
        self.rows = RowDataset(plan.index, img_size_px, min_decoded_px)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the sample at a place of the plan.

        Raises:
            DataError: a shard cannot be read, or the domain's images are bad one after another.
        """
        bad: list[BadSample] = []
        row = self.plan[index]
        for attempt in range(MAX_SUBSTITUTES + 1):
            try:
                image = self._view(index, row)
            except ImageError as error:
                bad.append(self._bad(index, attempt, row, str(error)))
                row = self.plan.substitute(index, row, attempt)
            else:
                return {**self.rows.item(row, image), "index": index, "substituted": int(bool(bad)), "bad": bad}
        raise DataError(
            f"The domain {bad[-1].domain!r} has no usable image within {len(bad)} tries, the last being "
            f"{bad[-1].shard}: {bad[-1].key} ({bad[-1].reason}). Mend its shards, or leave the domain out of "
            "data.train and data.weights."
        )

    def _view(self, index: int, row: int) -> Tensor:
        image = self.rows.decode(row)
        generator = generator_for(self.plan.seed, index, AUGMENT_STREAM)
        return square_view(augment(image, self.augmentation, generator), self.rows.img_size_px)

    def _bad(self, index: int, attempt: int, row: int, reason: str) -> BadSample:
        data = self.plan.index
        shard = data.shards[int(data.shard_ids[row])]
        return BadSample(index, attempt, row, shard.domain, shard.shown, data.key_of(row), reason)


def collate(samples: Sequence[dict[str, Any]]) -> Batch:
    """Join samples to a batch.

    Returns:
        `images` uint8 `[B, 3, S, S]` in channels-last memory, as decoders write it; `label`, `domain`, `row`, `index`
        (the row where there is no plan) and, from a plan, `substituted`, int64 `[B]` each; and `bad`, the list of all
        bad samples met, also only from a plan.
    """
    stacked = default_collate([sample["image"].permute(1, 2, 0) for sample in samples])
    batch: Batch = {"images": stacked.permute(0, 3, 1, 2)}
    for name in ("label", "domain", "row", "index", "substituted"):
        if name in samples[0]:
            batch[name] = torch.tensor([sample[name] for sample in samples], dtype=torch.int64)
    batch.setdefault("index", batch["row"].clone())
    if "teacher_states" in samples[0]:
        batch["teacher_states"] = default_collate([sample["teacher_states"] for sample in samples])
    if "bad" in samples[0]:
        batch["bad"] = [entry for sample in samples for entry in sample["bad"]]
    return batch
