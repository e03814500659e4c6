"""DINOv2's linear protocol: a grid of linear heads, learning rates by features, trained together by SGD.

Source: Oquab et al. 2023 (arXiv 2304.07193, appendix B.3) and the release's `dinov2/eval/linear.py`: thirteen learning
rates, scaled by batch size over 256; SGD with momentum 0.9 and no weight decay; a cosine to zero over 12,500 steps of
128 images; weights drawn from N(0, 0.01), biases zero. The release crosses the learning rates with features (last or
last four blocks, with or without the mean patch token) and reads the best head off the reported split.

Deviations: features are cached, so images are not augmented; they are standardised by the fit split, because those of
other encoders than DINOv2 are not normalised; at most `MAX_PASSES` are made over a small fit split; the head is chosen
on the selection split and trained again on fit and select.

Heads of one feature share each step's matrix products: one GEMM for all learning rates, forward and back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.errors import DataError
from distill.probe.classification import Classified, accuracy, best_setting, positions_of, require_classifiable
from distill.probe.linear import standardise
from distill.probe.protocol import Split

LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
"""The release's grid, for a batch of 256."""

BATCH_SIZE = 128
NUM_STEPS = 12_500
MOMENTUM = 0.9
INIT_STD = 0.01

MAX_PASSES = 100
"""Over the fit split: 12,500 steps are 1.25 epochs of ImageNet, and thousands of a small set."""


@dataclass(frozen=True)
class SgdGridResult(Classified):
    """The head that was best on the selection split.

    Attributes:
        feature: name of its feature.
        learning_rate: of the grid, before it is scaled by the batch size.
        path: every (feature, learning rate) with its accuracy on the selection split.
        num_steps: SGD steps of a head.
        select_logits: `[n_select, K]`, of the head that was trained on the fit split alone.
        test_logits: `[n_test, K]`, of the scored head.
    """

    feature: str
    learning_rate: float
    path: tuple[tuple[str, float, float], ...]
    num_steps: int
    select_logits: Tensor
    test_logits: Tensor

    @property
    def settings(self) -> dict[str, Any]:
        """The chosen head."""
        return {"feature": self.feature, "learning_rate": self.learning_rate, "steps": self.num_steps}


def steps_for(num_images: int) -> int:
    """Return the number of SGD steps for a fit split of that size: the release's, or fewer for a small one."""
    return min(NUM_STEPS, MAX_PASSES * math.ceil(num_images / BATCH_SIZE))


def sgd_grid_probe(
    features: Mapping[str, Tensor],
    targets: Tensor,
    split: Split,
    *,
    num_classes: int,
    seed: int,
    learning_rates: Sequence[float] = LEARNING_RATES,
    num_steps: int | None = None,
) -> SgdGridResult:
    """Train the grid on the fit split, choose a head on the selection split, and predict the test split once.

    Args:
        features: by name, each `[N, D]`, D of its own: for example the class token, and class and mean patch token.
        targets: `[N]`, int64 classes, all labelled.
        split: positions of fit, select and test images.
        num_classes: number of classes.
        seed: of the first weights and the order of the images.
        learning_rates: for a batch of 256.
        num_steps: SGD steps; None takes `steps_for` the fit split.

    Raises:
        DataError: see `distill.probe.classification.require_classifiable`; or every head diverged.
        ValueError: the grid is empty.
    """
    if not features or not learning_rates:
        raise ValueError("the grid needs one feature and one learning rate at least")
    fit, select, test = positions_of(split)
    num_steps = steps_for(len(fit)) if num_steps is None else num_steps
    logits_of = partial(_logits, fit=fit, num_classes=num_classes, num_steps=num_steps, seed=seed)
    scores: dict[tuple[str, float], tuple[float, float]] = {}
    held_out: dict[tuple[str, float], Tensor] = {}
    for name, feature in features.items():
        require_classifiable(feature, targets, split, num_classes)
        heads = logits_of(feature, targets, train=fit, scored=select, learning_rates=learning_rates)
        for lr, logits in zip(learning_rates, heads, strict=True):
            if logits.isfinite().all():
                loss = float(F.cross_entropy(logits, targets[select]))
                scores[name, lr] = (accuracy(logits.argmax(1), targets[select]), -loss)
                held_out[name, lr] = logits
    if not scores:
        raise DataError(f"Every head of the SGD grid diverged; learning rates {tuple(learning_rates)} are too high.")
    name, lr = best_setting(scores)
    both = torch.cat([fit, select])
    logits = logits_of(features[name], targets, train=both, scored=test, learning_rates=[lr])[0]
    return SgdGridResult(
        predictions=logits.argmax(1),
        probabilities=logits.softmax(1),
        feature=name,
        learning_rate=lr,
        path=tuple((*key, score[0]) for key, score in scores.items()),
        num_steps=num_steps,
        select_logits=held_out[name, lr],
        test_logits=logits,
    )


