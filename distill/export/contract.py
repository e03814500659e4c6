"""What an export target is, what its consumer gives back, and how close that must be.

A target is a module (or an object) with the members of `ExportTarget`. Its `consumer_features` and `consumer_pixels`
run in a fresh process, where only torch, safetensors and the consumer itself are imported.

Three members are optional, because few targets need them:

- `golden_features(encoder, directory, pixel_values) -> list[Layer]`: what the consumer's features are compared with,
  where these are not the encoder's hidden states (a GGUF file gives projected features). `pixel_values` is normalised,
  `[1, 3, S, S]`.
- `COMPANION: str` and `with_companion(path) -> ExportTarget`: the flag of `distill export` that names a file or
  directory this target needs beside the encoder, and the target that uses it. Without it, `check` refuses.
- `READING: Reading`: what the card says of the consumer's output and preprocessing, where `Reading()` is not true.
- `INSTALL: str`: the command that installs the consumer, where that is not `pip install 'encoder-distill[EXTRA]'`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from torch import Tensor

from distill.encoder import Layer, TimmLayoutEncoder

if TYPE_CHECKING:
    from PIL.Image import Image

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"

TOLERANCE = 1e-5
"""Largest absolute difference of a feature, float32."""


@dataclass(frozen=True)
class Bound:
    """How far a variant's features may be from the encoder's; at least one of the two is set.

    Attributes:
        absolute: largest absolute difference of a feature while features stay below 10.5; it grows in proportion to
            a layer's largest feature above that, where float32 itself becomes coarser.
        cosine: smallest cosine of any token, in [-1, 1].
    """

    absolute: float | None = None
    cosine: float | None = None

    def __post_init__(self) -> None:
        if self.absolute is None and self.cosine is None:
            raise ValueError("A bound without an absolute difference and without a cosine lets everything pass.")


@dataclass(frozen=True)
class Variant:
    """One file or precision inside an export directory that is verified on its own.

    Attributes:
        name: "float32", "float16", "int8", "q8_0", ...
        file: file name inside the directory.
        bound: what it must keep.
    """

    name: str
    file: str
    bound: Bound


FLOAT32_BOUND = Bound(absolute=TOLERANCE)


def single_variant(directory: Path) -> tuple[Variant, ...]:
    """Return the variants of a directory whose only weights are `model.safetensors` in float32."""
    return (Variant("float32", WEIGHTS_FILE, FLOAT32_BOUND),) if (directory / WEIGHTS_FILE).is_file() else ()


@dataclass(frozen=True)
class ConsumerFeatures:
    """What a consumer's own class made of an exported directory.

    Attributes:
        layers: the hidden states of the target's `LAYERS`, oldest first, `(prefix [B, P, D], patches [B, H, W, D])`.
        missing: weights the class wanted and the file lacks.
        unexpected: weights the file has and the class ignored.
        consumer: the class and its library's version, for the manifest.
        forward: computes the features of the same pixels again, without loading anything; it is timed. None where
            the consumer cannot be timed apart from loading.
    """

    layers: list[Layer]
    missing: list[str]
    unexpected: list[str]
    consumer: str
    forward: Callable[[], object] | None = None


@dataclass(frozen=True)
class Reading:
    """What a reader of the export meets, as the card puts it.

    Attributes:
        cls_in_output: the class token and registers stand in front of the patches in the consumer's output.
        class_token: where they are; `{count}` is how many.
        preprocessing: what prepares images so.
        golden: what golden.safetensors holds.
    """

    cls_in_output: bool = True
    class_token: str = "{count} token(s) in front of the patches; drop them."
    preprocessing: str = "The config in this directory does exactly this."
    golden: str = "the encoder's own features"


class ExportTarget(Protocol):
    """One export format; the modules of this folder offer it."""

    @property
    def FORMAT(self) -> str:  # noqa: N802 - a module constant seen as a property
        """The name users give, for example `internvl-hf`."""
        ...

    @property
    def REQUIRES(self) -> tuple[str, ...]:  # noqa: N802
        """Import names of the packages that writing and the consumer need."""
        ...

    @property
    def EXTRA(self) -> str:  # noqa: N802
        """The pip extra that brings them: `export`, `onnx`, `gguf`."""
        ...

    @property
    def CONSUMER_FOLDER(self) -> str | None:  # noqa: N802
        """Name under `.consumers/` that the fresh process imports from first, or None."""
        ...

    @property
    def LAYERS(self) -> tuple[int, ...]:  # noqa: N802
        """Hidden states the consumer gives, oldest first: `(-2, -1)` for layouts, `(-1,)` for graphs."""
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

    def variants(self, directory: Path) -> tuple[Variant, ...]:
        """Return what is verified in an export: each file or precision with its bound; `single_variant` fits most."""
        ...

    def consumer_features(
        self, directory: Path, variant: str, pixel_values: Tensor, num_layers: int
    ) -> ConsumerFeatures:
        """Return the last hidden states that the consumer's own class computes.

        Args:
            directory: the export.
            variant: the name of one of `variants`.
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


def golden_features_of(
    target: ExportTarget, encoder: TimmLayoutEncoder, directory: Path
) -> Callable[[Tensor], list[Layer]] | None:
    """Return the target's own reference features as a function of `pixel_values`, or None for hidden states."""
    function = cast(Any, getattr(target, "golden_features", None))
    if function is None:
        return None
    return lambda pixel_values: cast(list[Layer], function(encoder, directory, pixel_values))


def reading_of(target: ExportTarget) -> Reading:
    """Return how the target's output is read."""
    return cast(Reading, getattr(target, "READING", Reading()))


def companion_flag(target: ExportTarget) -> str | None:
    """Return the flag that names what this target needs beside the encoder, or None."""
    return cast(str | None, getattr(target, "COMPANION", None))


def bind_companion(target: ExportTarget, path: Path) -> ExportTarget:
    """Return the target that uses the companion file or directory; see the head of this file."""
    return cast(ExportTarget, cast(Any, target).with_companion(path))


def install_command(target: ExportTarget) -> str:
    """Return the command that installs what a target requires."""
    return str(getattr(target, "INSTALL", f"pip install 'encoder-distill[{target.EXTRA}]'"))
