"""The student of InternViT's architecture: 300M parameters by default, smaller by its arguments."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from students.calibration import read_images, synthetic_images
from students.images import IMAGENET_MEAN, IMAGENET_STD
from students.init import LayerScale, PreNorm, add_layer_scale, clip_to_internvit, resize_position_embedding
from students.random_init import RandomInit, build_random_model
from students.timm_encoder import Attention, TimmEncoder
from students.vision_tower import ARCHITECTURES, check_geometry, read_vision_tower


class InternViT(TimmEncoder):
    """A ViT with LayerScale, a biased patch convolution, and no norm before or after its blocks.

    The defaults are InternViT-300M-448px: exactly 304,012,288 parameters under the names of timm's
    `vit_intern300m_patch14_448`, so an export is a renaming. Images are normalised by ImageNet's statistics.
    How CLIP's weights become an InternViT's, and why the defaults are what they are, is in
    `docs/initialisation.md`.

    Args:
        weights: a file or directory of CLIP weights (open_clip, OpenAI, transformers or timm layout; the layout is
            read from the keys), or of InternViT weights to go on from (the release's, transformers' or timm's
            layout); or "pretrained", timm's hub copy of CLIP-ViT-L/14-336; or "random".
        img_size: pixels a side; a multiple of `patch_size`. Positions are resized to this grid.
        patch_size: pixels a side.
        embed_dim: width; a multiple of `num_heads`.
        depth: blocks.
        num_heads: attention heads. CLIP's are `embed_dim / 64`; weights cannot tell a wrong number, only a
                configuration beside them can.
        mlp_ratio: hidden width of the MLP, in widths.
        drop_path_rate: stochastic depth at the last block, growing from 0 at the first.
        act: "gelu" is InternViT's; "quick_gelu" is CLIP's.
        layer_scale: for CLIP and random weights: "one" sets LayerScale to 1; "rescaled" keeps InternViT's 0.1 and
            multiplies the branches by 10. The same function; the optimiser moves its branches at another pace.
        fold_normalisation: for CLIP weights: fold CLIP's mean and std into the patch convolution, exactly.
        pre_norm: for CLIP weights: "linearised" folds CLIP's first LayerNorm into embedding and positions, "drop"
            leaves it out.
        calibration_images: for "linearised": a directory of images to measure the LayerNorm's scale on; none means
            noise with the spectrum of photographs.
        init: for random weights: "timm", or "mimetic" (arXiv 2305.09828).
        seed: of random weights.
        attention: "auto" is explicit matrix products for bfloat16 on a CPU and torch's fused kernel elsewhere;
            "sdpa" and "explicit" fix it.
        grad_checkpointing: recompute each block in the backward pass: less memory, about a third more time.

    Raises:
        ValueError: `img_size` is no multiple of `patch_size`, or `embed_dim` none of `num_heads`.

    Example:
        >>> import torch
        >>> student = InternViT(weights="random", img_size=28, embed_dim=16, depth=2, num_heads=2)
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
        act: Literal["gelu", "quick_gelu"] = "gelu",
        layer_scale: LayerScale = "one",
        fold_normalisation: bool = True,
        pre_norm: PreNorm = "linearised",
        calibration_images: str | None = None,
        init: RandomInit = "timm",
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
            ARCHITECTURES["internvit"],
            geometry if act == "gelu" else {**geometry, "act_layer": act},
            training_args={"drop_path_rate": drop_path_rate},
            layout="internvit",
            img_size=img_size,
            patch_size=patch_size,
            layer_dims=(embed_dim,) * depth,
            normalisation=(IMAGENET_MEAN, IMAGENET_STD),
            attention=attention,
            grad_checkpointing=grad_checkpointing,
        )
        self._weights, self._geometry = weights, geometry
        self._layer_scale: LayerScale = layer_scale
        self._pre_norm: PreNorm = pre_norm
        self._fold_normalisation, self._calibration_images = fold_normalisation, calibration_images
        self._init: RandomInit = init
        self._seed = seed

    def read_weights(self) -> dict[str, Tensor]:
        """Return the first weights: CLIP's carried over, an InternViT's as they are, or random ones.

        Raises:
            FileNotFoundError: a weight file or the calibration images are missing.
            ValueError: the weights are neither CLIP's nor an InternViT's, or do not fit, or a configuration beside them
                says other heads.
        """
        if self._weights == "random":
            return self._random_weights()
        grid = self.img_size // self.patch_size
        kind, state = read_vision_tower(self._weights, self._geometry, ("clip", "internvit"))
        if kind == "internvit":
            return {**state, "pos_embed": resize_position_embedding(state["pos_embed"], grid)}
        return clip_to_internvit(
            state,
            grid=grid,
            layer_scale=self._layer_scale,
            should_fold_normalisation=self._fold_normalisation,
            pre_norm=self._pre_norm,
            calibration_images=self._read_calibration() if self._pre_norm == "linearised" else None,
        )

    def _read_calibration(self) -> Tensor:
        if self._calibration_images is None:
            return synthetic_images(self.img_size)
        return read_images(self._calibration_images, self.img_size)

    def _random_weights(self) -> dict[str, Tensor]:
        model = build_random_model(self.timm_architecture, self.timm_model_args, init=self._init, seed=self._seed)
        plain = {
            key: value for key, value in model.state_dict().items() if not key.endswith((".ls1.gamma", ".ls2.gamma"))
        }
        return add_layer_scale(plain, self._layer_scale)
