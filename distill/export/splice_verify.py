"""Whether a spliced VLM's own class computes the encoder's features: a fresh process tells, before it is published."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from distill.encoder import Layer, TimmLayoutEncoder
from distill.errors import ExportError
from distill.export.compare import compare_features
from distill.export.contract import FLOAT32_BOUND, Bound
from distill.export.files import write_safetensors
from distill.export.fresh_process import run_module
from distill.export.golden import Golden

ROUNDED_BOUND = Bound(cosine=0.999)
"""What features may lose by weights in half precision; the rounded weights themselves are held to 1e-5."""


@dataclass(frozen=True)
class TowerProof:
    """What the fresh process proved.

    Attributes:
        worst_difference: largest difference from the encoder's features, with its weights in the VLM's precision.
        min_cosine: smallest cosine of any token with the encoder's own features, its weights in float32.
        consumer: the class that computed, and its library's version.
    """

    worst_difference: float
    min_cosine: float
    consumer: str


def verify_tower(
    kind: str, directory: Path, encoder: TimmLayoutEncoder, golden: Golden, dtype: torch.dtype, timeout_s: float
) -> TowerProof:
    """Return how close the tower of a spliced VLM is to the encoder.

    Args:
        kind: `model_type` of the VLM.
        directory: the VLM; it is only read.
        encoder: what was put into it.
        golden: the encoder's features.
        dtype: the precision that the tower's weights are stored in.
        timeout_s: longest time the fresh process may take.

    Raises:
        ExportError: it cannot be loaded, misses or ignores a weight of the tower, or gives other features.
    """
    tensors, report = _consume(kind, directory, golden, timeout_s)
    who, missing, unexpected = str(report["consumer"]), report["missing"], report["unexpected"]
    if missing or unexpected:
        raise ExportError(
            f"{who} misses {len(missing)} weights of the {golden.target} {missing[:2]} and ignores "
            f"{len(unexpected)} {unexpected[:2]}; both must be 0. Nothing was written."
        )
    is_rounded = dtype != torch.float32
    reference = replace(golden, layers=_rounded_layers(encoder, golden, dtype)) if is_rounded else golden
    exact = compare_features(reference, tensors, "tower", FLOAT32_BOUND, who)
    return TowerProof(
        exact.worst_difference, compare_features(golden, tensors, "tower", ROUNDED_BOUND, who).min_cosine, who
    )


def _rounded_layers(encoder: TimmLayoutEncoder, golden: Golden, dtype: torch.dtype) -> list[Layer]:
    """Return the golden layers as timm computes them in float32 with the weights that a smaller precision leaves."""
    import timm

    model: Any = timm.create_model(encoder.timm_architecture, **encoder.timm_model_args).eval()
    model.load_state_dict({key: value.to(dtype).float() for key, value in encoder.timm_state_dict().items()})
    with torch.inference_mode():
        outputs = model.forward_intermediates(
            golden.preprocessing.normalise(golden.image),
            indices=len(golden.layers),
            norm=False,
            output_fmt="NCHW",
            return_prefix_tokens=True,
            intermediates_only=True,
        )
    return [(prefix, patches.permute(0, 2, 3, 1)) for patches, prefix in outputs]


def _consume(kind: str, directory: Path, golden: Golden, timeout_s: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what the VLM's tower computed in a fresh process, and its report."""
    with tempfile.TemporaryDirectory(prefix="distill-splice-") as work:
        request, response = Path(work, "request.safetensors"), Path(work, "response.safetensors")
        pixel_values = golden.preprocessing.normalise(golden.image).contiguous()
        count = torch.tensor(len(golden.layers))
        write_safetensors(request, {"pixel_values": pixel_values, "num_layers": count})
        run_module(
            "distill.export.splice_consume",
            [kind, str(directory), str(request), str(response)],
            folder=None,
            timeout_s=timeout_s,
            late=f"Loading the spliced {kind} took more than {timeout_s:g} s; nothing was written.",
            failed=f"The spliced {kind} cannot be loaded; nothing was written",
        )
        with safe_open(response, framework="pt") as file:
            report: dict[str, Any] = json.loads(file.metadata()["report"])
        return load_file(response), report
