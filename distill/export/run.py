"""The verb `distill export`: a run's student, in its consumers' formats, published once they reproduced it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from rich.console import Console

from distill.checkpoint import RunDir, Which, load_student
from distill.encoder import TimmLayoutEncoder
from distill.errors import ConfigError, ExportError
from distill.export.card import trained_layers, write_card, write_manifest
from distill.export.contract import ExportTarget, bind_companion, golden_features_of
from distill.export.files import check_target, staged
from distill.export.fresh_process import require_consumer
from distill.export.golden import compute_golden, write_golden
from distill.export.outcome import Exported, NotExported, outcome_table, reason_lines
from distill.export.provenance import Provenance, read_provenance
from distill.export.reshape import Changes, reshape
from distill.export.selection import (
    bind_companions,
    format_names,
    named_targets,
    possible_targets,
    refuse_with_into,
    unexpected,
)
from distill.export.splice import splice
from distill.export.targets import find_target
from distill.export.verify import verify_export

__all__ = ["Exported", "as_timm_layout", "export", "export_encoder"]

LOG_WIDTH = 160
ENCODER_MEMBERS = ("layout", "timm_architecture", "timm_model_args", "img_size", "timm_state_dict")


def export(
    run: Path,
    format: list[str] | str = "all",
    out: Path | None = None,
    student: str | None = None,
    which: Which = "last",
    overwrite: bool = False,
    layers: int | None = None,
    img_size: int | None = None,
    fold_layer_scale: bool = False,
    text_tower: Path | None = None,
    projector: Path | None = None,
    into: Path | None = None,
    trust_remote_code: bool = False,
) -> list[Path]:
    """Write a run's student in the formats that other programs load without this project.

    Nothing is published unless the consumer's own class, in a fresh process, gives the student's features: within
    1e-5 in float32, within 1e-4 for the float32 graphs of onnx and executorch (in proportion where features pass
    10.5), and within a stated cosine for smaller precisions.

    Args:
        run: the run directory that `distill fit` wrote.
        format: one of the formats of docs/exports.md, as internvl-hf, clip-hf, timm or onnx; a list, as
            [clip-hf,timm]; or all that the student's layout and the installed packages allow, the others being listed
            with the reason.
        out: where to; null means RUN/exports. With one named format this is the export's own directory, with several
            or all it holds one directory for each.
        student: name of the student; null where the run has only one.
        which: last for the newest checkpoint, initial for the student before the first step.
        overwrite: replace exports that are there already.
        layers: keep only the first so many blocks, for consumers that read the last layer where an earlier one was
            trained; null keeps all.
        img_size: pixels a side, a multiple of the patch size, that the positions are resized for (224, 336, 448);
            null keeps the student's.
        fold_layer_scale: multiply LayerScale into the weights in front of it, exactly; ones are left.
        text_tower: for open_clip: a local open_clip directory whose text tower goes beside the student.
        projector: for gguf: a safetensors file with the weights mlp1.0, mlp1.1 and mlp1.3 of an InternVL projector.
        into: an existing InternVL, LLaVA or LLaVA-NeXT directory: instead of an export, write a copy of it at `out`
            with the student in place of its vision tower and everything else as it is. `format` is then not given.
        trust_remote_code: for `into` a directory in OpenGVLab's layout: run the Python it brings, to verify.

    Returns:
        The published directories.

    Raises:
        ConfigError: a format is unknown, a package is missing, a number is out of range, or the run or student
            cannot be found.
        WeightsError: the checkpoint is missing, damaged or does not fit.
        ExportError: the layout forbids a format, files cannot be written, or a consumer gave other features.
    """
    names = format_names(format)
    if into is not None:
        flags = {"text_tower": text_tower, "projector": projector, "format": names, "overwrite": overwrite or None}
        refuse_with_into({flag: value is not None for flag, value in flags.items()})
    targets = bind_companions(named_targets(names), {"text_tower": text_tower, "projector": projector})
    directory = RunDir(run)
    name, module = load_student(run, name=student, which=which)
    encoder = reshape(as_timm_layout(module), Changes(layers, img_size, fold_layer_scale))
    provenance = read_provenance(directory, name, which)
    if into is not None:
        return [_splice(encoder, provenance, into, out, trust=trust_remote_code)]
    possible, others = possible_targets(encoder, targets, must_all=names is not None)
    root = directory.path / "exports" if out is None else out
    is_single = out is not None and names is not None and len(names) == 1
    places = [root if is_single else root / target.FORMAT for target in possible]
    for place in places:
        check_target(place.resolve(), overwrite=overwrite)
    exported, failed = _publish_all(encoder, possible, places, provenance, overwrite=overwrite)
    _print_outcome(exported, [*failed, *others])
    failed += [item for item in others if item.is_failure]
    if failed:
        raise ExportError(
            f"{len(failed)} of {len(exported) + len(failed)} exports failed. {failed[0].target}: {failed[0].reason}"
        )
    return [item.directory for item in exported]


def export_encoder(
    encoder: TimmLayoutEncoder,
    format: str,
    out: Path,
    provenance: Provenance | None = None,
    *,
    overwrite: bool = False,
    companion: Path | None = None,
) -> Exported:
    """Write one encoder in one format, verify it by its consumer in a fresh process, and publish it at `out`.

    Args:
        encoder: a `torch.nn.Module` on the CPU, in eval mode, float32; see `distill.export.reshape` to change it first.
        format: one of the formats, as internvl-hf.
        out: the export's own directory; its parents are made. It appears complete and verified, or not at all.
        provenance: what the model card says of its origin; None says nothing.
        overwrite: replace an export that is there.
        companion: what the format needs beside the encoder: a text tower for open_clip, a projector for gguf.

    Returns:
        What was published and what was proved.

    Raises:
        ConfigError: the format is unknown or its consumer is not installed.
        ExportError: see `export`.
    """
    target = find_target(format)
    target = target if companion is None else bind_companion(target, companion)
    require_consumer(target)
    target.check(encoder)
    return _publish(encoder, target, out, provenance or Provenance(student="student"), overwrite=overwrite)


def _publish(
    encoder: TimmLayoutEncoder, target: ExportTarget, out: Path, provenance: Provenance, *, overwrite: bool
) -> Exported:
    out = out.resolve()
    with staged(out, overwrite=overwrite) as directory:
        target.write(encoder, directory)
        reference = golden_features_of(target, encoder, directory)
        write_golden(directory, compute_golden(encoder, target.FORMAT, len(target.LAYERS), reference))
        verification = verify_export(directory)
        write_card(directory, encoder, target, provenance, verification)
        write_manifest(directory, encoder, target, provenance, verification)
    size_bytes = sum(path.stat().st_size for path in out.iterdir())
    return Exported(target.FORMAT, out, size_bytes, verification)


def _publish_all(
    encoder: TimmLayoutEncoder,
    targets: Sequence[ExportTarget],
    places: Sequence[Path],
    provenance: Provenance,
    *,
    overwrite: bool,
) -> tuple[list[Exported], list[NotExported]]:
    """Publish each target; one that fails does not keep the others from being published."""
    console = _console()
    exported: list[Exported] = []
    failed: list[NotExported] = []
    for number, (target, place) in enumerate(zip(targets, places, strict=True), start=1):
        console.print(f"{number}/{len(targets)} {target.FORMAT}: writing, then loading it in a fresh process")
        try:
            exported.append(_publish(encoder, target, place, provenance, overwrite=overwrite))
        except ExportError as error:
            failed.append(NotExported(target.FORMAT, str(error), is_failure=True))
        except Exception as error:  # one target's fault is not the others'
            failed.append(unexpected(target, error))
    return exported, failed


def _splice(
    encoder: TimmLayoutEncoder,
    provenance: Provenance,
    into: Path,
    out: Path | None,
    *,
    trust: bool,
) -> Path:
    if out is None:
        raise ConfigError("--into DIR needs --out NEW, where the changed copy goes.")
    trained = trained_layers(encoder, provenance)
    if trained == []:
        raise ConfigError("--layers keeps only layers that were not trained; keep more of them.")
    spliced = splice(encoder, into, out, trained_layers=len(trained or [-1]), trust_remote_code=trust)
    _console().print(
        f"{spliced.kind}: {spliced.directory}: {spliced.replaced} tensors replaced, {spliced.proof.consumer} differs "
        f"by {spliced.proof.worst_difference:.1e} ({spliced.dtype})",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    return spliced.directory


def _console() -> Console:
    """Return a console that is wide enough for the table where nothing says how wide it is, as in a log file."""
    return Console(width=None if sys.stdout.isatty() else LOG_WIDTH)


def _print_outcome(exported: Sequence[Exported], others: Sequence[NotExported]) -> None:
    console = _console()
    if exported:
        console.print(outcome_table(exported))
    for item in exported:
        console.print(f"{item.target}: {item.directory}", soft_wrap=True, highlight=False, markup=False)
    for line in reason_lines(others):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


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
