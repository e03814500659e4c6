"""Mixtures of sources: exact shares, no repetition within a pass, and the same at any time and in any process."""

from __future__ import annotations

import pickle
from collections import Counter

import pytest

from distill.errors import ConfigError
from distill.vlm.conversation import Conversation, Turn
from distill.vlm.mixture import MixtureDataset


def source(name: str, size: int) -> list[Conversation]:
    return [Conversation(f"{name} {number}", (Turn("assistant", "x"),), kind="text") for number in range(size)]


MM1 = {"caption": 0.45, "interleaved": 0.45, "text": 0.1}


def mm1(seed: int = 0) -> MixtureDataset:
    return MixtureDataset(
        {name: source(name, size) for name, size in (("caption", 7), ("interleaved", 50), ("text", 9))}, MM1, seed
    )


def test_every_stretch_holds_the_sources_in_proportion() -> None:
    names = [mm1().place(position)[0] for position in range(400)]
    for start in (0, 33, 300):
        counts = Counter(names[start : start + 100])
        assert {name: pytest.approx(100 * share, abs=2) for name, share in MM1.items()} == counts


def test_a_source_is_gone_through_before_any_record_repeats() -> None:
    mixture = mm1()
    seen = [record for name, record in map(mixture.place, range(200)) if name == "caption"]
    passes = [seen[start : start + 7] for start in range(0, 70, 7)]
    assert all(sorted(records) == list(range(7)) for records in passes)
    assert len({tuple(records) for records in passes}) > 1, "each pass has an order of its own"


def test_a_place_is_the_same_whenever_and_wherever_it_is_asked_for() -> None:
    mixture = mm1()
    forwards = [mixture[position].id for position in range(50)]
    assert [mm1()[position].id for position in reversed(range(50))][::-1] == forwards
    copied = pickle.loads(pickle.dumps(mixture))
    assert [copied[position].id for position in range(50)] == forwards
    assert [mm1(seed=1)[position].id for position in range(50)] != forwards


def test_another_source_does_not_change_a_sources_own_order() -> None:
    alone = MixtureDataset({"text": source("text", 9)}, seed=3)
    beside = MixtureDataset({"text": source("text", 9), "caption": source("caption", 5)}, {"text": 1, "caption": 1}, 3)
    mixed = [name for name in (beside[position].id for position in range(18)) if name.startswith("text")]
    assert mixed == [alone[position].id for position in range(9)]


def test_without_weights_one_pass_of_the_mixture_is_about_one_pass_of_each() -> None:
    mixture = MixtureDataset({"large": source("large", 30), "small": source("small", 10)})
    assert len(mixture) == 40
    assert Counter(mixture[position].id.split()[0] for position in range(40)) == {"large": 30, "small": 10}
    assert len({mixture[position].id for position in range(40)}) == 40


def test_a_source_of_weight_zero_does_not_occur_nor_count() -> None:
    mixture = MixtureDataset({"a": source("a", 3), "b": source("b", 5)}, {"a": 1, "b": 0})
    assert len(mixture) == 3
    assert {mixture.place(position)[0] for position in range(20)} == {"a"}


@pytest.mark.parametrize(
    ("weights", "seed", "message"),
    [
        ({"a": 1.0}, 0, "sources are a, b"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, 0, "sources are a, b"),
        ({"a": -1.0, "b": 1.0}, 0, "{'a': -1.0} cannot be"),
        ({"a": float("nan"), "b": 1.0}, 0, "cannot be"),
        ({"a": 0.0, "b": 0.0}, 0, "at least one above 0"),
        (None, -1, "seed is -1"),
        (None, 2**32, "from 0 to 4294967295"),
    ],
)
def test_weights_and_seeds_that_cannot_be_are_refused(
    weights: dict[str, float] | None, seed: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        MixtureDataset({"a": source("a", 2), "b": source("b", 2)}, weights, seed)


def test_an_empty_source_and_a_negative_place_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"source\(s\) b hold no record"):
        MixtureDataset({"a": source("a", 2), "b": []})
    with pytest.raises(ConfigError, match="to mix"):
        MixtureDataset({})
    with pytest.raises(IndexError):
        mm1()[-1]
