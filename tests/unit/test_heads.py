from __future__ import annotations

import pytest
import torch

from distill.heads import NoHead, build_head


@pytest.mark.parametrize("kind", ["linear", "layer_norm_linear", "mlp"])
def test_a_head_maps_the_students_width_to_the_teachers(kind) -> None:
    assert build_head(kind, 8, 20)(torch.randn(2, 5, 8)).shape == (2, 5, 20)


@pytest.mark.parametrize("kind", ["linear", "layer_norm_linear", "mlp"])
def test_a_fresh_head_keeps_the_order_of_magnitude(kind) -> None:
    out = build_head(kind, 64, 256)(torch.randn(4, 100, 64))
    assert 0.2 < out.std().item() < 2


def test_no_head_is_the_identity_without_parameters() -> None:
    head = build_head("none", 8, 20)
    assert isinstance(head, NoHead)
    assert not list(head.parameters())
    x = torch.randn(1, 2, 8)
    assert head(x) is x
