"""The split keeps groups whole, classes present and shares right; classes that cannot be judged are named."""

import numpy as np
import pytest

from distill.errors import DataError
from distill.probe.protocol import (
    Classes,
    Split,
    group_ids,
    split_by_group,
    split_for_probe,
    usable_classes,
)


def parts(split: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return split.fit, split.select, split.test


def test_the_parts_are_disjoint_and_cover_everything_in_the_given_shares() -> None:
    strata = np.arange(1000) % 10
    split = split_by_group([""] * 1000, strata, seed=0)
    assert np.array_equal(np.sort(np.concatenate(parts(split))), np.arange(1000))
    assert [len(part) for part in parts(split)] == [500, 200, 300]
    for part, share in zip(parts(split), (50, 20, 30), strict=True):
        assert np.array_equal(np.bincount(strata[part]), np.full(10, share))


def test_a_group_never_stands_in_two_parts_even_across_classes() -> None:
    generator = np.random.default_rng(0)
    groups = [f"g{number}" for number in generator.integers(60, size=500)]
    split = split_by_group(groups, generator.integers(7, size=500), seed=1)
    names = [{groups[at] for at in part} for part in parts(split)]
    assert not names[0] & names[1]
    assert not names[0] & names[2]
    assert not names[1] & names[2]


@pytest.mark.parametrize("sizes", [(1, 1, 10), (10, 1, 1), (5, 5, 5), (1, 2, 30)])
def test_a_class_of_three_groups_is_in_every_part(sizes: tuple[int, int, int]) -> None:
    for seed in range(5):
        groups = [f"a{number}" for number, size in enumerate(sizes) for _ in range(size)]
        strata = np.zeros(len(groups), dtype=np.int64)
        split = split_by_group(groups + [""] * 30, np.concatenate([strata, np.ones(30, dtype=np.int64)]), seed=seed)
        assert all((part < len(groups)).any() for part in parts(split))


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_the_images() -> None:
    groups = [f"g{number // 2}" for number in range(200)]
    strata = np.arange(200) // 2 % 4
    first, other = split_by_group(groups, strata, seed=0), split_by_group(groups, strata, seed=1)
    assert not np.array_equal(first.test, other.test)
    order = np.random.default_rng(0).permutation(200)
    moved = split_by_group([groups[at] for at in order], strata[order], seed=0)
    assert {groups[at] for at in first.test} == {groups[order[at]] for at in moved.test}


def test_fewer_than_three_groups_are_refused() -> None:
    with pytest.raises(DataError, match="2 group"):
        split_by_group(["a", "a", "b"], np.zeros(3, dtype=np.int64), seed=0)
    with pytest.raises(DataError, match="0 group"):
        split_by_group([], np.zeros(0, dtype=np.int64), seed=0)


def test_an_empty_group_name_is_a_group_of_its_own() -> None:
    assert len(np.unique(group_ids(["", "", "x", "x"]))) == 3


def test_usable_classes_renumbers_and_names_what_it_drops() -> None:
    labels = np.array([0] * 4 + [1] * 4 + [2] * 4 + [-1])
    groups = [""] * 4 + ["same"] * 4 + [""] * 5
    classes = usable_classes(labels, ["cat", "dog", "fox"], groups)
    assert classes.names == ("cat", "fox")
    assert classes.dropped == {"dog": 1}
    assert classes.targets.tolist() == [0] * 4 + [-1] * 4 + [1] * 4 + [-1]


def test_a_class_without_images_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="'dog'"):
        usable_classes(np.array([0] * 5 + [2] * 5), ["cat", "dog", "fox"], [""] * 10)


def test_a_single_class_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"two classes.*'cat' \(5\)"):
        usable_classes(np.zeros(5, dtype=np.int64), ["cat"], [""] * 5)


def test_a_label_without_a_name_is_refused() -> None:
    with pytest.raises(DataError, match="run from 0 to 3"):
        usable_classes(np.array([0, 3]), ["cat", "dog"], ["", ""])


def test_images_without_any_label_are_no_error() -> None:
    classes = usable_classes(np.full(4, -1), [], [""] * 4)
    assert classes.names == ()
    assert (classes.targets == -1).all()


def test_unlabelled_images_of_each_domain_are_in_every_part() -> None:
    classes = Classes(np.array([0, 1] * 20 + [-1] * 20), ("a", "b"), {})
    domains = np.repeat([0, 1], [40, 20])
    split = split_for_probe(classes, domains, [""] * 60, seed=0)
    for part in parts(split):
        assert set(domains[part].tolist()) == {0, 1}
        assert set(classes.targets[part].tolist()) == {-1, 0, 1}


def test_classes_that_share_groups_are_in_every_part_or_refused_by_name() -> None:
    groups = ["p", "q", "r", "p", "q", "r", "s"]
    classes = Classes(np.array([0, 0, 0, 1, 1, 1, -1]), ("a", "b"), {})
    split = split_for_probe(classes, np.zeros(7, dtype=np.int64), groups, seed=0)
    assert all(set(classes.targets[part].tolist()) >= {0, 1} for part in parts(split))
    # Class "b" lies in one group only, which can stand in one part only.
    starved = Classes(np.array([0, 0, 0, 1]), ("a", "b"), {})
    with pytest.raises(DataError, match="'b'"):
        split_for_probe(starved, np.zeros(4, dtype=np.int64), ["p", "q", "r", "r"], seed=0)


def test_restrict_keeps_positions() -> None:
    split = split_by_group([""] * 100, np.zeros(100, dtype=np.int64), seed=0)
    even = np.arange(100) % 2 == 0
    restricted = split.restrict(even)
    assert np.array_equal(restricted.test, split.test[split.test % 2 == 0])
