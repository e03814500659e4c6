"""Attentive probe: a learned query attends over frozen patch tokens, and a linear classifier reads what it gathers.

A linear probe on mean tokens understates encoders that were trained inside a VLM: what they know stands in single
tokens. The protocol is the one of V-JEPA (Bardes et al. 2024, arXiv 2404.08471) and AIM (El-Nouby et al. 2024, arXiv
2401.08541): cross-attention of one learned query, then a linear layer, by AdamW with a cosine schedule.

With one query, attention is linear algebra that can be reordered: a head's key projection and query are one vector of
width D, and its value projection may follow the weighted mean of the tokens. So no token is ever projected, the
function stays that of multi-head cross-attention, and a grid of settings is trained in the same pass over the tokens.
Tokens are standardised by the fit split. Legend: B images, T tokens, D channels, G settings, H heads, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.errors import DataError
from distill.probe.classification import Classified, accuracy, best_setting, positions_of, require_classifiable
from distill.probe.protocol import Split

SETTINGS = ((3e-4, 0.01), (1e-3, 0.01), (3e-3, 0.01), (1e-2, 0.01), (3e-3, 0.3))
"""(learning rate, weight decay) of AdamW that are tried together."""

HEAD_DIM = 64
BATCH_SIZE = 64
NUM_EPOCHS = 20
MIN_STEPS = 300
"""A small fit split is gone over more often than `NUM_EPOCHS` times."""

AT_ONCE_BYTES = 1 << 29
WARMUP_FRACTION = 0.1
INIT_STD = 0.02


@dataclass(frozen=True)
class AttentiveResult(Classified):
    """The setting that was best on the selection split.

    Attributes:
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        path: every (learning rate, weight decay) with its accuracy on the selection split.
        num_steps: AdamW steps on the fit split.
        select_logits: `[n_select, K]`, of the probe that was trained on the fit split alone.
        test_logits: `[n_test, K]`, of the scored probe.
    """

    learning_rate: float
    weight_decay: float
    path: tuple[tuple[float, float, float], ...]
    num_steps: int
    select_logits: Tensor
    test_logits: Tensor

    @property
    def settings(self) -> dict[str, Any]:
        """The chosen setting of AdamW."""
        return {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay, "steps": self.num_steps}


class AttentiveHeads(nn.Module):
    """G attentive probes side by side, on the same tokens.

    Args:
        dim: channels of a token, D.
        num_classes: number of classes, K.
        count: number of probes, G; all start from the same weights.
        seed: of the first weights.
    """

    def __init__(self, dim: int, num_classes: int, count: int, seed: int) -> None:
        super().__init__()
        heads = max(1, dim // HEAD_DIM)
        generator = torch.Generator().manual_seed(seed)
        width = math.ceil(dim / heads)
        queries = INIT_STD * torch.randn(heads, dim, generator=generator)
        values = torch.randn(heads, dim, width, generator=generator) / math.sqrt(dim)
        classifier = INIT_STD * torch.randn(heads * width, num_classes, generator=generator)

        def copies(value: Tensor) -> nn.ParameterList:
            return nn.ParameterList([nn.Parameter(value.clone()) for _ in range(count)])

        self.queries, self.values, self.classifiers = copies(queries), copies(values), copies(classifier)
        self.value_biases = copies(torch.zeros(heads * width))
        self.biases = copies(torch.zeros(num_classes))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits `[G, B, K]` of tokens `[B, T, D]`."""
        queries = torch.stack(list(self.queries))
        count, heads, _ = queries.shape
        # No division by sqrt(D): the vector is learned as a whole, and tokens are standardised.
        scores = tokens @ queries.flatten(0, 1).T
        gathered = scores.softmax(1).transpose(1, 2) @ tokens  # [B, G * H, D]
        by_head = gathered.unflatten(1, (count, heads)).permute(1, 2, 0, 3)  # [G, H, B, D]
        mixed = (by_head @ torch.stack(list(self.values))).transpose(1, 2).flatten(2)  # [G, B, H * width]
        mixed = mixed + torch.stack(list(self.value_biases))[:, None]
        return torch.baddbmm(torch.stack(list(self.biases))[:, None], mixed, torch.stack(list(self.classifiers)))

    def parameters_of(self, at: int) -> list[nn.Parameter]:
        """Return the parameters of one of the probes."""
        lists = (self.queries, self.values, self.classifiers, self.value_biases, self.biases)
        return [members[at] for members in lists]  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class _Tokens:
    """Tokens with the statistics that standardise them; converted batch by batch, or at once where they are few."""

    tokens: Tensor
    mean: Tensor
    std: Tensor
    is_standardised: bool = False

    def batch(self, rows: Tensor) -> Tensor:
        tokens = self.tokens[rows]
        return tokens if self.is_standardised else (tokens.float() - self.mean) / self.std


