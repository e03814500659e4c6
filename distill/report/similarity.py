"""Similarity maps: which patches of an image an encoder finds similar to one of them.

The page computes them for whatever patch is clicked, so it carries each encoder's tokens of the shown images, reduced
to a few principal components and eight bits. Similarity is the cosine of tokens less the encoder's mean token over
all images: without that, a direction that all tokens share makes everything similar to everything.

Legend: n shown images, N all images, h x w the patch grid, D the width of the encoder, K the components kept.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

COMPONENTS = 32
MIN_COMPONENTS = 8
MAX_GRID = 32
"""Finer grids are averaged down to this many patches a side: nobody can click a smaller one on a phone."""

BUDGET_BYTES = 2_500_000
"""Bytes that the tokens of all encoders together may take in the page, before base64."""

COLOUR_MAP = "inferno"
COLOUR_STOPS = 64
_SEED = 0


@dataclass(frozen=True)
class PatchFeatures:
    """One encoder's tokens of the shown images, as the page holds them.

    Attributes:
        codes: `[n, h, w, K]`, int8, proportional to the components.
        kept: share of the tokens' variance that the components hold, in [0, 1].
    """

    codes: NDArray[np.int8]
    kept: float

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patch grid."""
        return self.codes.shape[1], self.codes.shape[2]

    def similarity(self, image: int, row: int, column: int) -> NDArray[np.float64]:
        """Return the cosine `[h, w]` of every patch of an image with one of them, as the page computes it."""
        tokens = self.codes[image].astype(np.float64)
        norms = np.linalg.norm(tokens, axis=-1)
        dots = tokens @ tokens[row, column]
        return np.divide(
            dots, norms * norms[row, column], out=np.zeros_like(dots), where=norms * norms[row, column] > 0
        )


def patch_features(patches: Tensor, num_shown: int, components: int = COMPONENTS) -> PatchFeatures:
    """Reduce an encoder's patch tokens to what the page carries.

    Args:
        patches: `[N, h, w, D]`, the shown images first; the mean token is taken over all of them.
        num_shown: n.
        components: K, at most D.
    """
    mean = patches.flatten(0, 2).double().mean(0).float()
    tokens = patches[:num_shown].float() - mean
    if max(tokens.shape[1:3]) > MAX_GRID:
        grid = (min(tokens.shape[1], MAX_GRID), min(tokens.shape[2], MAX_GRID))
        tokens = F.adaptive_avg_pool2d(tokens.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)
    flat = tokens.flatten(0, 2)
    rank = min(components, *flat.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)  # the solver draws its first directions
        _, _, axes = torch.svd_lowrank(flat, q=min(rank + 8, *flat.shape), niter=4)
    projected = tokens @ axes[:, :rank]
    total = float(flat.square().sum())
    kept = float(projected.square().sum()) / total if total > 0 else 1.0
    # One scale an image: cosines are within an image, and an image of small tokens keeps its digits.
    largest = projected.flatten(1).abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (projected / largest[:, None, None, None] * 127).round().to(torch.int8)
    return PatchFeatures(codes.numpy(), min(1.0, kept))


def affordable_components(num_encoders: int, num_shown: int, grid: int = MAX_GRID) -> int:
    """Return how many components fit into the page for so many encoders and images."""
    components = COMPONENTS
    while components > MIN_COMPONENTS and num_encoders * num_shown * grid**2 * components > BUDGET_BYTES:
        components //= 2
    return components


def salient_patch(features: PatchFeatures, image: int) -> tuple[float, float]:
    """Return the place, as shares of the height and width, of the patch that differs most from its image's mean."""
    tokens = features.codes[image].astype(np.float64)
    distance = np.square(tokens - tokens.mean((0, 1))).sum(-1)
    row, column = np.unravel_index(int(distance.argmax()), distance.shape)
    return (int(row) + 0.5) / features.grid[0], (int(column) + 0.5) / features.grid[1]


def patch_at(features: PatchFeatures, place: tuple[float, float]) -> tuple[int, int]:
    """Return row and column of the patch under a place."""
    rows, columns = features.grid
    return min(int(place[0] * rows), rows - 1), min(int(place[1] * columns), columns - 1)


def colour_stops() -> NDArray[np.uint8]:
    """Return the colours `[64, 3]` of similarities from 0 (and less) to 1."""
    import matplotlib as mpl  # belongs to an optional extra: this module must import without it, to say so

    ramp = mpl.colormaps[COLOUR_MAP](np.linspace(0, 1, COLOUR_STOPS))
    return (np.asarray(ramp)[:, :3] * 255).round().astype(np.uint8)


def colours_of(similarity: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return similarities `[h, w]` as colours `[h, w, 3]`."""
    stops = colour_stops()
    return stops[np.floor(similarity.clip(0, 1) * (len(stops) - 1) + 0.5).astype(np.int64)]


def page_data(encoders: Sequence[PatchFeatures]) -> dict[str, Any]:
    """Return what the page's script reads: the colours, and each encoder's grid and codes by image, base64."""
    return {
        "stops": colour_stops().tolist(),
        "encoders": [
            {
                "rows": entry.grid[0],
                "columns": entry.grid[1],
                "dim": entry.codes.shape[3],
                "codes": [base64.b64encode(image.tobytes()).decode("ascii") for image in entry.codes],
            }
            for entry in encoders
        ],
    }
