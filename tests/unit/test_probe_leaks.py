"""Probed images that were trained on are found, exactly or encoded anew, counted, and left out where that is asked."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from rich.console import Console

from distill.errors import DataError
from distill.probe.duplicates import MAX_BITS, find_duplicates, hash_image, hash_images
from distill.probe.feature_cache import FeatureCache
from distill.probe.leaks import LeakSearch, check_leaks, training_data, without_leaks
from distill.probe.probe_set import open_probe_set


def picture(number: int) -> Image.Image:
    """Random rectangles, and below them lines of random words as on a page of text."""
    generator = np.random.default_rng(number)
    image = Image.new("RGB", (200, 160), tuple(generator.integers(100, 255, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, w, h = generator.integers(0, 110, 4).tolist()
        draw.rectangle((x, y, x + w, y + h), fill=tuple(generator.integers(0, 255, 3).tolist()))
    return image


def page(number: int) -> Image.Image:
    """A white page of text lines, like every other at a glance."""
    generator = np.random.default_rng(1000 + number)
    image = Image.new("RGB", (200, 160), "white")
    draw = ImageDraw.Draw(image)
    for line in range(12):
        x = 8
        while x < 170:
            width = int(generator.integers(4, 30))
            draw.rectangle((x, 8 + 12 * line, min(x + width, 190), 13 + 12 * line), fill="black")
            x += width + int(generator.integers(3, 9))
    return image


def save(image: Image.Image, file: Path, **options: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Probed images 0 to 9, and training images of which some are the same, encoded otherwise."""
    root = tmp_path_factory.mktemp("leaks")
    probed, trained = root / "probed", root / "trained"
    for number in range(10):
        save(picture(number) if number < 5 else page(number), probed / "x" / f"{number}.png")
    for number in range(20, 60):
        save(picture(number) if number % 2 else page(number), trained / "x" / f"{number}.png")
    save(picture(0), trained / "x" / "same.webp", lossless=True)  # equal pixels in another format
    save(picture(1), trained / "x" / "jpeg.jpg", quality=40)
    save(picture(2).resize((101, 83)), trained / "x" / "small.png")
    save(page(5), trained / "x" / "page.jpg", quality=60)
    return probed, trained


def test_exact_and_near_duplicates_are_told_apart_and_nothing_else_is_taken_for_one(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    probed, trained = (str(folder) for folder in folders)
    data = open_probe_set(probed, 32)
    check = check_leaks(data, list(range(10)), LeakSearch([trained]), Console())
    assert check is not None
    assert check.block == {
        "train": trained,
        "exact": 1,
        "near": 3,
        "rows": [0, 1, 2, 5],
        "checked": 10,
        "excluded": 0,
    }
    assert "LEAK: of 10 probed images 1 are in the training shards exactly and 3 nearly" in capsys.readouterr().out
    assert without_leaks(list(range(10)), check) == list(range(10))


def test_leaks_are_left_out_where_that_is_asked_and_hashes_are_kept(folders: tuple[Path, Path], tmp_path: Path) -> None:
    probed, trained = (str(folder) for folder in folders)
    data, console = open_probe_set(probed, 32), Console(quiet=True)
    rows = list(range(10))
    for _ in range(2):
        check = check_leaks(data, rows, LeakSearch([trained], "exclude", cache=FeatureCache(tmp_path)), console)
        assert without_leaks(rows, check) == [3, 4, 6, 7, 8, 9]
        assert check is not None
        assert check.block["excluded"] == 4
    assert len(list(tmp_path.iterdir())) == 2


def test_training_on_the_probed_images_themselves_leaves_nothing_to_probe(folders: tuple[Path, Path]) -> None:
    probed = str(folders[0])
    with pytest.raises(DataError, match="All 10 probed images are in"):
        check_leaks(open_probe_set(probed, 32), list(range(10)), LeakSearch([probed], "exclude"), Console(quiet=True))


def test_shards_that_a_run_names_and_are_gone_are_said_and_named_ones_are_an_error(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data = open_probe_set(str(folders[0]), 32)

    def check(must_exist: bool) -> object:
        return check_leaks(data, [0, 1], LeakSearch(["gone/*.tar"], must_exist=must_exist), Console())

    assert check(False) is None
    assert "Leaks were not looked for" in capsys.readouterr().out
    with pytest.raises(DataError, match="no shard matches"):
        check(True)


def test_blank_images_are_no_leak_and_brightness_is_none_either() -> None:
    white = torch.full((3, 40, 40), 255, dtype=torch.uint8)
    digest, bits, thumbnail = hash_image(white)
    assert len(digest) == 32
    assert thumbnail.shape == (1024,)
    assert 0 <= bits < 1 << 64

    class Blank:
        def pixels(self, row: int) -> torch.Tensor:
            return white - row

        def name_of(self, row: int) -> str:
            return str(row)

    one, _ = hash_images(Blank(), [0], what="x")
    other, _ = hash_images(Blank(), [1, 2], what="x")
    assert not find_duplicates(one, other).either.any()


def test_images_that_are_alike_at_a_glance_only_are_no_duplicates() -> None:
    coarse = np.asarray(picture(8).resize((320, 320)).convert("L"), dtype=np.float64) * 0.4 + 70
    y, x = np.mgrid[:320, :320] // 10 % 2  # cells of one thumbnail pixel, which eight frequencies do not resolve

    class Striped:
        def pixels(self, row: int) -> torch.Tensor:
            fine = coarse + 60 * ((x, y)[row] - 0.5)
            return torch.from_numpy(np.repeat(fine.clip(0, 255).astype(np.uint8)[None], 3, axis=0))

        def name_of(self, row: int) -> str:
            return str(row)

    one, _ = hash_images(Striped(), [0], what="x")
    other, _ = hash_images(Striped(), [1], what="x")
    assert int(np.bitwise_count(one.near ^ other.near)[0]) <= MAX_BITS
    assert not find_duplicates(one, other).either.any()


def test_training_data_is_read_from_the_runs_config(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {}\ndata: {train: {natural: [a.tar, b.tar], ocr: c.tar}}\n")
    assert training_data(str(tmp_path)) == ["a.tar", "b.tar", "c.tar"]
    (tmp_path / "config.yaml").write_text("model: {}\ndata: {train: shards}\n")
    assert training_data(str(tmp_path)) == ["shards"]
    (tmp_path / "config.yaml").write_text("model: {}\n")
    assert training_data(str(tmp_path)) == []
    assert training_data(str(tmp_path / "nothing")) == []


def test_an_image_that_cannot_be_decoded_is_no_reason_to_stop(tmp_path: Path) -> None:
    save(picture(1), tmp_path / "x" / "a.png")
    save(picture(2), tmp_path / "x" / "b.png")
    buffer = io.BytesIO()
    picture(3).save(buffer, "PNG")
    (tmp_path / "x" / "a.png").write_bytes(buffer.getvalue()[:60])
    hashes, rows = hash_images(open_probe_set(str(tmp_path), 32).images, [0, 1], what="x")
    assert (len(hashes), rows.tolist()) == (1, [1])
