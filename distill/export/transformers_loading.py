"""What the targets for transformers have in common: their preprocessing file, and running its classes on an export."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from distill.encoder import TimmLayoutEncoder
from distill.export.contract import ConsumerFeatures

if TYPE_CHECKING:
    from PIL.Image import Image

AUTO_MODEL_CODE = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, {model_class}

processor = AutoImageProcessor.from_pretrained(directory)
model = {model_class}.from_pretrained(directory)
pixel_values = processor(Image.open("photo.jpg").convert("RGB"), return_tensors="pt")["pixel_values"]
with torch.inference_mode():
    features = model(pixel_values).last_hidden_state[:, 1:]  # [B, N, D]; row 0 is the class token
"""


def squash_preprocessor(encoder: TimmLayoutEncoder) -> dict[str, Any]:
    """Return a preprocessor_config.json by which `CLIPImageProcessor` squashes to the encoder's size."""
    side = {"height": encoder.img_size, "width": encoder.img_size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": side,
        "resample": 3,
        "do_center_crop": False,
        # Not applied, but LLaVA's loader reads the size of its padding from here.
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(encoder.image_mean),
        "image_std": list(encoder.image_std),
    }


def load_strictly(model_class: Any, directory: Path, **options: Any) -> tuple[Any, list[str], list[str]]:
    """Return the model in eval mode, the names it missed and the names it ignored.

    Args:
        model_class: a class of transformers with `from_pretrained`.
        directory: the export.
        options: further arguments of `from_pretrained`.
    """
    model, info = model_class.from_pretrained(directory, output_loading_info=True, local_files_only=True, **options)
    return model.eval(), _names(info["missing_keys"]), _names(info["unexpected_keys"])


def _names(keys: Any) -> list[str]:
    return sorted(str(key) for key in keys)


def hidden_states(
    model: Any, missing: list[str], unexpected: list[str], pixel_values: Tensor, num_layers: int
) -> ConsumerFeatures:
    """Return the last hidden states of a transformers vision tower whose row 0 is the class token."""
    import transformers

    def forward() -> Any:
        with torch.inference_mode():
            return model(pixel_values, output_hidden_states=True)

    states = cast(tuple[Tensor, ...], forward().hidden_states)[-num_layers:]
    grid = math.isqrt(states[-1].shape[1] - 1)
    layers = [(state[:, :1], state[:, 1:].unflatten(1, (grid, grid))) for state in states]
    consumer = f"{type(model).__name__} of transformers {transformers.__version__}"
    return ConsumerFeatures(layers, missing, unexpected, consumer, forward)


def processor_pixels(directory: Path, image: Image) -> Tensor:
    """Return the image as `AutoImageProcessor` prepares it, `[1, 3, H, W]` float32."""
    from transformers import AutoImageProcessor

    processor: Any = AutoImageProcessor.from_pretrained(directory, local_files_only=True)
    return cast(Tensor, processor(image, return_tensors="pt")["pixel_values"])