def _standardised(tokens: Tensor, fit: Tensor) -> _Tokens:
    total = torch.zeros(tokens.shape[2], dtype=torch.float64)
    squares = torch.zeros_like(total)
    reference = tokens[fit[0]].double().mean(0)  # near the mean, so that squares do not cancel
    for rows in fit.split(256):
        centred = tokens[rows].double() - reference
        total += centred.sum((0, 1))
        squares += centred.square().sum((0, 1))
    count = len(fit) * tokens.shape[1]
    std = (squares / count - (total / count).square()).clamp_min(0).sqrt()
    std = torch.where(std > torch.finfo(torch.float32).eps, std, torch.ones_like(std))
    mean, std = (reference + total / count).float(), std.float()
    if 4 * tokens.numel() > AT_ONCE_BYTES:
        return _Tokens(tokens, mean, std)
    return _Tokens((tokens.float() - mean) / std, mean, std, is_standardised=True)


def steps_for(num_images: int) -> int:
    """Return the number of AdamW steps for a fit split of that size."""
    return max(MIN_STEPS, NUM_EPOCHS * math.ceil(num_images / BATCH_SIZE))


def attentive_probe(
    tokens: Tensor,
    targets: Tensor,
    split: Split,
    *,
    num_classes: int,
    seed: int,
    settings: Sequence[tuple[float, float]] = SETTINGS,
    num_steps: int | None = None,
) -> AttentiveResult:
    """Train a probe for each setting on the fit split, choose one on the selection split, predict the test split once.

    The chosen setting is trained again on fit and select. Computed in float32 whatever the tokens are stored in.

    Args:
        tokens: `[N, T, D]`, frozen patch tokens.
        targets: `[N]`, int64 classes, all labelled.
        split: positions of fit, select and test images.
        num_classes: number of classes.
        seed: of the first weights and the order of the images.
        settings: (learning rate, weight decay) pairs to choose from.
        num_steps: AdamW steps on the fit split; None takes `steps_for` it.

    Raises:
        DataError: see `distill.probe.classification.require_classifiable`; or every probe diverged.
        ValueError: `settings` is empty, or `tokens` is not `[N, T, D]`.
    """
    if not settings or tokens.ndim != 3:
        raise ValueError(f"tokens {tuple(tokens.shape)} must be [N, T, D], and settings {settings} not empty")
    require_classifiable(tokens, targets, split, num_classes)
    fit, select, test = positions_of(split)
    num_steps = steps_for(len(fit)) if num_steps is None else num_steps
    data = _standardised(tokens, fit)
    heads = _train(data, targets, fit, num_classes, settings, num_steps, seed)
    scores: dict[int, tuple[float, float]] = {}
    held_out = _logits(heads, data, select)
    for at, logits in enumerate(held_out):
        if logits.isfinite().all():
            loss = float(F.cross_entropy(logits, targets[select]))
            scores[at] = (accuracy(logits.argmax(1), targets[select]), -loss)
    if not scores:
        raise DataError(f"Every attentive probe diverged; learning rates of {tuple(settings)} are too high.")
    best = best_setting(scores)
    both = torch.cat([fit, select])
    final = _train(data, targets, both, num_classes, [settings[best]], num_steps * len(both) // len(fit), seed)
    logits = _logits(final, data, test)[0]
    return AttentiveResult(
        predictions=logits.argmax(1),
        probabilities=logits.softmax(1),
        learning_rate=settings[best][0],
        weight_decay=settings[best][1],
        path=tuple((*settings[at], score[0]) for at, score in scores.items()),
        num_steps=num_steps,
        select_logits=held_out[best],
        test_logits=logits,
    )


def _train(
    data: _Tokens,
    targets: Tensor,
    positions: Tensor,
    num_classes: int,
    settings: Sequence[tuple[float, float]],
    num_steps: int,
    seed: int,
) -> AttentiveHeads:
    heads = AttentiveHeads(data.tokens.shape[2], num_classes, len(settings), seed)
    groups: list[dict[str, Any]] = []
    for at, (lr, weight_decay) in enumerate(settings):
        for parameters, decay in _by_decay(heads.parameters_of(at), weight_decay):
            groups.append({"params": parameters, "lr": lr, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, num_steps))
    generator = np.random.default_rng([seed, len(positions)])
    batch_size = min(BATCH_SIZE, len(positions))
    per_pass = len(positions) // batch_size
    order = np.empty(0)
    with torch.enable_grad():
        for step in range(num_steps):
            if step % per_pass == 0:
                order = generator.permutation(len(positions))
            start = step % per_pass * batch_size
            rows = positions[torch.from_numpy(order[start : start + batch_size])]
            logits = heads(data.batch(rows))
            # Summed over settings: the probes share no parameter, so none sees another's gradient.
            loss = F.cross_entropy(logits.flatten(0, 1), targets[rows].repeat(len(settings))) * len(settings)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return heads


def _rate(step: int, num_steps: int) -> float:
    """Share of the learning rate at a step: a linear warm-up, then a cosine to zero."""
    warmup = max(1, int(WARMUP_FRACTION * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def _by_decay(parameters: list[nn.Parameter], decay: float) -> list[tuple[list[nn.Parameter], float]]:
    """Parameters with their weight decay: none for biases."""
    matrices = [value for value in parameters if value.ndim > 1]
    return [(matrices, decay), ([value for value in parameters if value.ndim == 1], 0.0)]


@torch.no_grad()
def _logits(heads: AttentiveHeads, data: _Tokens, positions: Tensor) -> Tensor:
    """Logits `[G, n, K]` of the images at those positions."""
    return torch.cat([heads(data.batch(rows)) for rows in positions.split(BATCH_SIZE)], dim=1)
