"""The student of CLIP's architecture: a drop-in for whatever loads a CLIPVisionModel."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from students.images import CLIP_MEAN, CLIP_STD
from students.init import PRE_NORM_EPS, resize_position_embedding
from students.random_init import build_random_model
from students.timm_encoder import Attention, TimmEncoder
from students.vision_tower import ARCHITECTURES, check_geometry, read_vision_tower


class CLIPViT(TimmEncoder):
    """CLIP's vision transformer: LayerNorm before the blocks, quick_gelu, no bias in the patch convolution.

    The defaults are CLIP-ViT-L/14 at 448 px. On the grid of its checkpoint the hidden states are CLIP's own; on another
    grid the positions are resized (bicubic, float32, no antialias). The LayerNorm after the last block is kept,
    because a CLIPVisionModel has one, and frozen, because no hidden state depends on it. Images are normalised by
    CLIP's statistics.

    Args:
        weights: a file or directory of CLIP weights (open_clip, OpenAI, transformers or timm layout; the layout is
            read from the keys); or "pretrained", timm's hub copy of CLIP-ViT-L/14-336; or "random".
        img_size: pixels a side; a multiple of `patch_size`. Positions are resized to this grid.
        patch_size: pixels a side.
        embed_dim: width; a multiple of `num_heads`.
        depth: blocks.
        num_heads: attention heads. CLIP's are `embed_dim / 64`; weights cannot tell a wrong number, only a
                configuration beside them can.
        mlp_ratio: hidden width of the MLP, in widths.
        drop_path_rate: stochastic depth at the last block, growing from 0 at the first.
        seed: of random weights.
        attention: "auto" is explicit matrix products for bfloat16 on a CPU and torch's fused kernel elsewhere;
            "sdpa" and "explicit" fix it.
        grad_checkpointing: recompute each block in the backward pass: less memory, about a third more time.

    Raises:
        ValueError: `img_size` is no multiple of `patch_size`, or `embed_dim` none of `num_heads`.

    Example:
        >>> import torch
        >>> student = CLIPViT(weights="random", img_size=28, embed_dim=16, depth=2, num_heads=2)
        >>> student.load_weights()
        >>> prefix, patches = student.forward_hidden_states(torch.zeros(1, 3, 28, 28), num_layers=1)[0]
        >>> prefix.shape, patches.shape
        (torch.Size([1, 1, 16]), torch.Size([1, 2, 2, 16]))
    """

    def __init__(
        self,
        weights: str,
        img_size: int = 448,
        patch_size: int = 14,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        *,
        seed: int = 0,
        attention: Attention = "auto",
        grad_checkpointing: bool = False,
    ) -> None:
        check_geometry(img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, num_heads=num_heads)
        geometry: dict[str, Any] = {
            "img_size": img_size,
            "patch_size": patch_size,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "num_classes": 0,
        }
        super().__init__(
            ARCHITECTURES["clip"],
            {**geometry, "dynamic_img_size": True},
            training_args={"drop_path_rate": drop_path_rate},
            layout="clip",
            img_size=img_size,
            patch_size=patch_size,
            layer_dims=(embed_dim,) * depth,
            normalisation=(CLIP_MEAN, CLIP_STD),
            attention=attention,
            grad_checkpointing=grad_checkpointing,
        )
        self._weights, self._geometry, self._seed = weights, geometry, seed
        cast(nn.Module, self.model.norm).requires_grad_(False)

    def read_weights(self) -> dict[str, Tensor]:
        """Return CLIP's weights with positions of the student's grid, or random ones.

        Raises:
            FileNotFoundError: a weight file is missing.
            ValueError: the weights are not CLIP's or do not fit, or a configuration beside them says other heads,
                another activation or another epsilon.
        """
        if self._weights == "random":
            model = build_random_model(self.timm_architecture, self.timm_model_args, init="timm", seed=self._seed)
            return model.state_dict()
        _, state = read_vision_tower(self._weights, self._geometry, ("clip",), act="quick_gelu", norm_eps=PRE_NORM_EPS)
        state["pos_embed"] = resize_position_embedding(state["pos_embed"], self.img_size // self.patch_size)
        return state
