"""The files of a report: the page, and beside it a folder with each of its figures as PNG."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from distill.errors import ConfigError
from distill.report.charts import Chart
from distill.report.feature_maps import MapRow
from distill.report.neighbours import Neighbour, Neighbours
from distill.report.thumbnails import SMALL_PX, photo_of
from distill.report.worst_images import WorstImages


class FigureFiles:
    """The figures of a page as PNG files, under names that differ."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}

    def draw(self, charts: Sequence[Chart]) -> list[str]:
        """Return charts as SVG elements, and keep each as PNG."""
        # matplotlib belongs to an optional extra: this module must import without it, to say so.
        from distill.report.figures import chart_png, chart_svg

        for chart in charts:
            self._keep(chart.key, chart_png(chart))
        return [chart_svg(chart) for chart in charts]

    def add_sheet(self, key: str, rows: Sequence[MapRow]) -> None:
        """Keep images and their maps as one sheet."""
        from distill.report.figures import map_sheet_png

        columns = [cell.heading for cell in rows[0].cells]
        marks = [[cell.mark for cell in row.cells] for row in rows]
        self._keep(
            key, map_sheet_png(columns, [(row.domain, [cell.pixels for cell in row.cells]) for row in rows], marks)
        )

    def add_neighbours(self, key: str, queries: Sequence[Neighbours]) -> None:
        """Keep each image and its neighbours by every encoder as one sheet."""
        from distill.report.figures import map_sheet_png

        headings = ["image", *(heading for heading, _, _ in queries[0].lists)]
        rows = [(query.domain, [_small(query.image), *map(_row_of, query.lists)]) for query in queries]
        self._keep(key, map_sheet_png(headings, rows))

    def add_worst(self, key: str, student: WorstImages) -> None:
        """Keep a student's worst images as one sheet, a row for each domain."""
        from distill.report.figures import map_sheet_png

        widest = max(len(entries) for _, entries in student.domains)
        blank = np.full((SMALL_PX, SMALL_PX, 3), 255, dtype=np.uint8)
        rows: list[tuple[str, list[NDArray[np.uint8]]]] = []
        for domain, entries in student.domains:
            pictures = [_small(entry.image) for entry in entries]
            rows.append((domain, [*pictures, *[blank] * (widest - len(pictures))]))
        self._keep(key, map_sheet_png([f"worst {i + 1}" for i in range(widest)], rows))

    def _keep(self, key: str, png: bytes) -> None:
        name, number = key, 2
        while f"{name}.png" in self.content:
            name, number = f"{key}-{number}", number + 1
        self.content[f"{name}.png"] = png


def _small(image: Tensor) -> NDArray[np.uint8]:
    return np.asarray(photo_of(image, SMALL_PX))


def _row_of(entry: tuple[str, int | None, tuple[Neighbour, ...]]) -> NDArray[np.uint8]:
    return np.concatenate([_small(neighbour.image) for neighbour in entry[2]], axis=1)


def target_of(runs: Sequence[Path], out: Path | None) -> Path:
    """Return the page to write.

    Raises:
        ConfigError: its folder does not exist.
    """
    default = runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
    target = default if out is None else out / "report.html" if out.is_dir() else out
    if not target.parent.is_dir():
        raise ConfigError(f"--out {target}: the folder {target.parent} does not exist. Make it, or name another file.")
    return target


def write_page(target: Path, page: str, figures: FigureFiles) -> None:
    """Write the figures, then the page in one step: a reader sees the old page or the new one, never a part.

    Raises:
        ConfigError: a file cannot be written.
    """
    folder = target.parent / "figures"
    try:
        folder.mkdir(exist_ok=True)
        for name, content in figures.content.items():
            (folder / name).write_bytes(content)
        _remove_older(folder, figures)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=target.parent, delete=False) as file:
            temporary = Path(file.name)
            try:
                file.write(page)
                file.flush()
                os.fsync(file.fileno())
                temporary.chmod(0o644)  # temporary files are private; a report is to be shown
                temporary.replace(target)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        cause = error.strerror or str(error)
        raise ConfigError(
            f"{target} could not be written: {cause}. Free space there, or give another --out."
        ) from error


def _remove_older(folder: Path, figures: FigureFiles) -> None:
    """Remove figures of an earlier report that this one does not have; anybody else's files stay."""
    from distill.report.figures import SOFTWARE

    for path in folder.glob("*.png"):
        if path.name not in figures.content and SOFTWARE.encode() in path.read_bytes()[:512]:
            path.unlink()
