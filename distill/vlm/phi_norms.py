"""TinyGPT-V's norms in Phi: LayerNorm of queries and keys, and RMSNorm of the attention's output.

TinyGPT-V (arXiv 2312.16862, section 3.2) found that Phi-2 cannot be trained as part of a VLM without them: gradients
vanish. The first is part of transformers' Phi (`qk_layernorm`); the second is put around its attention here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from distill.errors import ConfigError

_RMS_EPS = 1e-6
"""Of the LlamaRMSNorm in TinyGPT-V's modeling_phi.py, which takes the default."""


class PostNormAttention(nn.Module):
    """An attention module whose output is normalised before it joins the residual stream.

    Args:
        attention: returns a tuple whose first entry is its output `[B, L, D]`.
        width: D.
    """

    def __init__(self, attention: nn.Module, width: int) -> None:
        super().__init__()
        like = next(attention.parameters())
        self.attention = attention
        self.post_layernorm = nn.RMSNorm(width, eps=_RMS_EPS, device=like.device, dtype=like.dtype)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Return what the attention returns, its first entry normalised."""
        output, *others = self.attention(*args, **kwargs)
        return (self.post_layernorm(output), *others)


def check_phi(model_config: Any, option: str) -> None:
    """Refuse an option that is defined for Phi alone.

    Raises:
        ConfigError: the configuration is of another model.
    """
    if model_config.model_type != "phi":
        raise ConfigError(
            f"language.{option} is TinyGPT-V's change of Phi, and this model is of model_type "
            f"{model_config.model_type!r}. Leave it out, or take a Phi model (Phi-1.5, Phi-2)."
        )


def add_post_norms(model: Any) -> None:
    """Put `PostNormAttention` around the attention of every layer of a Phi model, in place.

    Raises:
        ConfigError: the model is no Phi.
    """
    check_phi(model.config, "post_norm")
    for layer in model.model.layers:
        layer.self_attn = PostNormAttention(layer.self_attn, model.config.hidden_size)
