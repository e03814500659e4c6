"""Where an exported encoder comes from: teachers, first weights, recipe and validation figures of its run."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, cast

import yaml

from distill.alignment import AlignmentConfig
from distill.checkpoint import RunDir, Which

UNKNOWN_LICENCE = "not recorded"
TRAINER_KEYS = ("max_steps", "max_epochs", "precision", "devices", "num_nodes", "accumulate_grad_batches")
METRICS = ("cosine", "baseline", "skill")
OUTSIDE_FOLDERS = re.compile(r"(?:(?i:\bfile:/+)|~|(?:\.\./)+|(?<![\w./])/(?!/))(?:[^\s,:;{}]*/)?")
"""The folders of an absolute path or `file:` address, of a path in a home folder, or of one above the project, wherever
in a string."""


@dataclass(frozen=True)
class Source:
    """One thing the encoder's weights derive from.

    Attributes:
        role: "first weights", "teacher <name>" or "training data".
        description: its class and arguments, without anyone's folders.
        licence: what the README beside its weights declares, or `UNKNOWN_LICENCE`.
    """

    role: str
    description: str
    licence: str = UNKNOWN_LICENCE


@dataclass(frozen=True)
class Provenance:
    """What the model card says about an encoder beyond its weights.

    Attributes:
        student: the name.
        which: "last" for the trained student, "initial" for the student before the first step.
        sources: teachers and first weights.
        recipe: the parts of the run's config that matter, as plain values.
        metrics: by domain: cosine with the teacher, that cosine before training, the trivial baseline, the skill.
        trained_layers: how many of the student's last hidden states were compared with a teacher's; None if unknown.
    """

    student: str
    which: Which = "last"
    sources: tuple[Source, ...] = ()
    recipe: dict[str, Any] = field(default_factory=dict[str, Any])
    metrics: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    trained_layers: int | None = None


def read_provenance(run: RunDir, student: str, which: Which) -> Provenance:
    """Return what a run directory tells about one of its students."""
    sources = [_source("first weights", run.spec("students", student)[1])]
    if which == "last":
        sources += [_source(f"teacher {name}", run.spec("teachers", name)[1]) for name in run.teacher_names]
        sources += _data_sources(run.config)
    metrics = _read_metrics(run, student) if which == "last" else {}
    trained = _trained_layers(run.config, student) if which == "last" else None
    return Provenance(student, which, tuple(sources), _recipe(run.config), metrics, trained)


def _trained_layers(config: dict[str, Any], student: str) -> int:
    """Return how many of a student's last hidden states its alignments compare; a recipe may leave the default."""
    model = cast(dict[str, Any], config["model"])
    alignments = cast(list[dict[str, Any]], model.get("init_args", model).get("alignments") or [])
    counts = [
        int(alignment.get("num_layers", AlignmentConfig.num_layers))
        for alignment in alignments
        if alignment.get("student") == student
    ]
    return max(counts, default=AlignmentConfig.num_layers)


def _source(role: str, spec: dict[str, Any]) -> Source:
    arguments = cast(dict[str, Any], spec.get("init_args") or {})
    shown = {key: value for key, value in arguments.items() if isinstance(value, str | int | float)}
    text = ", ".join(f"{key}={_without_folders(value)}" for key, value in shown.items())
    return Source(role, f"{spec['class_path']}({text})", _licence_beside(str(arguments.get("weights", ""))))


def _data_sources(config: dict[str, Any]) -> list[Source]:
    """Return one source for each place that the recipe's training shards lie in."""
    data = cast(dict[str, Any], config.get("data") or {})
    train: Any = cast(dict[str, Any], data.get("init_args") or data).get("train")
    places = list(train.values()) if isinstance(train, Mapping) else train if isinstance(train, list) else [train]
    texts = [place for place in cast(list[Any], places) if isinstance(place, str) and place]
    return [Source("training data", str(_without_folders(text)), _licence_beside(text)) for text in texts]


def _licence_beside(weights: str) -> str:
    """Return the `license` in the front matter of the README.md in or beside a path, as hubs keep it."""
    path = Path(weights)
    readme = (path if path.is_dir() else path.parent) / "README.md"
    if not weights or not readme.is_file():
        return UNKNOWN_LICENCE
    parts = readme.read_text(encoding="utf-8", errors="replace").split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return UNKNOWN_LICENCE
    try:
        front: object = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return UNKNOWN_LICENCE
    return (
        str(cast(dict[str, Any], front).get("license", UNKNOWN_LICENCE)) if isinstance(front, dict) else UNKNOWN_LICENCE
    )


def _recipe(config: dict[str, Any]) -> dict[str, Any]:
    trainer = cast(dict[str, Any], config.get("trainer") or {})
    kept: dict[str, Any] = {"seed_everything": config.get("seed_everything")}
    kept["trainer"] = {key: trainer[key] for key in TRAINER_KEYS if trainer.get(key) is not None}
    kept |= {key: config[key] for key in ("model", "data", "optimizer", "lr_scheduler") if config.get(key)}
    return cast(dict[str, Any], _without_folders(kept))


def _without_folders(value: Any) -> Any:
    """Return a copy of plain values in which a path outside the project is only its last part: cards are published."""
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        return {str(_without_folders(str(key))): _without_folders(item) for key, item in items}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in cast(list[Any], value)]
    if isinstance(value, str):
        return OUTSIDE_FOLDERS.sub("", value)
    is_plain = isinstance(value, int) or value is None or (isinstance(value, float) and isfinite(value))
    return value if is_plain else str(value)


def _read_metrics(run: RunDir, student: str) -> dict[str, dict[str, float]]:
    first, last = dict[str, str](), dict[str, str]()
    for path in run.metrics_files:
        # A damaged log costs the card its figures, not the export.
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(file):
                filled = {key: value for key, value in row.items() if value}
                first, last = {**filled, **first}, {**last, **filled}
    metrics: dict[str, dict[str, float]] = {}
    for column, value in last.items():
        place = _domain_metric(column, run, student)
        if place is None:
            continue
        domain, metric = place
        figures = {metric: float(value)}
        if metric == "cosine":
            figures["initial_cosine"] = float(first[column])
        metrics.setdefault(domain, {}).update({key: number for key, number in figures.items() if isfinite(number)})
    return metrics


def _domain_metric(column: str, run: RunDir, student: str) -> tuple[str, str] | None:
    """Return (domain, metric) of a path `val/[<student>/<teacher>/]<metric>/<domain>`, or None for any other."""
    head, *rest = column.split("/")
    if head != "val":
        return None
    teacher = ""
    if len(rest) == 4 and rest[0] in run.student_names:
        if rest[0] != student:
            return None
        teacher, rest = f" ({rest[1]})", rest[2:]
    if len(rest) != 2 or rest[0] not in METRICS:
        return None
    return rest[1] + teacher, rest[0]
