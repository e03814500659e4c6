"""Every kind of generated image: size, content, labels, groups and annotations."""

from __future__ import annotations

import json

import numpy as np
import pytest

from distill.data.synthetic import chart, multidisciplinary, natural, ocr
from distill.data.synthetic.fonts import FAMILIES
from distill.data.synthetic.rendered import SPLITS, Split, sample_rng
from distill.data.synthetic.words import Vocabulary
from distill.data.synthetic.writer import DOMAINS, draw_sample, label_names

SIZE_PX = 448
MODULES = {"natural": natural, "ocr": ocr, "chart": chart, "multidisciplinary": multidisciplinary}
KINDS = [(domain, split, kind) for domain in DOMAINS for split in SPLITS for kind in MODULES[domain].kinds(split)]


@pytest.mark.parametrize(("domain", "split", "kind"), KINDS)
def test_every_kind_is_a_448_px_rgb_image_with_content(domain: str, split: Split, kind: str) -> None:
    index = MODULES[domain].kinds(split).index(kind)
    rendered, facts = draw_sample(domain, split, index, seed=1, size_px=SIZE_PX)
    assert rendered.image.mode == "RGB"
    assert rendered.image.size == (SIZE_PX, SIZE_PX)
    grey = np.asarray(rendered.image.convert("L"), np.float32)
    assert grey.std() > 3
    assert len(np.unique(grey.astype(np.uint8))) > 16
    assert facts["label"] == f"{domain}/{kind}"
    json.dumps(facts)


def test_there_are_enough_kinds() -> None:
    assert len(natural.kinds("train")) >= 8
    assert len(natural.kinds("heldout")) >= 8
    assert len(ocr.kinds("train")) >= 6
    assert len(chart.kinds("train")) >= 12
    assert len(multidisciplinary.kinds("train")) >= 8


def test_only_natural_kinds_differ_between_the_splits() -> None:
    for domain in ("ocr", "chart", "multidisciplinary"):
        assert MODULES[domain].kinds("train") == MODULES[domain].kinds("heldout")
    assert not set(natural.kinds("train")) & set(natural.kinds("heldout"))


def test_the_splits_use_different_photograph_files() -> None:
    paths = [{p.path for p in natural.PHOTOGRAPHS[split].values()} for split in SPLITS]
    assert not paths[0] & paths[1]
    # The two frames of the stereo pair show the same motorcycle.
    assert sum("motorcycle" in path for path in paths[0] | paths[1]) == 1


def test_every_photograph_lies_on_disk() -> None:
    for split in SPLITS:
        for photograph in natural.PHOTOGRAPHS[split].values():
            assert natural.photograph_path(photograph).stat().st_size > 10_000


def test_a_natural_view_lies_inside_its_region_and_the_group_names_both() -> None:
    kinds = natural.kinds("heldout")
    regions: dict[str, set[int]] = {kind: set() for kind in kinds}
    for index in range(6 * len(kinds)):
        _, facts = draw_sample("natural", "heldout", index, seed=0, size_px=64)
        region = facts["region"]
        assert isinstance(region, int)
        assert facts["group"] == f"natural/{facts['photograph']}/{region}"
        regions[str(facts["photograph"])].add(region)
        _assert_view_inside(str(facts["photograph"]), facts)
    assert all(found == set(range(6)) for found in regions.values())


def _assert_view_inside(kind: str, facts: dict[str, object]) -> None:
    from distill.data.synthetic.natural import _regions

    box, angle, region = facts["view"], facts["angle_deg"], facts["region"]
    assert isinstance(box, list)
    assert isinstance(angle, float)
    assert isinstance(region, int)
    image = _regions("heldout", kind)[region]
    x, y, width, height = box
    cos, sin = abs(np.cos(np.radians(angle))), abs(np.sin(np.radians(angle)))
    half_x, half_y = (width * cos + height * sin) / 2, (width * sin + height * cos) / 2
    # Boxes are recorded to a tenth of a pixel and angles to a tenth of a degree.
    slack = 1.0
    assert -slack <= x - half_x <= x + half_x <= image.width + slack
    assert -slack <= y - half_y <= y + half_y <= image.height + slack


