"""What makes an encoder a teacher: it never changes, never trains, and never asks for a gradient.

A teacher is in eval mode for ever (dropout, drop-path and batch statistics would make its targets move), none of
its parameters requires a gradient, its forward runs under `torch.no_grad`, and it computes in its own dtype
whatever autocast the training loop is in.
"""

from __future__ import annotations

import timeit
from abc import abstractmethod
from functools import cache
from typing import Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from teachers.attention import free_layers, head_shape, set_kernel
from teachers.images import RGB, check_image_size, normalise_images
from teachers.weights import check_sha256

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

M = TypeVar("M", bound=nn.Module)

WEIGHTS_RANDOM = "random"
"""The word that asks for untrained weights; nothing else ever leads to them."""

WEIGHTS_PRETRAINED = "pretrained"
"""The word that asks for a library's own download, alone or followed by a colon and a tag."""


@cache
def fast_dtype() -> torch.dtype:
    """Return bfloat16 where this machine's GPU, or else its CPU, multiplies faster in it than in float32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_fast = _product_s(torch.bfloat16) < _product_s(torch.float32)
    return torch.bfloat16 if is_fast else torch.float32


def _product_s(dtype: torch.dtype) -> float:
    """Return the best time of a few small matrix products on the CPU, in seconds."""
    matrix = torch.ones(256, 256, dtype=dtype, device="cpu")
    return min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=5))


def freeze(module: M) -> M:
    """Put `module` in eval mode and stop every gradient to its parameters; returns the same object."""
    return module.requires_grad_(False).eval()


class FrozenEncoder(nn.Module):
    """Base of the teachers: everything that is the same for all of them.

    A subclass builds its module on the meta device in `__init__`, so that construction costs no memory and reads no
    weights, then says its widths through `_describe`, and implements `_load` and `_hidden_states`.

    Args:
        weights: what the subclass understands: a path, `"pretrained"` or `"random"`.
        dtype: what the encoder computes in; also the dtype of the hidden states. "auto" means bfloat16 on a machine
            that computes it fast, else float32: CPUs without bfloat16 instructions emulate it, eighty times slower.
        sha256: expected checksum of the weights, as `weights_sha256` gives it; verified before anything is read.
            None does not check.
    """

    embed_dim: int
    depth: int
    layer_dims: tuple[int, ...]
    patch_size: int
    num_prefix_tokens: int
    image_mean: RGB
    image_std: RGB

    def __init__(self, *, weights: str, dtype: Dtype, sha256: str | None) -> None:
        super().__init__()
        if dtype != "auto" and dtype not in TORCH_DTYPES:
            raise ValueError(f"dtype is {dtype!r}; use auto or one of {', '.join(TORCH_DTYPES)}.")
        if not weights:
            raise ValueError("weights is empty; name a file or directory, or say 'random' for untrained weights.")
        if sha256 is not None and weights.partition(":")[0] in (WEIGHTS_RANDOM, WEIGHTS_PRETRAINED):
            raise ValueError(f"sha256 is given, but weights is {weights!r}; only a file or directory can be checked.")
        self.weights = weights
        self.sha256 = sha256
        self.dtype = fast_dtype() if dtype == "auto" else TORCH_DTYPES[dtype]
        self.is_loaded = False

    def _describe(self, layer_dims: tuple[int, ...], patch_size: int, num_prefix_tokens: int) -> None:
        """Set the numbers that follow from the architecture; oldest hidden state first."""
        self.layer_dims = layer_dims
        self.depth = len(layer_dims)
        self.embed_dim = layer_dims[-1]
        self.patch_size = patch_size
        self.num_prefix_tokens = num_prefix_tokens

    @property
    def _prefers_channels_last(self) -> bool:
        """Whether images and kernels go channels last; of a ViT without prefix that concerns the patch conv only."""
        return self.num_prefix_tokens == 0

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode whatever is asked: a module that contains a teacher may call `train()` freely."""
        del mode
        return super().train(False)

    def load_weights(self, device: str | torch.device = "cpu") -> None:
        """Read the weights named at construction, strictly; a second call does nothing.

        Args:
            device: where the weights go. InternViT reads tensor by tensor, so that a GPU as `device` costs no more
                host memory than one tensor.

        Raises:
            FileNotFoundError: a weight file is missing.
            ValueError: a checksum, key, width or config field does not fit, or a file is damaged.
            RuntimeError: a download failed.
        """
        if self.is_loaded:
            return
        if self.sha256 is not None:
            check_sha256(self.weights, self.sha256)
        self._load(torch.device(device))
        if self._prefers_channels_last:
            # Convolutions run up to 1.5 times faster with channels last, on CPUs as on GPUs.
            self.to(memory_format=torch.channels_last)
        freeze(self)
        self.is_loaded = True

    @torch.no_grad()
    def forward_hidden_states(self, images: Tensor, num_layers: int) -> list[tuple[Tensor, Tensor]]:
        """Return the last `num_layers` hidden states, oldest first, before any final norm.

        Args:
            images: `[B, 3, H, W]`, uint8 in [0, 255] or float in [0, 1], RGB, on the encoder's device.
            num_layers: from 1 to `depth`.

        Returns:
            `num_layers` pairs `(prefix [B, P, D], patches [B, H', W', D])` in the encoder's dtype, without gradient.

        Raises:
            RuntimeError: `load_weights` was not called.
            ValueError: `num_layers` is out of range, or the images have a shape, size or dtype that cannot be used.
        """
        if not self.is_loaded:
            raise RuntimeError(f"{type(self).__name__} has no weights yet; call load_weights() first.")
        if not 1 <= num_layers <= self.depth:
            raise ValueError(f"num_layers is {num_layers}; this encoder has hidden states 1 to {self.depth}.")
        normalised = normalise_images(images, self.image_mean, self.image_std, self.dtype)
        self._check_size(int(images.shape[-2]), int(images.shape[-1]))
        if self._prefers_channels_last:
            normalised = normalised.contiguous(memory_format=torch.channels_last)
        # The configured dtype rules: under a trainer's autocast a float32 teacher would silently give bfloat16 targets.
        with torch.autocast(images.device.type, enabled=False):
            return self._hidden_states(normalised, num_layers)

    def attention_shape(self, img_size_px: int) -> tuple[int, int, int] | None:
        """Return heads, tokens and head width; None where no attention's kernel may be chosen from outside."""
        layers = free_layers(self)
        if not layers or img_size_px % self.patch_size:
            return None
        heads, width = head_shape(layers[0])
        return heads, (img_size_px // self.patch_size) ** 2 + self.num_prefix_tokens, width

    def use_attention(self, kernel: Literal["sdpa", "explicit"]) -> None:
        """Use this kernel wherever it may be chosen from outside; see `teachers.attention`."""
        set_kernel(free_layers(self), kernel)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last hidden state, `(prefix [B, P, D], patches [B, H', W', D])`."""
        return self.forward_hidden_states(images, 1)[0]

    def _check_size(self, height: int, width: int) -> None:
        """Raise `ValueError` for an image size in pixels that the encoder cannot take."""
        check_image_size(height, width, self.patch_size)

    @abstractmethod
    def _load(self, device: torch.device) -> None:
        """Put weights of `self.dtype` into the module, on `device`, strictly."""

    @abstractmethod
    def _hidden_states(self, images: Tensor, num_layers: int) -> list[tuple[Tensor, Tensor]]:
        """Return the last `num_layers` hidden states of normalised images in `self.dtype`."""
