"""A small VLM: an encoder's hidden state, a connector, and a language model that reads both images and text.

Legend: B rows, L tokens of a row, T tiles, N embeddings a tile, C the language model's width, V its vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.encoder import Encoder, Layer
from distill.errors import ConfigError, DataError
from distill.vlm.batch import IGNORED_LABEL, VLMBatch
from distill.vlm.connectors import Connector
from distill.vlm.noise import NoiseFeatures
from distill.vlm.vision import patch_grid

_GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
}
"""What a chat model's generation_config.json would change is set back: Qwen2's penalises repetition, and samples."""


class SmallVLM(nn.Module):
    """An encoder, a connector and a language model, joined.

    Each embedding of a tile stands in the place of one `image_token_id` of the text, in order. Packed rows are told
    apart by `segment_ids`: no token attends to another sample.

    Args:
        vision: offers `distill.encoder.Encoder`, weights loaded.
        connector: takes its hidden state.
        language: a causal language model of transformers, or a `peft.PeftModel` around one.
        image_token_id: the id that holds an image embedding's place.
        noise_features: give the connector fixed noise with the features' mean and standard deviation instead of the
            features: the control that shows how much the answers owe to the image.
        layer: the hidden state that is read, from the end.

    Attributes:
        keeps_logits: whether the language model can compute the scores of some positions only.

    Raises:
        ConfigError: the widths of the parts do not fit.
    """

    def __init__(
        self,
        vision: nn.Module,
        connector: Connector,
        language: nn.Module,
        image_token_id: int,
        noise_features: bool = False,
        layer: int = -1,
    ) -> None:
        super().__init__()
        self.vision, self.connector, self.language = vision, connector, language
        self.image_token_id, self.layer = image_token_id, layer
        gives = self._encoder.layer_dims[layer]
        takes = int(self._language.get_input_embeddings().weight.shape[1])
        if (gives, takes) != (connector.in_width, connector.out_width):
            raise ConfigError(
                f"The connector is for widths {connector.in_width} and {connector.out_width}, but the encoder's layer "
                f"{layer} is {gives} wide and the language model {takes}. Build it by build_connector with these."
            )
        self.noise = NoiseFeatures(gives, self._encoder.num_prefix_tokens) if noise_features else None
        self.keeps_logits = "logits_to_keep" in inspect.signature(self._base_language.forward).parameters

    @property
    def _encoder(self) -> Encoder:
        return cast(Encoder, self.vision)

    @property
    def _language(self) -> Any:
        return self.language

    @property
    def _base_language(self) -> Any:
        """The language model without peft's wrapping."""
        unwrap = getattr(self.language, "get_base_model", None)
        return unwrap() if callable(unwrap) else self.language

    def train(self, mode: bool = True) -> SmallVLM:
        """Set the mode of the parts; an encoder or language model of which nothing is trained stays in eval mode."""
        super().train(mode)
        for part in (self.vision, self.language):
            if not _is_trained(part):
                part.eval()
        return self

    def tokens_per_tile(self, tile_size: int) -> int:
        """Return N, the number of image tokens that a tile of so many pixels a side becomes.

        Raises:
            ConfigError: the encoder or the connector cannot take tiles of this size.
        """
        return self.connector.num_tokens(*patch_grid(self._encoder, tile_size))

    def features(self, tiles: Tensor) -> Layer:
        """Return the hidden state `(prefix [T, P, D], patches [T, H, W, D])` that the connector reads.

        Args:
            tiles: uint8 `[T, 3, S, S]`, T at least 1.
        """
        if self.noise is not None and self.noise.is_calibrated:
            return self.noise(len(tiles), patch_grid(self._encoder, tiles.shape[-1]))
        with torch.set_grad_enabled(torch.is_grad_enabled() and _is_trained(self.vision)):
            state = self._encoder.forward_hidden_states(tiles, -self.layer)[0]
        if self.noise is not None:
            self.noise.calibrate(state)
            return self.noise(len(tiles), (state[1].shape[1], state[1].shape[2]))
        return state

    def image_embeddings(self, tiles: Tensor) -> Tensor:
        """Return `[T * N, C]`: the connector's output for all tiles, one after another."""
        prefix, patches = self.features(tiles)
        dtype = next(self.connector.parameters()).dtype
        return self.connector(prefix.to(dtype), patches.to(dtype)).flatten(0, 1)

    def embed(self, batch: VLMBatch) -> Tensor:
        """Return the language model's input `[B, L, C]`: text embeddings, and images' in their places.

        Raises:
            DataError: the number of image tokens is not the number of embeddings of the batch's tiles.
        """
        return self.place(batch, self.image_embeddings(batch.tiles) if len(batch.tiles) else None)

    def place(self, batch: VLMBatch, images: Tensor | None) -> Tensor:
        """Return the language model's input `[B, L, C]` of image embeddings `[T * N, C]` that are computed already.

        Raises:
            DataError: the number of image tokens is not the number of embeddings.
        """
        embeddings = self._language.get_input_embeddings()(batch.input_ids)
        places = batch.input_ids == self.image_token_id
        wanted, given = int(places.sum()), 0 if images is None else len(images)
        if wanted != given:
            raise DataError(
                f"The batch has {wanted} image tokens (id {self.image_token_id}) and {len(batch.tiles)} tiles, which "
                f"make {given} embeddings. Encode the text with tokens_per_tile(tile_size) of this model, and cut no "
                "conversation off inside an image."
            )
        if images is None:
            return embeddings
        return embeddings.masked_scatter(places.unsqueeze(-1), images.to(embeddings.dtype))

    def logits(self, batch: VLMBatch) -> Tensor:
        """Return `[B, L, V]`: at each position the scores of the token after it.

        Raises:
            DataError: image tokens and tiles do not fit.
        """
        return self._run(batch)

    def _run(self, batch: VLMBatch, columns: Tensor | None = None) -> Tensor:
        """Return the logits of every position, or of the columns that are named."""
        options = {} if columns is None else {"logits_to_keep": columns}
        embeddings = self.embed(batch)
        mask = segment_mask(batch.segment_ids, embeddings.dtype)
        return self._language(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=batch.position_ids,
            use_cache=False,
            **options,
        ).logits

    def forward(self, batch: VLMBatch) -> Tensor:
        """Return the mean cross-entropy of the labels, a scalar computed in float32; 0 if the batch has no label.

        Raises:
            DataError: image tokens and tiles do not fit.
        """
        targets = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED_LABEL)
        counted = targets != IGNORED_LABEL
        # Images and questions have no labels: their scores, at a hundred thousand tokens a position, are not computed.
        columns = counted.any(0).nonzero().flatten()
        if self.keeps_logits and len(columns) > 0:
            logits = self._run(batch, columns)
            targets, counted = targets[:, columns], counted[:, columns]
        else:
            logits = self._run(batch)
        if not bool(counted.any()):
            return logits.float().sum() * 0
        return F.cross_entropy(logits[counted].float(), targets[counted])

    @torch.inference_mode()
    def generate(
        self, batch: VLMBatch, max_new_tokens: int, end_token_ids: Sequence[int] = (), **options: Any
    ) -> list[list[int]]:
        """Return each row's answer, by default the likeliest token at each step, in eval mode; never an image token.

        Args:
            batch: one prompt a row, not packed; labels are not read.
            max_new_tokens: most tokens of an answer.
            end_token_ids: tokens that end an answer; they are not part of it. None given: those of the language model's
                generation config.
            options: for transformers' `generate`, as num_beams.

        Raises:
            DataError: a row holds several samples, or image tokens and tiles do not fit.
        """
        if int(batch.segment_ids.max()) > 1:
            raise DataError("generate() takes one prompt a row, and this batch is packed; collate with pack=False.")
        was_training = self.training
        self.eval()
        try:
            embeddings, mask = _pad_left(self.embed(batch), batch.segment_ids > 0)
            ends = list(end_token_ids) or _as_list(self._base_language.generation_config.eos_token_id)
            # An image token in an answer would stand for no image.
            barred = [self.image_token_id]
            settings = {**_GREEDY, "eos_token_id": ends or None, "suppress_tokens": barred, **options}
            made: Tensor = self._language.generate(
                inputs_embeds=embeddings,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                pad_token_id=ends[0] if ends else 0,
                **settings,
            )
        finally:
            self.train(was_training)
        return [_until_end(row, ends) for row in made.tolist()]


def segment_mask(segment_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive attention mask of packed rows: causal, and within a segment.

    Args:
        segment_ids: int64 `[B, L]`; 0 is padding, which attends to itself alone, so that no row is all masked.
        dtype: of the embeddings.

    Returns:
        `[B, 1, L, L]`, 0 where the row's token may attend to the column's, else the dtype's lowest value.
    """
    length = segment_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    same = (segment_ids.unsqueeze(2) == segment_ids.unsqueeze(1)) & (segment_ids > 0).unsqueeze(2)
    allowed = (same & causal) | torch.eye(length, dtype=torch.bool, device=segment_ids.device)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=segment_ids.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min).unsqueeze(1)


def _is_trained(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())


def _pad_left(embeddings: Tensor, is_token: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows `[B, L, C]` and their mask `[B, L]` with the padding moved from the right end to the left."""
    length = embeddings.shape[1]
    padding = length - is_token.sum(1, keepdim=True)
    source = (torch.arange(length, device=embeddings.device) - padding) % length
    moved = embeddings.gather(1, source.unsqueeze(-1).expand_as(embeddings))
    return moved, is_token.gather(1, source).long()


def _as_list(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return list(ids) if isinstance(ids, list) else [ids]


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    stop = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]
