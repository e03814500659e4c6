"""The check every export passes before it is published: its consumer, in a fresh process, gives the same numbers.

"It loaded" proves nothing: the libraries concerned fill what they do not find with random weights and go on. So the
consumer's own class computes the golden image's features in a process of its own, and they are compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import distill
from distill.errors import ExportError
from distill.export.files import MANIFEST_FILE, sha256, write_safetensors
from distill.export.golden import Golden, draw_image, read_golden
from distill.export.targets import find_target

TOLERANCE = 1e-5
"""Largest absolute difference of a feature, float32."""

FLOAT32_STEPS = 2.0**-20
"""Eight float32 steps, relative to a layer's largest feature. It exceeds `TOLERANCE` only where features pass 10.5:
the outlier channels of large encoders reach hundreds, where neighbouring float32 numbers are already 3e-5 apart."""

PIXEL_TOLERANCE = 1e-5
"""Largest difference of a normalised pixel of an image that needs no resize."""

RESIZE_MAX_LEVELS = 4.0
RESIZE_MEAN_LEVELS = 0.25
"""Largest and mean difference in grey levels (of 255) after a resize. Consumers resize by Pillow or by torchvision;
bicubic in the one is within 2 levels of bicubic in the other, and bilinear is further on average."""


@dataclass(frozen=True)
class Verification:
    """What the fresh process proved.

    Attributes:
        worst_difference: largest absolute difference of any feature.
        tolerance: what it was allowed to be.
        worst_pixel_levels: largest difference after the consumer's own resize, in grey levels.
        consumer: class and library that computed.
        seconds: time the fresh process took.
    """

    worst_difference: float
    tolerance: float
    worst_pixel_levels: float
    consumer: str
    seconds: float


@dataclass(frozen=True)
class _Response:
    tensors: dict[str, Tensor]
    report: dict[str, Any]
    seconds: float


def verify_export(directory: Path, *, timeout_s: float = 900.0) -> Verification:
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
    response = _consume(directory, golden, timeout_s)
    _check_keys(golden, response)
    worst, tolerance = _check_features(golden, response)
    levels = _check_pixels(golden, response)
    return Verification(worst, tolerance, levels, str(response.report["consumer"]), response.seconds)


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
        _run_fresh_process([golden.target, str(directory.resolve()), str(request), str(answer)], timeout_s)
        seconds = time.perf_counter() - start
        with safe_open(answer, framework="pt") as file:
            report = json.loads(file.metadata()["report"])
        return _Response(load_file(answer), report, seconds)


def _run_fresh_process(arguments: list[str], timeout_s: float) -> None:
    find_target(arguments[0])
    package_root = str(Path(distill.__file__).parents[1])
    search_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": search_path, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    # -P: the folder the user stands in is no place to import from.
    command = [sys.executable, "-P", "-m", "distill.export.consume", *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise ExportError(
            f"The fresh process that loads the {arguments[0]} export did not end within {timeout_s:g} s; "
            "nothing was published. Try again on an idle machine."
        ) from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()[-3:] or [f"exit code {done.returncode}"]
        raise ExportError(f"The consumer cannot load the {arguments[0]} export: {' | '.join(lines)}")


def _check_keys(golden: Golden, response: _Response) -> None:
    missing, unexpected = response.report["missing"], response.report["unexpected"]
    if missing or unexpected:
        raise ExportError(
            f"{response.report['consumer']} misses {len(missing)} weights of the {golden.target} export "
            f"{missing[:2]} and ignores {len(unexpected)} {unexpected[:2]}; both must be 0."
        )


def _check_features(golden: Golden, response: _Response) -> tuple[float, float]:
    worst, allowed = 0.0, TOLERANCE
    for position, (prefix, patches) in enumerate(golden.layers):
        layer = position - len(golden.layers)
        largest = max(float(tensor.abs().max()) for tensor in (prefix, patches) if tensor.numel())
        tolerance = max(TOLERANCE, FLOAT32_STEPS * largest)
        for name, expected in (("prefix", prefix), ("patches", patches)):
            got = response.tensors[f"{position}.{name}"]
            if got.shape != expected.shape:
                raise ExportError(
                    f"{response.report['consumer']} gives {name} tokens of shape {tuple(got.shape)} in layer {layer}, "
                    f"the encoder {tuple(expected.shape)}; the {golden.target} export is not published."
                )
            difference = float((got - expected).abs().max()) if expected.numel() else 0.0
            # Written so that a NaN fails as well.
            if not difference <= tolerance:
                raise ExportError(
                    f"{response.report['consumer']} gives other features than the encoder: layer {layer}, {name} "
                    f"tokens differ by {difference:.3g}, allowed is {tolerance:.3g}; the {golden.target} export is "
                    "not published."
                )
            worst, allowed = max(worst, difference), max(allowed, tolerance)
    return worst, allowed


def _check_pixels(golden: Golden, response: _Response) -> float:
    preprocessing = golden.preprocessing
    side, levels_per_unit = preprocessing.img_size, 255 * torch.tensor(preprocessing.image_std).view(3, 1, 1)
    for name in ("image", "photo"):
        shape = tuple(response.tensors[name].shape)
        if shape != (1, 3, side, side):
            raise ExportError(
                f"The export's preprocessing gives {shape} pixels, the encoder needs {(1, 3, side, side)}: size, "
                "crop or tiling in its preprocessing config is wrong."
            )
    difference = float((response.tensors["image"] - preprocessing.normalise(golden.image)).abs().max())
    if not difference <= PIXEL_TOLERANCE:
        raise ExportError(
            f"The export's preprocessing normalises otherwise than the encoder: pixels differ by {difference:.3g}, "
            f"allowed is {PIXEL_TOLERANCE:g}. Its mean and std must be {preprocessing.image_mean} and "
            f"{preprocessing.image_std}."
        )
    from PIL import Image

    expected = preprocessing.prepare(Image.fromarray(_photo(golden).numpy()))
    levels = (response.tensors["photo"] - expected).abs() * levels_per_unit
    worst, mean = float(levels.max()), float(levels.mean())
    if not (worst <= RESIZE_MAX_LEVELS and mean <= RESIZE_MEAN_LEVELS):
        raise ExportError(
            f"The export's preprocessing resizes otherwise than the encoder: {worst:.1f} grey levels at worst and "
            f"{mean:.2f} on average, allowed are {RESIZE_MAX_LEVELS:g} and {RESIZE_MEAN_LEVELS:g}. It must squash by "
            "bicubic resampling, without a crop."
        )
    return worst
