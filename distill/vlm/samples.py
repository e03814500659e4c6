"""Conversations to samples: images cut into tiles, text to tokens with one placeholder for each embedding.

Legend: T tiles, S pixels a side of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from distill.errors import ConfigError
from distill.vlm.batch import IGNORED_LABEL, VLMSample
from distill.vlm.chat import Tokenizer, encode, encode_prompt, stop_ids
from distill.vlm.conversation import Conversation
from distill.vlm.templates import IMAGE_TOKEN, find_template
from distill.vlm.tiling import Tiling, cut_tiles


class SampleBuilder:
    """Makes samples of conversations.

    Args:
        tokenizer: as `distill.vlm.tokens.load_tokenizer` gives it for this template and image token.
        template: name of the template, see `distill.vlm.templates.TEMPLATES`.
        tiling: how an image alone is cut. Of several images in a record each has `max_tiles // images` tiles at most,
            one at least, as InternVL does; a video's frames have one each.
        tokens_per_tile: embeddings that the connector yields for a tile.
        max_length: most tokens of a sample.
        image_token: stands for one embedding; None means `<IMG_CONTEXT>`.

    Raises:
        ConfigError: the template is unknown, a number is below 1, or the tokenizer lacks the image token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        tiling: Tiling,
        tokens_per_tile: int,
        max_length: int,
        image_token: str | None = None,
    ) -> None:
        if tokens_per_tile < 1 or max_length < 1:
            raise ConfigError(
                f"tokens_per_tile is {tokens_per_tile} and max_length {max_length}; both must be at least 1."
            )
        self.tokenizer = tokenizer
        self.template = find_template(template)
        self.tiling = tiling
        self.tokens_per_tile = tokens_per_tile
        self.max_length = max_length
        self.image_token = image_token or IMAGE_TOKEN
        if self.image_token not in tokenizer.get_vocab():
            raise ConfigError(
                f"The tokenizer has no token {self.image_token!r}: load it with distill.vlm.tokens.load_tokenizer, "
                "which adds it."
            )

    @property
    def image_token_id(self) -> int:
        """Id of the image token."""
        return int(self.tokenizer.convert_tokens_to_ids(self.image_token))

    @property
    def pad_id(self) -> int:
        """Id of the padding."""
        return int(self.tokenizer.pad_token_id)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a generated answer."""
        return stop_ids(self.tokenizer, self.template)

    def build(self, conversation: Conversation) -> VLMSample:
        """Return a sample to learn from.

        Raises:
            DataError: an image cannot be read, or the conversation cannot be encoded; the record is named.
        """
        tiles, image_tokens = self._tiles(conversation)
        ids, labels = encode(
            conversation, self.tokenizer, self.template, image_tokens, self.image_token, self.max_length
        )
        return VLMSample(ids, labels, tiles, conversation.id)

    def build_prompt(self, conversation: Conversation) -> VLMSample:
        """Return a sample that asks for the conversation's last answer; no token of it is labelled.

        Raises:
            DataError: as for `build`.
        """
        question = conversation.question
        tiles, image_tokens = self._tiles(question)
        ids = encode_prompt(question, self.tokenizer, self.template, image_tokens, self.image_token)
        return VLMSample(ids, [IGNORED_LABEL] * len(ids), tiles, conversation.id)

    def decode(self, ids: Sequence[int]) -> str:
        """Return generated ids as an answer: up to the first stop, without special tokens and white space around it."""
        stops = set(self.stop_ids)
        end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
        return str(self.tokenizer.decode(list(ids[:end]), skip_special_tokens=True)).strip()

    def _tiles(self, conversation: Conversation) -> tuple[Tensor, list[int]]:
        """Return all tiles, uint8 `[T, 3, S, S]`, and for each image how many tokens it has."""
        side = self.tiling.tile_size
        tiling = tiling_for(self.tiling, len(conversation.images), is_video=conversation.is_video)
        cut = [cut_tiles(source.read(), tiling) for source in conversation.images]
        if not cut:
            return torch.zeros(0, 3, side, side, dtype=torch.uint8), []
        pixels = np.stack([np.asarray(tile) for tiles in cut for tile in tiles])
        tokens = [len(tiles) * self.tokens_per_tile for tiles in cut]
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), tokens


def tiling_for(tiling: Tiling, num_images: int, *, is_video: bool) -> Tiling:
    """Return how each of a record's images is cut, so that several images share what one may have."""
    max_tiles = 1 if is_video else max(1, tiling.max_tiles // max(1, num_images))
    return replace(tiling, min_tiles=min(tiling.min_tiles, max_tiles), max_tiles=max_tiles)
