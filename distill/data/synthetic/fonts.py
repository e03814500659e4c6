"""The fonts that matplotlib ships, parted between the splits.

No font file stands in both splits, so that a held-out text image never repeats a training typeface.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from PIL import ImageFont

from distill.data.synthetic.rendered import Split

Family = Literal["sans", "bold", "serif", "heavy_serif", "mono", "script"]

# The Computer Modern files lack "<", ">" and "_", and cmti10 draws "$" as a pound sign: keep those out of their text.
FAMILIES: dict[Split, dict[Family, tuple[str, ...]]] = {
    "train": {
        "sans": ("DejaVuSans", "DejaVuSans-Oblique"),
        "bold": ("DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSansMono-Bold"),
        "serif": ("DejaVuSerif", "cmr10", "DejaVuSerif-Italic"),
        "heavy_serif": ("DejaVuSerif-Bold", "DejaVuSerif-BoldItalic"),
        "mono": ("DejaVuSansMono", "DejaVuSansMono-Oblique"),
        "script": ("DejaVuSans-Oblique", "DejaVuSerif-Italic", "DejaVuSansMono-Oblique"),
    },
    "heldout": {
        "sans": ("cmss10",),
        "bold": ("STIXGeneralBol", "cmss10"),
        "serif": ("STIXGeneral", "STIXGeneralItalic"),
        "heavy_serif": ("cmb10", "STIXGeneralBolIta"),
        "mono": ("cmtt10",),
        "script": ("STIXGeneralItalic", "cmti10"),
    },
}


@lru_cache(maxsize=1)
def font_folder() -> Path:
    """Returns the folder of matplotlib's own TrueType files, found without importing matplotlib."""
    spec = find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("The fonts come with matplotlib, which is not installed: pip install matplotlib.")
    return Path(spec.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"


def font_path(name: str) -> str:
    """Returns the path of the font file of this name, for example `DejaVuSans`."""
    return str(font_folder() / f"{name}.ttf")


@lru_cache(maxsize=512)
def load_font(name: str, size_px: int) -> ImageFont.FreeTypeFont:
    """Returns the font at this size; the basic layout engine keeps pixels equal whether or not raqm is built in."""
    return ImageFont.truetype(font_path(name), max(size_px, 4), layout_engine=ImageFont.Layout.BASIC)
