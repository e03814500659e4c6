"""The verb `distill export`: a run's student, in its consumers' formats, published once they reproduced it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.table import Table

from distill.checkpoint import RunDir, Which, load_student
from distill.encoder import TimmLayoutEncoder
from distill.errors import ConfigError, ExportError
from distill.export.card import write_card, write_manifest
from distill.export.contract import ExportTarget
from distill.export.files import check_target, staged
from distill.export.golden import compute_golden, write_golden
from distill.export.provenance import Provenance, read_provenance
from distill.export.targets import TARGETS, find_target
from distill.export.verify import Verification, verify_export

ENCODER_MEMBERS = ("layout", "timm_architecture", "timm_model_args", "img_size", "timm_state_dict")


@dataclass(frozen=True)
class Exported:
    """One published export: where, how large, and what its verification proved."""

    target: str
    directory: Path
    size_bytes: int
    verification: Verification


def export(
    run: Path,
    format: list[str] | str = "all",
    out: Path | None = None,
    student: str | None = None,
    which: Which = "last",
    overwrite: bool = False,
) -> list[Path]:
    """Write a run's student as directories that transformers or timm load without this project.

    Nothing is published unless the consumer's own class, in a fresh process, gives the student's features
    within 1e-5 in float32 (within eight float32 steps of a layer's largest feature where features pass 10.5).

    Args:
        run: the run directory that `distill fit` wrote.
        format: internvl-hf, clip-hf or timm; a list, as [clip-hf,timm]; or all that the student's layout allows.
        out: where to; null means RUN/exports. With one named format this is the export's own directory, with several
            or all it holds one directory for each.
        student: name of the student; null where the run has only one.
        which: last for the newest checkpoint, initial for the student before the first step.
        overwrite: replace exports that are there already.

    Returns:
        The published directories.

    Raises:
        ConfigError: a format is unknown, a package is missing, or the run or student cannot be found.
        WeightsError: the checkpoint is missing, damaged or does not fit.
        ExportError: the layout forbids a format, files cannot be written, or a consumer gave other features.
    """
    names = _format_names(format)
    directory = RunDir(run)
    name, module = load_student(run, name=student, which=which)
    encoder = as_timm_layout(module)
    targets = _allowed_targets(encoder, names)
    provenance = read_provenance(directory, name, which)
    root = directory.path / "exports" if out is None else out
    is_single = out is not None and names is not None and len(names) == 1
    places = {target.FORMAT: root if is_single else root / target.FORMAT for target in targets}
    for place in places.values():
        check_target(place.resolve(), overwrite=overwrite)
    console = Console()
    exported: list[Exported] = []
    for target_name, place in places.items():
        with console.status(f"{target_name}: writing, then loading it in a fresh process"):
            exported.append(export_encoder(encoder, target_name, place, provenance, overwrite=overwrite))
    console.print(_table(exported))
    for item in exported:
        console.print(f"{item.target}: {item.directory}", soft_wrap=True, highlight=False, markup=False)
    return [item.directory for item in exported]


def export_encoder(
    encoder: TimmLayoutEncoder,
    format: str,
    out: Path,
    provenance: Provenance | None = None,
    *,
    overwrite: bool = False,
) -> Exported:
    """Write one encoder in one format, verify it by its consumer in a fresh process, and publish it at `out`.

    Args:
        encoder: a `torch.nn.Module` on the CPU, in eval mode, float32.
        format: internvl-hf, clip-hf or timm.
        out: the export's own directory; its parents are made. It appears complete and verified, or not at all.
        provenance: what the model card says of its origin; None says nothing.
        overwrite: replace an export that is there.

    Returns:
        What was published and what was proved.

    Raises:
        ConfigError: the format is unknown or its consumer is not installed.
        ExportError: see `export`.
    """
    target = find_target(format)
    _require(target)
    target.check(encoder)
    provenance = provenance or Provenance(student="student")
    out = out.resolve()
    with staged(out, overwrite=overwrite) as directory:
        target.write(encoder, directory)
        write_golden(directory, compute_golden(encoder, format))
        verification = verify_export(directory)
        write_card(directory, encoder, target, provenance, verification)
        write_manifest(directory, encoder, target, provenance, verification)
    size_bytes = sum(path.stat().st_size for path in out.iterdir())
    return Exported(format, out, size_bytes, verification)


def as_timm_layout(module: object) -> TimmLayoutEncoder:
    """Return the module as an encoder that tells its weights under timm's names.

    Raises:
        ExportError: it lacks a member of `distill.encoder.TimmLayoutEncoder`.
    """
    missing = [member for member in ENCODER_MEMBERS if not hasattr(module, member)]
    if missing:
        raise ExportError(
            f"{type(module).__name__} cannot be exported: it lacks {', '.join(missing)} of "
            "distill.encoder.TimmLayoutEncoder. Give your student these members."
        )
    return cast(TimmLayoutEncoder, module)


def _format_names(format: str | Sequence[str]) -> list[str] | None:
    """Return the formats asked for, without repetition; None means all that the layout allows."""
    words = [format] if isinstance(format, str) else list(format)
    if words == ["all"]:
        return None
    if not words:
        raise ConfigError(f"--format is empty; choose from {', '.join(TARGETS)}, or all.")
    return list(dict.fromkeys(find_target(word).FORMAT for word in words))


def _allowed_targets(encoder: TimmLayoutEncoder, names: list[str] | None) -> list[ExportTarget]:
    if names is not None:
        targets = [TARGETS[name] for name in names]
        for target in targets:
            target.check(encoder)
    else:
        targets = [target for target in TARGETS.values() if _allows(target, encoder)]
    for target in targets:
        _require(target)
    return targets


def _allows(target: ExportTarget, encoder: TimmLayoutEncoder) -> bool:
    try:
        target.check(encoder)
    except ExportError:
        return False
    return True


def _require(target: ExportTarget) -> None:
    missing = [package for package in target.REQUIRES if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"The export {target.FORMAT} is verified by {', '.join(missing)}, which is not installed. "
            "Run: pip install 'encoder-distill[export]'"
        )


def _table(exported: list[Exported]) -> Table:
    table = Table("target", "size", "worst difference", "verified by", "seconds", title="Published exports")
    for item in exported:
        proof = item.verification
        table.add_row(
            item.target,
            f"{item.size_bytes / 1e6:.1f} MB",
            f"{proof.worst_difference:.1e}",
            proof.consumer,
            f"{proof.seconds:.1f}",
        )
    return table
