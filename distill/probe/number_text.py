"""How figures are written for people: proper minus signs, the same digits everywhere, intervals in brackets."""

from __future__ import annotations

MINUS = "\u2212"
NO_BREAK_SPACE = "\u00a0"
NARROW_SPACE = "\u202f"
PERCENT_KINDS = ("accuracy", "error_rate", "iou")
"""Kinds of figures, as in `distill.probe.rung.Kind`, that are written in per cent."""


def signed(text: str) -> str:
    """Return a number's text with a typographic minus sign."""
    return text.replace("-", MINUS)


def score_text(kind: str, value: float | None) -> str:
    """Return accuracies, IoU and error rates in per cent with one digit, the rest with three; a dash for no value."""
    if value is None:
        return "\u2013"
    return signed(f"{value * 100:.1f}") if kind in PERCENT_KINDS else signed(f"{value:.3f}")


def interval_text(kind: str, low: float | None, high: float | None) -> str:
    """Return `[low, high]`, or nothing when there is no interval."""
    if low is None or high is None:
        return ""
    return f"[{score_text(kind, low)},{NO_BREAK_SPACE}{score_text(kind, high)}]"


def difference_text(kind: str, value: float, low: float | None, high: float | None) -> str:
    """Return a difference with its sign, its interval, and "points" where it is one of percentages."""
    sign = "+" if value > 0 else ""
    unit = " points" if kind in PERCENT_KINDS else ""
    interval = interval_text(kind, low, high)
    return f"{sign}{score_text(kind, value)}{unit}" + (f" {interval}" if interval else "")


def axis_text(value: float) -> str:
    """Return a point of a curve's axis without needless digits: 12, 0.5, -1 with a typographic minus."""
    return signed(f"{value:g}")


def count_text(count: int | None) -> str:
    """Return a count with thousands apart: 304,012,288."""
    return "\u2013" if count is None else f"{count:,}"


def short_count_text(count: int | None) -> str:
    """Return a count in thousands, millions or billions with three digits: 304 M, 5.54 B."""
    if count is None:
        return "\u2013"
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{NARROW_SPACE}{unit}"
    return str(count)


def size_text(size_bytes: int) -> str:
    """Return a file size in decimal units: 12.4 MB."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size_bytes >= size:
            return f"{size_bytes / size:.1f} {unit}"
    return f"{size_bytes} bytes"
