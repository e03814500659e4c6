from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("module", ["internvit", "timm_teacher", "openclip_teacher"])
def test_the_example_in_the_documentation_of_each_teacher_runs(module: str) -> None:
    results = doctest.testmod(importlib.import_module(f"teachers.{module}"))
    assert results.attempted > 0
    assert results.failed == 0
