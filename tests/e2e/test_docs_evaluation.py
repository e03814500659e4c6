"""Every command of docs/evaluation.md runs as printed, beside runs and shards as it speaks of."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image

from distill import training_cli
from distill.cli import VERBS, main
from distill.probe.drawn_text import TextSettings, draw_text_pages
from distill.probe.ladder import Rung

pytestmark = pytest.mark.slow

PAGE = Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
MAX_SCREENSHOT_BYTES = 300_000
CHEAPER = {
    "probe": ["--img_size_px", "64", "--device", "cpu", "--rungs", "[knn,fidelity]"],
    "reading": ["--img_size_px", "128", "--device", "cpu", "--seed", "1"],
    "report": ["--images_per_domain", "1", "--device", "cpu"],
}
"""The reader's encoders are of 448 px; these are of 64, and little is enough to see a command work."""


@pytest.fixture(scope="module")
def folder(demo_recipe: Any, demo_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that a reader of the page stands in, after the page's commands."""
    path = tmp_path_factory.mktemp("page")
    (path / "shards").mkdir()
    # The only shards of the recipe that have classes with enough images.
    (path / "shards" / "heldout").symlink_to(demo_images / "train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["distill"])  # the training CLI warns of words that it does not read
        training_cli.run(demo_recipe.words(path / "runs" / "mine", "--trainer.max_epochs=1"))
    shutil.copytree(path / "runs" / "mine", path / "runs" / "other")
    write_pages(path)
    before = Path.cwd()
    os.chdir(path)
    try:
        for command in COMMANDS:
            run_command(command)
        yield path
    finally:
        os.chdir(before)


def write_pages(path: Path) -> None:
    pages = draw_text_pages(TextSettings(num_pages=12, img_size_px=128, font_sizes_px=(16, 24)))
    entries = [{"path": f"page_{number}.png", "group": str(number), "lines": []} for number in range(12)]
    for line in pages.lines:
        entries[line.page]["lines"].append([*line.box, line.text])
    for entry, image in zip(entries, pages.images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path / entry["path"])
    (path / "pages.jsonl").write_text("\n".join(map(json.dumps, entries)))


def run_command(command: str) -> None:
    program, *words = shlex.split(command)
    if program == "mkdir":
        subprocess.run([program, *words], check=True)
        return
    assert program == "distill"
    kind = "reading" if "--text_lines" in words else words[0]
    main([*words, *CHEAPER.get(kind, [])])


def test_the_commands_leave_the_files_they_name(folder: Path) -> None:
    for name in (
        "runs/mine/probe.json",
        "runs/other/probe.json",
        "comparison/compare.csv",
        "comparison/compare.json",
        "comparison/compare.md",
        "single-images.csv",
        "before-and-after.md",
        "runs/mine/report.html",
        "both.html",
        "figures/feature-maps.png",
    ):
        assert (folder / name).stat().st_size > 0, name


def test_the_options_mean_what_the_page_says(folder: Path) -> None:
    lines = list(csv.DictReader((folder / "single-images.csv").open()))
    assert {line["baseline"] for line in lines} == {"other"}
    assert all(line["clusters"] == line["n"] for line in lines)
    assert {line["scope"] for line in lines} > {"overall"}
    text = (folder / "before-and-after.md").read_text()
    assert "vit (initial) (baseline)" in text
    assert "efficientnet_lite0" in text
    page = (folder / "both.html").read_text()
    assert "Runs compared" in page
    assert "at 12.00 an hour" in page


def test_given_pages_are_read_beside_drawn_ones_and_a_guess_stands_beside_both(folder: Path) -> None:
    found = json.loads((folder / "reading.json").read_text())
    assert set(found["metrics"]) == {"ocr_cer", "ocr_pages_cer"}
    assert all(0.3 < about["blind"] <= 1 for about in found["metrics"].values())
    for encoder in found["encoders"]:
        of_pages = [entry for entry in encoder["scores"] if entry["metric"] == "ocr_pages_cer"]
        assert {entry["at"][0] for entry in of_pages if entry["at"]} == {"line_px"}
        assert all(entry["low"] is None or entry["low"] <= entry["value"] <= entry["high"] for entry in of_pages)


def test_the_page_names_every_verb_and_every_rung() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert {shlex.split(command)[1] for command in COMMANDS if command.startswith("distill")} <= set(VERBS)
    table = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert table == list(get_args(Rung))


def test_the_screenshots_are_there_and_small() -> None:
    names = re.findall(r"\]\((images/[^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert len(names) == 2
    for name in names:
        file = PAGE.parent / name
        assert file.stat().st_size < MAX_SCREENSHOT_BYTES
        with Image.open(file) as image:
            image.load()
