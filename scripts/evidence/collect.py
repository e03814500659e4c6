"""Read what the runs of a study were judged: each test image's part of every figure, by arm and seed.

An arm is whatever is compared: an initialisation, a teacher, or a variant over its seeds.
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
from variants import Study, Variant

from distill.probe.results import ProbeResults
from distill.probe.results_file import read_probe

Floats = NDArray[np.float64]
Key = tuple[str, str]
"""Data set and metric."""

RECEIPTS: Key = ("receipts", "cer")


@dataclass(frozen=True)
class Parts:
    """One figure of one run: it is `sum(numerator) / sum(denominator)` over test images or lines.

    Attributes:
        data: fingerprint of the images, or empty.
        rows: `[n]`, which images.
        numerator: `[n]`.
        denominator: `[n]`.
        groups: `[n]`, what is resampled as a whole.
    """

    data: str
    rows: NDArray[np.int64]
    numerator: Floats
    denominator: Floats
    groups: NDArray[np.int64]

    @property
    def value(self) -> float:
        """The figure."""
        return float(self.numerator.sum() / self.denominator.sum())

    def is_of(self, other: Parts) -> bool:
        """Whether two figures are of the same images, in the same groups."""
        return (
            self.data == other.data
            and np.array_equal(self.rows, other.rows)
            and np.array_equal(self.groups, other.groups)
        )


@dataclass
class Arm:
    """What is compared.

    Attributes:
        name: of its row.
        kind: "initial", "variant" or "teacher".
        figures: by data set and metric, then by seed.
        costs: of each seed's training, as `cost.json` has them, with `states_cpu_s` where teacher states were stored.
        variant: None for initialisations and teachers.
    """

    name: str
    kind: str
    figures: dict[Key, dict[int, Parts]] = field(default_factory=dict[Key, dict[int, Parts]])
    costs: dict[int, dict[str, Any]] = field(default_factory=dict[int, dict[str, Any]])
    variant: Variant | None = None

    def parts(self, key: Key) -> list[Parts]:
        """A figure of each seed, in their order.

        Raises:
            ValueError: the seeds were judged on other images.
        """
        found = [parts for _, parts in sorted(self.figures.get(key, {}).items())]
        if any(not parts.is_of(found[0]) for parts in found):
            raise ValueError(f"{self.name}'s seeds were judged on other images of {key[0]}: delete what is older")
        return found

    def values(self, key: Key) -> Floats:
        """The figure of every seed, `[S]`."""
        return np.asarray([parts.value for parts in self.parts(key)])


def collect(folder: Path, study: Study) -> dict[str, Arm]:
    """Return the arms of a study by name: initialisations, variants in the study's order, teachers.

    Args:
        folder: with a folder `<variant>-seed<number>` for each run and `company` for what they are judged beside; what
            was not judged on every data set is passed over, and so are runs that the study does not have.
        study: says which runs there are.

    Raises:
        ValueError: no run was judged.
    """
    initial: dict[str, Arm] = {}
    variants: dict[str, Arm] = {}
    teachers: dict[str, Arm] = {}
    for variant, seed in study.runs():
        run = folder / f"{variant.name}-seed{seed}"
        if not all((run / study.look.folder / f"{dataset}.json").is_file() for dataset in study.datasets):
            continue  # its judging was stopped half way
        for _, key, parts in _judged(run / "judge", "student", "other"):
            arm = variants.setdefault(variant.name, Arm(variant.name, "variant", variant=variant))
            arm.figures.setdefault(key, {})[seed] = parts
        if variant.name in variants and (run / "cost.json").is_file():
            variants[variant.name].costs[seed] = _cost(run, folder, study, variant, seed)
    # Once each, though many variants share them.
    for name in dict.fromkeys(variant.initial for variant in study.variants):
        for _, key, parts in _judged(company(folder, "initial", name), "initial"):
            initial.setdefault(name, Arm(name, "initial")).figures[key] = {0: parts}
    for names in dict.fromkeys(variant.teachers for variant in study.variants):
        for encoder, key, parts in _judged(company(folder, "teacher", " and ".join(names)), "teacher"):
            teachers.setdefault(encoder, Arm(f"teacher {encoder}", "teacher")).figures[key] = {0: parts}
    if not variants:
        raise ValueError(f"{folder} holds no judged run; run scripts/evidence.sh first.")
    return {arm.name: arm for arm in [*initial.values(), *variants.values(), *teachers.values()]}


def company(folder: Path, role: str, name: str) -> Path:
    """Return where the results of an initialisation, or of teachers, lie in a study's folder."""
    return folder / "company" / f"{role} {name}".replace(" ", "_")


def _cost(run: Path, folder: Path, study: Study, variant: Variant, seed: int) -> dict[str, Any]:
    cost = json.loads((run / "cost.json").read_text("utf-8"))
    name = study.states_name(variant, seed)
    if name is not None:
        file = folder.parent / "states" / name / "complete.json"
        cost["states_cpu_s"] = json.loads(file.read_text("utf-8"))["cpu_s"] if file.is_file() else float("nan")
    return cost


def _judged(folder: Path, *roles: str) -> Iterator[tuple[str, Key, Parts]]:
    """Yield each figure in a folder of results that is of an encoder of these roles, with the encoder's name."""
    for file in sorted(folder.rglob("*.json")):
        if file.stem == RECEIPTS[0]:
            for encoder, entry in json.loads(file.read_text("utf-8")).items():
                if entry["role"] in roles:
                    yield encoder, RECEIPTS, _receipt_parts(entry)
            continue
        found = read_probe(file)
        wanted = {encoder.name for encoder in found.encoders if encoder.role in roles}
        for encoder, metric, parts in _probe_parts(found):
            if encoder in wanted:
                yield encoder, (file.stem, metric), parts


def _receipt_parts(entry: dict[str, Any]) -> Parts:
    return Parts(
        entry["data"],
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
            yield entry.encoder, entry.metric, Parts(entry.data, rows, numerator[:, 0], denominator[:, 0], groups)
