"""Target `executorch`: one `.pte` program of batch 1 for phones, its operators given to XNNPACK where it has them.

ExecuTorch pins other releases of what the main environment holds, so it lives in a folder of its own, and lowering
the graph happens in a process that imports from there (`python -m distill.export.executorch_file SOURCE PROGRAM`).
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distill.encoder import Layer, TimmLayoutEncoder
from distill.export.contract import Bound, ConsumerFeatures, Variant
from distill.export.files import cannot_write
from distill.export.fresh_process import run_module
from distill.export.graph_module import (
    GRAPH_READING,
    as_layer,
    build_graph_module,
    signature_pixels,
    trace,
    write_signature,
)

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = "executorch"
REQUIRES = ("executorch",)
EXTRA = "executorch"
INSTALL = "bash scripts/consumers.sh executorch"
CONSUMER_FOLDER: str | None = "executorch"
LAYERS = (-1,)
READING = GRAPH_READING
PROGRAM_FILE = "encoder.pte"
LOWERING_TIMEOUT_S = 1800.0


def check(encoder: TimmLayoutEncoder) -> None:
    """Return: every layout can be traced; `write` refuses what cannot."""


def write(encoder: TimmLayoutEncoder, directory: Path) -> None:
    """Write encoder.pte (float32, batch 1) and preprocessor.json.

    Raises:
        ExportError: the model cannot be traced or lowered, or a file cannot be written.
    """
    write_signature(encoder, directory, batch=1)
    program = trace(build_graph_module(encoder), encoder.img_size, batch=1, format=FORMAT)
    with tempfile.TemporaryDirectory(prefix="distill-executorch-") as folder:
        source = Path(folder, "encoder.pt2")
        try:
            torch.export.save(program, source)
        except (OSError, RuntimeError) as error:
            raise cannot_write(source, error) from error
        _lower_apart(source, directory / PROGRAM_FILE)


def _lower_apart(source: Path, program: Path) -> None:
    """Lower a saved graph in a process that imports executorch from its own folder."""
    run_module(
        "distill.export.executorch_file",
        [str(source), str(program)],
        folder=FORMAT,
        timeout_s=LOWERING_TIMEOUT_S,
        late=f"ExecuTorch did not lower the graph within {LOWERING_TIMEOUT_S:g} s.",
        failed="ExecuTorch cannot lower this student, which may go out as pt2 or onnx",
    )


def lower(source: Path, program: Path) -> None:
    """Write the ExecuTorch program of a graph that `torch.export.save` wrote."""
    exir: Any = importlib.import_module("executorch.exir")
    xnnpack: Any = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    partitioner = [xnnpack.XnnpackPartitioner()]
    edge = exir.to_edge_transform_and_lower(torch.export.load(source), partitioner=partitioner)
    program.write_bytes(edge.to_executorch().buffer)


def variants(directory: Path) -> tuple[Variant, ...]:
    """Return the one file, float32."""
    if not (directory / PROGRAM_FILE).is_file():
        return ()
    # XNNPACK sums in another order than torch: 3e-6 was measured on a tiny model.
    return (Variant("float32", PROGRAM_FILE, Bound(absolute=1e-4)),)


def consumer_features(directory: Path, variant: str, pixel_values: Tensor, num_layers: int) -> ConsumerFeatures:
    """Return the last layer by ExecuTorch's own runtime."""
    from importlib.metadata import version

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the runtime warns on import that its Python interface may change
        runtime: Any = importlib.import_module("executorch.runtime")

    # A program's memory belongs to the object that loaded it, so it must outlive the method.
    program: Any = runtime.Runtime.get().load_program(directory / PROGRAM_FILE)
    method: Any = program.load_method("forward")
    forward = partial(_run, program, method, directory, pixel_values)
    consumer = f"ExecuTorch {version('executorch')} with XNNPACK"
    return ConsumerFeatures([forward()], [], [], consumer, forward)


def _run(program: object, method: Any, directory: Path, pixel_values: Tensor) -> Layer:
    outputs: list[Tensor] = method.execute([pixel_values.contiguous()])
    return as_layer([output.clone() for output in outputs], directory)


def consumer_pixels(directory: Path, image: Image) -> Tensor:
    """Return the image prepared as preprocessor.json says, `[1, 3, S, S]`: the graph itself has no preprocessing."""
    return signature_pixels(directory, image)


def loading_code() -> str:
    """Return the lines that run the export by ExecuTorch's Python runtime; a phone loads the same file."""
    return """\
import json

import numpy as np
import torch
from executorch.runtime import Runtime
from PIL import Image

prep = json.load(open(f"{directory}/preprocessor.json"))
program = Runtime.get().load_program(f"{directory}/encoder.pte")
image = Image.open("photo.jpg").convert("RGB").resize((prep["img_size"],) * 2, Image.Resampling.BICUBIC)
pixel_values = torch.from_numpy((np.asarray(image) / 255 - prep["image_mean"]) / prep["image_std"])
inputs = [pixel_values.permute(2, 0, 1).unsqueeze(0).float().contiguous()]
features = program.load_method("forward").execute(inputs)[0]  # [B, N, D]
"""


if __name__ == "__main__":
    lower(Path(sys.argv[1]), Path(sys.argv[2]))
