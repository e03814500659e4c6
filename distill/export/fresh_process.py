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
    run_module(
        "distill.export.consume",
        [target.FORMAT, *arguments],
        folder=target.CONSUMER_FOLDER,
        timeout_s=timeout_s,
        late=f"The fresh process that loads the {target.FORMAT} export did not end within {timeout_s:g} s; "
        "nothing was published. Try again on an idle machine.",
        failed=f"The consumer cannot load the {target.FORMAT} export",
    )


def run_module(
    module: str, arguments: list[str], *, folder: str | None, timeout_s: float, late: str, failed: str
) -> None:
    """Run a module in a new Python process that asks no hub for anything.

    Args:
        module: its name.
        arguments: the words after it.
        folder: name under `.consumers/` that the process imports from first, where it exists.
        timeout_s: longest time it may take.
        late: what to say when it takes longer.
        failed: what to say, in front of the last lines it printed, when it fails.

    Raises:
        ExportError: it failed or did not end in time.
    """
    try:
        done = subprocess.run(
            # -P: the folder the user stands in is no place to import from.
            [sys.executable, "-P", "-m", module, *arguments],
            env=_environment(folder),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(late) from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()[-ERROR_LINES:] or [f"exit code {done.returncode}"]
        raise ExportError(f"{failed}: {' | '.join(lines)}")


def _environment(folder: str | None) -> dict[str, str]:
    own = str(CONSUMERS_ROOT / folder) if folder is not None and (CONSUMERS_ROOT / folder).is_dir() else None
    search_path = os.pathsep.join(filter(None, [own, str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": search_path, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
