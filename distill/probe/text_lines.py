"""Lines of text whose place and content are known, drawn or of real pages: what the reading probe reads."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from distill.data.decode import decode_image
from distill.data.transforms import square_view
from distill.errors import DataError
from distill.probe.protocol import FRACTIONS, IntArray, Split, group_ids, split_by_group

Box = tuple[float, float, float, float]

LINE_SIZES_PX = (8, 12, 16, 24, 32, 48, 64, 96)
"""Heights that real lines are sorted under: the nearest by ratio."""


@dataclass(frozen=True)
class TextLine:
    """One line.

    Attributes:
        page: position of its page.
        box: x0, y0, x1, y1 in pixels of the page.
        text: what it says; not empty.
        size_px: the line's place on the curve.
        group: lines of one document share a number.
    """

    page: int
    box: Box
    text: str
    size_px: float
    group: int


@dataclass(frozen=True, eq=False)
class TextPages:
    """Pages with their lines.

    Attributes:
        images: `[P, 3, S, S]`, uint8.
        lines: all lines.
        data: fingerprint of pages and lines.
        axis: what `TextLine.size_px` measures: "font_px" or "line_px".
    """

    images: Tensor
    lines: tuple[TextLine, ...]
    data: str
    axis: str

    @property
    def groups(self) -> IntArray:
        """The group of each line, `[N]`."""
        return np.asarray([line.group for line in self.lines], dtype=np.int64)

    def split(self, seed: int) -> Split:
        """Split the lines into fit, select and test; the lines of a group stay together.

        Raises:
            DataError: there are fewer than three groups.
        """
        strata = np.zeros(len(self.lines), dtype=np.int64)
        return split_by_group([str(group) for group in self.groups], strata, seed=seed, fractions=FRACTIONS)


def read_text_pages(
    manifest: Path, *, dataset: str | None = None, img_size_px: int = 448, max_pages: int | None = None
) -> TextPages:
    """Read images with text lines that a manifest of JSON lines names.

    A line of the manifest has the key `path`, relative to the manifest, and `lines`: lists of x0, y0, x1, y1 in pixels
    and the text, or objects with `box` and `text`. Others are passed over. Images with an equal `group` are one
    document's; without that key, files whose names differ only after the last underscore are (crops of one page).

    Args:
        manifest: JSON lines.
        dataset: only entries whose key `dataset` has this value; None means all.
        img_size_px: pages are resized to this square, and boxes with them.
        max_pages: at most this many pages, in the manifest's order; None means all.

    Raises:
        DataError: the manifest or an image cannot be read, a box is empty, or no line is left.
    """
    entries = [entry for entry in _entries(manifest) if dataset is None or entry.get("dataset") == dataset]
    entries = [entry for entry in entries if entry.get("lines")][:max_pages]
    if not entries:
        where = "" if dataset is None else f" of the dataset {dataset!r}"
        raise DataError(f"{manifest} has no image with text lines{where}; entries need the keys path and lines.")
    groups = group_ids([str(entry.get("group") or _document_of(entry["path"])) for entry in entries])
    images = torch.empty(len(entries), 3, img_size_px, img_size_px, dtype=torch.uint8)
    lines: list[TextLine] = []
    for page, entry in enumerate(entries):
        pixels = _pixels(manifest.parent / str(entry["path"]))
        images[page] = square_view(pixels, img_size_px)
        scale = img_size_px / pixels.shape[-1], img_size_px / pixels.shape[-2]
        lines.extend(_line(page, item, scale, int(groups[page]), entry["path"]) for item in entry["lines"])
    content = hashlib.sha256(images.numpy().tobytes())
    content.update(repr(lines).encode())
    return TextPages(images, tuple(lines), f"text-{content.hexdigest()[:16]}", "line_px")


def _entries(manifest: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in manifest.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"The manifest {manifest} cannot be read as JSON lines: {error}") from error
    wrong = next((row for row in rows if not isinstance(row, dict) or "path" not in row), None)
    if wrong is not None:
        raise DataError(f"The manifest {manifest} has a line without the key path: {str(wrong)[:80]}")
    return cast(list[dict[str, Any]], rows)


def _document_of(path: str) -> str:
    stem = Path(path).stem
    return stem.rpartition("_")[0] or stem


def _pixels(path: Path) -> Tensor:
    try:
        return decode_image(path.read_bytes())
    except OSError as error:
        raise DataError(f"The page {path} cannot be read: {error}") from error


def _line(page: int, item: Any, scale: tuple[float, float], group: int, path: str) -> TextLine:
    try:
        corners, text = (item["box"], item["text"]) if isinstance(item, dict) else (item[:4], item[4])
        x0, y0, x1, y1 = (float(corner) for corner in corners)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(f"{path}: a text line is {str(item)[:80]}; it must be [x0, y0, x1, y1, text].") from error
    if not (x1 > x0 and y1 > y0 and isinstance(text, str) and text):
        raise DataError(f"{path}: the text line {str(item)[:80]} has an empty box or no text.")
    box = (x0 * scale[0], y0 * scale[1], x1 * scale[0], y1 * scale[1])
    size = min(LINE_SIZES_PX, key=lambda size_px: abs(math.log((box[3] - box[1]) / size_px)))
    return TextLine(page, box, text, float(size), group)
