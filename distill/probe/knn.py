"""Weighted k-nearest-neighbour classification on frozen features, as DINOv2 reports it.

Source: Caron et al. 2021 (arXiv 2104.14294, appendix E) and Oquab et al. 2023 (arXiv 2304.07193): cosine similarity,
each neighbour votes with weight exp(similarity / T), T = 0.07. DINOv2 reads k in {10, 20, 100, 200} off the reported
split; here k is chosen among 10 and 20 on the selection split.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.probe.protocol import Split

KS = (10, 20)
TEMPERATURE = 0.07
_CHUNK = 1024  # queries at a time: bounds the similarity matrix to 1024 rows


@dataclass(frozen=True)
class KnnResult:
    """What kNN found.

    Attributes:
        k: the chosen number of neighbours.
        predictions: `[n_test]`, int64, in the order of the split's test part.
    """

    k: int
    predictions: Tensor


def knn_predict(
    bank: Tensor, bank_targets: Tensor, queries: Tensor, *, k: int, num_classes: int, temperature: float = TEMPERATURE
) -> Tensor:
    """Return the class `[Q]`, int64, that the k nearest images of the bank vote for; computed in float32.

    Args:
        bank: `[N, D]`, features of labelled images.
        bank_targets: `[N]`, int64 classes.
        queries: `[Q, D]`.
        k: number of neighbours, from 1 to N.
        num_classes: number of classes.
        temperature: votes are exp(similarity / temperature).

    Raises:
        ValueError: `k` is out of range.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k {k} must be from 1 to the size of the bank, {len(bank)}")
    bank = F.normalize(bank.float(), dim=1)
    predictions: list[Tensor] = []
    for chunk in queries.split(_CHUNK):
        similarity, neighbours = (F.normalize(chunk.float(), dim=1) @ bank.T).topk(k, dim=1)
        votes = similarity.new_zeros(len(chunk), num_classes)
        votes.scatter_add_(1, bank_targets[neighbours], (similarity / temperature).exp())
        predictions.append(votes.argmax(1))
    return torch.cat(predictions) if predictions else bank_targets.new_zeros(0)


def knn_probe(features: Tensor, targets: Tensor, split: Split, *, num_classes: int) -> KnnResult:
    """Choose k on the selection split, then classify the test split with fit and select as the bank.

    A k above the size of the fit split is lowered to it. A tie goes to the smaller k.

    Args:
        features: `[N, D]`, frozen features, not standardised.
        targets: `[N]`, int64 classes, all labelled.
        split: positions of fit, select and test images.
        num_classes: number of classes.
    """
    fit, select, test = (torch.from_numpy(part) for part in (split.fit, split.select, split.test))
    accuracy: dict[int, float] = {}
    for k in sorted({min(k, len(fit)) for k in KS}):
        predicted = knn_predict(features[fit], targets[fit], features[select], k=k, num_classes=num_classes)
        accuracy[k] = float((predicted == targets[select]).double().mean())
    best = max(accuracy, key=accuracy.__getitem__)
    bank = torch.cat([fit, select])
    return KnnResult(best, knn_predict(features[bank], targets[bank], features[test], k=best, num_classes=num_classes))
