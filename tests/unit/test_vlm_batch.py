"""Samples and batches: what is padded, labelled, numbered and joined."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.errors import ConfigError, DataError
from distill.vlm.batch import IGNORED_LABEL, VLMSample, collate

X = IGNORED_LABEL


def tiles(count: int, value: int = 0, size: int = 4) -> Tensor:
    return torch.full((count, 3, size, size), value, dtype=torch.uint8)


def sample(ids: list[int], labels: list[int] | None = None, num_tiles: int = 0, value: int = 0) -> VLMSample:
    return VLMSample(ids, ids if labels is None else labels, tiles(num_tiles, value), f"record {ids[0]}")


def test_unpacked_samples_have_a_row_each_and_padding_on_the_right() -> None:
    batch = collate([sample([11, 12, 13], [X, X, 13]), sample([21, 22])], pad_id=9, max_length=8, pack=False)
    assert batch.input_ids.tolist() == [[11, 12, 13], [21, 22, 9]]
    assert batch.labels.tolist() == [[X, X, 13], [X, 22, X]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert {tensor.dtype for tensor in (batch.input_ids, batch.labels, batch.position_ids, batch.segment_ids)} == {
        torch.int64
    }


def test_packed_samples_share_a_row_with_positions_that_start_anew() -> None:
    batch = collate([sample([11, 12, 13]), sample([21, 22]), sample([31, 32, 33])], pad_id=9, max_length=5, pack=True)
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22], [31, 32, 33, 9, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 0, 0]]


def test_the_first_token_of_a_sample_is_never_predicted_from_its_neighbour() -> None:
    batch = collate([sample([11, 12]), sample([21, 22])], pad_id=0, max_length=4, pack=True)
    assert batch.labels.tolist() == [[X, 12, X, 22]]


def test_tiles_follow_the_rows_and_not_the_order_of_the_samples() -> None:
    first, second, third = sample([1, 1, 1], num_tiles=1, value=1), sample([2] * 4, num_tiles=2, value=2), sample([3])
    third = VLMSample([3], [3], tiles(1, value=3), "third")
    batch = collate([first, second, third], pad_id=0, max_length=4, pack=True)
    assert batch.input_ids.tolist() == [[1, 1, 1, 3], [2, 2, 2, 2]]
    assert batch.tiles[:, 0, 0, 0].tolist() == [1, 3, 2, 2]


def test_samples_without_tiles_do_not_fix_the_size_of_tiles() -> None:
    batch = collate(
        [VLMSample([1], [1], tiles(0, size=4), "text"), VLMSample([2], [2], tiles(2, size=8), "image")], 0, 4, False
    )
    assert batch.tiles.shape == (2, 3, 8, 8)
    assert collate([sample([1])], 0, 4, True).tiles.shape == (0, 3, 4, 4)


def test_tiles_of_two_sizes_are_refused_with_their_records() -> None:
    pair = [VLMSample([1], [1], tiles(1, size=4), "small"), VLMSample([2], [2], tiles(1, size=8), "large")]
    with pytest.raises(DataError, match=r"4 px \(as small\), 8 px \(as large\)"):
        collate(pair, 0, 4, False)


@pytest.mark.parametrize("pack", [False, True])
def test_a_sample_longer_than_a_row_is_refused(pack: bool) -> None:
    with pytest.raises(DataError, match="3 tokens, but a row holds 2"):
        collate([sample([1, 2, 3])], 0, 2, pack)


def test_an_empty_batch_and_a_row_without_room_are_refused() -> None:
    with pytest.raises(DataError, match="no sample"):
        collate([], 0, 4, True)
    with pytest.raises(ConfigError, match="max_length 0"):
        collate([sample([1])], 0, 0, True)


@pytest.mark.parametrize(
    ("ids", "labels", "pixels"),
    [
        ([1, 2], [1], tiles(0)),
        ([], [], tiles(0)),
        ([1], [1], tiles(1).float()),
        ([1], [1], torch.zeros(1, 3, 4, 5, dtype=torch.uint8)),
        ([1], [1], torch.zeros(3, 4, 4, dtype=torch.uint8)),
    ],
)
def test_a_sample_of_another_layout_is_refused(ids: list[int], labels: list[int], pixels: Tensor) -> None:
    with pytest.raises(DataError, match="Sample odd"):
        VLMSample(ids, labels, pixels, "odd")


def test_a_batch_moves_whole() -> None:
    batch = collate([sample([1, 2], num_tiles=1)], 0, 4, False).to("meta")
    moved = (batch.input_ids, batch.labels, batch.position_ids, batch.segment_ids, batch.tiles)
    assert {tensor.device.type for tensor in moved} == {"meta"}
