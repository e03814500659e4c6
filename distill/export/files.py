"""Files of an export: written, flushed to the disk, and put in place all at once or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from distill.errors import ExportError

MANIFEST_FILE = "manifest.json"


def write_text(path: Path, text: str) -> None:
    """Write a text file.

    Raises:
        ExportError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise cannot_write(path, error) from error


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON with two spaces of indent and a final newline.

    Raises:
        ExportError: it cannot be written, or a value is no plain JSON.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ExportError(f"{path.name} cannot be written as JSON: {error}.") from error
    write_text(path, text)


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors with the metadata `format: pt`, which transformers asks for.

    Raises:
        ExportError: it cannot be written.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
        # safetensors writes for the owner alone; an export is to be read by whoever may read its directory.
        path.chmod(path.parent.stat().st_mode & 0o666)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: Exception) -> ExportError:
    """Return the error that names the path, the cause and the way out."""
    cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ExportError(f"{path} could not be written: {cause}. Free space there or give another `--out`.")


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_target(out: Path, *, overwrite: bool) -> None:
    """Return when an export may be put at `out`.

    Raises:
        ExportError: something is there already and `overwrite` is not given, or what is there is no export.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST_FILE).is_file():
        raise ExportError(f"{out} exists and is no export (it has no {MANIFEST_FILE}); give another `--out`.")
    if not overwrite:
        raise ExportError(f"{out} holds an export already. Give `--overwrite true` to replace it, or another `--out`.")


@contextmanager
def staged(out: Path, *, overwrite: bool) -> Generator[Path]:
    """Yield a new directory beside `out` that takes its place when the block ends well, and vanishes otherwise.

    The directory lies on the same file system, so taking its place is one rename. An export that is replaced stays
    until the new one is complete.

    Args:
        out: where the directory goes.
        overwrite: replace an export that is there.

    Raises:
        ExportError: `out` is taken (see `check_target`) or cannot be written.
    """
    check_target(out, overwrite=overwrite)
    token = uuid.uuid4().hex[:8]
    partial = out.with_name(f".{out.name}.{token}.partial")
    new_parents = [parent for parent in partial.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise cannot_write(out, error) from error
    try:
        yield partial
        try:
            _flush(partial)
            _swap(partial, out, out.with_name(f".{out.name}.{token}.replaced"))
        except OSError as error:
            raise cannot_write(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_empty(new_parents)


def _remove_empty(directories: list[Path]) -> None:
    """Remove directories, innermost first, as far as they are empty."""
    for directory in directories:
        with suppress(OSError):
            directory.rmdir()


def _flush(directory: Path) -> None:
    for path in [*directory.iterdir(), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(partial: Path, out: Path, replaced: Path) -> None:
    if not out.exists():
        partial.replace(out)
        return
    out.replace(replaced)
    try:
        partial.replace(out)
    except OSError:
        replaced.replace(out)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
