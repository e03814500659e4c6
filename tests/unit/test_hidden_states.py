from __future__ import annotations

import pytest
import torch

from distill.hidden_states import match_grids, pair_last_layers, patch_tokens, shared_prefix


def layer(value: float, grid: int = 2, prefix: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((1, prefix, 3), float(value)), torch.full((1, grid, grid, 3), float(value))


def test_last_meets_last_and_oldest_comes_first() -> None:
    pairs = pair_last_layers([layer(1), layer(2), layer(3)], [layer(20), layer(30)], 2)
    assert [(a[1].mean().item(), b[1].mean().item()) for a, b in pairs] == [(2, 20), (3, 30)]


def test_asking_for_more_layers_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="num_layers 3"):
        pair_last_layers([layer(1)], [layer(1)] * 3, 3)


def test_equal_grids_are_left_alone() -> None:
    a, b = torch.randn(1, 4, 4, 3), torch.randn(1, 4, 4, 5)
    assert match_grids(a, b)[0] is a
    assert match_grids(a, b)[1] is b


def test_the_finer_grid_is_averaged_over_the_coarser_cells() -> None:
    fine = torch.arange(16.0).reshape(1, 4, 4, 1)
    pooled, coarse = match_grids(fine, torch.zeros(1, 2, 2, 7))
    assert pooled.shape == (1, 2, 2, 1)
    assert coarse.shape == (1, 2, 2, 7)
    assert pooled[0, 0, 0, 0].item() == (0 + 1 + 4 + 5) / 4


def test_each_side_may_be_the_finer_one_in_its_own_direction() -> None:
    a, b = match_grids(torch.randn(1, 4, 2, 3), torch.randn(1, 2, 4, 3))
    assert a.shape[1:3] == b.shape[1:3] == (2, 2)


def test_patch_tokens_run_row_by_row() -> None:
    grid = torch.arange(6.0).reshape(1, 2, 3, 1)
    assert patch_tokens(grid)[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_the_class_token_alone_is_paired_when_counts_differ() -> None:
    pair = shared_prefix(torch.randn(1, 5, 3), torch.randn(1, 1, 4))
    assert pair is not None
    assert pair[0].shape == (1, 1, 3)


def test_there_is_no_prefix_pair_with_a_convolutional_side() -> None:
    assert shared_prefix(torch.randn(1, 1, 3), torch.randn(1, 0, 4)) is None
