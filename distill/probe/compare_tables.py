"""A comparison for people and programs: one table in the terminal, and CSV, JSON and Markdown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distill.checkpoint_files import temporary_beside
from distill.errors import ConfigError
from distill.probe.compare import NOT_PAIRED, ComparedFigure, Comparison
from distill.probe.number_text import axis_text, count_text, difference_text, score_text
from distill.probe.results import OVERALL, At

FORMAT = "distill-compare/1"
SUFFIXES = (".csv", ".json", ".md")
SHORT_VERDICTS = {"not distinguishable": "n. d."}
LEGEND = "In brackets: the 95 % interval of the paired difference; n. d.: not distinguishable, the interval includes 0."
COLUMNS = (
    *("metric", "title", "kind", "axis", "x", "scope", "encoder", "value", "baseline", "baseline_value"),
    *("difference", "low", "high", "n", "clusters", "verdict"),
)


@dataclass(frozen=True)
class Row:
    """One line of a table: a figure of every encoder, as text; `cells` by label, the baseline's without difference."""

    title: str
    scope: str
    n: str
    cells: dict[str, tuple[str, str, str]]
    """Value, difference with its interval, and verdict."""


def check_out(out: Path | None) -> None:
    """Refuse an --out that cannot be written, before anything is computed.

    Raises:
        ConfigError: it is neither a folder nor a file of a known suffix in a folder that exists.
    """
    if out is None or out.is_dir():
        return
    if out.suffix not in SUFFIXES:
        raise ConfigError(
            f"--out {out} is no folder, and its suffix {out.suffix!r} is none of {', '.join(SUFFIXES)}. Name a file "
            "with one of these, or make the folder first to get all three."
        )
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: the folder {out.parent} does not exist. Make it, or name another file.")


def write_comparison(found: Comparison, out: Path | None) -> list[Path]:
    """Write a comparison and return the files.

    Raises:
        ConfigError: a file cannot be written.
    """
    if out is None:
        return []
    texts: dict[str, Callable[[Comparison], str]] = {".csv": csv_text, ".json": json_text, ".md": markdown_text}
    targets = [out / f"compare{suffix}" for suffix in SUFFIXES] if out.is_dir() else [out]
    for target in targets:
        try:
            with temporary_beside(target) as temporary:
                temporary.write_text(texts[target.suffix](found), encoding="utf-8")
                temporary.replace(target)
        except OSError as error:
            raise ConfigError(
                f"--out {target} cannot be written: {error.strerror}. Free space or name another."
            ) from error
    return targets


def rows_of(found: Comparison) -> list[Row]:
    """Return the lines of a table over all scopes, in order."""
    lines: dict[tuple[str, At | None, str], list[ComparedFigure]] = {}
    for entry in found.figures:
        lines.setdefault((entry.metric, entry.at, entry.scope), []).append(entry)
    return [_row(found, entries) for entries in lines.values()]


def _row(found: Comparison, entries: list[ComparedFigure]) -> Row:
    first = entries[0]
    kind = first.info.kind
    cells = {found.baseline: (score_text(kind, first.baseline), "", "")}
    for entry in entries:
        change = difference_text(kind, entry.difference, entry.low, entry.high).replace(" points", "")
        cells[entry.label] = (score_text(kind, entry.value), change, entry.verdict)
    return Row(titled(first), first.scope, count_text(first.n), cells)


def titled(entry: ComparedFigure) -> str:
    """Return a figure's title with its unit and its point on a curve."""
    percent = " (%)" if entry.info.kind in ("accuracy", "error_rate", "iou") and "%" not in entry.info.title else ""
    lower = ", lower is better" if entry.info.lower_is_better else ""
    at = "" if entry.at is None else f", {entry.at[0].replace('_', ' ')} {axis_text(entry.at[1])}"
    return f"{entry.info.title}{percent}{at}{lower}"


def print_comparison(found: Comparison, console: Console) -> None:
    """Print the figures over all domains, then what was left out."""
    table = Table(title=LEGEND, title_justify="left", title_style="")
    table.add_column("figure")
    table.add_column("n", justify="right")
    table.add_column(f"{escape(found.baseline)}\nbaseline", justify="right")
    for label in found.labels[1:]:
        table.add_column(escape(label), justify="right")
    shown = [row for row in rows_of(found) if row.scope == OVERALL]
    for row in shown:
        cells = [escape(_terminal_cell(*row.cells[label])) if label in row.cells else "-" for label in found.labels]
        table.add_row(escape(row.title), row.n, *cells)
    console.print(table)
    domains = sorted({entry.scope for entry in found.figures} - {OVERALL})
    if domains:
        console.print(f"By domain ({', '.join(domains)}): in the files that --out writes.", markup=False)
    console.print(_how(found), markup=False)
    for note in found.notes:
        console.print(note, markup=False, highlight=False)


def _terminal_cell(value: str, change: str, verdict: str) -> str:
    return f"{value}\n{change} {SHORT_VERDICTS.get(verdict, verdict)}" if change else value


def _how(found: Comparison) -> str:
    if all(entry.verdict == NOT_PAIRED for entry in found.figures):
        return "Nothing was paired: no interval, no verdict."
    unit = "whole groups" if found.cluster == "group" else "single images"
    return f"Paired bootstrap over {unit}, {found.num_resamples:,} resamples, seed {found.seed}."


def markdown_text(found: Comparison) -> str:
    """Return the comparison as a Markdown table, every scope a line."""
    heading = ["figure", "scope", "n", f"{found.baseline} (baseline)", *found.labels[1:]]
    lines = [LEGEND, "", _markdown_line(heading), _markdown_line(["---", "---", *["---:"] * (len(heading) - 2)])]
    for row in rows_of(found):
        cells = [" ".join(filter(None, row.cells.get(label, ("-",)))) for label in found.labels]
        lines.append(_markdown_line([row.title, row.scope, row.n, *cells]))
    return "\n".join([*lines, "", _how(found), *(f"\n{note}" for note in found.notes)]) + "\n"


def _markdown_line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def csv_text(found: Comparison) -> str:
    """Return the comparison as CSV, a line for each figure of each encoder but the baseline; fractions as they are."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value is None else value for key, value in line.items()} for line in _lines(found))
    return buffer.getvalue()


def _lines(found: Comparison) -> Iterable[dict[str, Any]]:
    for entry in found.figures:
        values = (entry.label, entry.value, found.baseline, entry.baseline, entry.difference, entry.low, entry.high)
        axis = entry.at or (None, None)
        head = (entry.metric, entry.info.title, entry.info.kind, *axis, entry.scope)
        yield dict(zip(COLUMNS, (*head, *values, entry.n, entry.num_clusters, entry.verdict), strict=True))


def json_text(found: Comparison) -> str:
    """Return the comparison as JSON in the format "distill-compare/1"."""
    content = {
        "format": FORMAT,
        "baseline": found.baseline,
        "encoders": [{"label": label, "probe": str(found.files[label])} for label in found.labels],
        "cluster": found.cluster,
        "num_resamples": found.num_resamples,
        "seed": found.seed,
        "figures": list(_lines(found)),
        "notes": found.notes,
    }
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
