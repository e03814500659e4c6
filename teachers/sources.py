"""Where a model lies: a file, a directory that describes itself, or a file inside an installed package."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

PACKAGE_PREFIX = "package:"
"""Marks a file inside an installed Python package: `package:<name>/<path inside it>`."""

LOCAL_DIR_PREFIX = "local-dir:"
"""Marks a directory that holds a model and its description, as in timm and open_clip."""

_PRETRAINED = "pretrained"


def resolve_path(weights: str) -> Path:
    """Return the existing file or directory that `weights` names.

    Args:
        weights: a path, or `package:<name>/<path>` for a file inside an installed package; the package is located
            without importing it, so none of its code runs.

    Raises:
        FileNotFoundError: the path, the package, or the file in it does not exist.
    """
    if weights.startswith(PACKAGE_PREFIX):
        return _resolve_in_package(weights)
    path = Path(weights).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"weights {weights!r}: no such file or directory (looked at {path.absolute()}); correct the path, or say "
            "'random' if untrained weights are meant."
        )
    return path


def _resolve_in_package(weights: str) -> Path:
    name, _, inner = weights.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"weights {weights!r}: no package {name!r} is installed; install it, or name another file "
            f"(form: {PACKAGE_PREFIX}<import name>/<path inside it>)."
        )
    candidates = [Path(root) / inner for root in spec.submodule_search_locations]
    for path in candidates:
        if path.exists():
            return path
    raise FileNotFoundError(f"weights {weights!r}: {candidates[0]} does not exist; the package has another layout.")


def resolve_directory(model_name: str | None, weights: str, config_name: str) -> tuple[str, str]:
    """Settle where a model that may be described by a directory has its architecture and its weights.

    Args:
        model_name: a library name, `local-dir:<directory>`, or None for the directory in `weights`.
        weights: as the user gave it.
        config_name: the file that describes the model.

    Returns:
        The name with the directory spelled out, and the weights without `local-dir:`.

    Raises:
        FileNotFoundError: the directory lacks `config_name`.
    """
    weights = weights.removeprefix(LOCAL_DIR_PREFIX)
    name = f"{LOCAL_DIR_PREFIX}{weights}" if model_name is None else model_name
    if name.startswith(LOCAL_DIR_PREFIX):
        directory = Path(name.removeprefix(LOCAL_DIR_PREFIX)).expanduser()
        if not (directory / config_name).is_file():
            raise FileNotFoundError(
                f"{directory / config_name} does not exist; without model_name, weights must be a directory that has "
                "it. Set model_name, or correct the path."
            )
        name = f"{LOCAL_DIR_PREFIX}{directory}"
        weights = str(directory) if weights == _PRETRAINED else weights
    return name, weights


def find_file(path: Path, names: Sequence[str]) -> Path:
    """Return `path` if it is a file, else the first of `names` that exists in it.

    Raises:
        FileNotFoundError: the directory has none of them.
    """
    if path.is_file():
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{path}: none of {', '.join(names)} in this directory; give the weight file itself.")
