"""Samples from conversations: tiles and placeholders agree, and what is cut into how many."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.errors import ConfigError, DataError
from distill.vlm.batch import IGNORED_LABEL
from distill.vlm.conversation import Conversation, Turn
from distill.vlm.image_sources import EncodedImage
from distill.vlm.samples import SampleBuilder, tiling_for
from distill.vlm.templates import find_template
from distill.vlm.tiling import Tiling, cut_tiles
from distill.vlm.tokens import load_tokenizer, tiny_tokenizer

TOKENS_PER_TILE = 3


def picture(width: int, height: int, seed: int = 0) -> EncodedImage:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return EncodedImage(buffer.getvalue(), f"{width} x {height}")


def talk(*images: EncodedImage, is_video: bool = False) -> Conversation:
    turns = (Turn("human", "<image>" * len(images) + "What is it?"), Turn("assistant", "A cat."))
    return Conversation("talk", turns, images, is_video=is_video)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder, ["What is it? A cat."] * 3)
    return load_tokenizer(folder, find_template("internvl"))


@pytest.fixture
def builder(tokenizer: Any) -> SampleBuilder:
    return SampleBuilder(tokenizer, "internvl", Tiling(tile_size=16, max_tiles=6), TOKENS_PER_TILE, 2000)


@pytest.mark.parametrize(
    ("sizes", "tiles"), [((), 0), (((16, 16),), 1), (((32, 16),), 3), (((48, 32),), 7), (((48, 32), (16, 16)), 4)]
)
def test_placeholders_are_tokens_per_tile_for_each_tile(
    builder: SampleBuilder, sizes: tuple[tuple[int, int], ...], tiles: int
) -> None:
    sample = builder.build(talk(*(picture(*size) for size in sizes)))
    assert sample.tiles.shape == (tiles, 3, 16, 16)
    assert sample.tiles.dtype == torch.uint8
    assert sample.input_ids.count(builder.image_token_id) == tiles * TOKENS_PER_TILE
    assert builder.image_token_id not in sample.labels


def test_tiles_are_those_of_internvls_tiling(builder: SampleBuilder) -> None:
    source = picture(48, 32)
    expected = np.stack([np.asarray(tile) for tile in cut_tiles(source.read(), Tiling(tile_size=16, max_tiles=6))])
    assert np.array_equal(builder.build(talk(source)).tiles.permute(0, 2, 3, 1).numpy(), expected)


def test_several_images_share_the_tiles_that_one_may_have() -> None:
    tiling = Tiling(max_tiles=12)
    assert [tiling_for(tiling, count, is_video=False).max_tiles for count in (0, 1, 2, 5, 40)] == [12, 12, 6, 2, 1]
    assert tiling_for(Tiling(min_tiles=4, max_tiles=12), 6, is_video=False).min_tiles == 2


def test_video_frames_have_one_tile_each(builder: SampleBuilder) -> None:
    frames = [picture(48, 32, seed) for seed in range(2)]
    assert len(builder.build(talk(*frames)).tiles) > 2
    assert len(builder.build(talk(*frames, is_video=True)).tiles) == 2


def test_a_prompt_has_no_label_and_ends_before_the_answer(builder: SampleBuilder) -> None:
    source = picture(16, 16)
    prompt, sample = builder.build_prompt(talk(source)), builder.build(talk(source))
    assert set(prompt.labels) == {IGNORED_LABEL}
    assert sample.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert sample.labels[len(prompt.input_ids)] != IGNORED_LABEL
    assert torch.equal(prompt.tiles, sample.tiles)


def test_a_generated_answer_ends_at_the_first_stop(builder: SampleBuilder) -> None:
    ids = builder.tokenizer(" A cat.")["input_ids"]
    assert builder.decode([*ids, builder.stop_ids[0], *ids]) == "A cat."
    assert builder.decode([*ids, builder.stop_ids[1]]) == "A cat."
    assert builder.decode([]) == ""


def test_a_record_that_is_too_long_for_its_image_is_refused(tokenizer: Any) -> None:
    builder = SampleBuilder(tokenizer, "internvl", Tiling(tile_size=16), 50, 64)
    with pytest.raises(DataError, match="talk has .* max_length 64 within them"):
        builder.build(talk(picture(48, 32)))


def test_settings_that_cannot_be_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="tokens_per_tile is 0"):
        SampleBuilder(tokenizer, "internvl", Tiling(), 0, 10)
    with pytest.raises(ConfigError, match="no token '<other>'"):
        SampleBuilder(tokenizer, "internvl", Tiling(), 1, 10, image_token="<other>")
    with pytest.raises(ConfigError, match="Unknown template"):
        SampleBuilder(tokenizer, "other", Tiling(), 1, 10)