def _logits(
    feature: Tensor,
    targets: Tensor,
    *,
    train: Tensor,
    scored: Tensor,
    fit: Tensor,
    num_classes: int,
    learning_rates: Sequence[float],
    num_steps: int,
    seed: int,
) -> Tensor:
    """Logits `[L, n, K]` of the positions `scored`, by heads that are trained on the positions `train`."""
    weight, bias = train_heads(
        standardise(feature[train], feature[fit]).float(),
        targets[train],
        num_classes=num_classes,
        learning_rates=learning_rates,
        num_steps=num_steps,
        seed=seed,
    )
    return standardise(feature[scored], feature[fit]).float() @ weight.transpose(1, 2) + bias[:, None]


def train_heads(
    features: Tensor,
    targets: Tensor,
    *,
    num_classes: int,
    learning_rates: Sequence[float],
    num_steps: int,
    seed: int,
    batch_size: int = BATCH_SIZE,
) -> tuple[Tensor, Tensor]:
    """Train a linear head for each learning rate, all on the same batches; gradients are written by hand.

    Args:
        features: `[N, D]`, float32, best standardised.
        targets: `[N]`, int64.
        num_classes: number of classes.
        learning_rates: `L` of them, for a batch of 256.
        num_steps: SGD steps.
        seed: of the first weights, which all heads share, and the order of the images.
        batch_size: images a step, at most `N`.

    Returns:
        Weights `[L, K, D]` and biases `[L, K]`.
    """
    batch_size = min(batch_size, len(features))
    heads = len(learning_rates)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(num_classes, features.shape[1], generator=generator).to(features) * INIT_STD
    weight, bias = first.repeat(heads, 1), features.new_zeros(heads * num_classes)
    weight_speed, bias_speed = torch.zeros_like(weight), torch.zeros_like(bias)
    rates = features.new_tensor(learning_rates).repeat_interleave(num_classes) * batch_size / 256
    batches = _batches(len(features), batch_size, num_steps, seed)
    for step, rows in enumerate(batches):
        x, y = features[rows], targets[rows]
        residual = F.linear(x, weight, bias).unflatten(1, (heads, num_classes)).softmax(2)
        residual.scatter_add_(2, y[:, None, None].expand(-1, heads, 1), residual.new_full((len(y), heads, 1), -1.0))
        residual = residual.flatten(1).div_(len(y))
        weight_speed.mul_(MOMENTUM).addmm_(residual.T, x)
        bias_speed.mul_(MOMENTUM).add_(residual.sum(0))
        now = rates * (0.5 * (1 + math.cos(math.pi * step / num_steps)))
        weight.addcmul_(weight_speed, now[:, None], value=-1)
        bias.addcmul_(bias_speed, now, value=-1)
    return weight.unflatten(0, (heads, num_classes)), bias.unflatten(0, (heads, num_classes))


def _batches(num_images: int, batch_size: int, num_steps: int, seed: int) -> list[Tensor]:
    """Rows of each step: passes over all images, each in an order of its own; what does not fill a batch goes on."""
    passes = math.ceil(num_steps * batch_size / num_images)
    generator = np.random.default_rng([seed, num_images])
    order = np.concatenate([generator.permutation(num_images) for _ in range(passes)])[: num_steps * batch_size]
    return list(torch.from_numpy(order).split(batch_size))
