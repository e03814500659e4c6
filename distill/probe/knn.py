"""Weighted k-nearest-neighbour classification on frozen features, as DINOv2 reports it.

Source: Caron et al. 2021 (arXiv 2104.14294, appendix E) and Oquab et al. 2023 (arXiv 2304.07193): cosine similarity,
each neighbour votes with weight exp(similarity / T), T = 0.07, k in {10, 20, 100, 200}. DINOv2 reads the best k off the
reported split; here it is chosen on the selection split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.probe.classification import Classified, accuracy, positions_of, require_classifiable
from distill.probe.protocol import Split

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
_SIMILARITIES = 1 << 25  # held at a time, 128 MiB: queries go in blocks of this over the size of the bank
_MAX_BLOCK = 1024


@dataclass(frozen=True)
class KnnResult(Classified):
    """What kNN found; a class's probability is its share of the neighbours' votes.

    Attributes:
        k: the chosen number of neighbours.
        path: every k that was tried, with its accuracy on the selection split.
    """

    k: int
    path: tuple[tuple[int, float], ...]

    @property
    def settings(self) -> dict[str, Any]:
        """The chosen k and the temperature of the votes."""
        return {"k": self.k, "temperature": TEMPERATURE}


def knn_shares(
    bank: Tensor,
    bank_targets: Tensor,
    queries: Tensor,
    *,
    ks: Sequence[int],
    num_classes: int,
    temperature: float = TEMPERATURE,
) -> dict[int, Tensor]:
    """Return for each k the classes' shares `[Q, K]`, float32, of the votes of the k nearest images of the bank.

    Args:
        bank: `[N, D]`, features of labelled images.
        bank_targets: `[N]`, int64 classes.
        queries: `[Q, D]`.
        ks: numbers of neighbours, from 1 to N.
        num_classes: number of classes.
        temperature: votes are exp(similarity / temperature).

    Raises:
        ValueError: a k is out of range.
    """
    if not ks or not all(1 <= k <= len(bank) for k in ks):
        raise ValueError(f"k {', '.join(map(str, ks))} must be from 1 to the size of the bank, {len(bank)}")
    shares = {k: queries.new_zeros(len(queries), num_classes, dtype=torch.float32) for k in ks}
    for rows, similarity, neighbours in _neighbours(bank, queries, max(ks)):
        # The nearest neighbour's weight is 1: shares stay the same, and a small temperature cannot overflow.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        for k in ks:
            votes = shares[k][rows]  # a view: votes are counted in place
            votes.scatter_add_(1, bank_targets[neighbours[:, :k]], weights[:, :k])
            votes /= votes.sum(1, keepdim=True)
    return shares


def _neighbours(bank: Tensor, queries: Tensor, k: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield rows of the queries with the cosine and the position of their k nearest, nearest first; in float32."""
    bank = F.normalize(bank.float(), dim=1)
    block = max(1, min(_MAX_BLOCK, _SIMILARITIES // len(bank)))
    for start in range(0, len(queries), block):
        rows = slice(start, min(start + block, len(queries)))
        similarity, neighbours = (F.normalize(queries[rows].float(), dim=1) @ bank.T).topk(k, dim=1)
        yield rows, similarity, neighbours


def knn_predict(
    bank: Tensor, bank_targets: Tensor, queries: Tensor, *, k: int, num_classes: int, temperature: float = TEMPERATURE
) -> Tensor:
    """Return the class `[Q]`, int64, that the k nearest images of the bank vote for; see `knn_shares`.

    Raises:
        ValueError: `k` is out of range.
    """
    shares = knn_shares(bank, bank_targets, queries, ks=[k], num_classes=num_classes, temperature=temperature)
    return shares[k].argmax(1)


def knn_probe(features: Tensor, targets: Tensor, split: Split, *, num_classes: int) -> KnnResult:
    """Choose k on the selection split, then classify the test split with fit and select as the bank.

    A k above the size of the fit split is lowered to it. A tie goes to the smaller k.

    Args:
        features: `[N, D]`, frozen features, not standardised.
        targets: `[N]`, int64 classes, all labelled.
        split: positions of fit, select and test images.
        num_classes: number of classes.

    Raises:
        DataError: see `distill.probe.classification.require_classifiable`.
    """
    require_classifiable(features, targets, split, num_classes)
    fit, select, test = positions_of(split)
    ks = sorted({min(k, len(fit)) for k in KS})
    chosen_by = knn_shares(features[fit], targets[fit], features[select], ks=ks, num_classes=num_classes)
    scores = {k: accuracy(shares.argmax(1), targets[select]) for k, shares in chosen_by.items()}
    best = max(scores, key=scores.__getitem__)
    bank = torch.cat([fit, select])
    shares = knn_shares(features[bank], targets[bank], features[test], ks=[best], num_classes=num_classes)[best]
    return KnnResult(shares.argmax(1), shares, best, tuple(scores.items()))
