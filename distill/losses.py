"""Losses between a student's and a teacher's tokens; each in float32 whatever the autocast.

Shapes: B images, N tokens, D channels. `student` has passed its projection head, `teacher` its standardiser, so both
are `[B, N, D]`; only `token_gram` takes two widths. The teacher gets no gradient.

The negative cosine is the published one (Mini-InternVL, arXiv 2410.16261, section 3.2). The others are alternatives
that later work found stronger in its own settings (AM-RADIO, arXiv 2312.06709; PHI-S, arXiv 2410.01680).
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-8
"""Added nowhere: a lower bound for a token's norm, so that an all-zero token has cosine 0 rather than NaN."""


class Loss(Protocol):
    """A loss over tokens, named in a recipe by `class_path`.

    The method has a name of its own because jsonargparse takes a protocol with `__call__` for a plain callable.
    """

    @property
    def needs_head(self) -> bool:
        """Whether student and teacher tokens must have the same width."""
        ...

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return a float32 scalar for `student [B, N, D]` and `teacher [B, N, D]`."""
        ...


def token_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the cosine of each student token with its teacher token, `[B, N]`, float32, in [-1, 1]."""
    with torch.autocast(student.device.type, enabled=False):
        return F.cosine_similarity(student.float(), teacher.detach().float(), dim=-1, eps=NORM_EPS)


def negative_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Return minus the mean token cosine: a scalar in [-1, 1]; -1 means identical directions everywhere.

    Source: Mini-InternVL, arXiv 2410.16261, section 3.2. The paper does not say which tokens are averaged, nor with
    which weights: here every token counts the same.
    """
    return -token_cosine(student, teacher).mean()


def mean_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Return minus the cosine of the two means over tokens, averaged over images: a scalar in [-1, 1].

    A mean varies less from image to image than tokens do, so a loss over tokens says little about it; yet pooled
    features are all that nearest neighbours and linear probes read. A term beside the token loss, not instead of it.
    """
    return negative_cosine(student.float().mean(1), teacher.float().mean(1))


def centred_mean_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Return minus the cosine of the two means over tokens, each less its mean over the batch: a scalar in [-1, 1].

    What all images of a batch share is learned first, and a student that is unsure falls back on it: its pooled
    features come to differ less from image to image than the teacher's. Without the shared part, only differences
    count. A batch of one image has none, and its cosine is that of `mean_cosine`.
    """
    own, target = student.float().mean(1), teacher.detach().float().mean(1)
    if own.shape[0] > 1:
        own, target = own - own.mean(0), target - target.mean(0)
    return negative_cosine(own, target)


def smooth_l1(student: Tensor, teacher: Tensor, beta: float = 1.0) -> Tensor:
    """Return the mean Huber loss, quadratic below `beta`; meant for standardised targets.

    Source: UNIC (arXiv 2408.05088) and AM-RADIO (arXiv 2312.06709) mix it with a cosine.
    """
    with torch.autocast(student.device.type, enabled=False):
        return F.smooth_l1_loss(student.float(), teacher.detach().float(), beta=beta)


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared error; meant for standardised targets (PHI-S, arXiv 2410.01680)."""
    with torch.autocast(student.device.type, enabled=False):
        return F.mse_loss(student.float(), teacher.detach().float())


def token_gram(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of the two token-by-token cosine matrices: needs no head.

    Source: the pairwise token similarity of Perception Encoder (arXiv 2504.13181) and DINOv3's Gram objective
    (arXiv 2508.10104), here between a teacher and a student of any widths.

    Args:
        student: `[B, N, D]`.
        teacher: `[B, N, E]`; E need not be D.
    """
    with torch.autocast(student.device.type, enabled=False):
        student_unit = F.normalize(student.float(), dim=-1, eps=NORM_EPS)
        teacher_unit = F.normalize(teacher.detach().float(), dim=-1, eps=NORM_EPS)
        return F.mse_loss(
            student_unit @ student_unit.transpose(1, 2),
            teacher_unit @ teacher_unit.transpose(1, 2),
        )


class NegativeCosine:
    """`negative_cosine` as a recipe names it; the default."""

    needs_head = True

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return `negative_cosine(student, teacher)`."""
        return negative_cosine(student, teacher)


class MeanCosine:
    """`mean_cosine` as a recipe names it; for a `WeightedSum` with a loss over tokens.

    Args:
        centred: take `centred_mean_cosine` instead.
    """

    needs_head = True

    def __init__(self, centred: bool = False) -> None:
        self.centred = centred

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return `mean_cosine(student, teacher)` or `centred_mean_cosine(student, teacher)`."""
        return (centred_mean_cosine if self.centred else mean_cosine)(student, teacher)


class SmoothL1:
    """`smooth_l1` as a recipe names it.

    Args:
        beta: where the loss turns from quadratic to linear, in units of the (standardised) target.
    """

    needs_head = True

    def __init__(self, beta: float = 1.0) -> None:
        self.beta = beta

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return `smooth_l1(student, teacher, beta)`."""
        return smooth_l1(student, teacher, self.beta)


class MSE:
    """`mse` as a recipe names it."""

    needs_head = True

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return `mse(student, teacher)`."""
        return mse(student, teacher)


class TokenGram:
    """`token_gram` as a recipe names it; works without a head."""

    needs_head = False

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return `token_gram(student, teacher)`."""
        return token_gram(student, teacher)


class WeightedSum:
    """A weighted sum of losses, for example 0.9 cosine and 0.1 smooth-L1 (AM-RADIO, arXiv 2312.06709).

    Args:
        terms: the losses.
        weights: one factor for each.

    Raises:
        ValueError: the lists differ in length or are empty.
    """

    def __init__(self, terms: list[Loss], weights: list[float]) -> None:
        if not terms or len(terms) != len(weights):
            raise ValueError(f"loss has {len(terms)} terms and {len(weights)} weights; give one weight for each term.")
        self.terms = terms
        self.weights = weights
        self.needs_head = any(term.needs_head for term in terms)

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the sum of `weights[i] * terms[i](student, teacher)`."""
        parts = [weight * term.compute(student, teacher) for weight, term in zip(self.weights, self.terms, strict=True)]
        return torch.stack(parts).sum()
