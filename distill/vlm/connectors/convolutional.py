"""Connectors that convolve over the patch grid: MobileVLM's LDP and LDPv2, Honeybee's C-Abstractor.

The blocks are written here rather than taken from torchvision and timm, where they are parts of classifiers without a
stable interface; tests/golden/test_vlm_connectors_parity.py holds them equal to both.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.errors import ConfigError
from distill.vlm.connectors.contract import Connector, check_pooling, square_side


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of `[T, C, H, W]`."""

    def forward(self, input: Tensor) -> Tensor:  # the name is that of nn.LayerNorm
        """Return the normalised map, of the same shape."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _conv_norm(in_width: int, out_width: int, kernel: int = 1, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(in_width, out_width, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, ChannelNorm(out_width))


class _SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from the means of all (arXiv 1709.01507)."""

    def __init__(self, width: int, squeezed: int, activation: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, width, 1)
        self.activation = activation
        self.gate = gate

    def forward(self, maps: Tensor) -> Tensor:
        """Return `[T, C, H, W]`, scaled."""
        means = maps.mean((2, 3), keepdim=True)
        return maps * self.gate(self.fc2(self.activation(self.fc1(means))))


class _MobileBlock(nn.Module):
    """MobileNetV3's inverted residual without expansion: depthwise 3 x 3, squeeze-and-excite, 1 x 1."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        # torchvision's rule: a quarter of the width, made a multiple of 8 by rounding, at least 8.
        quarter = width // 4
        squeezed = max(8, (quarter + 4) // 8 * 8)
        squeezed += 8 if squeezed < 0.9 * quarter else 0
        self.depthwise = _conv_norm(width, width, 3, stride=stride, groups=width)
        self.activation = nn.Hardswish()
        self.squeeze = _SqueezeExcite(width, squeezed, nn.ReLU(), nn.Hardsigmoid())
        self.pointwise = _conv_norm(width, width)
        self.is_residual = stride == 1

    def forward(self, maps: Tensor) -> Tensor:
        """Return `[T, C, ceil(H / stride), ceil(W / stride)]`."""
        made = self.pointwise(self.squeeze(self.activation(self.depthwise(maps))))
        return made + maps if self.is_residual else made


class LDP(Connector):
    """MobileVLM's lightweight downsample projector (arXiv 2312.16886, section 3.3): a quarter of the tokens.

    Linear, GELU, Linear, then two MobileNetV3 blocks with LayerNorm, the second of stride 2.

    Raises:
        ConfigError: `out_width` is no multiple of 8.
    """

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(in_width, out_width)
        if out_width % 8:
            raise ConfigError(
                f"connector ldp: the language model's width {out_width} is no multiple of 8, which MobileNetV3's "
                "blocks need. Take another language model or connector."
            )
        self.mlp = nn.Sequential(nn.Linear(in_width, out_width), nn.GELU(), nn.Linear(out_width, out_width))
        self.blocks = nn.Sequential(_MobileBlock(out_width, 1), _MobileBlock(out_width, 2))

    def num_tokens(self, rows: int, columns: int) -> int:
        """Return `ceil(rows / 2) * ceil(columns / 2)`: 24 x 24 patches become 144 tokens, 27 x 27 196."""
        return ((rows + 1) // 2) * ((columns + 1) // 2)

    def project(self, prefix: Tensor, patches: Tensor) -> Tensor:
        """Return `[T, N, C]`."""
        maps = self.blocks(self.mlp(patches).permute(0, 3, 1, 2))
        return maps.flatten(2).transpose(1, 2)


class LDPv2(Connector):
    """MobileVLM V2's projector (arXiv 2402.03766, section 3.3): pooled to 144 tokens, positions by a convolution.

    Linear, GELU, Linear, average pooling to a square, plus a depthwise 3 x 3 convolution of the result.

    Args:
        in_width: width of the encoder's hidden state.
        out_width: width of the language model's embeddings.
        tokens: a square. A grid that is no multiple of its side is pooled unevenly.

    Raises:
        ConfigError: `tokens` is no square.
    """

    def __init__(self, in_width: int, out_width: int, tokens: int = 144) -> None:
        super().__init__(in_width, out_width)
        self.side = square_side(tokens, "ldpv2")
        self.mlp = nn.Sequential(nn.Linear(in_width, out_width), nn.GELU(), nn.Linear(out_width, out_width))
        self.positions = nn.Conv2d(out_width, out_width, 3, padding=1, groups=out_width)

    def num_tokens(self, rows: int, columns: int) -> int:
        """Return `tokens`.

        Raises:
            ConfigError: the grid has fewer patches a side than the square of tokens.
        """
        check_pooling(rows, columns, self.side, "ldpv2")
        return self.side * self.side

    def project(self, prefix: Tensor, patches: Tensor) -> Tensor:
        """Return `[T, tokens, C]`."""
        pooled = F.adaptive_avg_pool2d(self.mlp(patches).permute(0, 3, 1, 2), self.side)
        return (pooled + self.positions(pooled)).flatten(2).transpose(1, 2)


class _RegBlock(nn.Module):
    """RegNet's block (arXiv 2003.13678): 1 x 1, depthwise 3 x 3, squeeze-and-excite, 1 x 1, all with LayerNorm."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.expand = _conv_norm(in_width, width)
        self.depthwise = _conv_norm(width, width, 3, groups=width)
        self.squeeze = _SqueezeExcite(width, round(in_width / 4), nn.SiLU(), nn.Sigmoid())
        self.reduce = _conv_norm(width, width)
        self.shortcut = nn.Identity() if in_width == width else _conv_norm(in_width, width)
        self.activation = nn.SiLU()

    def forward(self, maps: Tensor) -> Tensor:
        """Return `[T, width, H, W]`."""
        made = self.activation(self.depthwise(self.activation(self.expand(maps))))
        return self.activation(self.reduce(self.squeeze(made)) + self.shortcut(maps))


