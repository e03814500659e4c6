"""What stands between an encoder and a language model: one tile's patch tokens in, a few embeddings out."""

from distill.vlm.connectors.attention import AttentionPooling, QFormer
from distill.vlm.connectors.building import ConnectorConfig, ConnectorName, build_connector
from distill.vlm.connectors.contract import Connector
from distill.vlm.connectors.convolutional import LDP, CAbstractor, LDPv2
from distill.vlm.connectors.perceptrons import MLP, AveragePooling, PixelShuffleMLP

__all__ = [
    "LDP",
    "MLP",
    "AttentionPooling",
    "AveragePooling",
    "CAbstractor",
    "Connector",
    "ConnectorConfig",
    "ConnectorName",
    "LDPv2",
    "PixelShuffleMLP",
    "QFormer",
    "build_connector",
]
