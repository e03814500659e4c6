"""What a run logged: `metrics.csv` as one series for each column, and the validation columns told apart."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.errors import DataError

STEP_COLUMNS = ("step", "epoch")
METRIC_PART = re.compile(r"(?P<metric>cosine|baseline|skill)(?:_layer_(?P<layer>-?\d+))?")


@dataclass(frozen=True)
class Series:
    """One logged value over the steps, ascending; values are finite."""

    steps: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def has_initial(self) -> bool:
        """Whether the first value was logged before the first step."""
        return bool(self.steps) and self.steps[0] == 0


@dataclass
class DomainCurves:
    """Validation of one student, teacher and domain.

    Attributes:
        pair: "student/teacher" where the run has several alignments, else "".
        domain: name of the domain; "" for the mean over domains.
        metrics: "cosine", "baseline" and "skill", means over layers.
        layers: for each of these, the series of each layer, by its number as in `hidden_states[layer]`.
    """

    pair: str
    domain: str
    metrics: dict[str, Series] = field(default_factory=dict[str, Series])
    layers: dict[str, dict[int, Series]] = field(default_factory=dict[str, dict[int, Series]])


def read_metrics(*files: Path) -> dict[str, Series]:
    """Return every numeric column of CSV logs as a series over steps.

    Rows have many empty cells, because different values are logged at different steps. Of two values at one step the
    later row wins. Values that are not finite are left out.

    Args:
        files: written by Lightning's CSVLogger, oldest first; the column `step`, or else `epoch`, is the horizontal
            axis.

    Raises:
        DataError: a file cannot be read as text with a header.
    """
    rows: list[dict[str | None, Any]] = []
    for file in files:
        try:
            with file.open(newline="", encoding="utf-8") as stream:
                rows += csv.DictReader(stream)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{file} cannot be read as a CSV log: {error}. Restore the file the run wrote.") from error
    points: dict[str, dict[float, float]] = {}
    for row in rows:
        step = next((value for name in STEP_COLUMNS if (value := _number(row.get(name))) is not None), None)
        if step is None:
            continue
        for name, text in row.items():
            # DictReader keeps cells beyond the header under the key None.
            if not isinstance(name, str) or name in STEP_COLUMNS:
                continue
            value = _number(text)
            if value is not None:
                points.setdefault(name, {})[step] = value
    return {name: _series(column) for name, column in points.items()}


def _number(text: object) -> float | None:
    if not isinstance(text, str):
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _series(column: Mapping[float, float]) -> Series:
    steps = sorted(column)
    return Series(tuple(steps), tuple(column[step] for step in steps))


def split_validation(metrics: Mapping[str, Series]) -> tuple[list[DomainCurves], dict[str, Series]]:
    """Tell the columns under `val/` apart.

    Returns:
        The curves of each (pair, domain) in the order they were logged, and the columns under `val/` whose path names
        none of cosine, baseline and skill.
    """
    found: dict[tuple[str, str], DomainCurves] = {}
    others: dict[str, Series] = {}
    for name, series in metrics.items():
        parts = name.split("/")
        if parts[0] != "val":
            continue
        at = next((i for i, part in enumerate(parts) if i and METRIC_PART.fullmatch(part)), None)
        match = METRIC_PART.fullmatch(parts[at]) if at is not None else None
        if at is None or match is None:
            others[name] = series
            continue
        key = ("/".join(parts[1:at]), "/".join(parts[at + 1 :]))
        curves = found.setdefault(key, DomainCurves(*key))
        if match["layer"] is None:
            curves.metrics[match["metric"]] = series
        else:
            curves.layers.setdefault(match["metric"], {})[int(match["layer"])] = series
    return list(found.values()), others
