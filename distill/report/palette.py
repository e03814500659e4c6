"""Colours of the figures: one set for files, one of stand-ins that the page replaces by its CSS variables."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Palette:
    """Colours of a figure, as matplotlib takes them."""

    ink: str
    muted: str
    grid: str
    surface: str
    series: tuple[str, ...]

    def of(self, position: int) -> str:
        """The colour of a curve; after the last one they start again."""
        return self.series[position % len(self.series)]


LIGHT = Palette(
    # The series are Okabe and Ito's colours (jfly.uni-koeln.de/color), told apart under every colour-vision deficiency.
    "#1c2024",
    "#6b7280",
    "#e3e6ea",
    "#ffffff",
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7a5195"),
)

# Stand-ins that no figure uses otherwise; the page replaces each by the CSS variable named, so that one drawing serves
# light and dark.
THEMED = Palette("#010203", "#010204", "#010205", "#010206", tuple(f"#0102{10 + i:02d}" for i in range(7)))
VARIABLES = {
    THEMED.ink: "--ink",
    THEMED.muted: "--muted",
    THEMED.grid: "--line",
    THEMED.surface: "--surface",
    **{colour: f"--c{i}" for i, colour in enumerate(THEMED.series)},
}

MARKERS = {"initial": "o", "student": "s", "teacher": "D", "other": "^"}
