"""The golden features: what the trained encoder makes of one fixed image, kept beside every export.

`golden.safetensors` holds `image` (uint8 `[3, S, S]`) and, for the last two layers, `hidden_state_-1.prefix`
`[1, P, D]` and `hidden_state_-1.patches` `[1, H, W, D]` in float32; its metadata tells target, mean and std.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from distill.encoder import Layer, TimmLayoutEncoder
from distill.errors import ExportError
from distill.export.files import write_safetensors

if TYPE_CHECKING:
    from PIL.Image import Image

GOLDEN_FILE = "golden.safetensors"
NUM_LAYERS = 2
"""Layers compared: LLaVA and its like read the one before the last, InternVL the last."""


@dataclass(frozen=True)
class Preprocessing:
    """What a consumer must do to an image: squash it to `img_size` by bicubic resampling, then normalise."""

    img_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    def normalise(self, image: Tensor) -> Tensor:
        """Return `(image / 255 - mean) / std`, `[1, 3, S, S]` float32, for a uint8 `[3, S, S]`."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.image_mean, self.image_std))
        return ((image.float() / 255 - mean) / std).unsqueeze(0)

    def prepare(self, image: Image) -> Tensor:
        """Return `[1, 3, S, S]`: the image squashed by Pillow's bicubic filter and normalised."""
        from PIL.Image import Resampling

        squashed = np.asarray(image.resize((self.img_size, self.img_size), Resampling.BICUBIC))
        return self.normalise(torch.from_numpy(squashed.copy()).permute(2, 0, 1))


@dataclass(frozen=True)
class Golden:
    """One fixed image and the encoder's features of it.

    Attributes:
        target: the export format.
        preprocessing: the encoder's own.
        image: uint8 `[3, S, S]`.
        layers: the last hidden states, oldest first.
    """

    target: str
    preprocessing: Preprocessing
    image: Tensor
    layers: list[Layer]


def draw_image(height: int, width: int) -> NDArray[np.uint8]:
    """Return a fixed picture, uint8 `[H, W, 3]`: colour gradients, discs, stripes and letters' worth of edges.

    It is drawn by integer arithmetic alone, so that every machine draws the same.
    """
    rows, columns = np.mgrid[0:height, 0:width].astype(np.int64)
    picture = np.stack(
        [rows * 255 // max(height - 1, 1), columns * 255 // max(width - 1, 1), (rows + 2 * columns) * 3 % 256], axis=-1
    )
    side = min(height, width)
    for number in range(6):
        y, x, radius = height * (number + 1) // 7, width * (number * 3 % 7) // 7, side // (number + 5)
        disc = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
        picture[disc] = ((number * 97) % 256, (number * 57 + 120) % 256, (255 - number * 41) % 256)
    stripes = (rows > height * 3 // 4) & ((columns // max(side // 40, 1)) % 2 == 0)
    picture[stripes] = 255 - picture[stripes]
    ink = (rows < height // 5) & ((rows * rows // 7 + columns * columns // 11 + rows * columns // 5) % 23 < 4)
    picture[ink] = 12
    return picture.astype(np.uint8)


def compute_golden(
    encoder: TimmLayoutEncoder,
    target: str,
    num_layers: int = NUM_LAYERS,
    features: Callable[[Tensor], list[Layer]] | None = None,
) -> Golden:
    """Return the encoder's features of the fixed image.

    Args:
        encoder: a `torch.nn.Module` on the CPU, in eval mode, float32.
        target: the export format they are kept for.
        num_layers: how many of the last hidden states; fewer where the encoder has fewer.
        features: what is kept instead of hidden states, as a function of `pixel_values` `[1, 3, S, S]`.

    Raises:
        ExportError: the encoder is in training mode, not on the CPU, or gives features that are not finite float32.
    """
    module: object = encoder
    if not isinstance(module, nn.Module):
        raise ExportError(f"{type(encoder).__name__} is no torch.nn.Module, so it cannot be exported.")
    devices = {parameter.device.type for parameter in module.parameters()} - {"cpu"}
    if module.training or devices:
        state = f"on {', '.join(sorted(devices))}" if devices else "in training mode"
        raise ExportError(f"The encoder is {state}; features are verified on the CPU in eval mode. Call .cpu().eval().")
    image = torch.from_numpy(draw_image(encoder.img_size, encoder.img_size)).permute(2, 0, 1).contiguous()
    preprocessing = Preprocessing(encoder.img_size, encoder.image_mean, encoder.image_std)
    try:
        with torch.inference_mode():
            if features is None:
                layers = encoder.forward_hidden_states(image.unsqueeze(0), min(num_layers, encoder.depth))
            else:
                layers = features(preprocessing.normalise(image))
    except (RuntimeError, ValueError) as error:
        raise ExportError(f"The encoder gives no features of a {encoder.img_size} px image: {error}") from error
    for tensor in (tensor for layer in layers for tensor in layer):
        if tensor.dtype != torch.float32 or not torch.isfinite(tensor).all():
            raise ExportError(f"The encoder's features are not finite float32 but {tensor.dtype}; call .float() first.")
    return Golden(target, preprocessing, image, layers)


def write_golden(directory: Path, golden: Golden) -> None:
    """Write `golden.safetensors`."""
    tensors = {"image": golden.image}
    for position, (prefix, patches) in enumerate(golden.layers):
        name = f"hidden_state_{position - len(golden.layers)}"
        tensors[f"{name}.prefix"], tensors[f"{name}.patches"] = prefix.contiguous(), patches.contiguous()
    metadata = {"target": golden.target, "preprocessing": json.dumps(asdict(golden.preprocessing))}
    write_safetensors(directory / GOLDEN_FILE, tensors, metadata)


def read_golden(directory: Path) -> Golden:
    """Return what `write_golden` wrote.

    Raises:
        ExportError: the file is missing or damaged.
    """
    path = directory / GOLDEN_FILE
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
        values = json.loads(metadata["preprocessing"])
        count = (len(tensors) - 1) // 2
        names = [f"hidden_state_{position - count}" for position in range(count)]
        layers = [(tensors[f"{name}.prefix"], tensors[f"{name}.patches"]) for name in names]
        preprocessing = Preprocessing(values["img_size"], tuple(values["image_mean"]), tuple(values["image_std"]))
        return Golden(metadata["target"], preprocessing, tensors["image"], layers)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ExportError(f"{path} is missing or damaged ({error}): the export cannot be verified.") from error
