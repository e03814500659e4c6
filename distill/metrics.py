"""What validation reports: cosine per layer and per domain, beside the trivial baseline.

A raw cosine alone flatters: features with a large common mean reach 0.9 for a predictor that ignores the image. So
each value comes with the cosine that the mean direction of the teacher's features reaches, and with the skill between
the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from distill.losses import NORM_EPS, token_cosine


class DomainCosine(Metric):
    """Token cosine of one paired layer, by domain, against the best constant prediction.

    Args:
        domains: names, in the order of the batches' domain ids.
        dim: D, the width of the targets at this layer.
    """

    full_state_update = False
    cosine_sum: Tensor
    count: Tensor
    unit_sum: Tensor

    def __init__(self, domains: Sequence[str], dim: int) -> None:
        super().__init__()
        self.domains = tuple(domains)
        num_domains = len(self.domains)
        self.add_state("cosine_sum", torch.zeros(num_domains, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(num_domains, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("unit_sum", torch.zeros(num_domains, dim, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, student: Tensor, teacher: Tensor, domain: Tensor) -> None:
        """Add a batch.

        Args:
            student: tokens after the head, `[B, N, D]`.
            teacher: target tokens, `[B, N, D]`.
            domain: domain ids, `[B]`.
        """
        teacher = teacher.detach().float()
        cosine = token_cosine(student, teacher).mean(1).double()
        unit = torch.nn.functional.normalize(teacher, dim=-1, eps=NORM_EPS).mean(1).double()
        self.cosine_sum.index_add_(0, domain, cosine)
        self.count.index_add_(0, domain, torch.ones_like(cosine))
        self.unit_sum.index_add_(0, domain, unit)

    def compute(self) -> dict[str, dict[str, Tensor]]:
        """Return `{domain: {"cosine", "baseline", "skill"}}` for the domains seen.

        "baseline" is the mean cosine of the teacher's tokens with the mean of all their directions, which no other
        constant exceeds over all domains. "skill" is `(cosine - baseline) / (1 - baseline)`: 0 for that constant, 1 for
        the teacher itself.
        """
        constant = torch.nn.functional.normalize(self.unit_sum.sum(0), dim=0)
        values: dict[str, dict[str, Tensor]] = {}
        for position, name in enumerate(self.domains):
            count = self.count[position]
            if count == 0:
                continue
            cosine = self.cosine_sum[position] / count
            baseline = (self.unit_sum[position] / count) @ constant
            skill = (cosine - baseline) / (1 - baseline).clamp_min(NORM_EPS)
            values[name] = {"cosine": cosine.float(), "baseline": baseline.float(), "skill": skill.float()}
        return values
