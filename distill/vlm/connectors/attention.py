"""Connectors whose learned queries attend to the tokens: MM1's attention pooling and BLIP-2's Q-Former.

Legend: as in distill/vlm/connectors/contract.py; Q queries, W the width inside the Q-Former.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.errors import ConfigError
from distill.vlm.connectors.contract import Connector

_HEAD_WIDTH = 64
_INIT_STD = 0.02
"""BERT's initializer_range."""

_BERT_WIDTH = 768
"""Of bert-base, for which that is. At 64 channels it would leave a thirtieth of the image beside the queries."""


def _num_heads(width: int, connector: str) -> int:
    if width > _HEAD_WIDTH and width % _HEAD_WIDTH:
        raise ConfigError(
            f"connector {connector}: a width of {width} cannot be cut into attention heads of {_HEAD_WIDTH}; take a "
            f"multiple of {_HEAD_WIDTH}."
        )
    return max(1, width // _HEAD_WIDTH)


class AttentionPooling(Connector):
    """MM1's attention pooling: learned queries attend once to the patches, then one Linear (arXiv 2403.09611, 3.2).

    The order of the patches is lost but for what the encoder has put into them.

    Args:
        in_width: width of the encoder's hidden state: up to 64, or a multiple of 64.
        out_width: width of the language model's embeddings.
        tokens: number of queries; MM1 compares 64 and 144.

    Raises:
        ConfigError: the width cannot be cut into heads, or there is no query.
    """

    def __init__(self, in_width: int, out_width: int, tokens: int = 144) -> None:
        super().__init__(in_width, out_width)
        _check_queries(tokens, "attention_pooling")
        self.queries = nn.Parameter(torch.empty(1, tokens, in_width).normal_(std=_INIT_STD))
        self.norm = nn.LayerNorm(in_width)
        self.attention = nn.MultiheadAttention(in_width, _num_heads(in_width, "attention_pooling"), batch_first=True)
        self.linear = nn.Linear(in_width, out_width)

    def num_tokens(self, rows: int, columns: int) -> int:
        """Return the number of queries; every grid is allowed."""
        return self.queries.shape[1]

    def project(self, prefix: Tensor, patches: Tensor) -> Tensor:
        """Return `[T, tokens, C]`."""
        tokens = self.norm(patches.flatten(1, 2))
        pooled = self.attention(self.queries.expand(len(tokens), -1, -1), tokens, tokens, need_weights=False)[0]
        return self.linear(pooled)


def _check_queries(tokens: int, connector: str) -> None:
    if tokens < 1:
        raise ConfigError(f"connector.tokens {tokens} is no number of queries for {connector}; give at least 1.")


class _Attention(nn.Module):
    """BERT's attention: multi-head attention, Linear, and a LayerNorm after the residual."""

    def __init__(self, width: int, context_width: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key, self.value = nn.Linear(context_width, width), nn.Linear(context_width, width)
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=eps)

    def forward(self, states: Tensor, context: Tensor) -> Tensor:
        """Return `[T, Q, W]` of states `[T, Q, W]` that attend to a context `[T, M, width]`."""
        query, key, value = (
            made.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for made in (self.query(states), self.key(context), self.value(context))
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.norm(self.dense(attended) + states)


class _QFormerLayer(nn.Module):
    """Self-attention of the queries, cross-attention where `context_width` is given, and two Linears."""

    def __init__(self, width: int, context_width: int | None, num_heads: int, eps: float) -> None:
        super().__init__()
        self.attention = _Attention(width, width, num_heads, eps)
        self.cross_attention = None if context_width is None else _Attention(width, context_width, num_heads, eps)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """Return `[T, Q, W]`."""
        states = self.attention(queries, queries)
        if self.cross_attention is not None:
            states = self.cross_attention(states, context)
        return self.norm(self.narrow(F.gelu(self.widen(states))) + states)


class QFormer(Connector):
    """BLIP-2's Q-Former (arXiv 2301.12597) and its projection: learned queries read prefix and patch tokens.

    A LayerNorm of the encoder's tokens (`ln_vision`), a BERT of queries alone that attends to them in every second
    layer, and one Linear; or TinyGPT-V's two (arXiv 2312.16862, section 3.1), the first of them to MiniGPT-4's 4096.
    There is no dropout: MiniGPT-4 and TinyGPT-V keep a Q-Former in eval mode, and a new encoder's queries are few.

    Args:
        in_width: width of the encoder's hidden state.
        out_width: width of the language model's embeddings.
        tokens: number of queries.
        hidden_width: of the queries: up to 64, or a multiple of 64; 768 is bert-base.
        depth: number of layers; cross-attention is in layers 0, 2, 4, ...
        bottleneck_width: width between TinyGPT-V's two projections; None: one projection, as BLIP-2 has.

    Raises:
        ConfigError: the width cannot be cut into heads, or a number is not positive.
    """

    _EPS = 1e-12  # BERT's

    def __init__(
        self,
        in_width: int,
        out_width: int,
        tokens: int = 32,
        hidden_width: int = 768,
        depth: int = 12,
        bottleneck_width: int | None = None,
    ) -> None:
        super().__init__(in_width, out_width)
        _check_queries(tokens, "qformer")
        heads = _num_heads(hidden_width, "qformer")
        self.vision_norm = nn.LayerNorm(in_width)
        self.queries = nn.Parameter(torch.zeros(1, tokens, hidden_width))
        self.norm = nn.LayerNorm(hidden_width, eps=self._EPS)
        self.layers = nn.ModuleList(
            _QFormerLayer(hidden_width, in_width if index % 2 == 0 else None, heads, self._EPS)
            for index in range(depth)
        )
        between = [] if bottleneck_width is None else [bottleneck_width]
        widths = [hidden_width, *between, out_width]
        self.apply(partial(_initialise, std=_INIT_STD * math.sqrt(_BERT_WIDTH / hidden_width)))
        nn.init.normal_(self.queries, std=_INIT_STD)
        # The projections keep torch's initialisation, as LAVIS and MiniGPT-4 have it.
        self.projection = nn.Sequential(*map(nn.Linear, widths, widths[1:]))

    def num_tokens(self, rows: int, columns: int) -> int:
        """Return the number of queries; every grid is allowed."""
        return self.queries.shape[1]

    def project(self, prefix: Tensor, patches: Tensor) -> Tensor:
        """Return `[T, tokens, C]`."""
        context = self.vision_norm(torch.cat([prefix, patches.flatten(1, 2)], dim=1))
        states = self.norm(self.queries).expand(len(context), -1, -1)
        for layer in self.layers:
            states = layer(states, context)
        return self.projection(states)


def _initialise(module: nn.Module, std: float) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=std)
        nn.init.zeros_(module.bias)
