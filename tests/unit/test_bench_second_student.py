"""What the benchmark of a second student claims follows from its rounds."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(BENCH))
    try:
        return import_module("second_student")
    finally:
        sys.path.remove(str(BENCH))


def test_the_added_cost_is_taken_round_by_round_and_told_beside_a_students_own(bench: ModuleType) -> None:
    # The machine was twice as slow in the second round: the ratio is not, as both sides of it are of one round.
    rounds = {
        "one student": [300.0, 600.0, 300.0],
        "two students": [410.0, 820.0, 412.0],
        "the student alone": [100.0, 200.0, 100.0],
    }
    figures = bench.summary(rounds)
    assert figures["added"] == pytest.approx(112)
    assert figures["ratio"] == pytest.approx(1.1)
    assert figures["one student"] == 300


def test_the_second_student_is_like_the_first_and_learns_from_the_same_teacher(bench: ModuleType) -> None:
    options = SimpleNamespace(size=28, batch=2, precision="32-true")
    one = bench.recipe_of(Path("unused"), options)
    two = bench.with_two_students(one)["model"]
    assert two["students"]["second"] == two["students"]["student"]
    assert [entry.pop("student") for entry in two["alignments"]] == ["student", "second"]
    assert two["alignments"][0] == two["alignments"][1]
    assert two["teachers"] == one["model"]["teachers"]
    assert len(one["model"]["students"]) == 1
