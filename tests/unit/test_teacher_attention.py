from __future__ import annotations

import pytest
import torch
from torch import Tensor

from teachers.attention import attend, choose_kernel


def query_key_value() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, 17, 8, generator=generator) for _ in range(3))


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights = (query.double() @ key.double().mT / 8**0.5).softmax(-1)
    return weights @ value.double()


@pytest.mark.parametrize("kernel", ["sdpa", "explicit", "auto"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_every_kernel_computes_the_formula(kernel: str, dtype: torch.dtype, tolerance: float) -> None:
    # bfloat16 has 8 bits: scores, weights and result are each rounded to a relative 2^-8.
    inputs = [t.to(dtype) for t in query_key_value()]
    result = attend(*inputs, kernel=kernel)
    assert result.dtype == dtype
    expected = exact(*inputs)
    assert (result.double() - expected).norm() / expected.norm() < tolerance


def test_the_fused_kernel_is_left_only_for_bfloat16_on_a_cpu() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_kernel(cpu, torch.bfloat16) == "explicit"
    assert choose_kernel(cpu, torch.float32) == choose_kernel(gpu, torch.bfloat16) == "sdpa"
