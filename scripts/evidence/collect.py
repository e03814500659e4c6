"""Read what the runs of a study were judged: each test image's part of every figure, by arm and seed.

An arm is whatever is compared: the initialisation, a teacher, or a variant over its seeds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from distill.probe.results import ProbeResults
from distill.probe.results_file import read_probe

Floats = NDArray[np.float64]
Key = tuple[str, str]
"""Data set and metric."""

RECEIPTS: Key = ("receipts", "cer")
INITIAL = "initialisation"
KEPT = ("initial", "teacher")
"""The initialisation as a teacher, which the initial student says already."""


@dataclass(frozen=True)
class Parts:
    """One figure of one run: it is `sum(numerator) / sum(denominator)` over test images or lines.

    Attributes:
        rows: `[n]`, which images.
        numerator: `[n]`.
        denominator: `[n]`.
        groups: `[n]`, what is resampled as a whole.
    """

    rows: NDArray[np.int64]
    numerator: Floats
    denominator: Floats
    groups: NDArray[np.int64]

    @property
    def value(self) -> float:
        """The figure."""
        return float(self.numerator.sum() / self.denominator.sum())


@dataclass
class Arm:
    """What is compared: figures by data set and metric, then by seed; and what each seed's training cost."""

    name: str
    kind: str
    figures: dict[Key, dict[int, Parts]] = field(default_factory=dict[Key, dict[int, Parts]])
    costs: dict[int, dict[str, Any]] = field(default_factory=dict[int, dict[str, Any]])

    def rows(self, key: Key) -> NDArray[np.int64]:
        """Which images a figure is of, `[n]`."""
        return next(iter(self.figures[key].values())).rows

    def values(self, key: Key) -> Floats:
        """The figure of every seed, `[S]`."""
        return np.asarray([parts.value for _, parts in sorted(self.figures.get(key, {}).items())])


def collect(folder: Path) -> dict[str, Arm]:
    """Return the arms of a study by name, in the order initialisations, variants, teachers.

    Args:
        folder: with a folder `<variant>-seed<number>` for each run; runs that were not judged are passed over.

    Raises:
        ValueError: no run was judged.
    """
    arms: dict[str, Arm] = {}
    for run in sorted(folder.glob("*-seed*")):
        variant, _, number = run.name.rpartition("-seed")
        cost = run / "cost.json"
        for encoder, role, key, parts in _judged(run):
            if (encoder, role) == KEPT:
                continue
            name, kind = _arm_of(encoder, role, variant)
            arm = arms.setdefault(name, Arm(name, kind))
            arm.figures.setdefault(key, {})[int(number) if kind == "variant" else 0] = parts
            if kind == "variant" and cost.is_file():
                arm.costs[int(number)] = json.loads(cost.read_text("utf-8"))
    if not arms:
        raise ValueError(f"{folder} holds no judged run; run scripts/evidence.sh first.")
    order = ("initial", "variant", "teacher")
    return dict(sorted(arms.items(), key=lambda item: order.index(item[1].kind)))


def _judged(run: Path) -> Iterator[tuple[str, str, Key, Parts]]:
    """Yield each figure of a run with the encoder's name and role."""
    for file in sorted((run / "judge").rglob("*.json")):
        if file.stem == RECEIPTS[0]:
            for encoder, entry in json.loads(file.read_text("utf-8")).items():
                yield encoder, entry["role"], RECEIPTS, _receipt_parts(entry)
            continue
        found = read_probe(file)
        roles = {encoder.name: encoder.role for encoder in found.encoders}
        for encoder, metric, parts in _probe_parts(found):
            yield encoder, roles[encoder], (file.stem, metric), parts


def initial_of(variant: str) -> str:
    """Return the arm that a variant's student began as: variants named "random" have one of their own."""
    return f"{INITIAL} of {variant}" if "random" in variant else INITIAL


def _arm_of(encoder: str, role: str, variant: str) -> tuple[str, str]:
    if role == "initial":
        return initial_of(variant), "initial"
    if role == "teacher":
        return f"teacher {encoder}", "teacher"
    return variant, "variant"


def _receipt_parts(entry: dict[str, Any]) -> Parts:
    return Parts(
        np.asarray(entry["rows"], dtype=np.int64),
        np.asarray(entry["edits"], dtype=np.float64),
        np.asarray(entry["characters"], dtype=np.float64),
        np.asarray(entry["groups"], dtype=np.int64),
    )


def _probe_parts(found: ProbeResults) -> Iterator[tuple[str, str, Parts]]:
    if found.per_image is None:
        return
    tensors = load_file(found.per_image)
    for entry in found.tensors:
        if entry.at is None and entry.metric.endswith("_top1"):
            rows, numerator, denominator, groups = (
                tensors[f"{entry.prefix}/{part}"] for part in ("rows", "numerator", "denominator", "groups")
            )
            yield entry.encoder, entry.metric, Parts(rows, numerator[:, 0], denominator[:, 0], groups)
