"""What an export target is, and what its consumer gives back.

A target is a module with the members of `ExportTarget`. Its `consumer_features` and `consumer_pixels` run in a fresh
process, where only torch, safetensors and the consumer itself are imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from distill.encoder import Layer, TimmLayoutEncoder

if TYPE_CHECKING:
    from PIL.Image import Image

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"


@dataclass(frozen=True)
class ConsumerFeatures:
    """What a consumer's own class made of an exported directory.

    Attributes:
        layers: the last hidden states, oldest first, `(prefix [B, P, D], patches [B, H, W, D])`.
        missing: weights the class wanted and the file lacks.
        unexpected: weights the file has and the class ignored.
        consumer: the class and its library's version, for the manifest.
    """

    layers: list[Layer]
    missing: list[str]
    unexpected: list[str]
    consumer: str


class ExportTarget(Protocol):
    """One export format; the modules of this folder offer it."""

    @property
    def FORMAT(self) -> str:  # noqa: N802 - a module constant seen as a property
        """The name users give, for example `internvl-hf`."""
        ...

    @property
    def REQUIRES(self) -> tuple[str, ...]:  # noqa: N802
        """Import names of the packages the consumer needs."""
        ...

    def check(self, encoder: TimmLayoutEncoder) -> None:
        """Return when the encoder's layout can be written so.

        Raises:
            ExportError: it cannot, with the reason.
        """
        ...

    def write(self, encoder: TimmLayoutEncoder, directory: Path) -> None:
        """Write the consumer's config, weights and preprocessing into an existing, empty directory.

        Raises:
            ExportError: a weight has no place in the consumer's layout.
        """
        ...

    def consumer_features(self, directory: Path, pixel_values: Tensor, num_layers: int) -> ConsumerFeatures:
        """Return the last hidden states that the consumer's own class computes.

        Args:
            directory: the export.
            pixel_values: normalised images, `[B, 3, H, W]` float32.
            num_layers: how many hidden states.
        """
        ...

    def consumer_pixels(self, directory: Path, image: Image) -> Tensor:
        """Return `[1, 3, H, W]` float32, the image as the consumer's own preprocessing prepares it."""
        ...

    def loading_code(self) -> str:
        """Return the lines of Python by which a user loads the export and reads its patch features.

        They expect a variable-free start, `directory` being the export's path, and end with `features` `[B, N, D]`.
        """
        ...
