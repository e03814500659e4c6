"""The report of real runs in a real browser: it clicks, it draws, it fits a phone, and it asks nothing of anybody."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from distill import training_cli
from distill.probe.run import probe
from distill.report.run import report

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # pytest imports each test file by itself
browser = import_module("browser")

pytestmark = pytest.mark.slow

MAX_PAGE_BYTES = 6_000_000
DESKTOP, PHONE = (1280, 900), (390, 844)
FIGURE = 'figure.similar[data-image="0"]'
PIXELS = """document.querySelector('%s .pick[data-encoder="%d"] canvas').toDataURL()"""
"""What a click painted."""
# The colours of the teacher's map at one pixel a patch, whichever element shows it.
COLOURS = """(async () => {
  const pick = document.querySelector('%s .pick[data-encoder="0"]');
  const shown = pick.querySelector('%s');
  if (shown.decode) await shown.decode();
  const side = JSON.parse(document.getElementById('patches').textContent).encoders[0].columns;
  const copy = document.createElement('canvas');
  copy.width = copy.height = side;
  const context = copy.getContext('2d');
  context.imageSmoothingEnabled = false;
  context.drawImage(shown, 0, 0, side, side);
  const data = context.getImageData(0, 0, side, side).data;
  return Array.from({length: side * side}, (_, p) => [data[4 * p], data[4 * p + 1], data[4 * p + 2]]);
})()"""


@pytest.fixture(scope="module")
def pages(demo_recipe: Any, demo_images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The page of one run, and the page of two."""
    root = tmp_path_factory.mktemp("reports")
    run, again = root / "first", root / "second"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["distill"])  # the training CLI warns of words that it does not read
        training_cli.run(demo_recipe.words(run, "--trainer.max_epochs=1"))
    # The shards that were trained on: leaks are to be told. They have classes with enough images, the others do not.
    data = str(demo_images / "train")
    probe(str(run), data=data, img_size_px=64, device="cpu", rungs=["knn", "fidelity"], layers="-2,-1")
    shutil.copytree(run, again)
    one = report([run], device="cpu", price_per_hour=1.0)
    return one, report([run, again], root, device="cpu", images_per_domain=1)


@pytest.fixture(scope="module")
def tab() -> Iterator[Any]:
    program = browser.find_chromium()
    if program is None:
        pytest.skip(f"needs a browser: none of {', '.join(browser.PROGRAMS)} is installed")
    with browser.Browser(program) as opened:
        yield opened


@pytest.fixture
def fresh(tab: Any) -> Any:
    """The tab with nothing noted yet."""
    tab.problems.clear()
    tab.requests.clear()
    return tab


def pixels(tab: Any, encoder: int) -> str:
    return tab.run(PIXELS % (FIGURE, encoder))


def test_a_click_on_a_patch_redraws_the_map_of_every_encoder(fresh: Any, pages: tuple[Path, Path]) -> None:
    fresh.size(*DESKTOP)
    fresh.open(pages[0])
    assert fresh.run(f"document.querySelectorAll('{FIGURE} canvas').length") == 0
    fresh.click(f'{FIGURE} .pick[data-encoder="-1"]', across=0.03, down=0.03)
    corner = [pixels(fresh, encoder) for encoder in range(3)]
    assert "row 1, column 1" in fresh.run(f"document.querySelector('{FIGURE} .status').textContent")
    fresh.click(f'{FIGURE} .pick[data-encoder="2"]', across=0.97, down=0.97)
    assert all(old != new for old, new in zip(corner, [pixels(fresh, e) for e in range(3)], strict=True))
    marks = fresh.run(f"[...document.querySelectorAll('{FIGURE} .mark')].map(m => parseFloat(m.style.left))")
    assert all(left > 40 for left in marks)
    assert fresh.problems == []


