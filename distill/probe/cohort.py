"""The images that are scored, the same for every encoder: labels, domains, groups and the split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from distill.probe.feature_records import Features
from distill.probe.probe_set import ProbeSet
from distill.probe.protocol import UNLABELLED, IntArray, Split, group_ids, split_for_probe, usable_classes
from distill.probe.score_intervals import OVERALL

__all__ = ["OVERALL", "Cohort", "choose_cohort"]


@dataclass(frozen=True)
class Cohort:
    """The images that are scored, the same for every encoder.

    Attributes:
        targets: `[N]`, class of each image, -1 for none.
        class_names: name of each class; empty when no image is labelled.
        domains: `[N]`, position of each image's domain in `domain_names`.
        domain_names: name of each domain.
        groups: `[N]`, group of each image.
        split: fit, select and test positions of all images.
        seed: of the bootstrap.
        rows: `[N]`, row of each image in its data set.
        data: fingerprint of the data set.
    """

    targets: IntArray
    class_names: tuple[str, ...]
    domains: IntArray
    domain_names: tuple[str, ...]
    groups: IntArray
    split: Split
    seed: int
    rows: IntArray
    data: str

    @property
    def labelled(self) -> Split:
        """The split's images that have a usable label."""
        return self.split.restrict(self.targets >= 0)

    @property
    def used_domains(self) -> list[str]:
        """Names of the domains that have an image."""
        return [self.domain_names[number] for number in np.unique(self.domains).tolist()]

    def scopes(self, positions: IntArray) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        """Yield "overall" and each domain with the mask of its images among `positions`; domains without any do not."""
        yield OVERALL, np.ones(len(positions), dtype=np.bool_)
        for number, name in enumerate(self.domain_names):
            mask = self.domains[positions] == number
            if mask.any():
                yield name, mask


def choose_cohort(features: Features, data: ProbeSet, seed: int, console: Console) -> Cohort:
    """Decide, from the images that could be decoded, what is in which split and which classes count.

    Args:
        features: of any encoder; which images it has counts, not their values.
        data: the images.
        seed: of the split and of the bootstrap.
        console: where is said what is left out.

    Raises:
        DataError: the images cannot be split, or their labels not be judged.
    """
    if features.num_bad:
        console.print(f"{features.num_bad} image(s) could not be decoded and are left out.")
    rows = features.rows.numpy()
    groups = [data.groups[row] for row in rows.tolist()]
    is_test = None if data.is_test is None else data.is_test[rows]
    labels = features.labels.numpy()
    present = np.unique(labels[labels >= 0])
    renumbered = np.where(labels >= 0, np.searchsorted(present, labels), UNLABELLED)
    classes = usable_classes(renumbered, [data.label_names[label] for label in present.tolist()], groups, is_test)
    if classes.dropped:
        listing = ", ".join(f"{name} ({count})" for name, count in classes.dropped.items())
        console.print(f"Left out of accuracy, fewer than three groups of images: {listing}.", markup=False)
    domains = features.domains.numpy()
    split = split_for_probe(classes, domains, groups, seed=seed, is_test=is_test)
    ids = group_ids(groups)
    return Cohort(classes.targets, classes.names, domains, data.domains, ids, split, seed, rows, data.fingerprint)


def rows_of(cohort: Cohort, positions: Sequence[int] | IntArray) -> list[int]:
    """Return the data set's rows of some positions of the cohort."""
    return cohort.rows[np.asarray(positions)].tolist()
