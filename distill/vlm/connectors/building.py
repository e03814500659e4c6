"""A connector from a few words of YAML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from distill.errors import ConfigError
from distill.vlm.connectors.attention import AttentionPooling, QFormer
from distill.vlm.connectors.contract import Connector
from distill.vlm.connectors.convolutional import LDP, CAbstractor, LDPv2
from distill.vlm.connectors.perceptrons import MLP, AveragePooling, PixelShuffleMLP

ConnectorName = Literal[
    "pixel_shuffle_mlp",
    "mlp",
    "ldp",
    "ldpv2",
    "c_abstractor",
    "average_pooling",
    "attention_pooling",
    "qformer",
]

_CONNECTORS: dict[ConnectorName, tuple[Callable[..., Connector], frozenset[str]]] = {
    "pixel_shuffle_mlp": (PixelShuffleMLP, frozenset()),
    "mlp": (MLP, frozenset()),
    "ldp": (LDP, frozenset()),
    "ldpv2": (LDPv2, frozenset({"tokens"})),
    "c_abstractor": (CAbstractor, frozenset({"tokens", "hidden_width", "depth"})),
    "average_pooling": (AveragePooling, frozenset({"tokens"})),
    "attention_pooling": (AttentionPooling, frozenset({"tokens"})),
    "qformer": (QFormer, frozenset({"tokens", "hidden_width", "depth", "bottleneck_width"})),
}
"""Name -> class, and which of the options of `ConnectorConfig` it has."""


@dataclass(frozen=True)
class ConnectorConfig:
    """Which connector, and its options; None is the connector's own default.

    Attributes:
        name: pixel_shuffle_mlp (InternVL), mlp (LLaVA's mlp2x_gelu), ldp and ldpv2 (MobileVLM V1 and V2), c_abstractor
            (Honeybee, MM1), average_pooling and attention_pooling (MM1), qformer (BLIP-2, TinyGPT-V).
        tokens: image tokens a tile: 144, a square (qformer: 32, any number; attention_pooling: 144, any number). The
            others derive it from the patch grid.
        hidden_width: channels inside c_abstractor (1024) and qformer (768).
        depth: blocks on each side of c_abstractor's pooling (3); layers of qformer (12).
        bottleneck_width: of qformer: width between two projections, TinyGPT-V's 4096; none by default.

    Raises:
        ConfigError: an option is given that the connector does not have, or is no positive number.
    """

    name: ConnectorName = "pixel_shuffle_mlp"
    tokens: int | None = None
    hidden_width: int | None = None
    depth: int | None = None
    bottleneck_width: int | None = None

    def __post_init__(self) -> None:
        if self.name not in _CONNECTORS:
            raise ConfigError(f"connector.name {self.name!r} is unknown; choose one of {', '.join(_CONNECTORS)}.")
        allowed = _CONNECTORS[self.name][1]
        for option, value in self.options.items():
            if option not in allowed:
                others = [name for name, (_, options) in _CONNECTORS.items() if option in options]
                raise ConfigError(
                    f"connector.{option} {value}: {self.name} has no such option; {', '.join(others)} have it. "
                    "Leave it out, or take one of these."
                )
            if value < 1:
                raise ConfigError(f"connector.{option} {value} must be a positive number.")

    @property
    def options(self) -> dict[str, int]:
        """The options that are given."""
        names = ("tokens", "hidden_width", "depth", "bottleneck_width")
        values: list[tuple[str, Any]] = [(name, getattr(self, name)) for name in names]
        return {name: value for name, value in values if value is not None}


def build_connector(config: ConnectorConfig, in_width: int, out_width: int, grid: tuple[int, int]) -> Connector:
    """Return a connector between an encoder and a language model, initialised at random.

    Args:
        config: which one.
        in_width: width of the hidden state that is read.
        out_width: width of the language model's embeddings.
        grid: (rows, columns) of patches of a tile.

    Raises:
        ConfigError: the connector cannot take such a grid or such widths.

    Example:
        >>> connector = build_connector(ConnectorConfig("ldpv2", tokens=4), in_width=8, out_width=16, grid=(4, 4))
        >>> connector.num_tokens(4, 4)
        4
    """
    build = _CONNECTORS[config.name][0]
    fixed = {"grid": grid} if config.name == "c_abstractor" else {}
    connector = build(in_width, out_width, **fixed, **config.options)
    connector.num_tokens(*grid)
    return connector
