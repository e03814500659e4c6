"""How features are taken, the same for every encoder of a comparison: device, precision, batch size, view and pooling.

Legend: B images, P prefix tokens, h x w the patch grid, D the width of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from distill.encoder import Encoder, Layer
from distill.errors import ConfigError, DataError
from distill.precision import choose_precision

Pool = Literal["mean", "prefix", "mean_prefix"]
Precision = Literal["float32", "bfloat16"]
PrecisionChoice = Literal["auto", "float32", "bfloat16"]

CPU_PIXELS = 4 * 448 * 448
"""Most pixels a forward pass on a CPU: EfficientNet-Lite0 takes 1.8 times the CPU time an image in batches of 32 images
of 448 px, whose activations outgrow the caches and are mapped anew by the system for every layer."""


@dataclass(frozen=True)
class Extraction:
    """How features are taken.

    Attributes:
        batch_size: most images a forward pass; on a CPU `CPU_PIXELS` bounds them too.
        device: where encoders run.
        precision: "bfloat16" runs encoders under autocast; features are kept in float32 either way.
        num_workers: processes that decode images; 0 decodes in this one.
        pool: mean over patch tokens, the class token, or both side by side.
        img_size_px: side of the square images.
        seed: of everything that is drawn.
    """

    batch_size: int
    device: str = "cpu"
    precision: Precision = "float32"
    num_workers: int = 0
    pool: Pool = "mean"
    img_size_px: int = 448
    seed: int = 0

    def images_per_pass(self, height_px: int, width_px: int | None = None) -> int:
        """Return how many images of that size (square without a width) enter a forward pass, 1 at least."""
        if torch.device(self.device).type != "cpu":
            return self.batch_size
        return max(1, min(self.batch_size, CPU_PIXELS // (height_px * (width_px or height_px))))

    def ready(self, encoder: nn.Module) -> Encoder:
        """Move an encoder to the device, put it in eval mode, and return it by its contract."""
        return cast(Encoder, encoder.to(self.device).eval())

    @torch.no_grad()
    def hidden_states(self, encoder: nn.Module, images: Tensor, num_layers: int = 1) -> list[Layer]:
        """Return the last hidden states of one forward pass, on the device, in the encoder's own dtype.

        Args:
            encoder: offers `distill.encoder.Encoder`, made `ready`.
            images: `[B, 3, H, W]`, uint8, or float in [0, 1]; moved to the device.
            num_layers: from 1 to the encoder's depth.
        """
        autocast = self.precision == "bfloat16"
        with torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=autocast):
            return cast(Encoder, encoder).forward_hidden_states(images.to(self.device), num_layers)

    def patch_maps(self, encoder: nn.Module, images: Tensor, layer: int = -1) -> Tensor:
        """Return the patch tokens of a layer, as many forward passes as it takes.

        Args:
            encoder: offers `distill.encoder.Encoder`.
            images: `[B, 3, H, W]`, uint8, or float in [0, 1]; on any device.
            layer: -1 for the last hidden state, -2 for the one before.

        Returns:
            `[B, h, w, D]`, float32, on the CPU.

        Raises:
            ConfigError: the encoder refuses images of that size, or has no such layer.
            DataError: a feature is not finite.
        """
        contract = self.ready(encoder)
        depth = layers_needed(contract, (layer,))
        maps: list[Tensor] = []
        for chunk in images.split(self.images_per_pass(*images.shape[-2:])):
            try:
                patches = self.hidden_states(encoder, chunk, depth)[layer][1]
            except ValueError as error:
                height, width = images.shape[-2:]
                raise ConfigError(f"The encoder refuses images of {height} x {width} px: {error}") from error
            maps.append(patches.float().cpu())
        dense = torch.cat(maps)
        if not dense.isfinite().all():
            raise DataError(
                "The encoder gives patch features that are not finite. A probe of NaN or infinity means nothing: "
                "check the weights, or use --precision float32."
            )
        return dense


def layers_needed(encoder: Encoder, layers: Sequence[int]) -> int:
    """Return how many last hidden states hold all of `layers`, counted from the end.

    Raises:
        ConfigError: a number is not negative, or the encoder has fewer layers.
    """
    wrong = [layer for layer in layers if layer > -1 or (layer < -1 and layer < -encoder.depth)]
    if not layers or wrong:
        raise ConfigError(
            f"--layers {', '.join(map(str, wrong)) or '(none)'}: layers are counted from the end, -1 being the last; "
            f"this encoder has -1 to -{encoder.depth}."
        )
    return -min(layers)


def pool_layer(layer: Layer, pool: Pool) -> Tensor:
    """Return one vector an image, `[B, D]` float32 (`[B, 2 D]` for "mean_prefix"), of a hidden state."""
    prefix, patches = layer
    mean = patches.flatten(1, 2).float().mean(1)
    if pool == "mean":
        return mean
    first = prefix[:, 0].float()
    return first if pool == "prefix" else torch.cat([mean, first], dim=1)


def choose_device(device: str) -> str:
    """Return the device to run encoders on; "auto" takes a GPU when there is one.

    Raises:
        ConfigError: "cuda" was asked for, and torch sees no CUDA device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device here; use --device cpu.")
    return device


def choose_dtype(precision: PrecisionChoice, device: str) -> Precision:
    """Return the precision to run encoders in; "auto" takes bfloat16 where the device computes it fast."""
    if precision != "auto":
        return precision
    return "bfloat16" if choose_precision("cuda" if device == "cuda" else "cpu") == "bf16-mixed" else "float32"
