"""InternViT for transformers 4.37 to 5.x: a pre-norm ViT with LayerScale, no norm before its blocks and none after.

Parameters are named as in InternVL's releases, so that the weights load wherever those do. Attention is torch's own,
or explicit with `attn_implementation="eager"`. Images `[B, 3, H, W]` are normalised; a hidden state is
`[B, 1 + N, D]`, class token first, patches row by row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

from .configuration_intern_vit import InternVisionConfig


def resize_grid(positions: Tensor, height: int, width: int) -> Tensor:
    """Return positions `[1, 1 + height * width, D]`: bicubic without antialiasing, in float32, as InternVL's code does.

    The stored grid is square; the class token's position stays.
    """
    first, grid = positions[:, :1], positions[:, 1:]
    side = int(grid.shape[1] ** 0.5)
    if (side, side) == (height, width):
        return positions
    grid = grid.float().transpose(1, 2).unflatten(2, (side, side))
    grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
    return torch.cat([first, grid.flatten(2).transpose(1, 2).to(first.dtype)], dim=1)


class InternVisionEmbeddings(nn.Module):
    """Patch, class and position embedding."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.image_size, self.patch_size = config.image_size, config.patch_size
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embedding = nn.Parameter(torch.zeros(1, tokens, config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Turn normalised images into tokens."""
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        height, width = patches.shape[-2:]
        first = self.class_embedding.expand(len(patches), -1, -1).to(patches.dtype)
        tokens = torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1)
        return tokens + resize_grid(self.position_embedding, height, width).to(tokens.dtype)


class InternAttention(nn.Module):
    """Multi-head self-attention with a joint query, key and value projection."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        if config.hidden_size % self.num_heads:
            raise ValueError(f"num_attention_heads {self.num_heads} does not divide hidden_size {config.hidden_size}.")
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over `[B, 1 + N, D]`."""
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        if getattr(self.config, "_attn_implementation", None) == "eager":
            scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
            mixed = F.dropout(scores.softmax(dim=-1), dropout) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return F.dropout(self.proj(mixed.transpose(1, 2).flatten(2)), self.config.dropout, self.training)


class InternMLP(nn.Module):
    """Two linear layers and an activation."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.act = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, 1 + N, D]` to `[B, 1 + N, D]`."""
        return self.fc2(self.act(self.fc1(x)))


class InternVisionEncoderLayer(nn.Module):
    """One block: attention and MLP, each behind a LayerNorm and in front of its LayerScale."""

    def __init__(self, config: InternVisionConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.attn = InternAttention(config)
        self.mlp = InternMLP(config)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ls1 = nn.Parameter(torch.full((config.hidden_size,), float(config.initializer_factor)))
        self.ls2 = nn.Parameter(torch.full((config.hidden_size,), float(config.initializer_factor)))

    def drop_path(self, branch: Tensor) -> Tensor:
        """Leave the branch out for some images of a training batch, and scale it up for the others."""
        if not self.training or self.drop_path_rate == 0:
            return branch
        keep = 1 - self.drop_path_rate
        kept = torch.rand(len(branch), 1, 1, device=branch.device) < keep
        return branch * kept.to(branch.dtype) / keep

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, 1 + N, D]` to `[B, 1 + N, D]`."""
        x = x + self.drop_path(self.attn(self.norm1(x)) * self.ls1)
        return x + self.drop_path(self.mlp(self.norm2(x)) * self.ls2)


class InternVisionEncoder(nn.Module):
    """All blocks."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        last = max(config.num_hidden_layers - 1, 1)
        self.layers = nn.ModuleList(
            InternVisionEncoderLayer(config, config.drop_path_rate * i / last) for i in range(config.num_hidden_layers)
        )
        self.gradient_checkpointing = False

    def forward(self, inputs_embeds: Tensor, output_hidden_states: bool = False) -> BaseModelOutput:
        """Return the last hidden state and, if asked for, all of them, the embeddings first."""
        x, states = inputs_embeds, [inputs_embeds]
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
            if output_hidden_states:
                states.append(x)
        return BaseModelOutput(last_hidden_state=x, hidden_states=tuple(states) if output_hidden_states else None)


class InternVisionModel(PreTrainedModel):
    """The encoder; its features are `last_hidden_state[:, 1:]`."""

    config_class = InternVisionConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["InternVisionEncoderLayer"]  # noqa: RUF012 - transformers' own way

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = InternVisionEmbeddings(config)
        self.encoder = InternVisionEncoder(config)
        # transformers 5 cannot load a model that leaves this out.
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding module, as InternVL's code expects."""
        return self.embeddings

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, InternVisionEmbeddings):
            nn.init.normal_(module.class_embedding, std=self.config.initializer_range)
            nn.init.normal_(module.position_embedding, std=self.config.initializer_range)

    def resize_pos_embeddings(self, old_size: int, new_size: int, patch_size: int) -> None:
        """Resize the stored positions from images of `old_size` to images of `new_size` pixels a side."""
        embeddings = self.embeddings
        tokens = (old_size // patch_size) ** 2 + 1
        if embeddings.position_embedding.shape[1] != tokens:
            raise ValueError(f"{embeddings.position_embedding.shape[1]} positions are not those of {old_size} px.")
        grid = new_size // patch_size
        embeddings.position_embedding = nn.Parameter(resize_grid(embeddings.position_embedding.data, grid, grid))
        embeddings.image_size = self.config.image_size = new_size

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        pixel_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Encode normalised images, or embeddings `[B, 1 + N, D]` made elsewhere.

        Returns:
            `last_hidden_state` `[B, 1 + N, D]`, `pooler_output` `[B, D]`, its class token, and with
            `output_hidden_states` all hidden states, the embeddings first.
        """
        if (pixel_values is None) == (pixel_embeds is None):
            raise ValueError("Give either pixel_values or pixel_embeds.")
        if output_hidden_states is None:
            output_hidden_states = bool(getattr(self.config, "output_hidden_states", False))
        embeddings = self.embeddings(pixel_values) if pixel_embeds is None else pixel_embeds
        encoded = self.encoder(embeddings, output_hidden_states)
        output = BaseModelOutputWithPooling(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=encoded.last_hidden_state[:, 0],
            hidden_states=encoded.hidden_states,
        )
        return output.to_tuple() if return_dict is False else output
