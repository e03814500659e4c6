"""How a chart looks: palette, fonts, grid, frame, title and legend, drawn once for each sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from distill.data.synthetic.fonts import font_path
from distill.data.synthetic.rendered import Split, between, chance, pick, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.font_manager import FontProperties

Location = Literal["best", "upper left", "upper right", "lower right", "upper center"]

_PALETTES: dict[Split, tuple[tuple[str, ...], ...]] = {
    "train": (
        ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#17becf"),
        ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3"),
        ("#003f5c", "#58508d", "#bc5090", "#ff6361", "#ffa600", "#2f9e8f", "#7a5195"),
        ("#66c2a5", "#fc8d62", "#8da0cb", "#e78ac3", "#a6d854", "#ffd92f", "#b3b3b3"),
        ("#264653", "#2a9d8f", "#e9c46a", "#f4a261", "#e76f51", "#8ab17d", "#287271"),
        ("#222222", "#555555", "#888888", "#aaaaaa", "#666666", "#333333", "#bbbbbb"),
    ),
    "heldout": (
        ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000"),
        ("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#a6761d"),
        ("#440154", "#3b528b", "#21918c", "#5ec962", "#fde725", "#31688e", "#90d743"),
        ("#b2182b", "#ef8a62", "#fddbc7", "#67a9cf", "#2166ac", "#d6604d", "#4393c3"),
        ("#0b3954", "#087e8b", "#bfd7ea", "#ff5a5f", "#c81d25", "#5e747f", "#7b9e87"),
    ),
}
_COLOUR_MAPS: dict[Split, tuple[str, ...]] = {
    "train": ("viridis", "Blues", "coolwarm", "YlOrRd", "Greens"),
    "heldout": ("magma", "PuBuGn", "RdYlGn", "Purples", "cividis"),
}
_CHART_FONTS: dict[Split, tuple[str, ...]] = {
    "train": ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "DejaVuSans-Bold"),
    "heldout": ("STIXGeneral", "cmss10", "STIXGeneralBol"),
}
_GROUNDS = ("white", "white", "white", "#f7f7f5", "#eaeaf2", "#fdf6e3", "#eef3f7")
_DARK_GROUNDS = ("#1d1f27", "#12263a", "#2b2b2b")
_HATCHES = ("", "", "", "", "//", "xx", "..")


@dataclass(frozen=True)
class ChartStyle:
    """One sample's look.

    Args:
        colours: series colours.
        colour_map: name of a matplotlib colour map, for heat maps.
        font_name: font file name without its ending.
        ground: figure colour.
        panel: colour inside the axes.
        ink: colour of text, ticks and frame.
        grid: "", "x", "y" or "both".
        grid_dash: matplotlib line style of the grid.
        is_open: leaves out the upper and right sides of the frame.
        hatch: fill pattern of bars, or "".
        alpha: opacity of filled marks.
        line_width: width of data lines in points.
        edge: outline colour of filled marks, or "none".
        font_size: base font size in points.
    """

    colours: tuple[str, ...]
    colour_map: str
    font_name: str
    ground: str
    panel: str
    ink: str
    grid: str
    grid_dash: str
    is_open: bool
    hatch: str
    alpha: float
    line_width: float
    edge: str
    font_size: float

    def font(self, scale: float = 1.0) -> FontProperties:
        """Returns the font at `scale` times the base size, by file, so that no font of the machine is taken."""
        from matplotlib.font_manager import FontProperties

        return FontProperties(fname=font_path(self.font_name), size=self.font_size * scale)


def brightness(colour: str) -> float:
    """Returns the perceived brightness of a `#rrggbb` colour in [0, 1] (Rec. 601 luma)."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return (0.299 * red + 0.587 * green + 0.114 * blue) / 255


def _lighter(colour: str) -> str:
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{(part + 2 * 200) // 3:02x}" for part in parts)


def draw_style(rng: np.random.Generator, split: Split) -> ChartStyle:
    """Returns a random look; palettes, colour maps and fonts of the two splits are disjoint."""
    is_dark = chance(rng, 0.12)
    colours = pick(rng, _PALETTES[split])
    if is_dark:
        colours = tuple(colour if brightness(colour) > 0.3 else _lighter(colour) for colour in colours)
    turn = whole(rng, 0, len(colours) - 1)
    ground = pick(rng, _DARK_GROUNDS if is_dark else _GROUNDS)
    same_panel = is_dark or chance(rng, 0.7)
    return ChartStyle(
        colours=colours[turn:] + colours[:turn],
        colour_map=pick(rng, _COLOUR_MAPS[split]),
        font_name=pick(rng, _CHART_FONTS[split]),
        ground=ground,
        panel=ground if same_panel else pick(rng, ("#ebebeb", "#f3f6fa", "#ffffff", "#fbf7ef")),
        ink="#e8e8e8" if is_dark else pick(rng, ("#000000", "#262626", "#444444", "#1b2a41")),
        grid=pick(rng, ("", "y", "y", "both", "x")),
        grid_dash=pick(rng, ("-", "--", ":")),
        is_open=chance(rng, 0.5),
        hatch=pick(rng, _HATCHES),
        alpha=pick(rng, (1.0, 1.0, 0.85, 0.7)),
        line_width=between(rng, 1.2, 3.0),
        edge=pick(rng, ("none", "none", "white", "black")),
        font_size=between(rng, 8.5, 11.5),
    )


def dress(axes: Axes, style: ChartStyle, grid: str | None = None) -> None:
    """Sets frame, grid and tick labels of a cartesian chart; `grid` overrides the style's grid."""
    axes.set_facecolor(style.panel)
    for side, spine in axes.spines.items():
        spine.set_visible(not (style.is_open and side in ("top", "right")))
        spine.set_color(style.ink)
        spine.set_linewidth(0.9)
    axes.tick_params(colors=style.ink, length=3, width=0.8, pad=2)
    shown = style.grid if grid is None else grid
    if shown:
        axes.set_axisbelow(True)
        axes.grid(True, axis="both" if shown == "both" else "x" if shown == "x" else "y")
        colour = "#555b66" if style.ink == "#e8e8e8" else "#c9c9c9" if style.panel != "#ebebeb" else "white"
        axes.tick_params(grid_color=colour, grid_linestyle=style.grid_dash, grid_linewidth=0.7)


def legend(axes: Axes, style: ChartStyle, columns: int = 1, location: Location = "best") -> None:
    """Adds a legend in the style's font and colours."""
    box = axes.legend(
        loc=location,
        ncols=columns,
        prop=style.font(0.82),
        frameon=style.is_open,
        handlelength=1.4,
        labelcolor=style.ink,
        borderpad=0.3,
        labelspacing=0.3,
        columnspacing=1.0,
    )
    box.get_frame().set(facecolor=style.panel, edgecolor=style.ink, linewidth=0.6, alpha=0.85)
