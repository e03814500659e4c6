"""What each encoder makes of the page's images: maps in a shared basis, similarity maps, and nearest neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.report.gallery import ChosenImages, Viewer, last_patches
from distill.report.neighbours import Neighbours, nearest, pooled_tokens
from distill.report.pca import FeatureMaps, fit_basis, mapped_map, own_map
from distill.report.similarity import (
    PatchFeatures,
    affordable_components,
    colours_of,
    page_data,
    patch_at,
    patch_features,
    salient_patch,
)
from distill.report.thumbnails import PHOTO_QUALITY, THUMBNAIL_PX, SmallPictures, enlarged, photo_of, webp_uri


@dataclass(frozen=True)
class MapCell:
    """One picture of the grid: heading, WebP as a data URI, pixels, and the agreement with the teacher.

    `mark` is the patch that a similarity map belongs to: left, top, width and height in per cent of the picture.
    """

    heading: str
    uri: str
    pixels: NDArray[np.uint8]
    agreement: float | None = None
    mark: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class MapRow:
    """An image and its maps."""

    domain: str
    label: str
    cells: tuple[MapCell, ...]


@dataclass(frozen=True)
class EncoderView:
    """What is kept of an encoder's tokens once it has left the memory."""

    heading: str
    role: str
    maps: FeatureMaps
    patches: PatchFeatures
    pooled: Tensor


@dataclass(frozen=True)
class ImageSection:
    """The page's sections about images.

    Attributes:
        map_rows: each shown image with the maps in the teacher's basis.
        similarity_rows: each shown image with the similarity maps of the patch that stands out most in it.
        similarity_data: what the page's script computes other patches' maps from.
        kept: smallest share of the variance that the page's tokens hold, over the encoders.
        neighbours: each shown image's neighbours by every encoder.
        num_candidates: images among which neighbours were sought.
        headings: of the encoders, the teacher first.
        css: style rules of the small pictures.
    """

    map_rows: list[MapRow]
    similarity_rows: list[MapRow]
    similarity_data: dict[str, Any]
    kept: float
    neighbours: list[Neighbours]
    num_candidates: int
    headings: tuple[str, ...]
    css: str


def image_section(
    encoders: Sequence[Viewer], chosen: ChosenImages, device: str, notice: Callable[[str], object]
) -> ImageSection:
    """Look at the images with every encoder, one in memory at a time, the first teacher's tokens kept.

    Args:
        encoders: from `viewers`; the first one gives the basis.
        chosen: from `choose_images`.
        device: where encoders run.
        notice: called with the name of each encoder as it begins.

    Raises:
        ConfigError: an encoder cannot be built or refuses the images.
        WeightsError: weights are missing or damaged.
    """
    shown = range(chosen.num_shown)
    components = affordable_components(len(encoders), chosen.num_shown)
    notice(encoders[0].heading)
    teacher = last_patches(encoders[0].load(), chosen.images, device)
    basis = fit_basis(teacher)
    views: list[EncoderView] = []
    for encoder in encoders:
        if encoder is encoders[0]:
            tokens, maps = teacher, own_map(basis, teacher, shown)
        else:
            notice(encoder.heading)
            tokens = last_patches(encoder.load(), chosen.images, device)
            maps = mapped_map(basis, tokens, teacher, shown)
        reduced = patch_features(tokens, chosen.num_shown, components)
        views.append(EncoderView(encoder.heading, encoder.role, maps, reduced, pooled_tokens(tokens)))
    pictures = SmallPictures()
    return ImageSection(
        _map_rows(views, chosen),
        _similarity_rows(views, chosen),
        page_data([view.patches for view in views]),
        min(view.patches.kept for view in views),
        nearest([(view.heading, view.pooled) for view in views], chosen, pictures),
        len(chosen.images) - 1,
        tuple(view.heading for view in views),
        pictures.css(),
    )


def _map_rows(views: Sequence[EncoderView], chosen: ChosenImages) -> list[MapRow]:
    rows: list[MapRow] = []
    for i in range(chosen.num_shown):
        cells = [_photo_cell(chosen.images[i])]
        for view in views:
            agreement = None if view is views[0] else view.maps.agreement[i]
            pixels = (view.maps.colours[i] * 255).round().to(torch.uint8).numpy()
            cells.append(_map_cell(view.heading, pixels, agreement))
        rows.append(MapRow(*chosen.captions[i], tuple(cells)))
    return rows


def _similarity_rows(views: Sequence[EncoderView], chosen: ChosenImages) -> list[MapRow]:
    rows: list[MapRow] = []
    for i in range(chosen.num_shown):
        place = salient_patch(views[0].patches, i)
        cells = [_photo_cell(chosen.images[i], _mark(views[0].patches, place))]
        for view in views:
            row, column = patch_at(view.patches, place)
            pixels = colours_of(view.patches.similarity(i, row, column))
            cells.append(_map_cell(view.heading, pixels, mark=_mark(view.patches, place)))
        rows.append(MapRow(*chosen.captions[i], tuple(cells)))
    return rows


def _mark(features: PatchFeatures, place: tuple[float, float]) -> tuple[float, float, float, float]:
    row, column = patch_at(features, place)
    rows, columns = features.grid
    return 100 * column / columns, 100 * row / rows, 100 / columns, 100 / rows


def _photo_cell(image: Tensor, mark: tuple[float, float, float, float] | None = None) -> MapCell:
    photo = photo_of(image, THUMBNAIL_PX)
    return MapCell("image", webp_uri(photo, PHOTO_QUALITY), np.asarray(photo), mark=mark)


def _map_cell(
    heading: str,
    pixels: NDArray[np.uint8],
    agreement: float | None = None,
    mark: tuple[float, float, float, float] | None = None,
) -> MapCell:
    # The page enlarges the tokens itself, so they travel as single pixels.
    uri = webp_uri(enlarged(pixels, max(pixels.shape[:2])), None) if pixels.shape[0] == pixels.shape[1] else ""
    picture = enlarged(pixels)
    return MapCell(heading, uri or webp_uri(picture, None), np.asarray(picture), agreement, mark)
