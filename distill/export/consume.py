"""The fresh process: loads an export as a stranger would and says what came out.

Run as `python -m distill.export.consume FORMAT DIRECTORY REQUEST RESPONSE`. It imports torch, safetensors and the
consumer (transformers, timm, ...), but no model code of this project, so that it sees what a user will see.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.export.targets import find_target
from distill.heap import keep_freed_memory

TIMED_RUNS, TIMED_S = 5, 10.0
"""At most so many runs, and none is begun after so many seconds: a run of 304M parameters takes seconds on a CPU."""


def main(arguments: list[str]) -> None:
    """Read REQUEST (`pixel_values`, images, `num_layers`), run the consumer on each variant, write RESPONSE.

    Args:
        arguments: format, export directory, request file, response file.
    """
    keep_freed_memory()
    target, directory = find_target(arguments[0]), Path(arguments[1])
    request = load_file(arguments[2])
    num_layers, pixel_values = int(request.pop("num_layers")), request.pop("pixel_values")
    response: dict[str, Tensor] = {
        name: target.consumer_pixels(directory, Image.fromarray(image.numpy())).contiguous()
        for name, image in request.items()
    }
    report: dict[str, dict[str, Any]] = {}
    for variant in target.variants(directory):
        features = target.consumer_features(directory, variant.name, pixel_values, num_layers)
        for position, (prefix, patches) in enumerate(features.layers):
            # A copy: a consumer may hand out memory that its next call reuses.
            response[f"{variant.name}.{position}.prefix"] = prefix.detach().clone().contiguous()
            response[f"{variant.name}.{position}.patches"] = patches.detach().clone().contiguous()
        report[variant.name] = {
            "missing": features.missing,
            "unexpected": features.unexpected,
            "consumer": features.consumer,
            "latency_ms": None if features.forward is None else _median_ms(features.forward),
        }
    save_file(response, arguments[3], metadata={"report": json.dumps(report)})


def _median_ms(forward: Callable[[], object]) -> float:
    """Return the median duration in milliseconds; the features were computed once before, so it is warm."""
    durations: list[float] = []
    while len(durations) < TIMED_RUNS and sum(durations) < TIMED_S:
        start = time.perf_counter()
        forward()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations) * 1e3


if __name__ == "__main__":
    main(sys.argv[1:])
