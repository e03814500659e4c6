"""Target `onnx`: one graph a precision, of any batch size, for ONNX Runtime, OpenVINO and TensorRT.

Files: `encoder.onnx` (float32, opset 20), `encoder_opset18.onnx` (float32 for older runtimes), `encoder_float16.onnx`
(float32 in and out, float16 between) and `encoder_int8.onnx` (weights of matrix products in int8 by output channel,
activations quantised as they come; everything else float32).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from distill.encoder import Layer, TimmLayoutEncoder
from distill.errors import ExportError
from distill.export.contract import Bound, ConsumerFeatures, Variant
from distill.export.files import cannot_write
from distill.export.golden import Preprocessing, draw_image
from distill.export.graph_module import (
    GRAPH_READING,
    INPUT_NAME,
    HalfGraphModule,
    as_layer,
    build_graph_module,
    check_batches,
    first_line,
    lowest_cosine,
    output_names,
    signature_pixels,
    trace,
    write_signature,
)

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = "onnx"
REQUIRES = ("onnx", "onnxscript", "onnxruntime")
EXTRA = "onnx"
CONSUMER_FOLDER: str | None = None
LAYERS = (-1,)
READING = GRAPH_READING

FLOAT32_FILE = "encoder.onnx"
OPSET18_FILE = "encoder_opset18.onnx"
FLOAT16_FILE = "encoder_float16.onnx"
INT8_FILE = "encoder_int8.onnx"

VARIANTS = (
    # 5e-6 to 1.1e-5 was measured: a runtime fuses and reorders sums.
    Variant("float32", FLOAT32_FILE, Bound(absolute=1e-4)),
    Variant("float32-opset18", OPSET18_FILE, Bound(absolute=1e-4)),
    Variant("float16", FLOAT16_FILE, Bound(cosine=0.9999)),
    # What int8 costs depends on the outlier channels of the weights: it is measured and told, and bounded loosely.
    Variant("int8", INT8_FILE, Bound(cosine=0.98)),
)
BATCH_COSINES = {"float32": 0.99999, "float32-opset18": 0.99999, "float16": 0.9999, "int8": 0.98}
"""Smallest cosine of a token in a batch with the same token alone; int8 scales are shared by a batch."""

_LOGGER = logging.getLogger(__name__)

MAX_FILE_BYTES = 2_000_000_000
"""Protobuf, and so a single ONNX file, ends at 2 GiB."""


def check(encoder: TimmLayoutEncoder) -> None:
    """Return when the weights fit into a single file; every layout is welcome.

    Raises:
        ExportError: they do not.
    """
    weights_bytes = sum(value.numel() * 4 for value in encoder.timm_state_dict().values())
    if weights_bytes > MAX_FILE_BYTES:
        raise ExportError(
            f"The weights take {weights_bytes / 1e9:.1f} GB in float32; an ONNX file ends at 2 GB. Export it as pt2."
        )


def write(encoder: TimmLayoutEncoder, directory: Path) -> None:
    """Write the graphs and preprocessor.json.

    A graph of lower precision is left out, and preprocessor.json and the log say why, where it falls below its bound:
    the float32 graphs are no worse for it. So is int8 where there is no linear layer to quantise.

    Raises:
        ExportError: the model cannot be traced or translated, or a file cannot be written.
    """
    check(encoder)
    write_signature(encoder, directory, batch=None)
    names = output_names(encoder.num_prefix_tokens)
    graph = build_graph_module(encoder)
    has_matmul = any(isinstance(module, nn.Linear) for module in graph.modules())
    write_graph(graph, encoder.img_size, names, directory / FLOAT32_FILE, opset=20)
    write_graph(graph, encoder.img_size, names, directory / OPSET18_FILE, opset=18)
    if has_matmul:
        write_int8(directory / FLOAT32_FILE, directory / INT8_FILE)
    write_graph(HalfGraphModule(graph), encoder.img_size, names, directory / FLOAT16_FILE, opset=20)
    left_out = {} if has_matmul else {INT8_FILE: "this student has no linear layer, and only those are quantised"}
    left_out |= _remove_distant(directory, _golden_pixels(encoder))
    if left_out:
        write_signature(encoder, directory, batch=None, left_out=left_out)
    for file, reason in left_out.items():
        _LOGGER.warning("The onnx export has no %s: %s.", file, reason)


def _golden_pixels(encoder: TimmLayoutEncoder) -> Tensor:
    size = encoder.img_size
    image = torch.from_numpy(draw_image(size, size)).permute(2, 0, 1)
    return Preprocessing(size, encoder.image_mean, encoder.image_std).normalise(image)


def _remove_distant(directory: Path, pixel_values: Tensor) -> dict[str, str]:
    """Remove graphs too far from float32, alone or in a batch; return file names and reasons."""
    removed: dict[str, str] = {}
    reference = _open_graph(directory, FLOAT32_FILE)(pixel_values)
    for variant in variants(directory):
        reason = None if variant.bound.cosine is None else _distance(directory, variant, pixel_values, reference)
        if reason is not None:
            (directory / variant.file).unlink()
            removed[variant.file] = reason
    return removed


def _distance(directory: Path, variant: Variant, pixel_values: Tensor, reference: Layer) -> str | None:
    """Return why a graph of lower precision is left out, or None."""
    forward, bound = _open_graph(directory, variant.file), variant.bound.cosine or 0.0
    layer = forward(pixel_values)
    cosine = lowest_cosine(layer, reference)
    if not cosine >= bound:  # a NaN is too far as well
        return f"its lowest cosine with float32 is {cosine:.4f}, at least {bound:g} is asked for"
    try:
        check_batches(layer, forward, pixel_values, BATCH_COSINES[variant.name], "it")
    except ExportError as error:
        return str(error).rstrip(".")
    return None


def _open_graph(directory: Path, file: str) -> Callable[[Tensor], Layer]:
    import onnxruntime

    session = onnxruntime.InferenceSession(directory / file, providers=["CPUExecutionProvider"])
    return partial(run_session, session, directory)


def write_graph(module: nn.Module, img_size: int, names: list[str], path: Path, *, opset: int) -> None:
    """Write one graph of any batch size, its weights inside.

    Args:
        module: a `GraphModule` or `HalfGraphModule`.
        img_size: pixels a side.
        names: of the outputs.
        path: the file.
        opset: version of the operators.

    Raises:
        ExportError: an operator has no ONNX counterpart, or the file cannot be written.
    """
    import onnx

    program = trace(module, img_size, batch=None, format=FORMAT)
    options: dict[str, Any] = {"opset_version": opset, "input_names": [INPUT_NAME], "output_names": names}
    try:
        translated = torch.onnx.export(program, dynamo=True, verbose=False, **options)
    except RuntimeError as error:
        raise ExportError(
            f"torch {torch.__version__} cannot translate this student to ONNX: {first_line(error)}. Export it as pt2."
        ) from error
    model = cast(Any, translated).model_proto
    _require_opset(model, opset)
    _forget_origin(model)
    try:
        onnx.save_model(model, str(path))
    except (OSError, ValueError) as error:
        raise cannot_write(path, error) from error


def _require_opset(model: Any, opset: int) -> None:
    """Raise where the exporter kept another opset: it only logs a conversion that failed."""
    got = {entry.domain: entry.version for entry in model.opset_import}.get("")
    if got != opset:
        raise ExportError(f"torch {torch.__version__} wrote ONNX opset {got} where {opset} was asked for.")


def _forget_origin(model: Any) -> None:
    """Remove what the exporter notes beside each node: stack traces and module names, which no runtime reads."""
    del model.graph.metadata_props[:]
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        del part.metadata_props[:]
    for tensor in model.graph.initializer:
        del tensor.metadata_props[:]
    for function in model.functions:
        del function.metadata_props[:]
        for node in function.node:
            del node.metadata_props[:]


def write_int8(source: Path, path: Path) -> None:
    """Write the graph with its matrix products in int8.

    Convolutions stay float32: quantising all operators costs accuracy and wins little.

    Args:
        source: the float32 graph.
        path: the new file.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # onnxruntime advises, on the root logger, to optimise the graph first; the exporter has done so.
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        quantize_dynamic(source, path, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        logging.disable(level)


def variants(directory: Path) -> tuple[Variant, ...]:
    """Return the graphs that the directory holds."""
    return tuple(variant for variant in VARIANTS if (directory / variant.file).is_file())


def consumer_features(directory: Path, variant: str, pixel_values: Tensor, num_layers: int) -> ConsumerFeatures:
    """Return the last layer by ONNX Runtime on the CPU, having run batches of 2 and 5 as well.

    Raises:
        ExportError: a batch changes an image's features.
    """
    import onnxruntime

    file = next(item.file for item in VARIANTS if item.name == variant)
    consumer, forward = f"ONNX Runtime {onnxruntime.__version__}", _open_graph(directory, file)
    layer = forward(pixel_values)
    check_batches(layer, forward, pixel_values, BATCH_COSINES[variant], f"{consumer} ({variant})")
    return ConsumerFeatures([layer], [], [], consumer, partial(forward, pixel_values))


def run_session(session: Any, directory: Path, pixel_values: Tensor) -> Layer:
    """Return a session's outputs as a layer."""
    outputs = session.run(None, {INPUT_NAME: pixel_values.numpy()})
    return as_layer([torch.from_numpy(output) for output in outputs], directory)


def consumer_pixels(directory: Path, image: Image) -> Tensor:
    """Return the image prepared as preprocessor.json says, `[1, 3, S, S]`: the graph itself has no preprocessing."""
    return signature_pixels(directory, image)


def loading_code() -> str:
    """Return the lines that run the export by ONNX Runtime, without torch."""
    return """\
import json

import numpy as np
import onnxruntime
from PIL import Image

prep = json.load(open(f"{directory}/preprocessor.json"))
session = onnxruntime.InferenceSession(f"{directory}/encoder.onnx")
image = Image.open("photo.jpg").convert("RGB").resize((prep["img_size"],) * 2, Image.Resampling.BICUBIC)
pixel_values = (np.asarray(image, np.float32) / 255 - prep["image_mean"]) / prep["image_std"]
features = session.run(["patch_tokens"], {"pixel_values": pixel_values.transpose(2, 0, 1)[None].astype(np.float32)})[0]
"""
