"""What every teacher and student offers: the only thing the three packages share, and they share it by shape.

Nobody inherits from these protocols. A teacher or student simply has the members below, a YAML file names it
by `class_path`, and jsonargparse refuses a class that lacks one of them.

Legend: B images, P prefix tokens (class token and registers), H x W the patch grid, D the width of a layer.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

from torch import Tensor

Layer = tuple[Tensor, Tensor]
"""One hidden state: `(prefix [B, P, D], patches [B, H, W, D])`; P is 0 for encoders without prefix tokens."""


class Encoder(Protocol):
    """An image encoder whose hidden states can be read; always also a `torch.nn.Module`.

    `hidden_states[-1]` is the output of the last block (for InternViT: of the release's selected layer), before
    any final norm. "The last K hidden states" are the outputs of the last K blocks, oldest first.

    Construction is cheap and reads no weights, so any recipe can be built without its files. `load_weights` reads
    them, strictly; calling `forward_hidden_states` before it raises `RuntimeError`.
    """

    @property
    def embed_dim(self) -> int:
        """Width of the last hidden state."""
        ...

    @property
    def depth(self) -> int:
        """How many hidden states can be had."""
        ...

    @property
    def layer_dims(self) -> tuple[int, ...]:
        """Width of each hidden state, oldest first; `depth` entries."""
        ...

    @property
    def patch_size(self) -> int:
        """Pixels a side that one cell of the last hidden state's grid covers."""
        ...

    @property
    def num_prefix_tokens(self) -> int:
        """Class token and registers in front of the patch tokens; 0 for convolutional encoders."""
        ...

    @property
    def image_mean(self) -> tuple[float, float, float]:
        """Channel means, RGB, of images scaled to [0, 1]; subtracted by the encoder itself."""
        ...

    @property
    def image_std(self) -> tuple[float, float, float]:
        """Channel standard deviations, RGB, of images scaled to [0, 1]."""
        ...

    def load_weights(self) -> None:
        """Read the weights named at construction, strictly; a second call does nothing.

        Raises:
            FileNotFoundError: a weight file is missing.
            ValueError: a key, width or config field does not fit, or a file is truncated.
        """
        ...

    def forward_hidden_states(self, images: Tensor, num_layers: int) -> list[Layer]:
        """Return the last `num_layers` hidden states, oldest first.

        Args:
            images: `[B, 3, H, W]`, uint8 in [0, 255] or float in [0, 1], RGB, on the encoder's device. The encoder
                normalises for itself.
            num_layers: from 1 to `depth`.

        Returns:
            `num_layers` pairs `(prefix [B, P, D], patches [B, H', W', D])`.

        Raises:
            ValueError: H or W is no multiple of the patch size, or `num_layers` is out of range.
        """
        ...


class TimmLayoutEncoder(Encoder, Protocol):
    """An encoder whose weights are known under timm's names: what the exporters need of a student."""

    @property
    def layout(self) -> Literal["internvit", "clip", "timm"]:
        """Which function the weights compute: InternViT, CLIP (pre-LN, quick_gelu), or whatever timm defines."""
        ...

    @property
    def timm_architecture(self) -> str:
        """The name `timm.create_model` takes."""
        ...

    @property
    def timm_model_args(self) -> dict[str, Any]:
        """Keyword arguments that, with the name, rebuild the model by `timm.create_model`; plain JSON values."""
        ...

    @property
    def img_size(self) -> int:
        """Pixels a side that the stored position embedding is for."""
        ...

    # May also have `timm_strides: dict[str, int]`: strides set on timm's model afterwards, by module.

    def timm_state_dict(self) -> dict[str, Tensor]:
        """Every weight of `timm.create_model(timm_architecture, **timm_model_args)`, under timm's key names."""
        ...
