"""From features to figures: accuracies, fidelity and paired differences, overall and for each domain.

One classifier is trained on all labelled images together; a domain's accuracy is that classifier's on the domain's
test images, against all classes. Images without a label, or of a class that was dropped, count for fidelity only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.probe.features import Features, Grid
from distill.probe.fidelity import cosine_centred, debiased_cka
from distill.probe.intervals import FloatArray, Interval, bootstrap_mean, paired_difference, wilson
from distill.probe.knn import TEMPERATURE, knn_probe
from distill.probe.linear import linear_probe
from distill.probe.protocol import IntArray, Split

Metric = Literal["linear_top1", "knn_top1", "cosine_centred"]
OVERALL = "overall"


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
    """

    targets: IntArray
    class_names: tuple[str, ...]
    domains: IntArray
    domain_names: tuple[str, ...]
    groups: IntArray
    split: Split
    seed: int

    @property
    def labelled(self) -> Split:
        """The split's images that have a usable label."""
        return self.split.restrict(self.targets >= 0)

    def scopes(self, positions: IntArray) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        """Yield "overall" and each domain with the mask of its images among `positions`; domains without any do not."""
        yield OVERALL, np.ones(len(positions), dtype=np.bool_)
        for number, name in enumerate(self.domain_names):
            mask = self.domains[positions] == number
            if mask.any():
                yield name, mask


@dataclass(frozen=True)
class PerImage:
    """One value for each scored image of an encoder.

    Attributes:
        positions: `[n]`, position of each image in the cohort.
        values: `[n]`, 0 or 1 for accuracies.
        grid: the grid that a cosine was measured on; figures on different grids are not comparable.
    """

    positions: IntArray
    values: FloatArray
    grid: Grid | None = None


@dataclass(frozen=True)
class Scores:
    """An encoder's figures as probe.json holds them, and the values behind them."""

    entry: dict[str, Any]
    per_image: dict[Metric, PerImage]


def score_encoder(features: Features, cohort: Cohort, reference: tuple[str, Features, Grid] | None) -> Scores:
    """Score one encoder by linear probe, kNN and fidelity.

    Args:
        features: of all images of the cohort, in its order.
        cohort: the images.
        reference: the teacher's name and features and the grid that tokens are compared on; None for the teacher
            itself and where there is no teacher.

    Returns:
        The values of the keys "linear", "knn" and "fidelity", and the per-image values.
    """
    entry: dict[str, Any] = {"linear": None, "knn": None, "fidelity": None}
    per_image: dict[Metric, PerImage] = {}
    if cohort.class_names:
        targets, split = torch.from_numpy(cohort.targets), cohort.labelled
        num_classes = len(cohort.class_names)
        linear = linear_probe(features.pooled, targets, split, num_classes=num_classes)
        knn = knn_probe(features.pooled, targets, split, num_classes=num_classes)
        entry["linear"], per_image["linear_top1"] = _accuracy({"C": linear.c}, linear.predictions, cohort)
        head = {"k": knn.k, "temperature": TEMPERATURE}
        entry["knn"], per_image["knn_top1"] = _accuracy(head, knn.predictions, cohort)
    if reference is not None:
        entry["fidelity"], per_image["cosine_centred"] = _fidelity(features, cohort, *reference)
    return Scores(entry, per_image)


def _accuracy(head: dict[str, Any], predictions: Tensor, cohort: Cohort) -> tuple[dict[str, Any], PerImage]:
    from torchmetrics.classification import MulticlassAccuracy  # imports transformers: seconds, unless it is needed

    positions = cohort.labelled.test
    targets = torch.from_numpy(cohort.targets[positions])
    correct = (predictions == targets).numpy()
    metric = MulticlassAccuracy(num_classes=len(cohort.class_names), average="micro")
    scopes: dict[str, Any] = {}
    for scope, mask in cohort.scopes(positions):
        at = torch.from_numpy(mask)
        top1 = float(metric(predictions[at], targets[at]))
        interval = wilson(correct[mask], cohort.groups[positions][mask])
        scopes[scope] = {"top1": top1, "low": interval.low, "high": interval.high, "n": interval.n}
    overall = scopes.pop(OVERALL)
    values = PerImage(positions, correct.astype(np.float64))
    return {**head, OVERALL: overall, "domains": scopes}, values


def _fidelity(
    features: Features, cohort: Cohort, name: str, teacher: Features, grid: Grid
) -> tuple[dict[str, Any], PerImage]:
    result = cosine_centred(features.tokens[grid], teacher.tokens[grid], cohort.domains, cohort.split)
    measured = ~np.isnan(result.per_image)
    positions, values = cohort.split.test[measured], result.per_image[measured]
    scopes: dict[str, Any] = {}
    for scope, mask in cohort.scopes(positions):
        at = torch.from_numpy(positions[mask])
        groups = cohort.groups[positions][mask]
        interval = bootstrap_mean(values[mask], groups, seed=cohort.seed)
        found = debiased_cka(features.pooled[at], teacher.pooled[at], groups)
        cka = {"value": None, "low": None, "high": None} if found is None else asdict(found)
        scopes[scope] = {"cosine_centred": asdict(interval), "cka": {**cka, "n": interval.n}}
    overall = scopes.pop(OVERALL)
    entry = {
        "teacher": name,
        "grid": list(grid),
        "tokens_per_image": features.tokens[grid].shape[1],
        "ridge_strength": result.strength,
        "cka_estimator": "debiased",
        OVERALL: overall,
        "domains": scopes,
    }
    return entry, PerImage(positions, values, grid)


def compare(scores: Mapping[str, Scores], pairs: Sequence[tuple[str, str]], cohort: Cohort) -> list[dict[str, Any]]:
    """Return the paired differences `a - b` of every metric and scope that both encoders have.

    Args:
        scores: by encoder name.
        pairs: names (a, b).
        cohort: the images.
    """
    found: list[dict[str, Any]] = []
    for a, b in pairs:
        for metric, mine in scores[a].per_image.items():
            other = scores[b].per_image.get(metric)
            if other is None or other.grid != mine.grid:
                continue
            groups = cohort.groups[mine.positions]
            for scope, mask in cohort.scopes(mine.positions):
                interval, verdict = paired_difference(
                    mine.values[mask], other.values[mask], groups[mask], seed=cohort.seed
                )
                found.append(_paired_entry(metric, scope, (a, b), interval, verdict))
    return found


def _paired_entry(metric: str, scope: str, pair: tuple[str, str], interval: Interval, verdict: str) -> dict[str, Any]:
    return {
        "metric": metric,
        "scope": scope,
        "a": pair[0],
        "b": pair[1],
        "difference": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "n": interval.n,
        "verdict": verdict,
    }
