"""Which targets `distill export` writes: those named or all, with what the command line gives them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from distill.encoder import TimmLayoutEncoder
from distill.errors import ConfigError, ExportError
from distill.export.contract import ExportTarget, bind_companion, companion_flag
from distill.export.fresh_process import require_consumer
from distill.export.outcome import NotExported
from distill.export.targets import TARGETS, find_target

_LOGGER = logging.getLogger(__name__)


def format_names(format: str | Sequence[str]) -> list[str] | None:
    """Return the formats asked for, without repetition; None means all that are possible."""
    words = [format] if isinstance(format, str) else list(format)
    if words == ["all"]:
        return None
    if not words:
        raise ConfigError(f"--format is empty; choose from {', '.join(TARGETS)}, or all.")
    return list(dict.fromkeys(find_target(word).FORMAT for word in words))


def named_targets(names: Sequence[str] | None) -> list[ExportTarget]:
    """Return the targets of these names; None names all."""
    return [TARGETS[name] for name in (TARGETS if names is None else names)]


def bind_companions(targets: Sequence[ExportTarget], companions: Mapping[str, Path | None]) -> list[ExportTarget]:
    """Return the targets with the files that the command line gives them.

    Raises:
        ConfigError: a file is given that no chosen format uses, or that does not exist.
    """
    wanted = {flag for flag in map(companion_flag, targets) if flag is not None}
    given = {flag: path for flag, path in companions.items() if path is not None}
    for flag, path in given.items():
        if flag not in wanted:
            users = [name for name, target in TARGETS.items() if companion_flag(target) == flag]
            raise ConfigError(f"--{flag} is used by {', '.join(users) or 'no format'}, which --format leaves out.")
        if not path.exists():
            raise ConfigError(f"--{flag} {path} does not exist.")
    flags = [companion_flag(target) or "" for target in targets]
    return [
        bind_companion(target, given[flag]) if flag in given else target
        for target, flag in zip(targets, flags, strict=True)
    ]


def refuse_with_into(given: Mapping[str, bool]) -> None:
    """Return when no flag stands beside --into that has no meaning there.

    Args:
        given: each such flag's name, and whether it was given.

    Raises:
        ConfigError: one was given.
    """
    flags = [f"--{flag}" for flag, is_given in given.items() if is_given]
    if flags:
        raise ConfigError(
            f"--into takes no {', '.join(flags)}: format, projector and text tower are those of the directory, and "
            "--out must be a new one. Leave it out."
        )


def unexpected(target: ExportTarget, error: Exception) -> NotExported:
    """Return a failure that no target announces, with its class and text; the log has its traceback."""
    _LOGGER.warning("The %s export stopped unexpectedly.", target.FORMAT, exc_info=error)
    return NotExported(target.FORMAT, f"{type(error).__name__}: {error}", is_failure=True)


def possible_targets(
    encoder: TimmLayoutEncoder, targets: Sequence[ExportTarget], *, must_all: bool
) -> tuple[list[ExportTarget], list[NotExported]]:
    """Return the targets that can be written and verified here, and the others with the reason.

    Raises:
        ConfigError: `must_all`, and a package is missing.
        ExportError: `must_all`, and the student does not fit.
    """
    possible: list[ExportTarget] = []
    others: list[NotExported] = []
    for target in targets:
        try:
            target.check(encoder)
            require_consumer(target)
        except (ConfigError, ExportError) as error:
            if must_all:
                raise
            others.append(NotExported(target.FORMAT, str(error)))
        except Exception as error:  # one target's fault is not the others'
            if must_all:
                raise
            others.append(unexpected(target, error))
        else:
            possible.append(target)
    return possible, others
