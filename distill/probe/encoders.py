"""What `ENCODER` on the command line means: a run, an export, a directory of a public model, or a YAML file.

timm and open_clip directories are opened by classes of the `teachers` package that are named here, not imported.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml
from torch import nn

from distill.checkpoint import RunDir, build_encoder, load_student, load_teacher, read_weights
from distill.errors import ConfigError, WeightsError

RunRole = Literal["initial", "student", "teacher"]
Role = Literal[RunRole, "other"]

TIMM_CLASS = "teachers.TimmTeacher"
OPEN_CLIP_CLASS = "teachers.OpenClipTeacher"


@dataclass(frozen=True)
class NamedEncoder:
    """An encoder with its weights, and what it is in the comparison.

    Attributes:
        name: unique in the comparison.
        role: "initial" is a student before its first step.
        source: where it came from, for the record.
        module: offers `distill.encoder.Encoder`, weights loaded, eval mode.
        baseline: name of a student's own initialisation; None for everything else.
    """

    name: str
    role: Role
    source: str
    module: nn.Module
    baseline: str | None = None


def resolve_encoders(
    encoder: str, beside: Sequence[str] = (), roles: Collection[RunRole] | None = None
) -> list[NamedEncoder]:
    """Load the encoder that is judged and everything it is judged beside.

    A run brings each student's initialisation, each student and each teacher; an export that names its run, or lies
    in RUN/exports, brings its run's initialisation and teacher. Everything else comes alone.

    Args:
        encoder: a run directory, an export, a timm, open_clip or transformers directory, or a YAML file with
            `class_path` and `init_args`.
        beside: more of these, as plain references; of a run, its students.
        roles: which of a run's encoders to load; all of them when left out. An export, or anything else that is
            named itself, is loaded in any case.

    Returns:
        At least one encoder, initialisations first, then students, teachers and others.

    Raises:
        ConfigError: a path does not exist or is none of these, or `roles` leaves nothing.
        WeightsError: weights are missing, damaged or do not fit.
    """
    found = _main(Path(encoder), get_args(RunRole) if roles is None else roles)
    if not found:
        raise ConfigError(f"--roles leaves no encoder of {encoder}; name at least one of {get_args(RunRole)}.")
    for path in map(Path, beside):
        found += _run_students(path) if _is_run(path) else [_single(path, "other")]
    return _unique(found)


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file()


def _main(path: Path, roles: Collection[RunRole]) -> list[NamedEncoder]:
    if _is_run(path):
        return _of_run(path, RunDir(path).student_names, roles)
    run = run_of(path)
    if run is None:
        return [_single(path, "other")]
    names = RunDir(run).student_names
    manifest = _manifest(path)
    student = str(manifest.get("student", names[0]))
    role: Role = "other" if manifest.get("which") == "initial" else "student"
    around = _of_run(run, [student] if student in names else names, set(roles) - {"student"})
    exported = replace(_single(path, role), name=f"{student} ({path.name})", baseline=_initial_name(student))
    initial = [entry for entry in around if entry.role == "initial"]
    return [*initial, exported, *(entry for entry in around if entry.role == "teacher")]


def _initial_name(student: str) -> str:
    return f"{student} (initial)"


def _of_run(run: Path, students: Sequence[str], roles: Collection[RunRole]) -> list[NamedEncoder]:
    directory = RunDir(run)
    found: list[NamedEncoder] = []
    for name in students if "initial" in roles else ():
        module = load_student(run, name=name, which="initial")[1]
        found.append(NamedEncoder(_initial_name(name), "initial", str(directory.initial_weights(name)), module))
    for name in students if "student" in roles else ():
        module = load_student(run, name=name)[1]
        found.append(NamedEncoder(name, "student", str(directory.last_checkpoint), module, _initial_name(name)))
    for name in directory.teacher_names if "teacher" in roles else ():
        spec = directory.spec("teachers", name)[1]
        source = f"{spec['class_path']} {spec.get('init_args', {}).get('weights', '')}".strip()
        label = f"{name} (teacher)" if name in students else name
        found.append(NamedEncoder(label, "teacher", source, load_teacher(run, name=name)[1]))
    return found


def _run_students(run: Path) -> list[NamedEncoder]:
    directory = RunDir(run)
    return [
        NamedEncoder(
            f"{run.resolve().name}/{name}", "other", str(directory.last_checkpoint), load_student(run, name=name)[1]
        )
        for name in directory.student_names
    ]


def _manifest(export: Path) -> dict[str, Any]:
    return _json(export / "manifest.json") or {}


def run_of(path: Path) -> Path | None:
    """Return the run that a path is, or is an export of: the one its manifest names, else the one it lies in."""
    if _is_run(path):
        return path
    named = _manifest(path).get("run")
    candidates = [Path(named), path / named] if isinstance(named, str) else []
    resolved = path.resolve()
    if resolved.parent.name == "exports":
        candidates.append(resolved.parent.parent)
    return next((run for run in candidates if _is_run(run)), None)


def _single(path: Path, role: Role) -> NamedEncoder:
    module = load_encoder(path)
    return NamedEncoder(path.resolve().stem if path.is_file() else path.resolve().name, role, str(path), module)


def load_encoder(path: Path) -> nn.Module:
    """Return the one encoder that an export, a public model's directory or a YAML file names, and nothing beside it.

    Args:
        path: anything that `resolve_encoders` takes but a run directory, whose students `load_student` loads.

    Returns:
        A module that offers `distill.encoder.Encoder`, weights loaded, in eval mode, on the CPU.

    Raises:
        ConfigError: the path does not exist or is none of these.
        WeightsError: weights are missing, damaged or do not fit.
    """
    if path.suffix in (".yaml", ".yml") and path.is_file():
        module = build_encoder(_yaml_spec(path))
    elif path.is_dir():
        module = _from_directory(path)
    else:
        raise ConfigError(
            f"ENCODER {path} does not exist. Give a run directory, an export, a timm, open_clip or transformers "
            "directory, or a YAML file with class_path and init_args."
        )
    read_weights(module, f"encoder {str(path)!r}")
    return module.eval()


def _yaml_spec(path: Path) -> dict[str, Any]:
    try:
        loaded: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(loaded, dict) or "class_path" not in loaded:
        raise ConfigError(f"{path} has no class_path; an encoder file holds class_path and, if needed, init_args.")
    return cast(dict[str, Any], loaded)


def _from_directory(path: Path) -> nn.Module:
    config = _json(path / "config.json") or {}
    if "architecture" in config:
        return build_encoder({"class_path": TIMM_CLASS, "init_args": {"model_name": None, "weights": str(path)}})
    # Releases on the hub often hold both layouts; transformers' is complete without a text tower's vocabulary.
    if "model_type" in config:
        return _transformers(path)
    if (path / "open_clip_config.json").is_file():
        return build_encoder({"class_path": OPEN_CLIP_CLASS, "init_args": {"model_name": None, "weights": str(path)}})
    raise ConfigError(
        f"{path} holds no encoder that is known. Looked for: config.yaml (a run of `distill fit`), config.json with "
        "`architecture` (timm) or `model_type` (transformers), and open_clip_config.json (open_clip). "
        "For anything else write a YAML file with class_path and init_args."
    )


def _transformers(path: Path) -> nn.Module:
    from distill.probe.transformers_encoder import TransformersEncoder

    try:
        return TransformersEncoder(str(path))
    except ImportError as error:
        raise ConfigError(f"{path} needs transformers: pip install 'encoder-distill[export]'.") from error
    except (ValueError, OSError) as error:
        raise WeightsError(f"The encoder {str(path)!r} could not be built. {error}") from error


def _json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        loaded: object = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}. Restore the file.") from error
    return cast(dict[str, Any], loaded) if isinstance(loaded, dict) else None


def _unique(found: list[NamedEncoder]) -> list[NamedEncoder]:
    """Tell apart encoders of one name, which `--beside` can bring, by a number."""
    seen: dict[str, int] = {}
    unique: list[NamedEncoder] = []
    for entry in found:
        seen[entry.name] = seen.get(entry.name, 0) + 1
        count = seen[entry.name]
        unique.append(entry if count == 1 else replace(entry, name=f"{entry.name} ({count})"))
    return unique


def comparison_pairs(encoders: Sequence[NamedEncoder]) -> list[tuple[str, str]]:
    """Return the names (a, b) of the encoders to compare image by image; the verdict is about `a`.

    Each student is compared with its own initialisation and everything else with the first one; without any
    initialisation, the first encoder is compared with each of the others.
    """
    initial = next((entry.name for entry in encoders if entry.role == "initial"), None)
    if initial is None:
        return [(encoders[0].name, entry.name) for entry in encoders[1:]]
    return [(entry.name, entry.baseline or initial) for entry in encoders if entry.role != "initial"]
