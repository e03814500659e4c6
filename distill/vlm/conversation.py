"""A record of any kind as turns of text with places for images: what readers yield and templates take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from distill.errors import DataError
from distill.vlm.image_sources import ImageSource

Role = Literal["system", "human", "assistant"]
Kind = Literal["instruction", "caption", "interleaved", "text"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DOCUMENT_KINDS: tuple[Kind, ...] = ("interleaved", "text")
"""Kinds that are one text, learned from beginning to end, without a question."""

IMAGE_PLACE = "<image>"
"""Where an image stands in a turn's text, as in LLaVA's and InternVL's data."""

VIDEO_PLACE = "<video>"
"""Where a video's frames stand, as in InternVL's data."""


@dataclass(frozen=True)
class Turn:
    """What one side says.

    Attributes:
        role: who.
        text: what; `<image>` stands for an image.
    """

    role: Role
    text: str


@dataclass(frozen=True)
class Conversation:
    """One record.

    Attributes:
        id: by which a person finds it.
        turns: an optional system turn; then, of an instruction or caption, human and assistant in turn, the last of
            which may be missing (a question that waits for its answer); of a document, the assistant alone.
        images: in the order of their places in the text.
        kind: what it is learned as.
        is_video: the images are frames: one tile each.

    Raises:
        DataError: turns stand in another order, or places and images differ in number.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[ImageSource, ...] = ()
    kind: Kind = "instruction"
    is_video: bool = False

    def __post_init__(self) -> None:
        roles = [turn.role for turn in self.turns]
        spoken = roles[1:] if roles[:1] == ["system"] else roles
        order = ["assistant"] if self.kind in DOCUMENT_KINDS else ["human", "assistant"] * len(spoken)
        if not spoken or spoken != order[: len(spoken)]:
            expected = (
                "one assistant turn" if self.kind in DOCUMENT_KINDS else "human and assistant in turn, human first"
            )
            raise DataError(
                f"{self.id}: the turns are {', '.join(roles) or 'none'}; a record of kind {self.kind} has {expected}."
            )
        places = sum(turn.text.count(IMAGE_PLACE) for turn in self.turns)
        if places != len(self.images):
            raise DataError(
                f"{self.id}: {places} place(s) for an image ({IMAGE_PLACE} in the text), but {len(self.images)} "
                "image(s): write one place for each image."
            )

    @property
    def question(self) -> Conversation:
        """The same without its last answer: what is asked when the model is scored."""
        turns = self.turns[:-1] if self.turns[-1].role == "assistant" else self.turns
        return Conversation(self.id, turns, self.images, self.kind, self.is_video)

    @property
    def answer(self) -> str:
        """The last answer; empty where there is none."""
        return self.turns[-1].text if self.turns[-1].role == "assistant" else ""
