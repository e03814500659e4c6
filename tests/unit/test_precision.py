"""The precision is chosen by what this machine does fast."""

from __future__ import annotations

import pytest
import torch

import distill.precision as module
from distill.precision import choose_precision
from teachers import TimmTeacher
from teachers.frozen import fast_dtype


@pytest.mark.parametrize(("bfloat16_s", "expected"), [(1.0, "bf16-mixed"), (80.0, "32-true")])
def test_bfloat16_is_taken_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, bfloat16_s: float, expected: str
) -> None:
    times = {torch.bfloat16: bfloat16_s, torch.float32: 4.0}
    monkeypatch.setattr(module, "_fastest_product_s", times.__getitem__)
    module.cpu_has_fast_bfloat16.cache_clear()
    assert choose_precision("cpu") == expected
    module.cpu_has_fast_bfloat16.cache_clear()


def test_teacher_and_student_agree_on_this_machine() -> None:
    wanted = (
        torch.bfloat16
        if choose_precision("cuda" if torch.cuda.is_available() else "cpu") == "bf16-mixed"
        else torch.float32
    )
    assert fast_dtype() == wanted
    assert TimmTeacher("test_efficientnet", weights="random", dtype="auto").dtype == wanted
