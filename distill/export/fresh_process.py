"""Starting the fresh process in which a consumer loads an export, and finding what it imports."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import distill
from distill.errors import ConfigError, ExportError
from distill.export.contract import ExportTarget, install_command

PACKAGE_ROOT = Path(distill.__file__).parents[1]
CONSUMERS_ROOT = PACKAGE_ROOT / ".consumers"
"""Consumers that cannot live in the main environment: older transformers, self-built runtimes, each in a folder."""

ERROR_LINES = 3


def require_consumer(target: ExportTarget) -> None:
    """Return when every package that a target needs can be imported.

    Raises:
        ConfigError: one cannot; the message has the command that installs it.
    """
    missing = [package for package in target.REQUIRES if not _is_installed(package, target.CONSUMER_FOLDER)]
    if missing:
        raise ConfigError(
            f"The export {target.FORMAT} is written for and verified by {', '.join(missing)}, which is not installed. "
            f"Run: {install_command(target)}"
        )


def _is_installed(package: str, folder: str | None) -> bool:
    if folder is not None:
        place = CONSUMERS_ROOT / folder / package
        if place.is_dir() or place.with_suffix(".py").is_file():
            return True
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module that was put aside in sys.modules has no spec
        return False


def run_consumer(target: ExportTarget, arguments: list[str], timeout_s: float) -> None:
    """Run `distill.export.consume` in a new Python process.

    Args:
        target: whose consumer it is.
        arguments: export directory, request file, response file.
        timeout_s: longest time it may take.

    Raises:
        ExportError: it failed or did not end in time; the message has the last lines it printed.
    """
    try:
        done = subprocess.run(
            # -P: the folder the user stands in is no place to import from.
            [sys.executable, "-P", "-m", "distill.export.consume", target.FORMAT, *arguments],
            env=_environment(target.CONSUMER_FOLDER),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(
            f"The fresh process that loads the {target.FORMAT} export did not end within {timeout_s:g} s; "
            "nothing was published. Try again on an idle machine."
        ) from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()[-ERROR_LINES:] or [f"exit code {done.returncode}"]
        raise ExportError(f"The consumer cannot load the {target.FORMAT} export: {' | '.join(lines)}")


def _environment(folder: str | None) -> dict[str, str]:
    own = str(CONSUMERS_ROOT / folder) if folder is not None and (CONSUMERS_ROOT / folder).is_dir() else None
    search_path = os.pathsep.join(filter(None, [own, str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": search_path, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
