"""Images that two data sets share, exactly or nearly: what a probe must know of the shards that were trained on.

Exact means equal pixels, whatever file they come in. Near means that two images look alike at 32 x 32 grey pixels:
their 64-bit DCT hashes differ in few bits, which is quick to ask of millions, and then the thumbnails themselves are
close. The second step is there because hashes alone take one page of text for another: at 8 x 8 they are alike. Images
that were encoded again, resized or slightly brightened are found; crops are not.

Legend: N images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distill.data.transforms import square_view
from distill.errors import DataError
from distill.probe.probe_set import Images

THUMBNAIL_PX = 32
HASH_SIDE = 8
MAX_BITS = 10
"""Of 64. Re-encoding at JPEG quality 50 or halving the size changes fewer; unrelated images differ in about 32."""

MAX_DISTANCE = 0.2
"""Relative L2 of two centred thumbnails, the most that the second step lets pass: on drawn images of four domains, JPEG
quality 30 or half the size stayed below 0.1, and no two of 120,000 unrelated pairs came below 0.33."""

FLAT = 2.0
"""Standard deviation, in grey levels, below which an image is blank: blank images all look alike, and leak nothing."""

_PAIRS = 1 << 22
_GREY = torch.tensor([0.299, 0.587, 0.114])[:, None, None]


@dataclass(frozen=True)
class ImageHashes:
    """What N images are recognised by.

    Attributes:
        exact: `[N, 32]` uint8, SHA-256 of size and pixels.
        near: `[N]` uint64, DCT hash.
        thumbnails: `[N, 1024]` uint8, grey.
    """

    exact: NDArray[np.uint8]
    near: NDArray[np.uint64]
    thumbnails: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.near)


@dataclass(frozen=True)
class Duplicates:
    """Which of N images another set holds; an image that it holds exactly is not counted as near.

    Attributes:
        exact: `[N]`.
        near: `[N]`.
    """

    exact: NDArray[np.bool_]
    near: NDArray[np.bool_]

    @property
    def either(self) -> NDArray[np.bool_]:
        """Images that are held exactly or nearly, `[N]`."""
        return self.exact | self.near


def hash_image(pixels: Tensor) -> tuple[bytes, int, NDArray[np.uint8]]:
    """Return SHA-256 of size and pixels, DCT hash and grey thumbnail `[1024]` of an image `[3, H, W]` uint8."""
    digest = hashlib.sha256(f"{tuple(pixels.shape)}".encode())
    digest.update(pixels.permute(1, 2, 0).contiguous().numpy().tobytes())
    grey = (square_view(pixels, THUMBNAIL_PX).float() * _GREY).sum(0).round().clamp(0, 255).to(torch.uint8).numpy()
    basis = _dct_basis()
    low = (basis @ (grey.astype(np.float64) - grey.mean()) @ basis.T).flatten()
    bits = low > np.median(low[1:])
    return digest.digest(), int(np.packbits(bits).view(">u8")[0]), grey.flatten()


@cache
def _dct_basis() -> NDArray[np.float64]:
    """The lowest frequencies of the DCT-II, `[8, 32]`."""
    at = np.arange(THUMBNAIL_PX) + 0.5
    return np.cos(np.pi / THUMBNAIL_PX * np.outer(np.arange(HASH_SIDE), at))


class _Hashed(Dataset[Any]):
    def __init__(self, images: Images, rows: Sequence[int]) -> None:
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Any:
        try:
            return hash_image(self.images.pixels(self.rows[position]))
        except DataError:
            return None  # an image that cannot be decoded trains nothing and is probed by nothing


def _as_they_are(items: list[Any]) -> list[Any]:
    return items


def hash_images(
    images: Images, rows: Sequence[int], *, what: str, num_workers: int = 0, console: Console | None = None
) -> tuple[ImageHashes, NDArray[np.int64]]:
    """Hash images; those that cannot be decoded are left out.

    Args:
        images: where pixels come from.
        rows: which of them.
        what: shown beside the progress bar.
        num_workers: processes that decode; 0 decodes in this one.
        console: where the progress bar is drawn; None draws none.

    Returns:
        The hashes, and the row of each.
    """
    loader = DataLoader(_Hashed(images, rows), batch_size=16, num_workers=num_workers, collate_fn=_as_they_are)
    batches = loader if console is None else track(loader, what, console=console)
    found = [item for batch in batches for item in cast(list[Any], batch)]
    kept = [position for position, item in enumerate(found) if item is not None]
    good = [found[position] for position in kept]
    hashes = ImageHashes(
        np.frombuffer(b"".join(item[0] for item in good), dtype=np.uint8).reshape(-1, 32),
        np.array([item[1] for item in good], dtype=np.uint64),
        np.array([item[2] for item in good], dtype=np.uint8).reshape(-1, THUMBNAIL_PX**2),
    )
    return hashes, np.asarray(rows, dtype=np.int64)[kept]


def find_duplicates(probed: ImageHashes, trained: ImageHashes) -> Duplicates:
    """Return which of the probed images the trained ones hold."""
    held = {row.tobytes() for row in trained.exact}
    exact = np.array([row.tobytes() in held for row in probed.exact], dtype=np.bool_)
    near = np.zeros(len(probed), dtype=np.bool_)
    block = max(1, _PAIRS // max(1, len(trained)))
    for start in range(0, len(probed), block):
        bits = np.bitwise_count(probed.near[start : start + block, None] ^ trained.near[None])
        ours, theirs = np.nonzero(bits <= MAX_BITS)
        for at in range(0, len(ours), 1 << 14):
            one, other = ours[at : at + (1 << 14)] + start, theirs[at : at + (1 << 14)]
            near[one[_look_alike(probed.thumbnails[one], trained.thumbnails[other])]] = True
    return Duplicates(exact, near & ~exact)


def _look_alike(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether thumbnails `[n, 1024]` are close, pair by pair, `[n]`."""
    x, y = (side.astype(np.float32) for side in (a, b))
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    norm = np.maximum(np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1))
    return (np.linalg.norm(x - y, axis=1) <= MAX_DISTANCE * norm) & (norm > FLAT * THUMBNAIL_PX)
