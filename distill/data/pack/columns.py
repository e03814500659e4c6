"""Which column of a source is the path, the label, the group, the domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from distill.errors import ConfigError


def choose_columns(
    header: Sequence[str], known: Sequence[str], columns: Mapping[str, str] | None, file: Path
) -> dict[str, str]:
    """Return our name -> the file's name, for the columns to read.

    Args:
        header: the names the file has.
        known: our names.
        columns: what --columns says; None takes the file's names as ours, and all of them must be known: a slip such as
            "lable" would else lose every label without a word.
        file: for messages.

    Raises:
        ConfigError: a name is unknown, occurs twice, or is not in the file.
    """
    twice = sorted({name for name in header if list(header).count(name) > 1})
    if twice:
        raise ConfigError(f"{file} names the column {twice[0]!r} twice; rename one.")
    if columns is None:
        unknown = [name for name in header if name not in known]
        if unknown:
            raise ConfigError(
                f"{file} has the unknown column(s) {', '.join(unknown)}; known are {', '.join(known)}. Rename them, or "
                "name those to use: --columns.path=FILE --columns.label=CLASS leaves the others aside."
            )
        return {name: name for name in header}
    return check_columns(header, known, columns, file)


def check_columns(
    header: Sequence[str], known: Sequence[str], columns: Mapping[str, str], file: Path
) -> dict[str, str]:
    """Return the columns that --columns names.

    Raises:
        ConfigError: it names a column we do not know, or one that the file does not have.
    """
    for ours, theirs in columns.items():
        if ours not in known:
            raise ConfigError(f"--columns.{ours} is unknown here; known are {', '.join(known)}.")
        if theirs not in header:
            raise ConfigError(f"--columns.{ours} is {theirs!r}, and {file} has no such column: {', '.join(header)}.")
    return dict(columns)
