"""The encoder as a graph compiler sees it: pixels of one fixed size in, patch and prefix tokens of the last layer out.

Shared by the targets whose consumer runs a graph and no Python class (`onnx`, `pt2`, `executorch`).

Legend: B images, S pixels a side, P prefix tokens, N patch tokens, D the width of the last layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from distill.encoder import Layer, TimmLayoutEncoder
from distill.errors import ExportError
from distill.export.contract import Reading
from distill.export.files import write_json
from distill.export.golden import Preprocessing
from distill.export.weights import read_timm_weights, set_strides, timm_skeleton

if TYPE_CHECKING:
    from PIL.Image import Image

INPUT_NAME = "pixel_values"
PATCHES_NAME = "patch_tokens"
PREFIX_NAME = "prefix_tokens"
SIGNATURE_FILE = "preprocessor.json"
BATCHES = (2, 5)
"""Sizes that a graph of any batch is tried with: two, so that neither can be written into it."""
MAX_BATCH = 1024
"""Largest batch a graph is exported for; a bound lets the tracer prove its shapes."""


class GraphModule(nn.Module):
    """A timm model that returns the tokens of its last block, before any final norm.

    Args:
        model: timm's model with the encoder's weights, in eval mode.
        num_prefix_tokens: 0 leaves the second output away: runtimes disagree about empty tensors.
    """

    def __init__(self, model: nn.Module, num_prefix_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Return `(patch_tokens [B, N, D], prefix_tokens [B, P, D])`, the second only where P > 0.

        Args:
            pixel_values: normalised images, `[B, 3, S, S]`.
        """
        options: dict[str, Any] = {"indices": 1, "norm": False, "output_fmt": "NCHW", "intermediates_only": True}
        if not self.num_prefix_tokens:
            return (cast(Any, self.model).forward_intermediates(pixel_values, **options)[-1].flatten(2).mT,)
        patches, prefix = cast(Any, self.model).forward_intermediates(
            pixel_values, return_prefix_tokens=True, **options
        )[-1]
        return patches.flatten(2).mT, prefix


class HalfGraphModule(nn.Module):
    """A graph that takes and returns float32 and computes in float16 between.

    Args:
        graph: its weights are turned into float16 in place.
    """

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        # Not `graph`: that is a member of every traced module.
        self.inner = graph.half()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Return what `GraphModule` returns, float32."""
        return tuple(output.float() for output in self.inner(pixel_values.half()))


def build_graph_module(encoder: TimmLayoutEncoder) -> GraphModule:
    """Return timm's own model with a copy of the encoder's weights, in eval mode, on the CPU, float32.

    It is rebuilt rather than borrowed, so that neither a training-only argument nor a hook of the student is traced.

    Raises:
        ExportError: the weights are not those of the architecture.
    """
    import timm

    skeleton = timm_skeleton(encoder)
    weights, args = read_timm_weights(encoder, skeleton), encoder.timm_model_args
    if hasattr(skeleton, "dynamic_img_size"):
        # A model of any size resamples its positions in the graph, even to the size they have, by an operator that
        # few runtimes know.
        args["dynamic_img_size"] = False
    # Building a model draws from the global generator, which belongs to the caller.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        model = timm.create_model(encoder.timm_architecture, pretrained=False, **args)
    set_strides(model, encoder)
    model.load_state_dict(weights, strict=True, assign=True)
    return GraphModule(model.requires_grad_(False).eval(), encoder.num_prefix_tokens).eval()


GRAPH_READING = Reading(
    cls_in_output=False,
    class_token="{count} token(s), in a second output (`prefix_tokens`) behind the patches; drop nothing.",
    preprocessing="The graph holds none of this: preprocessor.json has the numbers, and the lines above apply them.",
)


def output_names(num_prefix_tokens: int) -> list[str]:
    """Return the names of the graph's outputs, in order."""
    return [PATCHES_NAME, PREFIX_NAME] if num_prefix_tokens else [PATCHES_NAME]


