"""Domain adaptation: annotations become InternVL's questions and answers, with boxes and places that are right."""

from __future__ import annotations

import doctest
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distill.errors import ConfigError, DataError
from distill.vlm.adapt import AdaptTask, adapt_records, boxes, driving, write_records
from distill.vlm.adapt.boxes import box_text, read_box, scale_box
from distill.vlm.adapt.driving import CAMERA_PLACES, StitchedViews, scale_objects
from distill.vlm.image_sources import FileImage
from distill.vlm.records import read_records
from distill.vlm.samples import tiling_for
from distill.vlm.scoring import box_accuracy, parse_boxes
from distill.vlm.tiling import Tiling, choose_grid, count_tiles


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (200, 100), "red").save(tmp_path / "a.png")
    Image.new("RGB", (50, 80), "blue").save(tmp_path / "b.png")
    for number, camera in enumerate(CAMERA_PLACES):
        Image.new("RGB", (160, 90), (40 * number, 10, 10)).save(tmp_path / f"{camera}.png")
    return tmp_path


def convert(folder: Path, task: AdaptTask, *lines: Any, **options: Any) -> list[tuple[str, str]]:
    path = folder / "annotations.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return [(record.turns[0].text, record.turns[1].text) for record in adapt_records(path, task, **options)]


def test_classification_offers_every_class_of_the_file(folder: Path) -> None:
    talks = convert(folder, "classification", {"image": "a.png", "label": "rain"}, {"image": "b.png", "label": "clear"})
    asked = "Classify the image within one of the given classes: clear, rain. Answer with one word or short phrase."
    assert talks == [(f"<image>\n{asked}", "rain"), (f"<image>\n{asked}", "clear")]


def test_detection_asks_for_all_boxes_of_each_label_in_thousandths(folder: Path) -> None:
    objects = [
        {"label": "car", "box": [100, 50, 200, 100]},
        {"label": "sign", "box": [0, 0, 20, 10]},
        {"label": "car", "box": [10, 10, 30, 20]},
    ]
    talks = convert(folder, "detection", {"image": "a.png", "objects": objects})
    assert talks == [
        (
            "<image>\nPlease detect all <ref>car</ref> in the image with their bounding boxes.",
            "<ref>car</ref><box>[[50, 100, 150, 200], [500, 500, 1000, 1000]]</box>",
        ),
        (
            "<image>\nPlease detect all <ref>sign</ref> in the image with their bounding boxes.",
            "<ref>sign</ref><box>[[0, 0, 100, 100]]</box>",
        ),
    ]


def test_referring_is_asked_and_answered_as_internvl_does(folder: Path) -> None:
    ((asked, answered),) = convert(
        folder, "referring", {"image": "b.png", "expression": "the left dog", "box": [5, 8, 20, 32]}, box_format="xywh"
    )
    assert asked == (
        "<image>\nPlease provide the bounding box coordinate of the region this sentence describes: "
        "<ref>the left dog</ref>"
    )
    assert answered == "<ref>the left dog</ref><box>[[100, 100, 500, 500]]</box>"
    assert box_accuracy(answered, ["[[100, 100, 500, 500]]"]) == 1.0


def test_a_region_is_described_or_asked_about(folder: Path) -> None:
    region = {"image": "a.png", "box": [0, 0, 100, 100], "answer": "a wall"}
    talks = convert(folder, "region", region, {**region, "question": "What colour is it?", "answer": "red"})
    assert talks == [
        ("<image>\nPlease describe the region <box>[[0, 0, 500, 1000]]</box>.", "a wall"),
        ("<image>\nWhat colour is it? <box>[[0, 0, 500, 1000]]</box>", "red"),
    ]


