"""Lines of text: read from a manifest, kept together by document, and refused when they cannot be written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from distill.errors import DataError
from distill.probe.ctc_head import Columns, ReadingHead, decode, encode, steps_needed
from distill.probe.extraction import Extraction
from distill.probe.ocr import Reading, ocr_scores
from distill.probe.rung import ratio_of_sums
from distill.probe.text_lines import TextLine, TextPages, read_text_pages

ASSETS = Path(__file__).parents[3] / "shared" / "assets"
QUIET = Console(quiet=True)


def write_manifest(folder: Path, *entries: dict[str, Any]) -> Path:
    for entry in entries:
        Image.new("RGB", (100, 50), (250, 250, 250)).save(folder / entry["path"])
    file = folder / "manifest.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), "utf-8")
    return file


def test_boxes_are_scaled_with_the_page_and_both_notations_are_read(tmp_path: Path) -> None:
    lines = [[10, 5, 50, 25, "TOTAL"], {"box": [0, 0, 100, 50], "text": "RM"}]
    manifest = write_manifest(tmp_path, {"path": "7_0.png", "lines": lines}, {"path": "8_0.png", "lines": []})
    pages = read_text_pages(manifest, img_size_px=200)
    assert pages.images.shape == (1, 3, 200, 200)
    assert [(line.text, line.box) for line in pages.lines] == [
        ("TOTAL", (20.0, 20.0, 100.0, 100.0)),
        ("RM", (0.0, 0.0, 200.0, 200.0)),
    ]
    assert [line.size_px for line in pages.lines] == [96.0, 96.0]


def test_crops_of_one_page_stay_on_one_side_of_the_split(tmp_path: Path) -> None:
    entries = [
        {"path": f"{page}_{crop}.png", "lines": [[0, 0, 40, 20, "A"], [0, 20, 40, 40, "B"]]}
        for page in range(10)
        for crop in range(3)
    ]
    pages = read_text_pages(write_manifest(tmp_path, *entries), img_size_px=32)
    split = pages.split(seed=0)
    document = np.asarray([line.page // 3 for line in pages.lines])
    sides = [set(document[part].tolist()) for part in (split.fit, split.select, split.test)]
    assert all(sides)
    assert sum(map(len, sides)) == len(set.union(*sides)) == 10


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "a.png", "lines": [[0, 0, 0, 10, "A"]]}, "empty box or no text"),
        ({"path": "a.png", "lines": [[0, 0, 10, 10, ""]]}, "empty box or no text"),
        ({"path": "a.png", "lines": [[0, 0, 10]]}, "must be"),
        ({"path": "a.png"}, "no image with text lines"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_named(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_text_pages(write_manifest(tmp_path, entry), img_size_px=32)


def test_a_missing_manifest_and_a_missing_page_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl"):
        read_text_pages(tmp_path / "none.jsonl")
    manifest = write_manifest(tmp_path, {"path": "a.png", "lines": [[0, 0, 9, 9, "A"]]})
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png"):
        read_text_pages(manifest, img_size_px=32)


def test_a_text_that_is_too_long_for_its_columns_is_refused(make_encoder: Any) -> None:
    line = TextLine(0, (0.0, 0.0, 16.0, 8.0), "1123", 8.0, 0)
    lines = tuple(TextLine(page, line.box, "1123" if page == 3 else "1", 8.0, page) for page in range(9))
    pages = TextPages(torch.zeros(9, 3, 32, 32, dtype=torch.uint8), lines, "x", "font_px")
    with pytest.raises(DataError, match=r"'1123' of page 3 needs 5 time steps, and its columns of tokens give 4"):
        ocr_scores(make_encoder(), Extraction(batch_size=4, img_size_px=32), 0, QUIET, pages)


def test_equal_neighbours_need_a_blank_between_them() -> None:
    assert [steps_needed(text) for text in ("", "1", "12", "11", "1122")] == [0, 1, 2, 3, 6]


def test_the_likeliest_path_is_merged_and_loses_its_blanks() -> None:
    path = torch.tensor([[0, 1, 1, 0, 1, 2, 2, 0, 2]]).T
    scores = torch.nn.functional.one_hot(path, 3).float()
    assert decode(scores, torch.tensor([9]), "ab") == ["aabb"]
    assert decode(scores, torch.tensor([4]), "ab") == ["a"]
    labels, lengths = encode(["ab", "b"], "ab")
    assert (labels.tolist(), lengths.tolist()) == ([1, 2, 2], [2, 1])


def test_the_head_does_not_see_what_lies_beside_a_lines_box() -> None:
    head = ReadingHead(6, steps_per_column=4, num_characters=3)
    features = torch.randn(1, 5, 6)
    first, count = torch.tensor([4]), torch.tensor([8])
    changed = features.clone()
    changed[:, [0, 3, 4]] = 9.0
    assert torch.equal(head(Columns(features, first, count)), head(Columns(changed, first, count)))
    changed[:, 1] = 9.0
    assert not torch.equal(head(Columns(features, first, count)), head(Columns(changed, first, count)))


def test_a_line_is_read_alike_alone_and_beside_a_longer_one() -> None:
    head = ReadingHead(6, steps_per_column=4, num_characters=3)
    features = torch.randn(2, 5, 6)
    first, count = torch.tensor([4, 0]), torch.tensor([8, 20])
    both = head(Columns(features, first, count))[:8, 0]
    assert torch.allclose(both, head(Columns(features[:1], first[:1], count[:1]))[:, 0], atol=1e-6)


def test_the_global_generator_is_left_as_it_was(make_encoder: Any) -> None:
    lines = tuple(TextLine(page, (0.0, 0.0, 32.0, 16.0), "12"[page % 2], 8.0, page) for page in range(9))
    pages = TextPages(torch.randint(0, 255, (9, 3, 32, 32), dtype=torch.uint8), lines, "x", "font_px")
    encoder, state = make_encoder(), torch.random.get_rng_state()
    reading = Reading(epochs=1)
    first = ocr_scores(encoder, Extraction(batch_size=4, img_size_px=32), 0, QUIET, pages, reading)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    again = ocr_scores(encoder, Extraction(batch_size=4, img_size_px=32), 0, QUIET, pages, reading)
    assert np.array_equal(first[0].per_image.numerator, again[0].per_image.numerator)


@pytest.mark.slow
@pytest.mark.skipif(not ASSETS.is_dir(), reason="needs the real receipts of ../shared/assets")
def test_real_receipts_are_read_from_their_manifest(make_encoder: Any) -> None:
    pages = read_text_pages(ASSETS / "manifest.jsonl", dataset="sroie_crops", max_pages=24)
    how = Extraction(batch_size=4)
    scores = ocr_scores(make_encoder(patch_size=16), how, 0, QUIET, pages, Reading(epochs=2))
    assert scores[0].at is None
    assert all(score.at is not None and score.at[0] == "line_px" for score in scores[1:])
    assert 0.5 < ratio_of_sums(scores[0].per_image.numerator, scores[0].per_image.denominator) < 1.5
