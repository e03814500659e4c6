"""Retrieval agreement: of the teacher's nearest neighbours of an image, the share that are the encoder's too."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.probe.intervals import FloatArray

NEIGHBOURS = 10
"""Of an image, in `retrieval_agreement`."""

_QUERIES = 1024  # rows of the similarity matrix held at a time


def retrieval_agreement(student: Tensor, teacher: Tensor, k: int = NEIGHBOURS) -> FloatArray:
    """Return for each image the share of the teacher's k nearest other images that are the encoder's nearest too.

    Neighbours are by cosine of features that are centred over these images; chance is k / (n - 1).

    Args:
        student: `[n, D]`, pooled features.
        teacher: `[n, E]`, pooled features of the same images.
        k: neighbours; n - 1 where there are fewer.

    Returns:
        `[n]`, float64, in [0, 1]; NaN for a lone image.

    Raises:
        ValueError: the numbers of images differ.
    """
    if len(student) != len(teacher):
        raise ValueError(f"{len(student)} and {len(teacher)} images: retrieval compares features of the same images")
    n = len(teacher)
    k = min(k, n - 1)
    if k < 1:
        return np.full(n, np.nan)
    own, wanted = _unit(student), _unit(teacher)
    shares: list[Tensor] = []
    for at in torch.arange(n).split(_QUERIES):
        near: list[Tensor] = []
        for features in (own, wanted):
            similarity = features[at] @ features.T
            similarity[torch.arange(len(at)), at] = -torch.inf  # an image is no neighbour of itself
            mask = torch.zeros_like(similarity, dtype=torch.bool)
            near.append(mask.scatter_(1, similarity.topk(k, dim=1).indices, True))
        shares.append((near[0] & near[1]).sum(1).double() / k)
    return torch.cat(shares).numpy()


def _unit(features: Tensor) -> Tensor:
    centred = features.to(torch.float64)
    return F.normalize(centred - centred.mean(0), dim=1)
