"""The probe's figures as terminal tables: one for each metric, encoders down, domains across."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distill.probe.scores import OVERALL

_Cell = Callable[[dict[str, Any] | None], str]


def print_tables(result: dict[str, Any], console: Console) -> None:
    """Print what probe.json holds.

    Args:
        result: the content of probe.json.
        console: where to print.
    """
    domains: list[str] = result["data"]["domains"]
    metrics: tuple[tuple[str, str, _Cell], ...] = (
        ("linear", "Linear probe, top-1 accuracy in %", _accuracy_cell),
        ("knn", "kNN, top-1 accuracy in %", _accuracy_cell),
        (
            "fidelity",
            "Fidelity of patch tokens to the teacher, centred cosine (mean teacher feature = 0)",
            _cosine_cell,
        ),
        ("fidelity", "Fidelity of pooled features to the teacher, debiased linear CKA", _cka_cell),
    )
    for key, title, cell in metrics:
        rows = [encoder for encoder in result["encoders"] if encoder[key] is not None]
        if rows:
            table = _table(f"{title}  [95 % interval]", ["encoder", OVERALL, *map(escape, domains)])
            for encoder in rows:
                scores = encoder[key]
                cells = [cell(scores["domains"].get(domain)) for domain in domains]
                table.add_row(escape(encoder["name"]), cell(scores[OVERALL]), *cells)
            console.print(table)
    _print_paired(result["paired"], domains, console)


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    return table


def _accuracy_cell(score: dict[str, Any] | None) -> str:
    if score is None:
        return "-"
    return f"{100 * score['top1']:.1f} \\[{100 * score['low']:.1f}, {100 * score['high']:.1f}]"


def _cosine_cell(score: dict[str, Any] | None) -> str:
    if score is None:
        return "-"
    cosine = score["cosine_centred"]
    return f"{cosine['mean']:.3f} \\[{cosine['low']:.3f}, {cosine['high']:.3f}]"


def _cka_cell(score: dict[str, Any] | None) -> str:
    if score is None or score["cka"]["value"] is None:
        return "-"
    cka = score["cka"]
    interval = "" if cka["low"] is None else f" \\[{cka['low']:.3f}, {cka['high']:.3f}]"
    return f"{cka['value']:.3f}{interval}"


def _print_paired(paired: list[dict[str, Any]], domains: list[str], console: Console) -> None:
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for entry in paired:
        scale, digits = (1, 3) if entry["metric"] == "cosine_centred" else (100, 1)
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
