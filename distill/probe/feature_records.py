"""What is kept of a data set's features, and the names of its tensors on their way through processes and files.

Legend: N images, T tokens an image, D the width of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Grid = tuple[int, int]
LAST = -1


@dataclass(frozen=True)
class Wanted:
    """What is kept of each image.

    Attributes:
        layers: counted from the end, -1 being the last.
        token_grids: grids (rows, columns) to sample patch tokens on, of every layer.
        tokens_per_image: tokens that are kept for each grid.
        dense_grid: grid on which all tokens of the last layer are kept; None keeps none.
    """

    layers: tuple[int, ...] = (LAST,)
    token_grids: tuple[Grid, ...] = ()
    tokens_per_image: int = 16
    dense_grid: Grid | None = None


@dataclass(frozen=True)
class Features:
    """What an encoder makes of a data set, on the CPU, in the data set's order.

    Attributes:
        labels: `[N]`, int64; -1 for no label.
        domains: `[N]`, int64.
        rows: `[N]`, int64, row of each image in the data set.
        by_layer: for each layer, `[N, D]` float32 pooled vectors; twice as wide for pool "mean_prefix".
        tokens_by_layer: for each layer and grid, `[N, T, D]` float32 patch tokens at places that depend only on seed
            and row.
        dense: `[N, h * w, D]` float32, all tokens of the last layer, pooled to the dense grid.
        num_bad: images left out because they could not be decoded.
    """

    labels: Tensor
    domains: Tensor
    rows: Tensor
    by_layer: dict[int, Tensor]
    tokens_by_layer: dict[int, dict[Grid, Tensor]]
    dense: Tensor | None = None
    num_bad: int = 0

    @property
    def pooled(self) -> Tensor:
        """Pooled vectors of the last layer, `[N, D]`."""
        return self.by_layer[LAST]

    @property
    def tokens(self) -> dict[Grid, Tensor]:
        """Sampled tokens of the last layer by grid."""
        return self.tokens_by_layer[LAST]


def pooled_key(layer: int) -> str:
    """Name of a layer's pooled vectors."""
    return f"pooled/{layer}"


def tokens_key(layer: int, grid: Grid) -> str:
    """Name of a layer's sampled tokens on a grid."""
    return f"tokens/{layer}/{grid[0]}x{grid[1]}"


def tensors_of(features: Features) -> dict[str, Tensor]:
    """Return features as named tensors."""
    kept = {"label": features.labels, "domain": features.domains, "row": features.rows}
    for layer, pooled in features.by_layer.items():
        kept[pooled_key(layer)] = pooled
        for grid, tokens in features.tokens_by_layer[layer].items():
            kept[tokens_key(layer, grid)] = tokens
    if features.dense is not None:
        kept["dense"] = features.dense
    return {**kept, "num_bad": torch.tensor(features.num_bad)}


def features_of(kept: Mapping[str, Tensor], wanted: Wanted, num_bad: int) -> Features:
    """Return the features that named tensors hold."""
    return Features(
        kept["label"],
        kept["domain"],
        kept["row"],
        {layer: kept[pooled_key(layer)] for layer in wanted.layers},
        {layer: {grid: kept[tokens_key(layer, grid)] for grid in wanted.token_grids} for layer in wanted.layers},
        kept.get("dense"),
        num_bad,
    )


def no_features(wanted: Wanted) -> Features:
    """Features of no image: what a process has that read none itself."""
    none = torch.empty(0, dtype=torch.int64)
    empty = {layer: torch.empty(0, 0) for layer in wanted.layers}
    return Features(none, none, none, empty, {layer: dict[Grid, Tensor]() for layer in wanted.layers})
