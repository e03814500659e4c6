"""Target `pt2`: the traced graph as `torch.export` saves it, for programs that have torch and nothing else."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distill.encoder import Layer, TimmLayoutEncoder
from distill.export.contract import FLOAT32_BOUND, ConsumerFeatures, Variant
from distill.export.files import cannot_write
from distill.export.graph_module import (
    GRAPH_READING,
    as_layer,
    build_graph_module,
    check_batches,
    signature_pixels,
    trace,
    write_signature,
)

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = "pt2"
REQUIRES = ("torch",)
EXTRA = "export"
CONSUMER_FOLDER: str | None = None
LAYERS = (-1,)
READING = GRAPH_READING
PROGRAM_FILE = "encoder.pt2"
BATCH_COSINE = 0.99999


def check(encoder: TimmLayoutEncoder) -> None:
    """Return: every layout can be traced; `write` refuses what cannot."""


def write(encoder: TimmLayoutEncoder, directory: Path) -> None:
    """Write encoder.pt2 (float32, any batch size) and preprocessor.json.

    Raises:
        ExportError: the model cannot be traced, or a file cannot be written.
    """
    write_signature(encoder, directory, batch=None)
    program = trace(build_graph_module(encoder), encoder.img_size, batch=None, format=FORMAT)
    try:
        torch.export.save(program, directory / PROGRAM_FILE)
    except (OSError, RuntimeError) as error:
        raise cannot_write(directory / PROGRAM_FILE, error) from error


def variants(directory: Path) -> tuple[Variant, ...]:
    """Return the one file, float32."""
    return (Variant("float32", PROGRAM_FILE, FLOAT32_BOUND),) if (directory / PROGRAM_FILE).is_file() else ()


def consumer_features(directory: Path, variant: str, pixel_values: Tensor, num_layers: int) -> ConsumerFeatures:
    """Return the last layer by `torch.export.load`, having run batches of 2 and 5 as well.

    Raises:
        ExportError: a batch changes an image's features.
    """
    module = torch.export.load(directory / PROGRAM_FILE).module()
    consumer = f"torch.export of torch {torch.__version__}"
    forward = partial(_run, module, directory)
    layer = forward(pixel_values)
    check_batches(layer, forward, pixel_values, BATCH_COSINE, consumer)
    return ConsumerFeatures([layer], [], [], consumer, partial(forward, pixel_values))


def _run(module: Any, directory: Path, pixel_values: Tensor) -> Layer:
    with torch.inference_mode():
        return as_layer(list(module(pixel_values)), directory)


def consumer_pixels(directory: Path, image: Image) -> Tensor:
    """Return the image prepared as preprocessor.json says, `[1, 3, S, S]`: the graph itself has no preprocessing."""
    return signature_pixels(directory, image)


def loading_code() -> str:
    """Return the lines that run the export by torch alone."""
    return """\
import json

import numpy as np
import torch
from PIL import Image

prep = json.load(open(f"{directory}/preprocessor.json"))
encoder = torch.export.load(f"{directory}/encoder.pt2").module()
image = Image.open("photo.jpg").convert("RGB").resize((prep["img_size"],) * 2, Image.Resampling.BICUBIC)
pixel_values = torch.from_numpy((np.asarray(image) / 255 - prep["image_mean"]) / prep["image_std"])
features = encoder(pixel_values.permute(2, 0, 1).unsqueeze(0).float())[0]  # [B, N, D]
"""