class CAbstractor(Connector):
    """Honeybee's C-Abstractor (arXiv 2312.06742, section 4.2), MM1's choice at 144 tokens.

    Learned positions, RegNet blocks, average pooling to a square, RegNet blocks, and Linear, SiLU, Linear.

    Args:
        in_width: width of the encoder's hidden state.
        out_width: width of the language model's embeddings.
        grid: (rows, columns) of patches; the learned positions are for this grid alone.
        tokens: a square; Honeybee has 144 and 256.
        hidden_width: channels of the blocks.
        depth: blocks before, and again after, the pooling.

    Raises:
        ConfigError: `tokens` is no square.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        grid: tuple[int, int],
        tokens: int = 144,
        hidden_width: int = 1024,
        depth: int = 3,
    ) -> None:
        super().__init__(in_width, out_width)
        self.side = square_side(tokens, "c_abstractor")
        self.grid = grid
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, *grid, in_width), std=0.02))
        widths = [in_width, *[hidden_width] * (2 * depth)]
        blocks = [_RegBlock(here, there) for here, there in pairwise(widths)]
        self.before, self.after = nn.Sequential(*blocks[:depth]), nn.Sequential(*blocks[depth:])
        self.readout = nn.Sequential(nn.Linear(hidden_width, out_width), nn.SiLU(), nn.Linear(out_width, out_width))

    def num_tokens(self, rows: int, columns: int) -> int:
        """Return `tokens`.

        Raises:
            ConfigError: the grid is not the one that the positions were made for, or too small.
        """
        if (rows, columns) != self.grid:
            raise ConfigError(
                f"connector c_abstractor has positions for a grid of {self.grid[0]} x {self.grid[1]} patches and met "
                f"{rows} x {columns}. Give it images of the size it was built for, or take ldpv2, which has none."
            )
        check_pooling(rows, columns, self.side, "c_abstractor")
        return self.side * self.side

    def project(self, prefix: Tensor, patches: Tensor) -> Tensor:
        """Return `[T, tokens, C]`."""
        maps = self.before((patches + self.positions).permute(0, 3, 1, 2))
        maps = self.after(F.adaptive_avg_pool2d(maps, self.side))
        return self.readout(maps.flatten(2).transpose(1, 2))
