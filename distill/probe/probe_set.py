"""The images that encoders are judged on, whatever holds them: shards, folders, a table, or another library's data.

Legend: N images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from distill.data.transforms import square_view
from distill.errors import ConfigError, DataError
from distill.probe.protocol import IntArray

TRAIN_PART, TEST_PARTS = "train", ("test", "val", "validation")
"""Names of fixed parts: the reported one is the first of `TEST_PARTS` that is there."""


class Images(Protocol):
    """Where pixels come from."""

    def pixels(self, row: int) -> Tensor:
        """Return one image, `[3, H, W]` uint8 RGB, at its own size.

        Raises:
            DataError: it cannot be read or decoded.
        """
        ...

    def name_of(self, row: int) -> str:
        """Return what a person finds the image by."""
        ...


@dataclass(frozen=True)
class ProbeSet:
    """N images with what is known of them; a map-style data set of square views.

    Attributes:
        source: what it was opened from.
        fingerprint: SHA-256, hex, of all images and labels.
        images: where pixels come from.
        img_size_px: side of the square views.
        labels: `[N]`, position in `label_names`, -1 for none.
        label_names: of the classes.
        domain_ids: `[N]`, position in `domains`.
        domains: names of the domains.
        groups: N group names, empty for an image that is a group of its own.
        is_test: `[N]`, which images a fixed split reports on; None where the split is free.
    """

    source: str
    fingerprint: str
    images: Images
    img_size_px: int
    labels: IntArray
    label_names: tuple[str, ...]
    domain_ids: IntArray
    domains: tuple[str, ...]
    groups: tuple[str, ...]
    is_test: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if not len(self):
            raise DataError(f"--data {self.source} holds no image. Name a folder, table or shards with images.")
        if self.is_test is not None and (self.is_test.all() or not self.is_test.any()):
            empty = "train" if self.is_test.all() else "test"
            raise DataError(
                f"--data {self.source} has a fixed test split, but its {empty} part is empty. Add images to it, or "
                "take the split away to have one drawn."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Return `{"image": uint8 [3, S, S], "label": int, "domain": int, "row": int}`.

        Raises:
            DataError: naming the image, when it cannot be used.
        """
        image = square_view(self.images.pixels(row), self.img_size_px)
        return {"image": image, "label": int(self.labels[row]), "domain": int(self.domain_ids[row]), "row": row}

    def rows_of(self, domains: Sequence[str] | None) -> list[int]:
        """Return the rows of some domains, ascending; None means all.

        Raises:
            ConfigError: a domain is not here.
        """
        unknown = sorted(set(domains or ()) - set(self.domains))
        if unknown:
            raise ConfigError(f"--domains {', '.join(unknown)} not in the data; it has {', '.join(self.domains)}.")
        wanted = [self.domains.index(domain) for domain in (domains or self.domains)]
        return np.flatnonzero(np.isin(self.domain_ids, wanted)).tolist()


def open_probe_set(data: str, img_size_px: int) -> ProbeSet:
    """Open the images that `--data` names.

    Args:
        data: a directory, file or pattern of shards; a directory of class folders; a CSV file with the columns path
            and label; a directory in clip_benchmark's layout; `torchvision:NAME:ROOT`; or `hf:PATH`.
        img_size_px: side of the square views.

    Raises:
        ConfigError: the value is malformed, or needs a package that is not installed.
        DataError: the data is missing, damaged, or holds nothing that can be probed.
    """
    from distill.probe import clip_benchmark, image_files, library_data

    scheme, colon, rest = data.partition(":")
    if colon and scheme == "torchvision":
        return library_data.open_torchvision(data, rest, img_size_px)
    if colon and scheme == "hf":
        return library_data.open_hugging_face(data, rest, img_size_px)
    path = Path(data)
    if path.suffix.lower() == ".csv":
        return image_files.open_csv(path, img_size_px)
    if path.is_dir() and clip_benchmark.is_layout(path):
        return clip_benchmark.open_layout(path, img_size_px)
    if path.is_dir() and image_files.is_image_folder(path):
        return image_files.open_image_folder(path, img_size_px)
    return _open_shards(data, img_size_px)


def _open_shards(data: str, img_size_px: int) -> ProbeSet:
    from distill.data.index import build_index
    from distill.probe.shard_images import ShardImages

    index = build_index(data, key="--data")
    labels, domain_ids = index.labels.astype(np.int64), index.domain_ids.astype(np.int64)
    return ProbeSet(
        data,
        index.fingerprint,
        ShardImages(index),
        img_size_px,
        labels,
        index.label_names,
        domain_ids,
        index.domains,
        tuple(index.groups),
    )


def sort_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return names without repetition, sorted, numbers by their value: class 2 comes before class 10."""
    distinct = set(names)
    numbers = {name: int(name) for name in distinct if name.isdecimal() and len(name) < 19}
    return tuple(sorted(distinct, key=lambda name: (name not in numbers, numbers.get(name, 0), name)))


def number(names: Sequence[str], known: Sequence[str]) -> IntArray:
    """Return the position of each name in `known`; -1 for an empty name."""
    table = {name: position for position, name in enumerate(known)}
    return np.array([table[name] if name else -1 for name in names], dtype=np.int64)


def require_every_class(labels: IntArray, label_names: Sequence[str], source: str) -> None:
    """Refuse a list of class names that goes on past the images.

    Raises:
        DataError: a named class has no image.
    """
    present = set(np.unique(labels).tolist())
    empty = [name for position, name in enumerate(label_names) if position not in present]
    if empty:
        raise DataError(
            f"--data {source}: {len(empty)} class(es) have no image, the first being {empty[0]!r}. A probe cannot "
            "judge a class without images: add images of it, or take its name out."
        )
