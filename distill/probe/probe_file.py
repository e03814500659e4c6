"""Writes probe.json and, beside it, the parts of every figure by image, so that other encoders can be paired later."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from distill.errors import ConfigError
from distill.probe.rung import RungScore
from distill.probe.scores import Scores

FORMAT = "distill-probe/2"
PER_IMAGE_SUFFIX = ".per_image.safetensors"


def write_probe(result: Mapping[str, Any], scores: Mapping[str, Scores], target: Path) -> None:
    """Write both files atomically: a reader sees the old ones or the new ones, never a part of one.

    Args:
        result: the content of probe.json, less "per_image" and "tensors".
        scores: by encoder name, in the order of the result's encoders.
        target: the JSON file; the other has its name with `PER_IMAGE_SUFFIX`.

    Raises:
        ConfigError: a file cannot be written.
    """
    tensors, listing = per_image_tensors(scores)
    beside = target.with_name(target.stem + PER_IMAGE_SUFFIX)
    content = {**result, "per_image": beside.name if tensors else None, "tensors": listing}
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    files: list[tuple[Path, bytes]] = [(beside, save(tensors))] if tensors else []
    _write_all([*files, (target, text.encode())], target)


def per_image_tensors(scores: Mapping[str, Scores]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return every figure's parts as named tensors, and what each name stands for."""
    tensors: dict[str, Tensor] = {}
    listing: list[dict[str, Any]] = []
    for number, (name, encoder) in enumerate(scores.items()):
        for position, score in enumerate(encoder.rungs):
            prefix = f"E{number}/M{position}"
            tensors.update({f"{prefix}/{part}": value for part, value in _parts(score).items()})
            listing.append(
                {
                    "encoder": name,
                    "metric": score.metric,
                    "at": None if score.at is None else list(score.at),
                    "prefix": prefix,
                    "data": score.data,
                    "domain_names": list(score.domain_names),
                }
            )
    return tensors, listing


def _parts(score: RungScore) -> dict[str, Tensor]:
    parts = score.per_image
    found = {
        "rows": parts.rows.astype(np.int64),
        "numerator": parts.numerator.astype(np.float64),
        "denominator": parts.denominator.astype(np.float64),
        "groups": parts.groups.astype(np.int64),
    }
    if parts.domains is not None:
        found["domains"] = parts.domains.astype(np.int64)
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in found.items()}


def _write_all(files: list[tuple[Path, bytes]], target: Path) -> None:
    temporaries: list[Path] = []
    try:
        for file, content in files:
            with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as opened:
                temporaries.append(Path(opened.name))
                opened.write(content)
                opened.flush()
                os.fsync(opened.fileno())
            temporaries[-1].chmod(0o644)  # temporary files are private; results are not
        # The JSON file is last: what it names is there when it appears.
        for (file, _), temporary in zip(files, temporaries, strict=True):
            temporary.replace(file)
    except OSError as error:
        raise ConfigError(f"--out {target} cannot be written: {error.strerror}. Free space or name another.") from error
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
