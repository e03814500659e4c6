"""The verb `distill report`: everything a run directory knows, on one page."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from rich.console import Console

from distill.checkpoint import RunDir
from distill.data.fetch import RowDataset
from distill.data.index import build_index
from distill.errors import ConfigError, DataError, DistillError
from distill.probe.features import choose_device
from distill.report.curves import Chart, score_charts, training_charts, validation_charts
from distill.report.feature_maps import MapRow, choose_images, map_rows
from distill.report.html import Page, render, training_facts
from distill.report.metrics_csv import Series, read_metrics
from distill.report.probe_json import ProbeResults, read_probe
from distill.report.recipe import (
    next_commands,
    read_exports,
    read_parts,
    read_sources,
    read_versions,
    recipe_yaml,
)
from distill.report.verdict import judge

DEFAULT_IMG_SIZE_PX = 448
Device = Literal["auto", "cpu", "cuda", "mps"]


def report(
    run: Path,
    out: Path | None = None,
    data: str | None = None,
    images_per_domain: int = 2,
    device: Device = "auto",
) -> Path:
    """Write one HTML page about a run, readable without network, and each of its figures as PNG.

    A section whose input is missing is replaced by a sentence that says so.

    Args:
        run: the run directory that `distill fit` wrote.
        out: the page to write; report.html in the run directory when left out. Figures go to the folder figures
            beside it.
        data: shards with the images for the feature maps; data.val of the run's recipe when left out.
        images_per_domain: images of each domain in the feature maps; 0 leaves the maps out, and then no encoder is
            loaded.
        device: where encoders run for the maps; auto takes a GPU when there is one.

    Returns:
        The page that was written.

    Raises:
        ConfigError: `run` is no run directory, an option cannot be used, matplotlib is not installed, or the page
            cannot be written.
        DataError: `data` was given and cannot be used.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "The report draws with matplotlib, which is not installed. Run: pip install 'encoder-distill[report]'"
        )
    if images_per_domain < 0:
        raise ConfigError(
            f"--images_per_domain {images_per_domain} is negative; give 0 to leave the maps out, or more."
        )
    directory = RunDir(run)
    target = _target(directory.path, out)
    console = Console()
    figures: dict[str, bytes] = {}
    page = Page(directory.path.resolve().name, read_parts(directory))
    _add_probe(page, directory.path / "probe.json", figures)
    _add_curves(page, directory.metrics_files, figures)
    with console.status("feature maps: teacher and students on images of each domain"):
        _add_maps(page, directory, data, images_per_domain, choose_device(device), figures)
    _add_recipe(page, directory, data)
    _write(target, render(page), figures)
    return target


def _target(run: Path, out: Path | None) -> Path:
    target = run / "report.html" if out is None else out / "report.html" if out.is_dir() else out
    if not target.parent.is_dir():
        raise ConfigError(f"--out {target}: the folder {target.parent} does not exist. Make it, or name another file.")
    return target


def _draw(charts: Sequence[Chart], figures: dict[str, bytes]) -> list[str]:
    """Return the charts as SVG and add their PNG to `figures`, under file names that differ."""
    # matplotlib belongs to an optional extra: this module must import without it, to say so.
    from distill.report.figures import chart_png, chart_svg

    for chart in charts:
        name, number = chart.key, 2
        while f"{name}.png" in figures:
            name, number = f"{chart.key}-{number}", number + 1
        figures[f"{name}.png"] = chart_png(chart)
    return [chart_svg(chart) for chart in charts]


def _add_probe(page: Page, file: Path, figures: dict[str, bytes]) -> None:
    if not file.is_file():
        page.probe_absent = "There are no scores yet: the run has no probe.json. `distill probe` writes it."
        return
    try:
        results: ProbeResults = read_probe(file)
    except DistillError as error:
        page.probe_absent = f"The scores could not be read. {error}"
        return
    page.probe = results
    page.verdicts = judge(results)
    page.score_svgs = _draw(score_charts(results), figures)


def _add_curves(page: Page, files: list[Path], figures: dict[str, bytes]) -> None:
    metrics: dict[str, Series] = {}
    reason = "The run has no metrics.csv, so there are no curves."
    if files:
        reason = ""
        try:
            metrics = read_metrics(*files)
        except DistillError as error:
            reason = f"The curves could not be read. {error}"
    page.validation_svgs = _draw(validation_charts(metrics), figures)
    page.validation_absent = "" if page.validation_svgs else reason or "The log holds no validation values."
    page.training_svgs = _draw(training_charts(metrics), figures)
    page.training_absent = "" if page.training_svgs else reason or "The log holds no training values."
    page.training_facts = training_facts(metrics)


def _add_maps(
    page: Page, run: RunDir, data: str | None, images_per_domain: int, device: str, figures: dict[str, bytes]
) -> None:
    if images_per_domain == 0:
        page.maps_absent = "Feature maps were left out on request (--images_per_domain 0)."
        return
    if not (data or _data_block(run).get("val")):
        page.maps_absent = "The recipe names no held-out data (data.val), so there are no feature maps. Give --data."
        return
    try:
        page.map_rows = _map_rows(page, run, data, images_per_domain, device)
    except DistillError as error:
        if data is not None and isinstance(error, DataError):
            raise
        page.maps_absent = f"The feature maps could not be made. {error}"
        return
    from distill.report.figures import map_sheet_png

    columns = [cell.heading for cell in page.map_rows[0].cells]
    rows = [(row.domain, [cell.pixels for cell in row.cells]) for row in page.map_rows]
    figures["feature-maps.png"] = map_sheet_png(columns, rows)


def _map_rows(page: Page, run: RunDir, data: str | None, images_per_domain: int, device: str) -> list[MapRow]:
    shards: Any = data if data is not None else _data_block(run).get("val")
    index = build_index(shards, key="data.val" if data is None else "--data")
    chosen = choose_images(index, RowDataset(index, _img_size_px(page, run)), images_per_domain)
    return map_rows(run.path, chosen, device)


def _img_size_px(page: Page, run: RunDir) -> int:
    probed = page.probe.settings.get("img_size_px") if page.probe else None
    size = _data_block(run).get("img_size_px") or probed
    return size if isinstance(size, int) else DEFAULT_IMG_SIZE_PX


def _data_block(run: RunDir) -> Mapping[str, Any]:
    block: Any = run.config.get("data") or {}
    if not isinstance(block, dict):
        return {}
    return cast(dict[str, Any], block.get("init_args") or block)


def _add_recipe(page: Page, run: RunDir, data: str | None) -> None:
    page.exports = read_exports(run.path)
    page.sources = read_sources(run)
    page.versions = read_versions()
    page.config_yaml = recipe_yaml(run)
    held_out: Any = data or _data_block(run).get("val")
    page.commands = next_commands(
        run.path,
        held_out if isinstance(held_out, str) else None,
        has_probe=page.probe is not None,
        has_exports=bool(page.exports),
    )


def _remove_older(folder: Path, figures: Mapping[str, bytes]) -> None:
    """Remove figures of an earlier report that this one does not have; anybody else's files stay."""
    from distill.report.figures import SOFTWARE

    for path in folder.glob("*.png"):
        if path.name not in figures and SOFTWARE.encode() in path.read_bytes()[:512]:
            path.unlink()


def _write(target: Path, page: str, figures: Mapping[str, bytes]) -> None:
    """Write the figures, then the page in one step: a reader sees the old page or the new one, never a part."""
    folder = target.parent / "figures"
    try:
        folder.mkdir(exist_ok=True)
        for name, content in figures.items():
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
