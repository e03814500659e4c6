"""The verb `distill report`: everything that run directories know, on one page."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

from rich.console import Console

from distill.checkpoint import RunDir
from distill.data.fetch import RowDataset
from distill.data.index import build_index
from distill.errors import ConfigError, DataError, DistillError
from distill.probe.features import choose_device
from distill.report.books import cost_facts, read_ledger
from distill.report.curves import training_charts, validation_charts
from distill.report.feature_maps import ImageSection, image_section
from distill.report.gallery import choose_images, viewers
from distill.report.html import Page, RunFacts, render
from distill.report.metrics_csv import Series, read_metrics
from distill.report.page_files import FigureFiles, target_of, write_page
from distill.report.recipe import (
    next_commands,
    read_exports,
    read_parts,
    read_sources,
    read_versions,
    recipe_yaml,
    training_facts,
)
from distill.report.scores import add_scores
from distill.report.several import overlay
from distill.report.small_vlms import vlm_section

DEFAULT_IMG_SIZE_PX = 448
Device = Literal["auto", "cpu", "cuda", "mps"]


def report(
    runs: list[Path],
    out: Path | None = None,
    data: str | None = None,
    images_per_domain: int = 2,
    price_per_hour: float | None = None,
    device: Device = "auto",
) -> Path:
    """Write one HTML page about runs, readable without network, and each of its figures as PNG.

    A section whose input is missing is replaced by a sentence that says so.

    Args:
        runs: one or more run directories that `distill fit` wrote, apart by spaces.
        out: the page to write. When left out, report.html in the run directory; for several runs, in the current
            folder. Figures go to the folder figures beside it.
        data: shards with the images that encoders are shown on; data.val of the first run's recipe when left out.
        images_per_domain: images of each domain in the feature maps; 0 leaves the maps out, and then no encoder is
            loaded.
        price_per_hour: price of a run's machines together for an hour, in any currency; gives the cost of training.
        device: where encoders run for the maps; auto takes a GPU when there is one.

    Returns:
        The page that was written.

    Raises:
        ConfigError: one of `runs` is no run directory or given twice, an option cannot be used, matplotlib is not
            installed, or the page cannot be written.
        DataError: `data` was given and cannot be used.
    """
    _check(images_per_domain, price_per_hour)
    directories = {name: RunDir(path) for name, path in _names(runs).items()}
    target = target_of(runs, out)
    console = Console()
    figures = FigureFiles()
    page = Page([RunFacts(name, read_parts(run)) for name, run in directories.items()])
    add_scores(page, directories, figures, data)
    _add_curves(page, directories, figures, price_per_hour)
    _add_images(page, list(directories.values()), data, images_per_domain, choose_device(device), figures, console)
    for facts, run in zip(page.runs, directories.values(), strict=True):
        facts.vlms = vlm_section(run.path)
        _add_recipe(facts, run, data)
    page.versions = read_versions()
    write_page(target, render(page), figures)
    return target


def _check(images_per_domain: int, price_per_hour: float | None) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "The report draws with matplotlib, which is not installed. Run: pip install 'encoder-distill[report]'"
        )
    if images_per_domain < 0:
        raise ConfigError(
            f"--images_per_domain {images_per_domain} is negative; give 0 to leave the maps out, or more."
        )
    if price_per_hour is not None and price_per_hour < 0:
        raise ConfigError(f"--price_per_hour {price_per_hour} is negative; give a price of 0 or more.")


def _names(runs: list[Path]) -> dict[str, Path]:
    """Names of the runs: their folders', with a number where they repeat."""
    if not runs:
        raise ConfigError("There is no run to report on. Give one or more run directories.")
    names: dict[str, Path] = {}
    for path in runs:
        if any(path.resolve() == other.resolve() for other in names.values()):
            raise ConfigError(f"{path} is given twice. Name each run once.")
        name = path.resolve().name
        number = 2
        while name in names:
            name, number = f"{path.resolve().name} ({number})", number + 1
        names[name] = path
    return names


