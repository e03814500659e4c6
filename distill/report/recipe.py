"""What made a run, and what can be done with it: parameters, versions, exports, licences, next commands."""

from __future__ import annotations

import csv
import json
import platform
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, Literal, cast

import torch
import yaml

from distill import __version__
from distill.checkpoint import RunDir, build_encoder
from distill.errors import DistillError
from distill.export.provenance import Source, read_provenance
from distill.export.targets import find_target
from distill.probe.number_text import size_text
from distill.report.metrics_csv import Series

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "open-clip-torch",
    "lightning",
    "torchmetrics",
    "grain",
    "transformers",
    "safetensors",
    "pillow",
    "numpy",
)


@dataclass(frozen=True)
class Part:
    """A teacher or student of the recipe; `num_params` is None where its class cannot be built here."""

    kind: Literal["teacher", "student"]
    name: str
    class_path: str
    num_params: int | None


@dataclass(frozen=True)
class ExportEntry:
    """One export of the run.

    Attributes:
        name: its folder.
        size: of its files, as text.
        verified: what its verification proved, or "".
        code: Python that loads it, or "".
    """

    name: str
    size: str
    verified: str
    code: str


def read_parts(run: RunDir) -> list[Part]:
    """Return the run's teachers and students with their parameter counts; no weight is read or held in memory."""
    kinds: tuple[tuple[Literal["teacher", "student"], Literal["teachers", "students"], list[str]], ...] = (
        ("teacher", "teachers", run.teacher_names),
        ("student", "students", run.student_names),
    )
    parts: list[Part] = []
    for kind, key, names in kinds:
        for name in names:
            spec = run.spec(key, name)[1]
            parts.append(Part(kind, name, str(spec.get("class_path", "")), _count_parameters(spec)))
    return parts


def _count_parameters(spec: dict[str, Any]) -> int | None:
    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in build_encoder(spec).parameters())
    except DistillError:
        return None


def read_versions() -> list[tuple[str, str]]:
    """Return (name, version) of Python, this package and the packages it rests on, those that are installed."""
    found = [("encoder-distill", __version__), ("python", platform.python_version())]
    for package in PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return found


def read_exports(run: Path) -> list[ExportEntry]:
    """Return the exports under RUN/exports, by name."""
    root = run / "exports"
    folders = (
        sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if root.is_dir()
        else []
    )
    return [_export_entry(folder) for folder in folders]


def _export_entry(folder: Path) -> ExportEntry:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    manifest = _manifest(folder)
    proof: Any = manifest.get("verification")
    proof = cast(dict[str, Any], proof) if isinstance(proof, dict) else {}
    verified = ""
    if isinstance(proof.get("worst_difference"), int | float) and proof.get("consumer"):
        verified = f"features reproduced by {proof['consumer']} within {proof['worst_difference']:.1e}"
    try:
        code = f'directory = "{folder.as_posix()}"\n' + find_target(str(manifest.get("target", ""))).loading_code()
    except DistillError:
        code = ""
    return ExportEntry(folder.name, size_text(size), verified, code)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        loaded: Any = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast(dict[str, Any], loaded) if isinstance(loaded, dict) else {}


def read_sources(run: RunDir) -> list[Source]:
    """Return what the students' weights derive from, with the licence recorded beside each, once each."""
    sources: list[Source] = []
    for student in run.student_names:
        try:
            found = read_provenance(run, student, "last").sources
        except (ValueError, csv.Error):
            # Reading "last" also reads the log; a damaged one must not cost the page its licences altogether.
            found = read_provenance(run, student, "initial").sources
        sources += [source for source in found if source not in sources]
    return sources


def recipe_yaml(run: RunDir) -> str:
    """Return the recipe as it ran."""
    return yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=100)


def next_commands(run: Path, data: str | None, *, has_probe: bool, has_exports: bool) -> list[tuple[str, str]]:
    """Return (why, command) of what is worth doing next, the missing first.

    Args:
        run: the run directory.
        data: the held-out shards, if they are known as one pattern.
        has_probe: whether there are scores.
        has_exports: whether there are exports.
    """
    folder = shlex.quote(str(run))
    shards = shlex.quote(data) if data else "SHARDS"
    config = shlex.quote(str(run / "config.yaml"))
    checkpoint = shlex.quote(str(run / "checkpoints" / "last.ckpt"))
    probe = (
        "Judge it on data of your own, beside its initialisation and its teacher",
        f"distill probe {folder} --data {shards}",
    )
    export = (
        "Write it for transformers or timm, verified by the library that will load it",
        f"distill export {folder}",
    )
    again = ("Write this page again with the new figures", f"distill report {folder}")
    longer = (
        "Train on from the last checkpoint; raise the number of steps first",
        f"distill fit --config {config} --ckpt_path {checkpoint} --trainer.max_steps STEPS",
    )
    missing = [command for command, present in ((probe, has_probe), (export, has_exports)) if not present]
    done = [command for command, present in ((probe, has_probe), (export, has_exports)) if present]
    return [*missing, *([again] if missing else []), longer, *done]


def training_facts(metrics: Mapping[str, Series]) -> list[str]:
    """Return short facts about training: the last logged step and the median throughput."""
    facts: list[str] = []
    steps = [series.steps[-1] for name, series in metrics.items() if not name.startswith("val/")]
    if steps:
        facts.append(f"last logged step {max(steps):,.0f}")
    rate = metrics.get("throughput/images_per_s")
    if rate is not None:
        facts.append(f"median {median(rate.values):,.1f} images/s")
    return facts
