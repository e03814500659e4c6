"""The map section of the page: which images are shown, their features, and the thumbnails."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from distill.checkpoint import RunDir, load_student, load_teacher
from distill.data.fetch import RowDataset
from distill.data.index import DatasetIndex
from distill.encoder import Encoder
from distill.errors import ConfigError, DataError
from distill.report.pca import shared_maps

THUMBNAIL_PX = 224
PHOTO_QUALITY = 82
FIT_IMAGES_PER_DOMAIN = 12
"""Images of each domain, beside those shown, on which the linear maps are fitted."""

_BATCH_SIZE = 4
_SEED = 0
_MAX_BAD_PER_DOMAIN = 16


@dataclass(frozen=True)
class ChosenImages:
    """Images for the maps, the shown ones first.

    Attributes:
        images: `[N, 3, S, S]`, uint8.
        captions: (domain, class name or "") of each shown image.
    """

    images: Tensor
    captions: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class MapCell:
    """One picture of the grid: heading, WebP as a data URI, pixels, and the agreement with the teacher."""

    heading: str
    uri: str
    pixels: NDArray[np.uint8]
    agreement: float | None = None


@dataclass(frozen=True)
class MapRow:
    """An image and its feature maps."""

    domain: str
    label: str
    cells: tuple[MapCell, ...]


def choose_images(index: DatasetIndex, dataset: RowDataset, per_domain: int) -> ChosenImages:
    """Choose images of each domain by a fixed seed, some to show and some to fit on.

    Shown images come from different groups where there are enough, and none of the images to fit on shares a group
    with a shown one. Images that cannot be decoded are passed over.

    Args:
        index: the data.
        dataset: gives the images.
        per_domain: images of each domain to show.

    Raises:
        DataError: no image can be decoded, or many of one domain cannot.
    """
    shown: list[Tensor] = []
    fit: list[Tensor] = []
    captions: list[tuple[str, str]] = []
    group_of = index.groups
    for number, domain in enumerate(index.domains):
        order = np.random.default_rng([_SEED, number]).permutation(index.rows_of(domain)).tolist()
        taken: set[int] = set()
        groups: set[str] = set()
        # Both filters are read as rows are pulled, so they know the groups taken by then.
        fresh = (row for row in order if group_of[row] not in groups)
        for row, image in islice(_decodable(fresh, dataset, domain), per_domain):
            taken.add(row)
            groups.update({group_of[row]} - {""})
            shown.append(image)
            label = int(index.labels[row])
            captions.append((domain, index.label_names[label] if label >= 0 else ""))
        rest = (row for row in order if row not in taken and group_of[row] not in groups)
        fit += [image for _, image in islice(_decodable(rest, dataset, domain), FIT_IMAGES_PER_DOMAIN)]
    if not shown:
        raise DataError("No image could be shown: the data has no domain with an image in it.")
    return ChosenImages(torch.stack([*shown, *fit]), tuple(captions))


def _decodable(rows: Iterable[int], dataset: RowDataset, domain: str) -> Iterator[tuple[int, Tensor]]:
    bad = 0
    for row in rows:
        try:
            yield row, cast(Tensor, dataset[row]["image"])
        except DataError as error:
            bad += 1
            if bad > _MAX_BAD_PER_DOMAIN:
                raise DataError(
                    f"{bad} images of the domain {domain!r} cannot be decoded; the last: {error}"
                ) from error


@torch.no_grad()
def last_patches(encoder: nn.Module, images: Tensor, device: str) -> Tensor:
    """Return the patch tokens of an encoder's last hidden state, `[N, H, W, D]`, float32, on the CPU.

    Raises:
        ConfigError: the encoder refuses images of that size.
    """
    contract = cast(Encoder, encoder.to(device).eval())
    parts: list[Tensor] = []
    for batch in images.split(_BATCH_SIZE):
        try:
            parts.append(contract.forward_hidden_states(batch.to(device), 1)[-1][1].float().cpu())
        except ValueError as error:
            raise ConfigError(f"The encoder refuses images of {images.shape[-1]} px: {error}") from error
    encoder.to("cpu")
    return torch.cat(parts)


def map_rows(run: Path, chosen: ChosenImages, device: str) -> list[MapRow]:
    """Return the shown images with the maps of the run's first teacher and of each student, before and after.

    One encoder is in memory at a time.

    Args:
        run: the run directory.
        chosen: from `choose_images`.
        device: where encoders run.

    Raises:
        ConfigError: an encoder cannot be built or refuses the images.
        WeightsError: weights are missing or damaged.
    """
    directory = RunDir(run)
    teacher_name = directory.teacher_names[0]
    headings = [f"teacher {teacher_name}"]
    teacher = last_patches(load_teacher(run, name=teacher_name)[1], chosen.images, device)
    others: list[Tensor] = []
    names = directory.student_names
    for name in names:
        for which, heading in (("initial", "initial student"), ("last", "distilled student")):
            module = load_student(run, name=name, which="initial" if which == "initial" else "last")[1]
            others.append(last_patches(module, chosen.images, device))
            headings.append(heading if len(names) == 1 else f"{name}, {heading.split()[0]}")
    maps = shared_maps(teacher, others, range(len(chosen.captions)))
    rows: list[MapRow] = []
    for i, (domain, label) in enumerate(chosen.captions):
        cells = [_photo_cell(chosen.images[i])]
        for heading, entry in zip(headings, maps, strict=True):
            agreement = None if entry is maps[0] else entry.agreement[i]
            cells.append(_map_cell(heading, entry.colours[i], agreement))
        rows.append(MapRow(domain, label, tuple(cells)))
    return rows


def _photo_cell(image: Tensor) -> MapCell:
    photo = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    photo = photo.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    return MapCell("image", webp_uri(photo, PHOTO_QUALITY), np.asarray(photo))


def _map_cell(heading: str, colours: Tensor, agreement: float | None) -> MapCell:
    pixels = (colours * 255).round().to(torch.uint8).numpy()
    # Nearest: each square is one patch token, nothing between tokens is made up.
    enlarged = Image.fromarray(pixels).resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.NEAREST)
    return MapCell(heading, webp_uri(enlarged, None), np.asarray(enlarged), agreement)


def webp_uri(image: Image.Image, quality: int | None) -> str:
    """Return an image as a data URI, WebP of the given quality, or lossless for None."""
    buffer = io.BytesIO()
    if quality is None:
        image.save(buffer, format="WEBP", lossless=True, method=4)
    else:
        image.save(buffer, format="WEBP", quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
