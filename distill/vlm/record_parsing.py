"""One JSON object to one conversation: LLaVA's and InternVL's records, captions, interleaved documents, texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from distill.errors import DataError
from distill.vlm.conversation import IMAGE_PLACE, VIDEO_PLACE, Conversation, Kind, Role, Turn
from distill.vlm.image_sources import ImageSource

Record = Mapping[str, Any]
Resolve = Callable[[str], ImageSource]
"""Gives the image that a record calls so."""

_ROLES: dict[str, Role] = {
    "human": "human",
    "user": "human",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def parse_record(kind: Kind, record: object, where: str, resolve: Resolve, *, caption_prompt: str = "") -> Conversation:
    """Return a record as a conversation.

    Args:
        kind: what the record is.
        record: the parsed JSON.
        where: file and record, for messages, and its id where it has none.
        resolve: gives the images it names.
        caption_prompt: what is asked of a captioned image; empty asks nothing.

    Raises:
        DataError: a field is missing or of another type, or images and their places do not match.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where} is a {type(record).__name__}; a record is a JSON object.")
    values = cast(Record, record)
    if kind == "instruction":
        return _instruction(values, where, resolve)
    if kind == "caption":
        return _caption(values, where, resolve, caption_prompt)
    if kind == "interleaved":
        return _interleaved(values, where, resolve)
    return Conversation(_id(values, where), (Turn("assistant", _text(values, "text", where)),), kind="text")


def _instruction(values: Record, where: str, resolve: Resolve) -> Conversation:
    turns = [_turn(turn, where) for turn in _list(values, "conversations", where)]
    if "video" in values:
        frames = _names(values, "video", where)
        return _with_frames(values, turns, frames, where, resolve)
    names = _names(values, "image", where) if values.get("image") is not None else []
    first = next((number for number, turn in enumerate(turns) if turn.role == "human"), None)
    if len(names) == 1 and first is not None and not any(IMAGE_PLACE in turn.text for turn in turns):
        # LLaVA's and InternVL's readers put the one image first where its place is not written.
        turns[first] = Turn("human", f"{IMAGE_PLACE}\n{turns[first].text}")
    return Conversation(_id(values, where), tuple(turns), tuple(map(resolve, names)))


def _with_frames(values: Record, turns: list[Turn], names: list[str], where: str, resolve: Resolve) -> Conversation:
    places = sum(turn.text.count(VIDEO_PLACE) for turn in turns)
    if places != 1 or not names:
        raise DataError(
            f"{where}: {len(names)} frame(s) in 'video' and {places} place(s) {VIDEO_PLACE} in the text; there must be "
            "one place, and at least one frame."
        )
    frames = frame_lines(len(names))
    expanded = tuple(Turn(turn.role, turn.text.replace(VIDEO_PLACE, frames)) for turn in turns)
    return Conversation(_id(values, where), expanded, tuple(map(resolve, names)), is_video=True)


def frame_lines(count: int) -> str:
    """Return the places of a video's frames as InternVL writes them: `Frame1: <image>`, a line for each frame."""
    return "\n".join(f"Frame{number}: {IMAGE_PLACE}" for number in range(1, count + 1))


def _caption(values: Record, where: str, resolve: Resolve, prompt: str) -> Conversation:
    name, caption = _text(values, "image", where), _text(values, "caption", where)
    if IMAGE_PLACE in caption:
        raise DataError(f"{where}: the caption holds {IMAGE_PLACE}; a caption is text alone.")
    asked = f"{IMAGE_PLACE}\n{prompt}" if prompt else IMAGE_PLACE
    return Conversation(
        _id(values, where), (Turn("human", asked), Turn("assistant", caption)), (resolve(name),), "caption"
    )


def _interleaved(values: Record, where: str, resolve: Resolve) -> Conversation:
    if "texts" in values:
        text, names = _parallel_lists(values, where)
    else:
        text = _text(values, "text", where)
        names = _names(values, "images", where) if values.get("images") else []
    return Conversation(_id(values, where), (Turn("assistant", text),), tuple(map(resolve, names)), "interleaved")


def _parallel_lists(values: Record, where: str) -> tuple[str, list[str]]:
    """Return text and images of a document written as two lists of equal length, each place text or image (OBELICS)."""
    texts, images = _list(values, "texts", where), _list(values, "images", where)
    if len(texts) != len(images):
        raise DataError(f"{where}: {len(texts)} entries in 'texts' and {len(images)} in 'images'; they go in pairs.")
    parts: list[str] = []
    names: list[str] = []
    for number, (text, image) in enumerate(zip(texts, images, strict=True)):
        if isinstance(text, str) == isinstance(image, str) or not isinstance(text or image, str):
            raise DataError(f"{where}: place {number} must be either text or an image's name, the other null.")
        if isinstance(image, str):
            names.append(image)
        parts.append(IMAGE_PLACE if isinstance(image, str) else text)
    return "\n".join(parts), names


def _turn(value: object, where: str) -> Turn:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a turn is {value!r:.80}; it must be an object with 'from' and 'value'.")
    turn = cast(Record, value)
    role = turn.get("from")
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError(f"{where}: a turn is from {role!r:.80}; the roles are {', '.join(_ROLES)}.")
    return Turn(_ROLES[role], _text(turn, "value", where))


def _id(values: Record, where: str) -> str:
    own = values.get("id")
    return f"{where} ({own})" if isinstance(own, str | int) and str(own) else where


def _text(values: Record, key: str, where: str) -> str:
    text = values.get(key)
    if not isinstance(text, str) or not text:
        raise DataError(f"{where}: {key!r} is {text!r:.80}; it must be text that is not empty.")
    return text


def _list(values: Record, key: str, where: str) -> list[Any]:
    items = values.get(key)
    if not isinstance(items, list) or not items:
        raise DataError(f"{where}: {key!r} is {items!r:.80}; it must be a list that is not empty.")
    return cast(list[Any], items)


def _names(values: Record, key: str, where: str) -> list[str]:
    given = values.get(key)
    names = cast(list[Any], given) if isinstance(given, list) else [given]
    wrong = [name for name in names if not isinstance(name, str) or not name]
    if wrong:
        raise DataError(f"{where}: {key!r} holds {wrong[0]!r:.80}; it must be an image's name or a list of names.")
    return cast(list[str], names)
