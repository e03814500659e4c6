"""Few-shot linear probes: 1, 5 and 10 images a class, several draws.

Each draw takes images of the fit split and trains logistic regression on them (as CLIP's few-shot linear probes,
Radford et al. 2021, arXiv 2103.00020, section 3.1.5). C is chosen once for each number of shots, on the selection
split, by the mean over draws; the test split is scored once by every draw's classifier. `RungScore.draws` takes
what `FewShotResult.correct` gives, and its interval covers draws and images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.probe.classification import best_setting, positions_of, require_classifiable
from distill.probe.intervals import FloatArray
from distill.probe.linear import fit_path, standardise
from distill.probe.logistic import LogisticModel, LogisticProblem
from distill.probe.protocol import Split

SHOTS = (1, 5, 10)
NUM_DRAWS = 5
CS = tuple(10.0**power for power in range(-4, 3))


@dataclass(frozen=True)
class FewShotResult:
    """The classifiers of one number of shots.

    Attributes:
        shots: images a class.
        c: the chosen C, the same for all draws.
        predictions: `[draws, n_test]`, int64, in the order of the split's test part.
        probabilities: `[n_test, K]`, float32, mean over draws.
    """

    shots: int
    c: float
    predictions: Tensor
    probabilities: Tensor

    @property
    def settings(self) -> dict[str, Any]:
        """Shots, draws and the chosen C."""
        return {"shots": self.shots, "draws": len(self.predictions), "C": self.c}

    def correct(self, targets: Tensor) -> FloatArray:
        """Return 0 or 1 for each draw and test image, `[draws, n_test]`, from the classes `[n_test]`."""
        return (self.predictions == targets).numpy().astype(np.float64)


def few_shot_probe(
    features: Tensor,
    targets: Tensor,
    split: Split,
    *,
    num_classes: int,
    seed: int,
    shots: Sequence[int] = SHOTS,
    num_draws: int = NUM_DRAWS,
) -> tuple[FewShotResult, ...]:
    """Train and test few-shot linear probes.

    Features are standardised by the images that a draw holds, which are all that a few-shot learner has. Numbers of
    shots that the rarest class of the fit split cannot give are left out.

    Args:
        features: `[N, D]`, frozen features.
        targets: `[N]`, int64 classes, all labelled.
        split: positions of fit, select and test images.
        num_classes: number of classes.
        seed: of the draws.
        shots: images a class, each above 0.
        num_draws: draws for each number of shots.

    Raises:
        DataError: see `distill.probe.classification.require_classifiable`.
        ValueError: `num_draws` or a number of shots is below 1.
    """
    if num_draws < 1 or any(count < 1 for count in shots):
        raise ValueError(f"num_draws {num_draws} and shots {tuple(shots)} must be 1 or more")
    require_classifiable(features, targets, split, num_classes)
    fit, _, _ = positions_of(split)
    rarest = int(torch.bincount(targets[fit], minlength=num_classes).min())
    results: list[FewShotResult] = []
    for count in shots:
        if count <= rarest:
            draws = [draw_shots(targets, fit, count, seed=seed, draw=draw) for draw in range(num_draws)]
            results.append(_probe_draws(features, targets, split, num_classes, count, draws))
    return tuple(results)


def draw_shots(targets: Tensor, fit: Tensor, shots: int, *, seed: int, draw: int) -> Tensor:
    """Return positions of `shots` images of each class among the positions `fit`, ascending.

    Draws are nested: those of more shots hold those of fewer, with the same seed and draw.

    Args:
        targets: `[N]`, int64 classes.
        fit: positions to draw from, `shots` of each class at least.
        shots: images a class.
        seed: another seed gives other images.
        draw: number of the draw.
    """
    order = fit[torch.from_numpy(np.random.default_rng([seed, draw]).permutation(len(fit)))]
    classes = targets[order]
    kept = [order[classes == label][:shots] for label in classes.unique().tolist()]
    return torch.cat(kept).sort().values


def _probe_draws(
    features: Tensor, targets: Tensor, split: Split, num_classes: int, shots: int, draws: list[Tensor]
) -> FewShotResult:
    _, select, test = positions_of(split)
    models: list[list[LogisticModel]] = []
    totals = {c: (0.0, 0.0) for c in CS}
    for drawn in draws:
        problem = LogisticProblem(standardise(features[drawn], features[drawn]), targets[drawn], num_classes)
        models.append(list(fit_path(problem, CS)))
        held_out = standardise(features[select], features[drawn])
        for model in models[-1]:
            logits = model.logits(held_out)
            hits = float((logits.argmax(1) == targets[select]).sum())
            loss = float(F.cross_entropy(logits, targets[select]))
            totals[model.c] = (totals[model.c][0] + hits, totals[model.c][1] - loss)
    best = best_setting(totals)
    at = CS.index(best)
    logits = torch.stack(
        [
            path[at].logits(standardise(features[test], features[drawn]))
            for path, drawn in zip(models, draws, strict=True)
        ]
    ).float()
    return FewShotResult(shots, best, logits.argmax(2), logits.softmax(2).mean(0))