def _add_curves(page: Page, runs: Mapping[str, RunDir], figures: FigureFiles, price_per_hour: float | None) -> None:
    logs: dict[str, dict[str, Series]] = {}
    reasons: list[str] = []
    for facts, run in zip(page.runs, runs.values(), strict=True):
        prefix = f"{facts.name}: " if len(runs) > 1 else ""
        facts.ledger = read_ledger(run.path)
        try:
            logs[facts.name] = read_metrics(*run.metrics_files) if run.metrics_files else {}
            if not run.metrics_files:
                reasons.append(f"{prefix}The run has no metrics.csv, so there are no curves.")
        except DistillError as error:
            logs[facts.name] = {}
            reasons.append(f"{prefix}The curves could not be read. {error}")
        facts.training_facts = training_facts(logs[facts.name])
        facts.cost = cost_facts(logs[facts.name], facts.ledger, price_per_hour)
    reason = " ".join(reasons)
    page.validation_svgs = figures.draw(overlay([(name, validation_charts(log)) for name, log in logs.items()]))
    page.validation_absent = "" if page.validation_svgs else reason or "The log holds no validation values."
    page.training_svgs = figures.draw(overlay([(name, training_charts(log)) for name, log in logs.items()]))
    page.training_absent = "" if page.training_svgs else reason or "The log holds no training values."


def _add_images(
    page: Page,
    runs: list[RunDir],
    data: str | None,
    images_per_domain: int,
    device: str,
    figures: FigureFiles,
    console: Console,
) -> None:
    if images_per_domain == 0:
        page.images_absent = "Feature maps were left out on request (--images_per_domain 0)."
        return
    if not (data or _data_block(runs[0]).get("val")):
        page.images_absent = "The recipe names no held-out data (data.val), so there are no feature maps. Give --data."
        return
    try:
        page.images = _look(page, runs, data, images_per_domain, device, console)
    except DistillError as error:
        if data is not None and isinstance(error, DataError):
            raise
        page.images_absent = f"The feature maps could not be made. {error}"
        return
    figures.add_sheet("feature-maps", page.images.map_rows)
    figures.add_sheet("similarity-maps", page.images.similarity_rows)
    figures.add_neighbours("nearest-neighbours", page.images.neighbours)


def _look(
    page: Page, runs: list[RunDir], data: str | None, images_per_domain: int, device: str, console: Console
) -> ImageSection:
    shards: Any = data if data is not None else _data_block(runs[0]).get("val")
    index = build_index(shards, key="data.val" if data is None else "--data")
    chosen = choose_images(index, RowDataset(index, _img_size_px(page, runs[0])), images_per_domain)
    with console.status("images") as status:
        return image_section(
            viewers(runs),
            chosen,
            device,
            lambda name: status.update(f"patch tokens of {len(chosen.images)} images: {name}"),
        )


def _img_size_px(page: Page, run: RunDir) -> int:
    probed = page.probe.settings.get("img_size_px") if page.probe else None
    size = _data_block(run).get("img_size_px") or probed
    return size if isinstance(size, int) else DEFAULT_IMG_SIZE_PX


def _data_block(run: RunDir) -> Mapping[str, Any]:
    block: Any = run.config.get("data") or {}
    if not isinstance(block, dict):
        return {}
    return cast(dict[str, Any], block.get("init_args") or block)


def _add_recipe(facts: RunFacts, run: RunDir, data: str | None) -> None:
    facts.exports = read_exports(run.path)
    facts.sources = read_sources(run)
    facts.config_yaml = recipe_yaml(run)
    held_out: Any = data or _data_block(run).get("val")
    facts.commands = next_commands(
        run.path,
        held_out if isinstance(held_out, str) else None,
        has_probe=not facts.probe_absent,
        has_exports=bool(facts.exports),
    )
