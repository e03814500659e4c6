"""Figures that belong to no single image, and so cannot be paired: CKA with the teacher, and the effective rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distill.probe.cohort import Cohort
from distill.probe.effective_rank import effective_rank
from distill.probe.feature_records import LAST, Features
from distill.probe.fidelity import debiased_cka
from distill.probe.hsic import Estimate
from distill.probe.protocol import IntArray
from distill.probe.rung import Kind

CKA, EFFECTIVE_RANK = "cka", "effective_rank"
UNPAIRED: dict[str, tuple[str, Kind]] = {
    CKA: ("Fidelity of pooled features to the teacher, debiased linear CKA", "cosine"),
    EFFECTIVE_RANK: ("Effective rank of pooled features, participation ratio", "count"),
}
"""By metric: title and kind."""


def cka_entries(features: Features, teacher: Features, cohort: Cohort, layers: Sequence[int]) -> list[dict[str, Any]]:
    """Return the entries of CKA with the teacher in an encoder's "scores".

    Args:
        features: of the encoder that is judged.
        teacher: of the teacher, on the same images.
        cohort: the images.
        layers: which hidden states to compare, each with the teacher's at the same place from the end.
    """

    def figure(layer: int, at: Tensor, groups: IntArray) -> Estimate | None:
        return debiased_cka(features.by_layer[layer][at], teacher.by_layer[layer][at], groups)

    return _entries(CKA, figure, cohort, layers, "debiased")


def effective_rank_entries(features: Features, cohort: Cohort, layers: Sequence[int]) -> list[dict[str, Any]]:
    """Return the entries of the effective rank in an encoder's "scores".

    Args:
        features: of the encoder that is judged.
        cohort: the images.
        layers: which hidden states to judge.
    """

    def figure(layer: int, at: Tensor, groups: IntArray) -> Estimate | None:
        return effective_rank(features.by_layer[layer][at], groups)

    return _entries(EFFECTIVE_RANK, figure, cohort, layers, "unbiased")


def _entries(
    metric: str,
    figure: Callable[[int, Tensor, IntArray], Estimate | None],
    cohort: Cohort,
    layers: Sequence[int],
    estimator: str,
) -> list[dict[str, Any]]:
    """One entry for each scope of the test split that has a figure; with several layers also a curve over them."""
    entries: list[dict[str, Any]] = []
    positions = cohort.split.test
    for layer in layers:
        for scope, mask in cohort.scopes(positions):
            found = figure(layer, torch.from_numpy(positions[mask]), cohort.groups[positions][mask])
            if found is None:
                continue
            entry = {
                "metric": metric,
                "scope": scope,
                "value": found.value,
                "low": found.low,
                "high": found.high,
                "n": int(mask.sum()),
                "seed": cohort.seed,
                "settings": {"estimator": estimator, "interval": "jackknife over groups"},
            }
            points = [None] if layer == LAST else []
            points += [["layer", float(layer)]] if len(layers) > 1 else []
            entries += [{**entry, "at": point} for point in points]
    return entries
