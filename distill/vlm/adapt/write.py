"""Conversations to LLaVA records on disk, with their images beside them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from rich.progress import track

from distill.checkpoint_files import temporary_beside
from distill.errors import DataError
from distill.vlm.adapt.driving import StitchedViews
from distill.vlm.conversation import Conversation
from distill.vlm.image_sources import EncodedImage, FileImage, ImageSource

JPEG_QUALITY = 95
RECORDS_NAME = "records.jsonl"


def write_records(conversations: Iterable[Conversation], folder: Path) -> Path:
    """Write conversations as `records.jsonl`, and what they show as `images/`.

    Image files are linked where the disk allows it, else copied; views that were put together are encoded as JPEG,
    other images as PNG. An image that several records show is written once, and one that is there already is kept.

    Args:
        conversations: of kind instruction.
        folder: new or empty, or one that this function wrote.

    Returns:
        The JSONL file, for `distill.vlm.records.read_records`. It is there only when everything is.

    Raises:
        DataError: the folder holds other files, or an image cannot be read.
        OSError: the folder cannot be written.
    """
    target, images = folder / RECORDS_NAME, folder / "images"
    if folder.is_dir() and not target.exists() and any(folder.iterdir()) and not images.is_dir():
        raise DataError(f"{folder} holds other files; give a folder that is new or empty.")
    images.mkdir(parents=True, exist_ok=True)
    with temporary_beside(target) as temporary:
        with temporary.open("w", encoding="utf-8") as stream:
            for number, conversation in enumerate(track(conversations, description="writing records", transient=True)):
                names = [f"images/{_write_image(source, images)}" for source in conversation.images]
                record = _record(conversation, f"{number:08d}", names)
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        temporary.replace(target)
    return target


def _record(conversation: Conversation, number: str, names: list[str]) -> dict[str, object]:
    speakers = {"human": "human", "assistant": "gpt", "system": "system"}
    turns = [{"from": speakers[turn.role], "value": turn.text} for turn in conversation.turns]
    image: dict[str, object] = {} if not names else {"image": names[0] if len(names) == 1 else names}
    return {"id": number, **image, "conversations": turns}


def _write_image(source: ImageSource, images: Path) -> str:
    """Write an image if it is not there yet, and return its name, which tells what it shows."""
    if isinstance(source, FileImage):
        name = f"{_digest(str(source.path.absolute()))}{source.path.suffix.lower()}"
    elif isinstance(source, StitchedViews):
        name = f"{_digest(str(sorted((camera, _place(view)) for camera, view in source.views.items())))}.jpg"
    else:
        name = f"{_digest(_place(source))}.png"
    if not (images / name).exists():
        with temporary_beside(images / name) as temporary:
            _write_new(source, temporary)
            temporary.replace(images / name)
    return name


def _write_new(source: ImageSource, target: Path) -> None:
    if isinstance(source, FileImage):
        # What has no image header is named now and not in training.
        source.size()
        try:
            os.link(source.path, target)
        except OSError:
            shutil.copyfile(source.path, target)
    elif isinstance(source, StitchedViews):
        source.read().save(target, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        source.read().save(target, "PNG")


def _place(source: ImageSource) -> str:
    """Return what tells an image apart: its file, its bytes, or its name."""
    if isinstance(source, EncodedImage):
        return hashlib.sha256(source.data).hexdigest()
    return str(source.path.absolute()) if isinstance(source, FileImage) else source.name


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
