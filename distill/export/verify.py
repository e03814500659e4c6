"""The check every export passes before it is published: its consumer, in a fresh process, gives the same numbers.

"It loaded" proves nothing: the libraries concerned fill what they do not find with random weights and go on. So the
consumer's own class computes the golden image's features in a process of its own, and they are compared.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from distill.errors import ExportError
from distill.export.compare import Closeness, compare_features, compare_pixels
from distill.export.contract import TOLERANCE, Variant
from distill.export.files import MANIFEST_FILE, sha256, write_safetensors
from distill.export.fresh_process import run_consumer
from distill.export.golden import Golden, draw_image, read_golden
from distill.export.targets import find_target

__all__ = ["TOLERANCE", "VariantProof", "Verification", "verify_export"]

TIMEOUT_S = 3600.0
"""A hung consumer ends some time; verifying four graphs of 304M parameters takes minutes on slow cores."""


@dataclass(frozen=True)
class VariantProof:
    """What the fresh process proved of one variant.

    Attributes:
        name: "float32", "int8", ...
        file: file name inside the directory.
        size_bytes: of that file.
        worst_difference: largest absolute difference of any feature.
        tolerance: what it was allowed to be; None where only the cosine is bounded.
        min_cosine: smallest cosine of any token with the encoder's.
        cosine_bound: what it had to reach; None where only the difference is bounded.
        latency_ms: median of up to five passes at batch 1 on this machine's CPU; None where it could not be timed.
    """

    name: str
    file: str
    size_bytes: int
    worst_difference: float
    tolerance: float | None
    min_cosine: float
    cosine_bound: float | None
    latency_ms: float | None


@dataclass(frozen=True)
class Verification:
    """What the fresh process proved.

    Attributes:
        variants: each file or precision, the most exact first.
        worst_pixel_levels: largest difference after the consumer's own resize, in grey levels.
        consumer: class and library that computed.
        seconds: time the fresh process took.
    """

    variants: tuple[VariantProof, ...]
    worst_pixel_levels: float
    consumer: str
    seconds: float

    @property
    def worst_difference(self) -> float:
        """Largest absolute difference of the first variant."""
        return self.variants[0].worst_difference


@dataclass(frozen=True)
class _Response:
    tensors: dict[str, Tensor]
    report: dict[str, dict[str, Any]]
    seconds: float


def verify_export(directory: Path, *, timeout_s: float = TIMEOUT_S) -> Verification:
    """Return what the consumer's own class makes of an export, having compared it with the golden features.

    Args:
        directory: an export; it is only read.
        timeout_s: longest time the fresh process may take.

    Raises:
        ExportError: a file differs from the manifest, the consumer fails, misses or ignores a weight, or gives other
            features or pixels. The message names the number.
    """
    golden = read_golden(directory)
    _check_hashes(directory)
    variants = find_target(golden.target).variants(directory)
    if not variants:
        raise ExportError(f"{directory} holds no weights of the format {golden.target}; export again.")
    response = _consume(directory, golden, timeout_s)
    proofs = tuple(_prove(directory, golden, variant, response) for variant in variants)
    levels = compare_pixels(golden.preprocessing, golden.image, _photo(golden), response.tensors)
    return Verification(proofs, levels, str(response.report[variants[0].name]["consumer"]), response.seconds)


def _check_hashes(directory: Path) -> None:
    path = directory / MANIFEST_FILE
    if not path.is_file():
        return
    try:
        files: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["files"]
        changed = [name for name, entry in files.items() if sha256(directory / name) != entry["sha256"]]
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"{path} does not describe this directory ({error}); export again.") from error
    if changed:
        raise ExportError(
            f"{directory / changed[0]} is not the file that was published: its SHA-256 differs from {MANIFEST_FILE}. "
            "Copy or download the export again."
        )


def _photo(golden: Golden) -> Tensor:
    side = golden.preprocessing.img_size
    return torch.from_numpy(draw_image(side * 3 // 2 + 1, side * 2 + 3))


def _consume(directory: Path, golden: Golden, timeout_s: float) -> _Response:
    with tempfile.TemporaryDirectory(prefix="distill-verify-") as work:
        request, answer = Path(work, "request.safetensors"), Path(work, "response.safetensors")
        tensors = {
            "pixel_values": golden.preprocessing.normalise(golden.image),
            "image": golden.image.permute(1, 2, 0).contiguous(),
            "photo": _photo(golden),
            "num_layers": torch.tensor(len(golden.layers)),
        }
        write_safetensors(request, tensors)
        start = time.perf_counter()
        run_consumer(find_target(golden.target), [str(directory.resolve()), str(request), str(answer)], timeout_s)
        seconds = time.perf_counter() - start
        with safe_open(answer, framework="pt") as file:
            report = json.loads(file.metadata()["report"])
        return _Response(load_file(answer), report, seconds)


def _prove(directory: Path, golden: Golden, variant: Variant, response: _Response) -> VariantProof:
    report = response.report[variant.name]
    missing, unexpected = report["missing"], report["unexpected"]
    if missing or unexpected:
        raise ExportError(
            f"{report['consumer']} misses {len(missing)} weights of the {golden.target} export "
            f"{missing[:2]} and ignores {len(unexpected)} {unexpected[:2]}; both must be 0."
        )
    closeness: Closeness = compare_features(
        golden, response.tensors, variant.name, variant.bound, str(report["consumer"])
    )
    return VariantProof(
        name=variant.name,
        file=variant.file,
        size_bytes=(directory / variant.file).stat().st_size,
        worst_difference=closeness.worst_difference,
        tolerance=closeness.tolerance,
        min_cosine=closeness.min_cosine,
        cosine_bound=variant.bound.cosine,
        latency_ms=report["latency_ms"],
    )