def test_the_script_computes_the_cosine_that_python_does(fresh: Any, pages: tuple[Path, Path]) -> None:
    """Clicking the patch that the page marks from the start must paint the very colours that Python drew for it."""
    fresh.size(*DESKTOP)
    fresh.open(pages[0])
    place = fresh.run(
        f"(() => {{ const m = document.querySelector('{FIGURE} .pick[data-encoder=\"0\"] .mark').style;"
        " return [parseFloat(m.left) + parseFloat(m.width) / 2, parseFloat(m.top) + parseFloat(m.height) / 2]; })()"
    )
    drawn = fresh.run(COLOURS % (FIGURE, "img"))
    fresh.click(f'{FIGURE} .pick[data-encoder="0"]', across=place[0] / 100, down=place[1] / 100)
    painted = fresh.run(COLOURS % (FIGURE, "canvas"))
    assert painted == drawn
    assert len(set(map(tuple, painted))) > 1


def test_arrow_keys_move_the_patch_and_stop_at_the_edge(fresh: Any, pages: tuple[Path, Path]) -> None:
    fresh.size(*DESKTOP)
    fresh.open(pages[0])
    fresh.click(f'{FIGURE} .pick[data-encoder="0"]', across=0.01, down=0.01)
    fresh.run(f"document.querySelector('{FIGURE} .strip').focus()")
    told = []
    for key in ("ArrowRight", "ArrowLeft", "ArrowLeft", "ArrowDown"):
        fresh.press(key)
        told.append(fresh.run(f"document.querySelector('{FIGURE} .status').textContent"))
    assert [text.split("patch in ")[1] for text in told] == [
        "row 1, column 2",
        "row 1, column 1",
        "row 1, column 1",
        "row 2, column 1",
    ]
    assert fresh.problems == []


@pytest.mark.parametrize("which", [0, 1], ids=["one run", "two runs"])
def test_the_page_opens_without_an_error_and_asks_nothing_of_the_network(
    fresh: Any, pages: tuple[Path, Path], which: int
) -> None:
    page = pages[which]
    assert page.stat().st_size < MAX_PAGE_BYTES
    for width, height in (DESKTOP, PHONE):
        for dark in (False, True):
            fresh.size(width, height, mobile=width < 600, dark=dark)
            fresh.open(page)
            assert fresh.run("document.documentElement.scrollWidth") == width
    closed = fresh.run("document.querySelectorAll('details:not([open])').length")
    for number in range(closed):
        fresh.run(f"document.querySelectorAll('details')[{number}].id = 'd{number}'")
        fresh.click(f"#d{number} summary")
    assert fresh.run("document.querySelectorAll('details:not([open])').length") == 0
    assert closed >= 3
    assert fresh.run("document.documentElement.scrollWidth") == PHONE[0]
    assert fresh.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert fresh.problems == []
    assert set(fresh.requests) == {page.resolve().as_uri()}


def test_every_link_leads_to_a_section_and_every_picture_says_what_it_is(fresh: Any, pages: tuple[Path, Path]) -> None:
    fresh.size(*PHONE, mobile=True)
    for page in pages:
        fresh.open(page)
        assert fresh.run("[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))")
        unnamed = "[...document.querySelectorAll('img, [role=img]')].filter(e => !(e.alt || e.ariaLabel))"
        assert fresh.run(f"{unnamed}.length") == 0


def test_without_scripts_the_page_still_shows_a_map_for_each_encoder(fresh: Any, pages: tuple[Path, Path]) -> None:
    fresh.size(*DESKTOP)
    fresh.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        fresh.open(pages[0])
        root = fresh.call("DOM.getDocument")["root"]["nodeId"]
        found = fresh.call("DOM.querySelectorAll", nodeId=root, selector=f"{FIGURE} .pick img")["nodeIds"]
        live = fresh.call("DOM.querySelectorAll", nodeId=root, selector=".scripted")["nodeIds"]
    finally:
        fresh.call("Emulation.setScriptExecutionDisabled", value=False)
    assert len(found) == 4
    assert live == []
    assert fresh.problems == []


def test_the_page_tells_what_the_run_has(fresh: Any, pages: tuple[Path, Path]) -> None:
    fresh.open(pages[0])
    text = fresh.run("document.body.textContent")
    assert "images trained on" in text
    assert "Worst images by fidelity" in text
    assert "In the training shards too: 96 probed images exactly" in text
    absent = json.loads(fresh.run("JSON.stringify([...document.querySelectorAll('.absent')].map(e => e.textContent))"))
    assert absent == ["The run has no exports yet."]
    fresh.open(pages[1])
    assert "Runs compared" in fresh.run("document.body.textContent")
