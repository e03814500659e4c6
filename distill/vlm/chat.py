"""A conversation as token ids and labels: the template's text is tokenised whole, and only answers are labelled.

The whole text goes through the tokenizer once, as the language models were trained, and labels are set by character
offsets: a tokenizer that joins or splits otherwise where pieces meet cannot shift them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from distill.errors import DataError
from distill.vlm.batch import IGNORED_LABEL
from distill.vlm.conversation import DOCUMENT_KINDS, IMAGE_PLACE, Conversation
from distill.vlm.templates import DOCUMENT, EOS, Template

Tokenizer = Any
"""A fast tokenizer of transformers (`PreTrainedTokenizerFast`), which this package does not import to annotate it."""


@dataclass(frozen=True)
class Rendered:
    """A conversation's text.

    Attributes:
        text: with the image token once for each image.
        learned: stretches (start, end) of characters that the loss counts, ascending.
    """

    text: str
    learned: tuple[tuple[int, int], ...]


class _Writer:
    """Puts pieces of text together, and notes which of them are learned."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.length = 0
        self.learned: list[tuple[int, int]] = []

    def write(self, piece: str, *, is_learned: bool = False) -> None:
        if is_learned and piece:
            self.learned.append((self.length, self.length + len(piece)))
        self.parts.append(piece)
        self.length += len(piece)


def render(
    conversation: Conversation, template: Template, image_token: str, eos_token: str, *, is_prompt: bool = False
) -> Rendered:
    """Return a conversation as its template writes it.

    Args:
        conversation: of any kind; documents are written without a template's roles.
        template: how.
        image_token: stands once for each image.
        eos_token: the tokenizer's end-of-sequence token.
        is_prompt: end where the assistant's next answer begins, for generation.
    """
    if conversation.kind in DOCUMENT_KINDS:
        template = DOCUMENT
    writer = _Writer()
    first = conversation.turns[0]
    message = first.text if first.role == "system" else template.system_message
    if message:
        writer.write(template.system_start + message + template.system_end)
    image = (template.image_start, image_token, template.image_end)
    for turn in conversation.turns:
        text = turn.text.strip() if template.strips else turn.text
        if turn.role == "human":
            writer.write(template.human_start)
            _write_text(writer, text, image, is_learned=False)
            writer.write(template.human_end)
        elif turn.role == "assistant":
            writer.write(template.assistant_start)
            writer.write(template.answer_start, is_learned=True)
            _write_text(writer, text, image, is_learned=True)
            writer.write(eos_token if template.assistant_end == EOS else template.assistant_end, is_learned=True)
            writer.write(template.after_answer)
    if is_prompt:
        writer.write(template.assistant_start)
    return Rendered("".join(writer.parts), tuple(writer.learned))


def _write_text(writer: _Writer, text: str, image: tuple[str, str, str], *, is_learned: bool) -> None:
    for number, piece in enumerate(text.split(IMAGE_PLACE)):
        if number:
            writer.write("".join(image))
        writer.write(piece, is_learned=is_learned)


def encode(
    conversation: Conversation,
    tokenizer: Tokenizer,
    template: Template,
    image_tokens: Sequence[int],
    image_token: str,
    max_length: int,
) -> tuple[list[int], list[int]]:
    """Return a conversation's token ids and labels.

    Args:
        conversation: with its answers.
        tokenizer: as `distill.vlm.tokens.load_tokenizer` gives it.
        template: how it is written.
        image_tokens: for each image how many tokens it becomes: tiles times the connector's tokens a tile.
        image_token: the token that stands for one image embedding.
        max_length: most tokens; a longer conversation loses its end.

    Returns:
        Ids, and labels of equal length: the id where the token is part of an answer or ends it, else -100.

    Raises:
        DataError: the text itself holds the image token, an image would be cut off, or no answer is left to learn.
    """
    rendered = render(conversation, template, image_token, str(tokenizer.eos_token or ""))
    ids, labels = _expand(conversation, tokenizer, rendered, image_tokens, image_token)
    image_id = int(tokenizer.convert_tokens_to_ids(image_token))
    if image_id in ids[max_length:]:
        raise DataError(
            f"{conversation.id} has {len(ids)} tokens, of which {sum(image_tokens)} are images', and would be cut at "
            f"max_length {max_length} within them: raise max_length, or lower the tiling's max_tiles."
        )
    ids, labels = ids[:max_length], labels[:max_length]
    if all(label == IGNORED_LABEL for label in labels):
        raise DataError(
            f"{conversation.id} has no answer within its first {max_length} tokens (of {len(ids)}): nothing to learn. "
            "Raise max_length, or leave the record out."
        )
    return ids, labels


