"""Annotations of a task, one JSON object a line, as conversations with InternVL's questions.

Every annotation names its image as `image` (driving: six as `views`), relative to the image folder; boxes are in
pixels.

    classification  {"image", "label"}                            all labels of the file are offered
    detection       {"image", "objects": [{"label", "box"}]}      one question for each label in the image
    referring       {"image", "expression", "box"}
    region          {"image", "box", "answer", "question"?}       without a question: to be described
    driving         {"views": {camera: image}, "question", "answer"}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from distill.errors import ConfigError, DataError
from distill.vlm.adapt.boxes import BoxFormat, ScaledBox, box_text, read_box, scale_box
from distill.vlm.adapt.driving import StitchedViews, scale_objects
from distill.vlm.conversation import IMAGE_PLACE, Conversation, Turn
from distill.vlm.image_sources import ImageSource, file_in

AdaptTask = Literal["classification", "detection", "referring", "region", "driving"]
TASKS: tuple[AdaptTask, ...] = get_args(AdaptTask)
MAX_LINE_BYTES = 4 << 20


@dataclass(frozen=True)
class _Source:
    """What the annotations of one file have in common."""

    image_folder: Path
    box_format: BoxFormat
    labels: tuple[str, ...] = field(default=())


def adapt_records(
    path: Path, task: AdaptTask, image_folder: Path | None = None, *, box_format: BoxFormat = "xyxy"
) -> Iterator[Conversation]:
    """Yield a file's annotations as conversations, in its order.

    Args:
        path: `.jsonl`, an annotation a line; or `.json`, a list of them.
        task: what they annotate.
        image_folder: where the images' names start; the file's own folder by default.
        box_format: "xyxy" (two corners) or "xywh" (COCO), in pixels.

    Raises:
        ConfigError: the task, the box format or the file's ending is unknown.
        DataError: the file is missing or empty, or an annotation is not as it must be; file and line are named.
    """
    if task not in TASKS or box_format not in get_args(BoxFormat):
        raise ConfigError(
            f"Unknown task {task!r} or box format {box_format!r}; tasks: {', '.join(TASKS)}; formats: xyxy, xywh."
        )
    path = Path(path)
    folder = path.parent if image_folder is None else Path(image_folder)
    labels: tuple[str, ...] = ()
    if task == "classification":
        labels = tuple(sorted({_text(values, "label", where) for values, where in _read(path)}))
    source = _Source(folder, box_format, labels)
    for values, where in _read(path):
        yield from convert_record(task, values, where, source)


def convert_record(task: AdaptTask, values: Mapping[str, Any], where: str, source: _Source) -> list[Conversation]:
    """Return one annotation as conversations: one, or for detection one for each label.

    Raises:
        DataError: a field is missing or wrong.
    """
    return _CONVERT[task](values, where, source)


def _read(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    if path.suffix not in (".json", ".jsonl"):
        raise ConfigError(f"{path} has the ending {path.suffix!r}; annotations are read from .jsonl or .json.")
    is_empty = True
    for line, where in _lines(path):
        is_empty = False
        if not isinstance(line, dict):
            raise DataError(f"{where} is a {type(line).__name__}; an annotation is a JSON object.")
        yield cast(Mapping[str, Any], line), where
    if is_empty:
        raise DataError(f"{path} holds no annotation; give a file with at least one.")


def _lines(path: Path) -> Iterator[tuple[object, str]]:
    where = str(path)
    try:
        if path.suffix == ".json":
            content: Any = json.loads(path.read_bytes())
            for number, item in enumerate(
                cast(list[Any], content) if isinstance(content, list) else [content], start=1
            ):
                yield item, f"{path}: annotation {number}"
            return
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                where = f"{path}: line {number}"
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(f"{where} is longer than {MAX_LINE_BYTES:,} bytes; shorten it.")
                if line.strip():
                    yield json.loads(line), where
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no valid JSON ({error}); mend it or leave it out.") from error


def _classification(values: Mapping[str, Any], where: str, source: _Source) -> list[Conversation]:
    question = (
        f"Classify the image within one of the given classes: {', '.join(source.labels)}. "
        "Answer with one word or short phrase."
    )
    return [_conversation(where, _image(values, where, source), question, _text(values, "label", where))]


def _detection(values: Mapping[str, Any], where: str, source: _Source) -> list[Conversation]:
    image = _image(values, where, source)
    objects = values.get("objects")
    if not isinstance(objects, list) or not objects:
        raise DataError(f"{where}: 'objects' is {objects!r:.80}; it must be a list that is not empty.")
    boxes: dict[str, list[ScaledBox]] = {}
    size = image.size()
    for item in cast(list[Any], objects):
        if not isinstance(item, dict):
            raise DataError(f"{where}: an object is {item!r:.80}; it must have a 'label' and a 'box'.")
        found = cast(Mapping[str, Any], item)
        boxes.setdefault(_text(found, "label", where), []).append(_box(found, size, where, source))
    return [
        _conversation(
            where,
            image,
            f"Please detect all <ref>{label}</ref> in the image with their bounding boxes.",
            f"<ref>{label}</ref>{box_text(sorted(of_label))}",
        )
        for label, of_label in boxes.items()
    ]


def _referring(values: Mapping[str, Any], where: str, source: _Source) -> list[Conversation]:
    image, expression = _image(values, where, source), _text(values, "expression", where)
    box = box_text([_box(values, image.size(), where, source)])
    question = (
        f"Please provide the bounding box coordinate of the region this sentence describes: <ref>{expression}</ref>"
    )
    return [_conversation(where, image, question, f"<ref>{expression}</ref>{box}")]


def _region(values: Mapping[str, Any], where: str, source: _Source) -> list[Conversation]:
    image = _image(values, where, source)
    box = box_text([_box(values, image.size(), where, source)])
    asked = (
        f"{_text(values, 'question', where)} {box}" if "question" in values else f"Please describe the region {box}."
    )
    return [_conversation(where, image, asked, _text(values, "answer", where))]


def _driving(values: Mapping[str, Any], where: str, source: _Source) -> list[Conversation]:
    given = values.get("views")
    names = cast(Mapping[str, Any], given) if isinstance(given, dict) else {}
    if not names or not all(isinstance(name, str) for name in names.values()):
        raise DataError(f"{where}: 'views' is {given!r:.80}; it must give an image's name for each camera.")
    views: dict[str, ImageSource] = {
        camera: file_in(source.image_folder, name, where) for camera, name in names.items()
    }
    question = scale_objects(_text(values, "question", where), where)
    answer = scale_objects(_text(values, "answer", where), where)
    return [_conversation(where, StitchedViews(views, where), question, answer)]


_CONVERT: dict[AdaptTask, Callable[[Mapping[str, Any], str, _Source], list[Conversation]]] = {
    "classification": _classification,
    "detection": _detection,
    "referring": _referring,
    "region": _region,
    "driving": _driving,
}


def _conversation(where: str, image: ImageSource, question: str, answer: str) -> Conversation:
    return Conversation(where, (Turn("human", f"{IMAGE_PLACE}\n{question}"), Turn("assistant", answer)), (image,))


def _image(values: Mapping[str, Any], where: str, source: _Source) -> ImageSource:
    return file_in(source.image_folder, _text(values, "image", where), where)


def _box(values: Mapping[str, Any], size: tuple[int, int], where: str, source: _Source) -> ScaledBox:
    return scale_box(read_box(values.get("box"), source.box_format, where), size, where)


def _text(values: Mapping[str, Any], key: str, where: str) -> str:
    text = values.get(key)
    if not isinstance(text, str) or not text.strip() or IMAGE_PLACE in text:
        raise DataError(f"{where}: {key!r} is {text!r:.80}; it must be text, not empty and without {IMAGE_PLACE}.")
    return text.strip()
