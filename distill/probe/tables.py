"""The probe's figures as terminal tables: one for each metric, encoders down, domains or points of a curve across."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distill.probe.score_intervals import OVERALL

_PER_CENT = ("accuracy", "error_rate", "iou")

_Key = tuple[str, str]


def print_tables(result: dict[str, Any], console: Console) -> None:
    """Print what probe.json holds.

    Args:
        result: the content of probe.json.
        console: where to print.
    """
    domains: list[str] = result["data"]["domains"]
    for metric, about in result["metrics"].items():
        _print_figures(result["encoders"], metric, about, domains, console)
        _print_curves(result["encoders"], metric, about, console)
    _print_ceiling(result.get("fidelity_ceiling"), console)
    _print_paired(result["paired"], result["metrics"], domains, console)


def _title(about: dict[str, Any]) -> str:
    unit = " in %" if about["kind"] in _PER_CENT else ""
    better = ", lower is better" if about["lower_is_better"] else ""
    blind = about.get("blind")
    guess = "" if blind is None else f"; without looking at the image {_number(blind, about['kind'])}"
    return escape(f"{about['title']}{unit}{better}{guess}  [95 % interval]")


def _number(value: float, kind: str) -> str:
    return f"{100 * value:.1f}" if kind in _PER_CENT else f"{value:.3f}"


def _print_figures(
    encoders: Sequence[dict[str, Any]], metric: str, about: dict[str, Any], domains: list[str], console: Console
) -> None:
    cells: dict[_Key, str] = {}
    for encoder in encoders:
        for entry in encoder["scores"]:
            if entry["metric"] == metric and entry["at"] is None:
                cells[encoder["name"], entry["scope"]] = _cell(entry, about["kind"])
    if not cells:
        return
    # Drawn data has parts of its own instead of the probe set's domains.
    met = list(dict.fromkeys(scope for _, scope in cells))
    scopes = [scope for scope in (OVERALL, *domains) if scope in met]
    scopes += [scope for scope in met if scope not in scopes]
    table = _table(_title(about), ["encoder", *map(escape, scopes)])
    for encoder in encoders:
        name = encoder["name"]
        if any(of == name for of, _ in cells):
            table.add_row(escape(name), *(cells.get((name, scope), "-") for scope in scopes))
    console.print(table)


def _print_curves(encoders: Sequence[dict[str, Any]], metric: str, about: dict[str, Any], console: Console) -> None:
    points: dict[str, dict[str, dict[float, str]]] = {}
    for encoder in encoders:
        for entry in encoder["scores"]:
            if entry["metric"] == metric and entry["at"] is not None and entry["scope"] == OVERALL:
                axis, x = entry["at"]
                points.setdefault(axis, {}).setdefault(encoder["name"], {})[x] = _cell(entry, about["kind"])
    for axis, by_encoder in points.items():
        xs = sorted({x for cells in by_encoder.values() for x in cells})
        table = _table(f"{_title(about)}  by {axis}", ["encoder", *(f"{x:g}" for x in xs)])
        for name, cells in by_encoder.items():
            table.add_row(escape(name), *(cells.get(x, "-") for x in xs))
        console.print(table)


def _print_ceiling(ceiling: dict[str, Any] | None, console: Console) -> None:
    if ceiling is None:
        return
    figures = [
        f"{entry['metric']} {entry['value']:.3f}"
        for entry in ceiling["scores"]
        if entry["scope"] == OVERALL and entry["at"] is None
    ]
    of = f"{ceiling['teacher']} against itself under {ceiling['augmentation']}"
    console.print(f"Ceiling of fidelity, {of}: {', '.join(figures)}", markup=False)


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    return table


def _cell(entry: dict[str, Any], kind: str) -> str:
    value = _number(entry["value"], kind)
    if entry["low"] is None or entry["high"] is None:
        return value
    return f"{value} \\[{_number(entry['low'], kind)}, {_number(entry['high'], kind)}]"


def _print_paired(
    paired: Sequence[dict[str, Any]], metrics: dict[str, dict[str, Any]], domains: list[str], console: Console
) -> None:
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for entry in paired:
        if entry["at"] is not None:
            continue  # a curve's points have the same verdicts in probe.json; here they would bury the rest
        scale, digits = (100, 1) if metrics[entry["metric"]]["kind"] in _PER_CENT else (1, 3)
        text = f"{scale * entry['difference']:+.{digits}f} {entry['verdict'].replace('not distinguishable', 'n. d.')}"
        rows.setdefault((entry["a"], entry["b"], entry["metric"]), {})[entry["scope"]] = text
    if not rows:
        return
    table = _table("Paired differences; n. d. = not distinguishable, the 95 % interval includes 0", ["comparison"])
    for column in ("metric", OVERALL, *map(escape, domains)):
        table.add_column(column, justify="right")
    for (a, b, metric), cells in rows.items():
        table.add_row(escape(f"{a} - {b}"), metric, *(cells.get(scope, "-") for scope in (OVERALL, *domains)))
    console.print(table)
