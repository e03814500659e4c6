from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from distill.losses import token_cosine
from distill.planner.memory_meter import MemoryMeter
from distill.projected_cosine import projected_cosine
from distill.step_meter import StepParts

TOKENS, NARROW, WIDE = 2050, 64, 200
# Same products in another order: float32 rounds differently in the last digits.
CLOSE = {"rtol": 2e-5, "atol": 1e-7}
GRADIENT_ERROR = 2e-6
# Gradients pass through bfloat16 once on either side: 8 bits.
BFLOAT16_ERROR = 1e-2


@pytest.fixture
def tensors() -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    projection = nn.Linear(NARROW, WIDE)
    return torch.randn(2, TOKENS // 2, NARROW, requires_grad=True), projection, torch.randn(2, TOKENS // 2, WIDE)


def identity(tokens: Tensor) -> Tensor:
    return tokens


def gradients(loss: Tensor, tokens: Tensor, projection: nn.Linear) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [tokens, projection.weight, projection.bias]))


@pytest.mark.parametrize("chunk", [1, 7, 512, TOKENS, 10 * TOKENS])
def test_value_and_gradients_are_those_of_the_whole_projection(tensors, chunk: int) -> None:
    tokens, projection, teacher = (t[:, :50] if isinstance(t, Tensor) and chunk == 1 else t for t in tensors)
    expected = token_cosine(projection(tokens), teacher).mean()
    found = projected_cosine(tokens, projection, teacher, identity, chunk)
    torch.testing.assert_close(found, expected, **CLOSE)
    for own, other in zip(
        gradients(3 * found, tokens, projection), gradients(3 * expected, tokens, projection), strict=True
    ):
        assert error(own, other) < GRADIENT_ERROR


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_gradients_in_float64_agree_with_finite_differences() -> None:
    torch.manual_seed(1)
    projection = nn.Linear(3, 5).double()
    tokens, teacher = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.randn(4, 5, dtype=torch.float64)
    found = gradients(projected_cosine(tokens, projection, teacher, identity, 3), tokens, projection)[0]

    def value(at: Tensor) -> float:
        with torch.no_grad():
            return float(torch.cosine_similarity(projection(at), teacher, dim=-1).mean())

    step = 1e-5
    for row in range(4):
        for column in range(3):
            moved = torch.zeros_like(tokens)
            moved[row, column] = step
            slope = (value(tokens + moved) - value(tokens - moved)) / (2 * step)
            assert float(found[row, column]) == pytest.approx(slope, abs=1e-6)  # the cosine itself is float32


def test_under_bfloat16_autocast_gradients_stay_near_those_of_float32(tensors) -> None:
    tokens, projection, teacher = tensors
    expected = gradients(token_cosine(projection(tokens), teacher).mean(), tokens, projection)
    with torch.autocast("cpu", torch.bfloat16):
        loss = projected_cosine(tokens, projection, teacher, identity, 512)
    assert loss.dtype == torch.float32
    for own, other in zip(gradients(loss, tokens, projection), expected, strict=True):
        assert own.dtype == other.dtype
        assert error(own, other) < BFLOAT16_ERROR


def test_the_teacher_is_prepared_in_chunks_and_gets_no_gradient(tensors) -> None:
    tokens, projection, teacher = tensors
    teacher.requires_grad_()
    sizes = []

    def prepare(part: Tensor) -> Tensor:
        sizes.append(len(part))
        return part - 1.0

    loss = projected_cosine(tokens, projection, teacher, prepare, 1000)
    loss.backward()
    assert sizes == [1000, 1000, 50]
    assert teacher.grad is None
    expected = token_cosine(projection(tokens), teacher - 1.0).mean()
    torch.testing.assert_close(loss.detach(), expected.detach(), **CLOSE)


def test_a_zero_token_has_cosine_0_and_the_gradient_of_the_reference() -> None:
    projection = nn.Linear(2, 3)
    nn.init.zeros_(projection.bias)
    tokens, teacher = torch.zeros(1, 2, requires_grad=True), torch.ones(1, 3)
    found = projected_cosine(tokens, projection, teacher, identity, 4)
    expected = token_cosine(projection(tokens), teacher).mean()
    assert float(found.detach()) == 0.0
    torch.testing.assert_close(
        gradients(found, tokens, projection)[0], gradients(expected, tokens, projection)[0], rtol=1e-4, atol=0
    )


def held_bytes(loss_of: Callable[[], Tensor], *inputs: Tensor) -> tuple[int, int]:
    """Return the bytes that a loss keeps from its forward to its backward pass, however it does so, and the most ever.

    Tensors that autograd saves and those that a graph's node holds on its own count alike: all that is alive beside
    the inputs.
    """
    with MemoryMeter(StepParts()) as meter:
        for tensor in inputs:
            meter.enter(tensor, "inputs")
        loss = loss_of()
        kept = meter.live.total()
    loss.backward()
    before = meter.live["inputs"]
    return kept - before, max(purposes.total() for purposes in meter.peaks.values()) - before


def test_nothing_as_wide_as_the_projection_is_kept_for_the_backward_pass() -> None:
    torch.manual_seed(0)
    narrow, wide, chunk = 128, 400, 256  # the shares of 1024 and 3200
    projection, teacher = nn.Linear(narrow, wide), torch.randn(TOKENS, wide)
    tokens = torch.randn(TOKENS, narrow, requires_grad=True)
    inputs = (tokens, teacher, *projection.parameters())
    kept, highest = held_bytes(lambda: projected_cosine(tokens, projection, teacher, identity, chunk), *inputs)
    gradients_alone, scalars = 4 * (TOKENS * narrow + wide * narrow + wide), 64
    assert gradients_alone <= kept <= gradients_alone + scalars
    # Beside them a few chunks' width at a time, and never the whole projection.
    assert highest < kept + 4 * (5 * chunk * wide + 2 * narrow * wide) < kept + 4 * TOKENS * wide
    whole, _ = held_bytes(lambda: token_cosine(projection(tokens), teacher).mean(), *inputs)
    assert whole > 4 * kept


def test_without_gradients_only_the_value_is_computed(tensors) -> None:
    tokens, projection, teacher = tensors
    with torch.no_grad():
        found = projected_cosine(tokens, projection, teacher, identity, 512)
    assert not found.requires_grad
    torch.testing.assert_close(found, token_cosine(projection(tokens), teacher).mean().detach(), **CLOSE)
