"""Configuration of the InternViT beside this file: the keys that InternVL, vLLM, SGLang, lmdeploy and llama.cpp read.

This file and `modeling_intern_vit.py` need torch and transformers (4.37 to 5.x) and nothing else.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class InternVisionConfig(PretrainedConfig):
    """Everything that determines the function the encoder computes.

    Args:
        hidden_size: width of the hidden states.
        num_hidden_layers: number of blocks.
        num_attention_heads: attention heads; divides `hidden_size`.
        intermediate_size: width inside the MLP.
        hidden_act: activation of the MLP, by its name in transformers.
        norm_type: only `layer_norm` is computed here.
        layer_norm_eps: epsilon of every norm.
        qkv_bias: whether the joint query, key and value projection has a bias.
        qk_normalization: only False is computed here.
        num_channels: channels of an image.
        patch_size: side of a patch, in pixels.
        image_size: side of the images that the stored positions are for, in pixels.
        drop_path_rate: stochastic depth of the last block in training, growing from 0 at the first.
        dropout: dropout of the attention's output in training.
        attention_dropout: dropout of the attention weights in training.
        use_flash_attn: read by InternVL's own code; this file uses torch's attention.
        initializer_range: standard deviation of untrained weights.
        initializer_factor: LayerScale of untrained weights.

    Raises:
        ValueError: `norm_type` or `qk_normalization` asks for another function.
    """

    model_type = "intern_vit_6b"

    def __init__(
        self,
        hidden_size: int = 1024,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        intermediate_size: int = 4096,
        hidden_act: str = "gelu",
        norm_type: str = "layer_norm",
        layer_norm_eps: float = 1e-6,
        qkv_bias: bool = True,
        qk_normalization: bool = False,
        num_channels: int = 3,
        patch_size: int = 14,
        image_size: int = 448,
        drop_path_rate: float = 0.0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        use_flash_attn: bool = True,
        initializer_range: float = 0.02,
        initializer_factor: float = 0.1,
        **kwargs: Any,
    ) -> None:
        if norm_type != "layer_norm" or qk_normalization:
            raise ValueError(
                f"norm_type {norm_type!r} with qk_normalization {qk_normalization} is another encoder than the one "
                "this file computes: norm_type must be 'layer_norm' and qk_normalization false."
            )
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.norm_type = norm_type
        self.layer_norm_eps = layer_norm_eps
        self.qkv_bias = qkv_bias
        self.qk_normalization = qk_normalization
        self.num_channels = num_channels
        self.patch_size = patch_size
        self.image_size = image_size
        self.drop_path_rate = drop_path_rate
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.use_flash_attn = use_flash_attn
        self.initializer_range = initializer_range
        self.initializer_factor = initializer_factor
        super().__init__(**kwargs)