def encode_prompt(
    conversation: Conversation, tokenizer: Tokenizer, template: Template, image_tokens: Sequence[int], image_token: str
) -> list[int]:
    """Return the ids that ask for the next answer: they end where it begins.

    Args:
        conversation: without its last answer, as `Conversation.question`.
        tokenizer: as for `encode`.
        template: as for `encode`.
        image_tokens: as for `encode`.
        image_token: as for `encode`.

    Raises:
        DataError: the text itself holds the image token.
    """
    rendered = render(conversation, template, image_token, str(tokenizer.eos_token or ""), is_prompt=True)
    return _expand(conversation, tokenizer, rendered, image_tokens, image_token)[0]


def _expand(
    conversation: Conversation,
    tokenizer: Tokenizer,
    rendered: Rendered,
    image_tokens: Sequence[int],
    image_token: str,
) -> tuple[list[int], list[int]]:
    """Tokenise a text, label it, and repeat each image's token as often as the image has embeddings."""
    encoded = tokenizer(rendered.text, return_offsets_mapping=True, truncation=False)
    found = cast(list[int], encoded["input_ids"])
    labels = label_tokens(found, cast(list[tuple[int, int]], encoded["offset_mapping"]), rendered.learned)
    image_id = int(tokenizer.convert_tokens_to_ids(image_token))
    if found.count(image_id) != len(image_tokens):
        raise DataError(
            f"{conversation.id}: {found.count(image_id)} times {image_token} for {len(image_tokens)} image(s). It is "
            "the image token: take it out of the record's text."
        )
    counts = iter(image_tokens)
    all_ids: list[int] = []
    all_labels: list[int] = []
    for token, label in zip(found, labels, strict=True):
        repeats = next(counts) if token == image_id else 1
        all_ids += [token] * repeats
        # An image's own label is -100: the writer never counts it among what is learned.
        all_labels += [label] * repeats
    return all_ids, all_labels


def label_tokens(
    ids: Sequence[int], offsets: Sequence[tuple[int, int]], learned: Sequence[tuple[int, int]]
) -> list[int]:
    """Return each token's label: its id where its characters lie in a learned stretch, even in part, else -100.

    Args:
        ids: token ids.
        offsets: characters (start, end) of each; start equals end for what the tokenizer added.
        learned: stretches (start, end) of characters, ascending.
    """
    labels: list[int] = []
    at = 0
    for token, (start, end) in zip(ids, offsets, strict=True):
        while at < len(learned) and learned[at][1] <= start:
            at += 1
        is_learned = at < len(learned) and start < learned[at][1] and end > learned[at][0] and end > start
        labels.append(token if is_learned else IGNORED_LABEL)
    return labels


def stop_ids(tokenizer: Tokenizer, template: Template) -> tuple[int, ...]:
    """Return the ids that end a generated answer: the template's end, where it is one token, and the tokenizer's."""
    end = str(tokenizer.eos_token or "") if template.assistant_end == EOS else template.assistant_end
    ids = cast(list[int], tokenizer(end, add_special_tokens=False)["input_ids"]) if end else []
    own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return tuple(dict.fromkeys([*(ids if len(ids) == 1 else []), *own]))
