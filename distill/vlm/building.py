"""A small VLM from the configurations of its three parts."""

from __future__ import annotations

from typing import Any, cast

from distill.encoder import Encoder
from distill.vlm.connectors import ConnectorConfig, build_connector
from distill.vlm.language import LanguageConfig, load_language_model
from distill.vlm.model import SmallVLM
from distill.vlm.vision import VisionConfig, load_vision, patch_grid, select_layer


def build_small_vlm(
    vision: VisionConfig,
    connector: ConnectorConfig,
    language: LanguageConfig,
    *,
    tile_size: int,
    image_token_id: int,
    vocabulary_size: int | None = None,
    noise_features: bool = False,
) -> SmallVLM:
    """Return an encoder and a language model with their weights, and a new connector between them, on the CPU.

    Args:
        vision: the encoder; swapping it is this line of a recipe and no other.
        connector: made for the widths of both; initialised at random, so seed torch before.
        language: the language model.
        tile_size: pixels a side of a tile.
        image_token_id: the token that holds an image embedding's place.
        vocabulary_size: number of the tokenizer's tokens; see `load_language_model`.
        noise_features: the control; see `SmallVLM`.

    Raises:
        ConfigError: a path or an option cannot be used, or the parts do not fit.
        WeightsError: weights are missing, damaged or do not fit.
    """
    encoder = load_vision(vision)
    layer = select_layer(vision)
    offered = cast(Encoder, encoder)
    grid = patch_grid(offered, tile_size)
    model: Any = load_language_model(language, vocabulary_size)
    width = int(model.get_input_embeddings().weight.shape[1])
    joined = build_connector(connector, offered.layer_dims[layer], width, grid)
    return SmallVLM(encoder, joined, model, image_token_id, noise_features, layer)
