"""The rules every score obeys: who may stand in which split, and which classes can be judged.

A group (one photograph, one document) never stands on both sides of a split, or a probe measures memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill.errors import DataError

IntArray = NDArray[np.int64]

FRACTIONS = (0.5, 0.2, 0.3)
"""Shares of fit, select and test: the test part is larger than is usual, because its size sets the interval."""

MIN_GROUPS = 3
"""A class needs one group in each of fit, select and test."""

UNLABELLED = -1


@dataclass(frozen=True)
class Split:
    """Positions of the images in each part, ascending; the parts are disjoint and cover everything.

    Attributes:
        fit: images that models and statistics are fitted on.
        select: images that choose regularisation, k and ridge strength.
        test: images that are scored, once.
    """

    fit: IntArray
    select: IntArray
    test: IntArray

    def restrict(self, keep: NDArray[np.bool_]) -> Split:
        """Return the same split with only the images that `keep` `[N]` marks; positions stay as they are."""
        return Split(*(part[keep[part]] for part in (self.fit, self.select, self.test)))


def group_ids(groups: Sequence[str]) -> IntArray:
    """Number the groups `[N]`; an image with an empty group name is a group of its own."""
    names = [group or f"\0{position}" for position, group in enumerate(groups)]
    return np.unique(np.asarray(names, dtype=np.str_), return_inverse=True)[1].astype(np.int64).reshape(-1)


def split_by_group(
    groups: Sequence[str], strata: IntArray, *, seed: int, fractions: tuple[float, ...] = FRACTIONS
) -> Split:
    """Split images into fit, select and test, whole groups at a time, each stratum in the given shares.

    Groups are taken in the order of a hash of (seed, group), rarest stratum first, and go to the part that lacks
    the stratum most. A stratum's first group goes to fit, so that every class can be learnt; its next two go to the
    parts that have none of it. (After Sechidis et al. 2011, "On the stratification of multi-label data".)

    Args:
        groups: `N` group names; an empty name is a group of its own.
        strata: `[N]`, the stratum of each image, for example a number for (domain, class).
        seed: another seed gives another split.
        fractions: shares of fit, select and test.

    Raises:
        DataError: there are fewer than three groups.
    """
    parts = _part_of_images(groups, strata, seed, fractions)
    return Split(*(np.flatnonzero(parts == part).astype(np.int64) for part in range(3)))


def split_train_by_group(groups: Sequence[str], strata: IntArray, is_test: NDArray[np.bool_], *, seed: int) -> Split:
    """Split the images outside a fixed test part into fit and select, as `split_by_group` does.

    Args:
        groups: `N` group names; an empty name is a group of its own.
        strata: `[N]`, the stratum of each image.
        is_test: `[N]`, the images of the test part.
        seed: another seed gives another split.

    Raises:
        DataError: there are fewer than two groups outside the test part.
    """
    train = np.flatnonzero(~is_test)
    names = [groups[at] or f"\0{at}" for at in train.tolist()]
    parts = _part_of_images(names, strata[train], seed, FRACTIONS[:2])
    return Split(train[parts == 0], train[parts == 1], np.flatnonzero(is_test).astype(np.int64))


def _part_of_images(groups: Sequence[str], strata: IntArray, seed: int, fractions: tuple[float, ...]) -> IntArray:
    """Number of the part of each image `[N]`."""
    ids = group_ids(groups)
    num_groups = int(ids.max()) + 1 if len(ids) else 0
    if num_groups < len(fractions):
        parts = "fit, select and test" if len(fractions) == MIN_GROUPS else "fit and select, beside the fixed test,"
        raise DataError(
            f"The probe set has {num_groups} group(s) of images; {parts} need one each, so {len(fractions)} at least. "
            "Add images, or give the samples distinct `group` fields."
        )
    strata_ids = np.unique(strata, return_inverse=True)[1].reshape(-1)
    order = _hash_order(groups, ids, num_groups, seed)
    return _assign(_members(ids, num_groups), strata_ids, order, fractions)[ids]


def _members(ids: IntArray, num_groups: int) -> list[IntArray]:
    order = np.argsort(ids, kind="stable")
    return np.split(order, np.searchsorted(ids[order], np.arange(1, num_groups)))


def _hash_order(groups: Sequence[str], ids: IntArray, num_groups: int, seed: int) -> IntArray:
    """Rank of each group `[G]` in the order of its hash: independent of the order of the images."""
    first = np.full(num_groups, -1, dtype=np.int64)
    first[ids[::-1]] = np.arange(len(ids))[::-1]
    digests = [
        hashlib.blake2b(f"{seed}\0{groups[at] or at}".encode(), digest_size=16).digest() for at in first.tolist()
    ]
    rank = np.empty(num_groups, dtype=np.int64)
    rank[sorted(range(num_groups), key=digests.__getitem__)] = np.arange(num_groups)
    return rank


def _assign(members: list[IntArray], strata: IntArray, rank: IntArray, fractions: tuple[float, ...]) -> IntArray:
    """Part (0 fit, 1 select and, with three fractions, 2 test) of each group `[G]`."""
    sizes = np.bincount(strata)
    groups_of: list[list[int]] = [[] for _ in sizes]
    for group, rows in enumerate(members):
        for stratum in np.unique(strata[rows]).tolist():
            groups_of[stratum].append(group)
    share = np.asarray(fractions, dtype=np.float64) / sum(fractions)
    placed = np.zeros((len(sizes), len(share)), dtype=np.float64)
    part_of = np.full(len(members), -1, dtype=np.int64)
    for stratum in sorted(range(len(sizes)), key=lambda s: (len(groups_of[s]), s)):
        for group in sorted(groups_of[stratum], key=rank.__getitem__):
            if part_of[group] >= 0:
                continue
            lack = share * sizes[stratum] - placed[stratum]
            if placed[stratum, 0] == 0:
                lack = np.eye(len(share))[0]
            elif (placed[stratum] == 0).any():
                lack = np.where(placed[stratum] == 0, lack, -np.inf)
            part = int(np.argmax(lack))
            part_of[group] = part
            placed[:, part] += np.bincount(strata[members[group]], minlength=len(sizes))
    return part_of


@dataclass(frozen=True)
class Classes:
    """The classes a probe can judge, numbered from 0.

    Attributes:
        targets: `[N]`, the class of each image, or -1 when it has no label or its class was dropped.
        names: name of each class.
        dropped: names of the classes that have too few groups, with their number of groups.
    """

    targets: IntArray
    names: tuple[str, ...]
    dropped: dict[str, int]


def usable_classes(
    labels: IntArray, label_names: Sequence[str], groups: Sequence[str], is_test: NDArray[np.bool_] | None = None
) -> Classes:
    """Renumber the classes that have a group for each of fit, select and test; name those that have not.

    Args:
        labels: `[N]`, index into `label_names`, or -1 for no label.
        label_names: name of each class.
        groups: `N` group names; an empty name is a group of its own.
        is_test: `[N]`, the images of a fixed test part: a class then needs two groups outside it and one inside.

    Raises:
        DataError: a label has no name, some images are labelled but a class has no image at all, or fewer than two
            classes are left. Images without any label are no error: there is nothing to classify then.
    """
    if len(labels) and (labels.max() >= len(label_names) or labels.min() < UNLABELLED):
        raise DataError(
            f"Labels run from {labels.min()} to {labels.max()}, but {len(label_names)} class names are known; "
            "a label is -1 (none) or a position in the list of names. Build the index again."
        )
    if not (labels >= 0).any():
        return Classes(np.full(len(labels), UNLABELLED, dtype=np.int64), (), {})
    ids = group_ids(groups)
    counts = {name: len(np.unique(ids[labels == label])) for label, name in enumerate(label_names)}
    empty = [name for name, count in counts.items() if count == 0]
    if empty:
        raise DataError(
            f"No image has the class(es) {', '.join(map(repr, empty[:5]))}; each class needs {MIN_GROUPS} groups of "
            "images. Add images of it, or take its name out."
        )
    if is_test is not None:
        train = {name: len(np.unique(ids[(labels == at) & ~is_test])) for at, name in enumerate(label_names)}
        # What counts is the smaller of the two needs: two groups to fit and select on, one to test.
        counts = {name: min(train[name], 2) + min(counts[name] - train[name], 1) for name in counts}
    kept = [label for label, name in enumerate(label_names) if counts[name] >= MIN_GROUPS]
    if len(kept) < 2:
        listing = ", ".join(f"{name!r} ({count})" for name, count in list(counts.items())[:5])
        raise DataError(
            f"A probe needs two classes with {MIN_GROUPS} groups of images each; met, with their groups: {listing}. "
            "Add labelled images, or leave labels out to measure fidelity alone."
        )
    renumber = np.full(len(label_names) + 1, UNLABELLED, dtype=np.int64)
    renumber[kept] = np.arange(len(kept))
    dropped = {name: count for name, count in counts.items() if count < MIN_GROUPS}
    return Classes(renumber[labels], tuple(label_names[label] for label in kept), dropped)


def split_for_probe(
    classes: Classes,
    domains: IntArray,
    groups: Sequence[str],
    *,
    seed: int,
    fractions: tuple[float, ...] = FRACTIONS,
    is_test: NDArray[np.bool_] | None = None,
) -> Split:
    """Split all images, labelled or not, so that each class, and each domain's unlabelled part, is in every part.

    Args:
        classes: targets of the images.
        domains: `[N]`, domain number of each image.
        groups: `N` group names; an empty name is a group of its own.
        seed: another seed gives another split.
        fractions: shares of fit, select and test.
        is_test: `[N]`, a fixed test part; None draws one.

    Raises:
        DataError: there are fewer than three groups, or a class got no image in a part, which happens when its
            groups also hold rarer classes.
    """
    strata = np.where(classes.targets >= 0, classes.targets, len(classes.names) + domains)
    if is_test is None:
        split = split_by_group(groups, strata, seed=seed, fractions=fractions)
    else:
        split = split_train_by_group(groups, strata, is_test, seed=seed)
    for part, positions in (("fit", split.fit), ("select", split.select), ("test", split.test)):
        present = set(classes.targets[positions].tolist())
        absent = [name for label, name in enumerate(classes.names) if label not in present]
        if absent:
            raise DataError(
                f"The {part} split has no image of the class(es) {', '.join(map(repr, absent[:5]))}, because their "
                "groups also hold other classes. Use smaller groups, another --seed, or more images."
            )
    return split