def test_samples_outside_the_natural_domain_stand_alone() -> None:
    groups = [draw_sample("ocr", "train", i, seed=0, size_px=64)[1]["group"] for i in range(12)]
    assert len(set(groups)) == 12


def test_the_splits_share_no_text_font_and_no_word() -> None:
    fonts = [{name for names in FAMILIES[split].values() for name in names} for split in SPLITS]
    assert not fonts[0] & fonts[1]
    words = [set(Vocabulary(sample_rng(0, split, 1, 0), split).words(4000).split()) for split in SPLITS]
    assert min(len(found) for found in words) > 150
    # Words made of syllables are drawn from an open set; a chance meeting would be one in thousands.
    assert len(words[0] & words[1]) <= 1


def test_a_sample_depends_on_seed_split_domain_and_index() -> None:
    def pixels(domain: str, split: Split, index: int, seed: int) -> bytes:
        return draw_sample(domain, split, index, seed=seed, size_px=96)[0].image.tobytes()

    first = pixels("chart", "train", 3, 0)
    assert pixels("chart", "train", 3, 0) == first
    assert pixels("chart", "train", 3, 1) != first
    assert pixels("chart", "heldout", 3, 0) != first
    assert pixels("chart", "train", 23, 0) != first


def test_a_chart_does_not_depend_on_the_charts_drawn_before_it() -> None:
    fresh = draw_sample("chart", "train", 12, seed=5, size_px=SIZE_PX)[0].image.tobytes()
    for index in (8, 3, 9):
        draw_sample("chart", "train", index, seed=6, size_px=SIZE_PX)
    assert draw_sample("chart", "train", 12, seed=5, size_px=SIZE_PX)[0].image.tobytes() == fresh


@pytest.mark.parametrize("kind", ocr.kinds("train"))
def test_text_lines_of_ocr_images_lie_in_the_picture_and_on_ink(kind: str) -> None:
    index = ocr.kinds("train").index(kind)
    rendered, facts = draw_sample("ocr", "train", index, seed=2, size_px=SIZE_PX)
    lines = facts["lines"]
    assert isinstance(lines, list)
    assert lines
    grey = np.asarray(rendered.image.convert("L"), np.float32)
    for line in lines:
        assert line["text"].strip()
        quad = np.asarray(line["quad"])
        assert quad.shape == (4, 2)
        x0, y0 = np.clip(quad.min(0), 0, SIZE_PX - 1).astype(int)
        x1, y1 = np.clip(quad.max(0), 0, SIZE_PX - 1).astype(int)
        inside = (quad >= -2).all() and (quad <= SIZE_PX + 2).all()
        assert inside
        assert np.ptp(grey[y0 : y1 + 1, x0 : x1 + 1]) > 20


@pytest.mark.parametrize("kind", chart.kinds("train"))
def test_charts_carry_their_values(kind: str) -> None:
    _, facts = draw_sample("chart", "train", chart.kinds("train").index(kind), seed=3, size_px=128)
    assert facts["data"]


def test_diagram_text_boxes_lie_inside_the_picture() -> None:
    for index in range(2 * len(multidisciplinary.kinds("train"))):
        _, facts = draw_sample("multidisciplinary", "train", index, seed=4, size_px=224)
        lines = facts["lines"]
        assert isinstance(lines, list)
        for line in lines:
            x0, y0, x1, y1 = line["box"]
            assert -1 <= x0 <= x1 <= 225, (facts["label"], line)
            assert -1 <= y0 <= y1 <= 225, (facts["label"], line)


def test_label_names_are_unique_and_sorted_by_domain() -> None:
    names = label_names()
    assert len(names) == len(set(names))
    assert [name.split("/")[0] for name in names] == sorted((name.split("/")[0] for name in names), key=DOMAINS.index)
