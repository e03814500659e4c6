"""What every connector offers, and the checks of grids and token counts that several share.

Legend: T tiles, P prefix tokens, H x W the patch grid, D the encoder's width, N tokens a tile, C the output width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from torch import Tensor, nn

from distill.errors import ConfigError


class Connector(nn.Module, ABC):
    """Turns the hidden state of a tile into embeddings of a language model.

    Args:
        in_width: width D of the encoder's hidden state.
        out_width: width C of the language model's embeddings.
    """

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.in_width = in_width
        self.out_width = out_width

    @abstractmethod
    def num_tokens(self, rows: int, columns: int) -> int:
        """Return how many embeddings one tile becomes.

        Args:
            rows: of the patch grid.
            columns: of the patch grid.

        Raises:
            ConfigError: the connector cannot take such a grid.
        """

    @abstractmethod
    def project(self, prefix: Tensor, patches: Tensor) -> Tensor:
        """Return the embeddings of a grid that `num_tokens` has accepted; shapes as in `forward`."""

    def forward(self, prefix: Tensor, patches: Tensor) -> Tensor:
        """Return the embeddings of each tile.

        Args:
            prefix: `[T, P, D]` class token and registers; P may be 0. Only the Q-Former reads them.
            patches: `[T, H, W, D]`.

        Returns:
            `[T, N, C]`, N being `num_tokens(H, W)`.

        Raises:
            ConfigError: the connector cannot take such a grid.
        """
        self.num_tokens(patches.shape[1], patches.shape[2])
        return self.project(prefix, patches)


def square_side(tokens: int, connector: str) -> int:
    """Return the side of a square of so many tokens.

    Raises:
        ConfigError: the number is no square.
    """
    side = math.isqrt(max(tokens, 0))
    if tokens < 1 or side * side != tokens:
        low = max(1, side)
        raise ConfigError(
            f"connector.tokens {tokens} is no square, and {connector} pools to a square; use {low * low} or "
            f"{(low + 1) ** 2}."
        )
    return side


def check_pooling(rows: int, columns: int, side: int, connector: str) -> None:
    """Refuse to pool a grid to one with more cells a side, which would repeat patches.

    Raises:
        ConfigError: a side of the grid is smaller than `side`.
    """
    if min(rows, columns) < side:
        most = min(rows, columns)
        raise ConfigError(
            f"{connector} pools to {side} x {side} tokens, more than the encoder's grid of {rows} x {columns} patches "
            f"has. Set connector.tokens to at most {most * most}, or take larger images."
        )