def trace(module: nn.Module, img_size: int, *, batch: int | None, format: str) -> torch.export.ExportedProgram:
    """Return the graph of `pixel_values [B, 3, S, S]`, without the paths of the machine it was traced on.

    Args:
        module: a `GraphModule` or `HalfGraphModule`.
        img_size: S.
        batch: the only B; None traces a graph of any B from 1 to `MAX_BATCH`.
        format: the target, for messages.

    Raises:
        ExportError: the model's Python cannot be traced.
    """
    # torch.export takes a dimension whose example is 1 for a constant, so the example of a free one is 2.
    example = torch.zeros(batch or 2, 3, img_size, img_size)
    free = {INPUT_NAME: {0: torch.export.Dim("batch", min=1, max=MAX_BATCH)}}
    try:
        program = torch.export.export(module, (example,), dynamic_shapes=None if batch else free)
    except (RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
        raise ExportError(
            f"torch {torch.__version__} cannot trace this student for the {format} export: "
            f"{first_line(error)}. Export it as timm instead."
        ) from error
    forget_paths(program.graph_module)
    return program


def first_line(error: BaseException) -> str:
    """Return the first line of what an error, or the one that caused it, says."""
    cause = error.__cause__ or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")


def forget_paths(graph_module: nn.Module) -> None:
    """Remove from every node the stack trace, which names files of the machine that traced it."""
    for part in graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                node.meta.pop("stack_trace", None)


def patch_grid(encoder: TimmLayoutEncoder) -> tuple[int, int]:
    """Return rows and columns of the last layer's patch tokens at the encoder's image size."""
    side = encoder.img_size
    module = cast(nn.Module, encoder)
    with torch.inference_mode():
        device = next(module.parameters()).device
        _, patches = encoder.forward_hidden_states(torch.zeros(1, 3, side, side, device=device), 1)[-1]
    return int(patches.shape[1]), int(patches.shape[2])


def write_signature(
    encoder: TimmLayoutEncoder, directory: Path, *, batch: int | None, left_out: Mapping[str, str] | None = None
) -> None:
    """Write preprocessor.json: how an image becomes the graph's input, and what the outputs are.

    Args:
        encoder: whose.
        directory: where to.
        batch: the only batch size the graph takes; None for any.
        left_out: files that the export lacks, and why.
    """
    rows, columns = patch_grid(encoder)
    size, width = encoder.img_size, encoder.embed_dim
    shapes = {PATCHES_NAME: [batch or "batch", rows * columns, width]}
    if encoder.num_prefix_tokens:
        shapes[PREFIX_NAME] = [batch or "batch", encoder.num_prefix_tokens, width]
    signature = {
        "input": {"name": INPUT_NAME, "shape": [batch or "batch", 3, size, size], "dtype": "float32"},
        "outputs": shapes,
        "patch_grid": [rows, columns],
        "select_layer": -1,
        "norm_after": False,
        "channel_order": "RGB",
        "resize": "squash",
        "interpolation": "bicubic",
        "img_size": size,
        "rescale_factor": 1 / 255,
        "image_mean": list(encoder.image_mean),
        "image_std": list(encoder.image_std),
        "left_out": dict(left_out or {}),
    }
    write_json(directory / SIGNATURE_FILE, signature)


def read_signature(directory: Path) -> dict[str, Any]:
    """Return what `write_signature` wrote.

    Raises:
        ExportError: the file is missing or damaged.
    """
    path = directory / SIGNATURE_FILE
    try:
        return cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} is missing or damaged ({error}); export again.") from error


def signature_pixels(directory: Path, image: Image) -> Tensor:
    """Return `[1, 3, S, S]` float32: the image prepared as preprocessor.json says, by Pillow."""
    signature = read_signature(directory)
    mean, std = signature["image_mean"], signature["image_std"]
    return Preprocessing(signature["img_size"], tuple(mean), tuple(std)).prepare(image)


def as_layer(outputs: list[Tensor], directory: Path) -> Layer:
    """Return a graph's outputs as `(prefix [B, P, D], patches [B, H, W, D])`."""
    rows, columns = read_signature(directory)["patch_grid"]
    patches = outputs[0].unflatten(1, (rows, columns))
    prefix = outputs[1] if len(outputs) > 1 else patches.new_zeros(len(patches), 0, patches.shape[-1])
    return prefix, patches


def check_batches(single: Layer, of_batch: Any, pixel_values: Tensor, min_cosine: float, who: str) -> None:
    """Return when images in a batch of 2 and of 5 get the features they get alone.

    Args:
        single: the last layer of `pixel_values` alone.
        of_batch: the function of `[B, 3, S, S]` that gives a last layer.
        pixel_values: `[1, 3, S, S]`; the other images of a batch are shifted copies of it.
        min_cosine: smallest cosine of any token with the one it has alone.
        who: for messages.

    Raises:
        ExportError: it does not.
    """
    shifted = pixel_values.roll(7, dims=-1)
    alone = of_batch(shifted)
    for size in BATCHES:
        images = torch.cat([pixel_values, *[pixel_values.roll(5 * i, dims=-2) for i in range(1, size - 1)], shifted])
        prefix, patches = of_batch(images)
        for row, expected in ((0, single), (size - 1, alone)):
            cosine = lowest_cosine((prefix[row : row + 1], patches[row : row + 1]), expected)
            if not cosine >= min_cosine:
                raise ExportError(
                    f"{who} gives image {row} of a batch of {size} other features than alone: cosine {cosine:.6f}, at "
                    f"least {min_cosine:g} is asked for."
                )


def lowest_cosine(got: Layer, expected: Layer) -> float:
    """Return the smallest cosine of any token with the one it should be; a NaN anywhere gives NaN."""
    pairs = [(a.double(), b.double()) for a, b in zip(got, expected, strict=True) if b.numel()]
    cosines = [nn.functional.cosine_similarity(a, b, dim=-1).flatten() for a, b in pairs]
    return float(torch.cat(cosines).min())