@pytest.mark.parametrize("seed", range(5))
def test_a_box_comes_back_to_within_half_a_thousandth(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for width, height in rng.integers(20, 4000, (40, 2)).tolist():
        x1, y1 = rng.uniform(0, width - 2), rng.uniform(0, height - 2)
        box = (x1, y1, rng.uniform(x1 + 1, width), rng.uniform(y1 + 1, height))
        (read,) = parse_boxes(box_text([scale_box(box, (width, height), "")]))
        back = [value * side / 1000 for value, side in zip(read, (width, height, width, height), strict=True)]
        assert np.abs(np.subtract(back, box)).max() <= max(width, height) / 2000 + 1e-9


def test_what_lies_outside_the_image_is_cut_off() -> None:
    assert scale_box((-10.0, 50.0, 100.0, 300.0), (200, 100), "") == (0, 500, 500, 1000)


def test_a_drive_is_six_views_in_the_published_layout(folder: Path) -> None:
    views = {camera: FileImage(folder / f"{camera}.png") for camera in CAMERA_PLACES}
    whole = StitchedViews(views, "drive")
    image = whole.read()
    assert image.size == whole.size() == (2688, 896)
    for number, (column, row) in enumerate(CAMERA_PLACES.values()):
        assert image.getpixel((column * 896 + 895, row * 448 + 447)) == (40 * number, 10, 10)
    assert CAMERA_PLACES["CAM_BACK"] == (1, 1)
    assert list(CAMERA_PLACES)[:3] == ["CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT"]


def test_every_view_carries_its_cameras_name(folder: Path) -> None:
    views = {camera: FileImage(folder / f"{camera}.png") for camera in CAMERA_PLACES}
    image = np.asarray(StitchedViews(views, "drive").read()).astype(int)
    corners = [
        image[448 * row : 448 * row + 50, 896 * column : 896 * column + 420] for column, row in CAMERA_PLACES.values()
    ]
    written = [corner.min(-1) > 200 for corner in corners]
    assert all(mask.sum() > 300 for mask in written)
    assert len({mask.tobytes() for mask in written}) == 6
    assert not (image[60:448, :896].min(-1) > 200).any()


def test_a_drive_becomes_twelve_tiles_and_a_thumbnail() -> None:
    tiling = tiling_for(Tiling(max_tiles=12), 1, is_video=False)
    assert choose_grid(2688, 896, tiling) == (6, 2)
    assert count_tiles(2688, 896, tiling) == 13


def test_objects_are_placed_in_the_whole_image(folder: Path) -> None:
    text = "Is <c1,CAM_BACK,1088.3,497.5> nearer than <c2,CAM_FRONT_RIGHT,0.0,900.0>?"
    scaled = scale_objects(text, "")
    assert scaled == "Is <c1,CAM_BACK,[560, 776]> nearer than <c2,CAM_FRONT_RIGHT,[667, 500]>?"
    # The way back, `post_process` of internvl_chat/eval/domain_specific/drivelm/evaluate.py: a view to the right and
    # one down are taken off, and 896 x 448 are a view of 1600 x 900. Thousandths are some 2.4 x 0.9 pixels of a view.
    x, y = (0.560 * 2688 - 896) / 896 * 1600, (0.776 * 896 - 448) / 448 * 900
    assert (x, y) == (pytest.approx(1088.3, abs=2.5), pytest.approx(497.5, abs=1.0))
    views = {camera: f"{camera}.png" for camera in CAMERA_PLACES}
    ((asked, answered),) = convert(
        folder, "driving", {"views": views, "question": text, "answer": "Yes, <c1,CAM_BACK,0,0>."}
    )
    assert asked == f"<image>\n{scaled}"
    assert answered == "Yes, <c1,CAM_BACK,[333, 500]>."


def test_written_records_are_read_back_with_their_images(folder: Path, tmp_path: Path) -> None:
    path = folder / "annotations.jsonl"
    line = {"image": "a.png", "box": [0, 0, 100, 100], "answer": "a wall"}
    path.write_text(json.dumps(line) + "\n" + json.dumps({**line, "answer": "red"}), encoding="utf-8")
    file = write_records(adapt_records(path, "region"), tmp_path / "out")
    first, second = read_records(file, "instruction")
    assert first.turns[0].text == "<image>\nPlease describe the region <box>[[0, 0, 500, 1000]]</box>."
    assert (first.answer, second.answer) == ("a wall", "red")
    assert first.images[0].read().getpixel((9, 9)) == (255, 0, 0)
    assert len(list((tmp_path / "out/images").iterdir())) == 1, "an image that two records show is written once"


def test_stitched_views_are_written_once_for_all_questions_about_them(folder: Path, tmp_path: Path) -> None:
    views = {camera: f"{camera}.png" for camera in CAMERA_PLACES}
    path = folder / "drive.json"
    path.write_text(json.dumps([{"views": views, "question": q, "answer": "Yes."} for q in ("Go?", "Stop?")]))
    records = read_records(write_records(adapt_records(path, "driving"), tmp_path / "out"), "instruction")
    assert [record.images[0].size() for record in records] == [(2688, 896)] * 2
    assert len(list((tmp_path / "out/images").iterdir())) == 1


def test_a_folder_with_other_files_is_left_alone(folder: Path) -> None:
    with pytest.raises(DataError, match="holds other files"):
        write_records([], folder)


BAD: list[tuple[AdaptTask, Any, str]] = [
    ("classification", {"image": "a.png"}, "'label' is None"),
    ("classification", {"image": "../a.png", "label": "x"}, "unsafe"),
    ("detection", {"image": "a.png", "objects": []}, "'objects' is \\[\\]"),
    ("detection", {"image": "a.png", "objects": ["car"]}, "an object is 'car'"),
    ("detection", {"image": "a.png", "objects": [{"label": "car"}]}, "the box is None"),
    ("referring", {"image": "a.png", "expression": "x", "box": [10, 10, 5, 20]}, "is empty as xyxy"),
    ("referring", {"image": "a.png", "expression": "x", "box": [300, 10, 350, 20]}, "outside the image of 200 x 100"),
    ("referring", {"image": "a.png", "expression": "x", "box": [1, 2, 3]}, "four numbers"),
    ("referring", {"image": "a.png", "expression": "x", "box": [1, 2, 3, "4"]}, "four numbers"),
    ("referring", {"image": "a.png", "expression": "x", "box": [1, 2, 3, True]}, "four numbers"),
    ("referring", {"image": "a.png", "expression": "an <image>", "box": [1, 2, 3, 4]}, "without <image>"),
    ("region", {"image": "none.png", "box": [1, 2, 3, 4], "answer": "x"}, "cannot be read"),
    ("driving", {"question": "x", "answer": "y"}, "'views' is None"),
    ("driving", {"views": {"CAM_FRONT": "a.png"}, "question": "x", "answer": "y"}, "the views are CAM_FRONT"),
    ("driving", {"views": {"CAM_FRONT": 1}, "question": "x", "answer": "y"}, "image's name for each camera"),
    ("driving", {"views": {}, "question": "x <c1,CAM_TOP,1,2>", "answer": "y"}, "'views' is {}"),
    ("region", ["a list"], "an annotation is a JSON object"),
]


@pytest.mark.parametrize(("task", "line", "message"), BAD)
def test_a_bad_annotation_is_named_with_its_line(folder: Path, task: AdaptTask, line: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        convert(folder, task, line)
    assert "annotations.jsonl: line 1" in str(raised.value)


def test_an_unknown_camera_in_the_text_is_refused() -> None:
    with pytest.raises(DataError, match="unknown camera 'CAM_TOP'"):
        scale_objects("<c1,CAM_TOP,1,2>", "line 3")


def test_boxes_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="four numbers"):
        read_box([float("nan"), 0, 1, 1], "xyxy", "")


def test_files_and_tasks_that_cannot_be_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="Unknown task 'segmentation'"):
        convert(folder, "segmentation", {})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'.csv'"):
        list(adapt_records(folder / "a.csv", "region"))
    with pytest.raises(DataError, match="cannot be read"):
        list(adapt_records(folder / "absent.jsonl", "region"))
    with pytest.raises(DataError, match="holds no annotation"):
        convert(folder, "region")
    (folder / "bad.jsonl").write_bytes(b"{\n")
    with pytest.raises(DataError, match="line 1 is no valid JSON"):
        list(adapt_records(folder / "bad.jsonl", "region"))


@pytest.mark.parametrize("module", [boxes, driving])
def test_the_examples_run(module: ModuleType) -> None:
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed
