"""Connectors that look at one token, or one small square of tokens, at a time."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from distill.errors import ConfigError
from distill.vlm.connectors.contract import Connector, check_pooling, square_side

_SHUFFLE = 2
"""Patches a side that become one token: InternVL's downsample ratio of 0.5."""


def pixel_shuffle(patches: Tensor) -> Tensor:
    """Return each square of 2 x 2 patches as one patch of four times the width, in the order of InternVL's "v2".

    The four are laid one behind the other row by row. Version 1 of the release exchanged rows and columns of the
    result; `torch.nn.functional.pixel_unshuffle` mixes the channels in another order.

    Args:
        patches: `[T, H, W, D]`, H and W even.

    Returns:
        `[T, H / 2, W / 2, 4 D]`.
    """
    tiles, rows, columns, width = patches.shape
    squares = patches.reshape(tiles, rows // _SHUFFLE, _SHUFFLE, columns // _SHUFFLE, _SHUFFLE, width)
    return squares.transpose(2, 3).reshape(tiles, rows // _SHUFFLE, columns // _SHUFFLE, _SHUFFLE * _SHUFFLE * width)


class PixelShuffleMLP(Connector):
    """InternVL's `mlp1`: 2 x 2 patches become a token, then LayerNorm, Linear, GELU, Linear.

    Its state dict has the release's names, `mlp1.0`, `mlp1.1` and `mlp1.3`.
    """

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(in_width, out_width)
        shuffled = in_width * _SHUFFLE * _SHUFFLE
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(shuffled), nn.Linear(shuffled, out_width), nn.GELU(), nn.Linear(out_width, out_width)
        )

    def num_tokens(self, rows: int, columns: int) -> int:
        """Return a quarter of the number of patches.

        Raises:
            ConfigError: a side of the grid is odd.
        """
        if rows % _SHUFFLE or columns % _SHUFFLE or min(rows, columns) < 1:
            raise ConfigError(
                f"connector pixel_shuffle_mlp makes one token of 2 x 2 patches; a grid of {rows} x {columns} has an "
                "odd side. Take an img_size that is an even multiple of the patch size, or another connector."
            )
        return rows * columns // (_SHUFFLE * _SHUFFLE)

    def project(self, prefix: Tensor, patches: Tensor) -> Tensor:
        """Return `[T, H W / 4, C]`."""
        return self.mlp1(pixel_shuffle(patches).flatten(1, 2))


class MLP(Connector):
    """LLaVA-1.5's `mlp2x_gelu`: Linear, GELU, Linear for each patch; the number of tokens stays."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(in_width, out_width)
        self.layers = nn.Sequential(nn.Linear(in_width, out_width), nn.GELU(), nn.Linear(out_width, out_width))

    def num_tokens(self, rows: int, columns: int) -> int:
        """Return the number of patches; every grid is allowed."""
        return rows * columns

    def project(self, prefix: Tensor, patches: Tensor) -> Tensor:
        """Return `[T, H W, C]`."""
        return self.layers(patches.flatten(1, 2))


class AveragePooling(Connector):
    """MM1's average pooling to a square of tokens, then one Linear (arXiv 2403.09611, section 3.2).

    Args:
        in_width: width of the encoder's hidden state.
        out_width: width of the language model's embeddings.
        tokens: a square; MM1 compares 64 and 144. A grid that is no multiple of the side is pooled unevenly.

    Raises:
        ConfigError: `tokens` is no square.
    """

    def __init__(self, in_width: int, out_width: int, tokens: int = 144) -> None:
        super().__init__(in_width, out_width)
        self.side = square_side(tokens, "average_pooling")
        self.linear = nn.Linear(in_width, out_width)

    def num_tokens(self, rows: int, columns: int) -> int:
        """Return `tokens`.

        Raises:
            ConfigError: the grid has fewer patches a side than the square of tokens.
        """
        check_pooling(rows, columns, self.side, "average_pooling")
        return self.side * self.side

    def project(self, prefix: Tensor, patches: Tensor) -> Tensor:
        """Return `[T, tokens, C]`."""
        pooled = F.adaptive_avg_pool2d(patches.permute(0, 3, 1, 2), self.side)
        return self.linear(pooled.flatten(2).transpose(1, 2))
